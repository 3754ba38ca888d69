"""Show a sweep's jobs, collect its results, or submit its failed jobs again.

python -m gymexp.sweep status outputs/<name>/sweep_<date_time>
python -m gymexp.sweep collect outputs/<name>/sweep_<date_time>     also writes results.csv and results.html
python -m gymexp.sweep resubmit outputs/<name>/sweep_<date_time> [--jobs 3,5]
"""

from __future__ import annotations

from pathlib import Path

from gymexp.cli.terminal import guarded, parser_of
from gymexp.config.schema import RunConfig
from gymexp.printable import printable, say
from gymexp.sweep import sweep_reader
from gymexp.sweep.resubmit import resubmit


def status(path: Path) -> None:
    """Print a table of the sweep's jobs with their states."""
    from gymexp.sweep.table import status_table

    say(status_table(sweep_reader.read_sweep(path)))


def collect(path: Path) -> None:
    """Print the results, and write results.csv and results.html to the sweep's directory."""
    from gymexp.files import replace_file
    from gymexp.sweep.page import results_html
    from gymexp.sweep.table import counted, reason, results_csv, results_table, rows_of

    sweep = sweep_reader.read_sweep(path)
    rows = rows_of(sweep)
    say(results_table(rows, sweep.keys))
    say("\n".join(["", *sweep.study, counted(sweep), *(reason(j) for j in sweep.jobs if j.run.why)]))
    replace_file(sweep.path / "results.csv", printable(results_csv(rows, sweep.keys)))
    replace_file(sweep.path / "results.html", printable(results_html(sweep, rows)))
    say(f"\n{sweep.path / 'results.csv'}\n{sweep.path / 'results.html'}")


def numbers(text: str) -> list[int]:
    """Returns the job numbers in a text like `3,5`."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = parser_of("sweep", __doc__ or "")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, summary in {
        "status": "the state of each job, and why",
        "collect": "the results as a table, a CSV file and a page",
        "resubmit": "submit failed and lost jobs again; they continue from their checkpoints",
    }.items():
        command = commands.add_parser(name, help=summary)
        command.add_argument("dir", type=Path, metavar="DIR", help="outputs/<name>/sweep_<date_time>")
        if name == "resubmit":
            command.add_argument("--jobs", type=numbers, metavar="3,5", help="only these jobs")
    arguments = parser.parse_args()
    if arguments.command == "status":
        status(arguments.dir)
    elif arguments.command == "collect":
        collect(arguments.dir)
    else:
        resubmit(sweep_reader.read_sweep(arguments.dir), arguments.jobs)


if __name__ == "__main__":
    guarded(main, RunConfig)()
