"""Writes rollouts as NeMo Gym's own `gym eval run` does, for `gym eval profile` and readers of its files.

F.jsonl                        a line a rollout: the environment's answer with reward and output
F_materialized_inputs.jsonl    a line a planned rollout: the task's row and its agent

A failed rollout is in the second file alone, as NeMo Gym has it. `response.usage` is left out, as a run does
not record it in NeMo Gym's sense.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from gymexp.errors import RunDirectoryError
from gymexp.export.chosen import open_run
from gymexp.export.selection import select
from gymexp.files import replacing
from gymexp.printable import say
from gymexp.rollout.rollout_files import read_outcome
from gymexp.view.run_files import RunFiles
from gymexp.view.task_rows import TaskRows


def write_gym_rollouts(run: Path, args: Namespace) -> None:
    """Writes the selected rollouts to `args.gym` and the file of inputs beside it. Raises GymexpError if
    nothing is selected, or if the run has not kept the rows of its tasks."""
    envs = open_run(run).env
    rows = select(run, args)
    tasks = TaskRows(RunFiles(run))
    task_numbers: dict[str, int] = {}
    num_played: dict[str, int] = {}
    target = args.gym.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    inputs = target.with_stem(f"{target.stem}_materialized_inputs")
    with (
        replacing(target) as played_part,
        replacing(inputs) as inputs_part,
        played_part.open("wb") as played_file,
        inputs_part.open("wb") as inputs_file,
    ):
        for row in rows:
            key = row["key"]
            if (task_row := tasks.read(key)) is None or row["env"] not in envs:
                raise RunDirectoryError(
                    "--gym needs the rows of the tasks (data/train.jsonl, data/validation.jsonl), but "
                    f"{run} has none of {key}"
                )
            place = {"_ng_task_index": task_numbers.setdefault(key, len(task_numbers))}
            place["_ng_rollout_index"] = num_played.get(key, 0)
            num_played[key] = num_played.get(key, 0) + 1
            agent = {"agent_ref": {"name": envs[row["env"]].agent}}
            inputs_file.write(orjson.dumps({**task_row, **agent, **place}) + b"\n")
            record = read_outcome(run / "rollouts", row)
            if record["outcome"] != "failed":
                played_file.write(orjson.dumps(result_of(record, task_row) | agent | place) + b"\n")
    say(f"{len(rows)} rollouts in {target}, and their inputs in {inputs}")


def result_of(record: Mapping[str, Any], task_row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the environment's answer: the task's own fields, its verdict, the reward and the output.

    record: an outcome that did not fail, as `read_outcome` returns it.
    """
    rollout = record["rollout"]
    answer = {"reward": rollout["reward"], "response": {"output": rollout["items"]}}
    return {**task_row, **(rollout.get("verdict") or {}), **answer}
