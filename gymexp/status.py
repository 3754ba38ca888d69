"""Show the state of a run, or of each run of a sweep.

python -m gymexp.status outputs/<name>/<date_time> [--follow]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from gymexp.cli.terminal import guarded, parser_of
from gymexp.config.schema import RunConfig
from gymexp.errors import RunDirectoryError
from gymexp.printable import say
from gymexp.record.own_files import check_own
from gymexp.sweep import sweep_reader
from gymexp.sweep.table import counted, job_line, status_table
from gymexp.view import run_text
from gymexp.view.progress import View

_POLL_S = 5.0


def show_sweep(path: Path, follow: bool) -> None:
    """Prints a sweep's jobs as a table; with `follow` also a line for each change, until all have ended."""
    sweep = sweep_reader.read_sweep(path)
    say(status_table(sweep))
    printed = {job.num: job_line(job) for job in sweep.jobs}
    while follow and not all(job.run.ended for job in sweep.jobs):
        time.sleep(_POLL_S)
        sweep = sweep_reader.read_sweep(path)
        for job in sweep.jobs:
            if printed.get(job.num) != job_line(job):
                printed[job.num] = job_line(job)
                say(printed[job.num])
    if follow:
        say(counted(sweep))


def show_run(path: Path, follow: bool) -> None:
    """Prints the state of a run; with `follow` also its logs and steps until it ends."""
    check_own(path)
    run = run_text.look(path)
    say(run_text.run_text(run))
    if follow and not run.ended:
        run = run_text.follow(path, View())
        say(f"{run.state}{f': {run.why}' if run.why else ''}")


def main() -> None:
    parser = parser_of("status", __doc__ or "")
    parser.add_argument("dir", type=Path, metavar="DIR", help="the directory of a run or of a sweep")
    parser.add_argument("--follow", action="store_true", help="also print logs and steps until it ends")
    args = parser.parse_args()
    path = args.dir.resolve()
    try:
        if sweep_reader.is_sweep(path):
            show_sweep(path, args.follow)
        elif any((path / name).exists() for name in ("config.yaml", "job.yaml", "status.json")):
            show_run(path, args.follow)
        else:
            raise RunDirectoryError(
                f"{path} must be the directory of a run or of a sweep, but has the files of neither"
            )
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    guarded(main, RunConfig)()
