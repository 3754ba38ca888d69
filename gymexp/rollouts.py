"""Show what the policy did: the rollouts of a step as a table, or one as a conversation with its verdict.

python -m gymexp.rollouts outputs/<name>/<date_time>                           the newest step as a table
python -m gymexp.rollouts outputs/<name>/<date_time> --step 3 --env sudoku     another step, one environment
python -m gymexp.rollouts outputs/<name>/<date_time> --eval 20 --worst         the worst held-out rollout
python -m gymexp.rollouts outputs/<name>/<date_time> --step 3 --number 17      this rollout
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from gymexp.cli.terminal import guarded, parser_of
from gymexp.config.schema import RunConfig
from gymexp.errors import RunDirectoryError
from gymexp.printable import say
from gymexp.record.own_files import check_own
from gymexp.rollout.rollout_files import load_index, read_names, read_outcome
from gymexp.view.rollout_text import conversation, rollout_table
from gymexp.view.run_files import RunFiles
from gymexp.view.task_rows import TaskRows


def choose(args: Namespace, run: Path) -> list[dict[str, Any]]:
    """Returns the lines of the index that the command line selects, at least one. Raises RunDirectoryError if
    it selects none."""
    check_own(run)
    names = read_names(run / "rollouts")
    if not names:
        raise RunDirectoryError(f"{run} must be the directory of a run that has played rollouts")
    asked = {"eval": args.eval, "step": args.step, "filtered": args.filtered}
    named = [f"{kind}-{step:06d}" for kind, step in asked.items() if step is not None]
    name = named[0] if named else names[-1]  # step-… comes last
    if name not in names:
        raise RunDirectoryError(
            f"--step, --eval and --filtered must name a file of this run, got {name}: {_list(names)}"
        )
    of_file = load_index(run / "rollouts", name)
    chosen = [row for row in of_file if args.env in (None, row["env"])]
    if not chosen:
        envs = ", ".join(sorted({row["env"] for row in of_file}))
        raise RunDirectoryError(f"--env must be one of {envs}, got {args.env!r}")
    if args.number is not None:
        chosen = [row for row in chosen if row["number"] == args.number]
        if not chosen:
            others = [row["env"] for row in of_file if row["number"] == args.number]
            rule = f"be of env {args.env}" if others else f"be below {len(of_file)}"
            of = f", which is of env {others[0]}" if others else ""
            raise RunDirectoryError(f"--number must {rule}, got {args.number}{of}")
    if args.worst or args.best:
        scored = [row for row in chosen if row.get("reward") is not None]
        if not scored:
            raise RunDirectoryError(f"--worst and --best need a rollout with a reward, and {name} has none")
        chosen = [(min if args.worst else max)(scored, key=lambda row: row["reward"])]
    return chosen


def _list(names: list[str]) -> str:
    return ", ".join(names) if len(names) < 8 else f"{', '.join(names[:3])}, …, {', '.join(names[-3:])}"


def main() -> None:
    parser = parser_of("rollouts", __doc__ or "")
    parser.add_argument("run", type=Path, metavar="DIR", help="the directory of a run")
    of = parser.add_mutually_exclusive_group()
    of.add_argument("--step", type=int, metavar="N", help="training rollouts of this step; else the newest")
    of.add_argument("--eval", type=int, metavar="N", help="held-out rollouts of the evaluation after step N")
    of.add_argument("--filtered", type=int, metavar="N", help="those that were left out before step N")
    parser.add_argument("--env", metavar="NAME", help="of this environment alone")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--worst", action="store_true", help="print the rollout with the lowest reward")
    one.add_argument("--best", action="store_true", help="print the rollout with the highest reward")
    one.add_argument("--number", type=int, metavar="N", help="print the rollout with this number")
    parser.add_argument("--full", action="store_true", help="print long messages whole")
    args = parser.parse_args()
    run = args.run.resolve()
    one_rollout = args.worst or args.best or args.number is not None
    if args.full and not one_rollout:
        parser.error("--full needs --worst, --best or --number")
    rows = choose(args, run)
    if one_rollout:
        [row] = rows
        record = read_outcome(run / "rollouts", row)
        say(conversation(row, record, TaskRows(RunFiles(run)).read(row["key"]), args.full))
    else:
        say(rollout_table(rows))


if __name__ == "__main__":
    guarded(main, RunConfig)()
