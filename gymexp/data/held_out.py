"""Tasks of one file in two parts: `data.validation_share` holds some of the training tasks out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import orjson

from gymexp.errors import DataError

Row = tuple[int, dict[str, Any]]  # with its line number


def split(env_name: str, rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Returns the training and the held-out rows, each in the order of the file.

    Rows with the same prompt are one task, and stay together; where all rows have the same prompt, as in a
    game, each row is a task. The tasks are ordered by a hash of seed and
    prompt, and the first ones are held out: as many as come nearest to the share of all tasks, but at least
    one of each part. Raises DataError if the file has a single task.
    """
    tasks = [_prompt(row) for _, row in rows]
    if len(set(tasks)) < 2:
        tasks = [orjson.dumps(row, option=orjson.OPT_SORT_KEYS) for _, row in rows]
    places = {task: hashlib.sha256(b"%d\0%b" % (seed, task)).digest() for task in tasks}
    if len(places) < 2:
        raise DataError(
            f"env.{env_name}.data.validation_share needs two different rows at least, but {len(rows)} of the "
            "file are one and the same"
        )
    count = min(max(round(share * len(places)), 1), len(places) - 1)
    held_out = set(sorted(places, key=places.__getitem__)[:count])
    parts: tuple[list[Row], list[Row]] = ([], [])
    for task, row in zip(tasks, rows, strict=True):
        parts[task in held_out].append(row)
    return parts


def _prompt(row: dict[str, Any]) -> bytes:
    return orjson.dumps(row["responses_create_params"]["input"], option=orjson.OPT_SORT_KEYS)
