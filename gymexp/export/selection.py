"""Which rollouts of a run are exported."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from gymexp.errors import GymexpError, RunDirectoryError
from gymexp.rollout.rollout_files import load_index


def select(run: Path, args: Namespace) -> list[dict[str, Any]]:
    """Returns the lines of the index that --eval, --steps, --env and --limit select: at least one, in the
    order of the index. Without --eval and --steps it is the newest evaluation.

    Raises GymexpError, with what there is, if nothing is selected.
    """
    rows = load_index(run / "rollouts")
    if not rows:
        raise RunDirectoryError(f"{run} must be the directory of a run that has played rollouts")
    evaluations = sorted({step_of(row) for row in rows if row["file"].startswith("eval-")})
    steps = sorted({step_of(row) for row in rows if row["file"].startswith("step-")})
    if args.steps is not None:
        first, last = _range(args.steps)
        kind, known = "step-", steps
    else:
        if args.eval is None and not evaluations:
            raise GymexpError(f"{run} has no evaluation: say --steps A:B for training rollouts")
        first = last = evaluations[-1] if args.eval is None else args.eval
        kind, known = "eval-", evaluations
    of_files = [row for row in rows if row["file"].startswith(kind) and first <= step_of(row) <= last]
    if not of_files:
        name = "--steps" if kind == "step-" else "--eval"
        wanted = args.steps or args.eval
        there = ", ".join(map(str, known)) if len(known) < 8 else f"{known[0]} to {known[-1]}"
        raise GymexpError(f"{name} must name steps that this run has ({there or 'none'}), got {wanted}")
    chosen = [row for row in of_files if args.env in (None, row["env"])]
    if not chosen:
        envs = ", ".join(sorted({row["env"] for row in of_files}))
        raise GymexpError(f"--env must be one of {envs}, got {args.env!r}")
    if args.limit is None:
        return chosen
    if args.limit < 1:
        raise GymexpError(f"--limit must be at least 1, got {args.limit}")
    number = min(args.limit, len(chosen))
    return [chosen[i * len(chosen) // number] for i in range(number)]


def step_of(row: dict[str, Any]) -> int:
    """Returns the step of a rollout's file: of training the step that it is for, of an evaluation the step
    that it comes after."""
    return int(row["file"].rpartition("-")[2])


def _range(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) < int(first):
        raise GymexpError(f"--steps must be A:B with two steps, or one step, got {text!r}")
    return int(first), int(last or first)
