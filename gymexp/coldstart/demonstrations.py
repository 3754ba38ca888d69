"""Demonstrations: tasks with their solutions as conversations, on which supervised fine-tuning trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from gymexp.config.schema import EnvConfig
from gymexp.data.rows import load_rows, server_of
from gymexp.data.sources import Files
from gymexp.errors import DataError


def demonstrations(name: str, env: EnvConfig, files: Files) -> Iterable[dict[str, Any]]:
    """Returns {"messages": […], "tools": […] or None} for each train task of the environment, in file order.

    Raises DataError, before the first demonstration is read, if the environment has none.
    """
    if files.demonstrations is not None:
        return _written(files.demonstrations, env.data.train_size)
    if server_of(env.config_path) == "reasoning_gym":
        rows = load_rows(files.train, name, env.agent, server="reasoning_gym", limit=env.data.train_size)
        return (_with_answer(row) for row in rows if row["answer"] is not None)
    hint = f": env.{name}.data.source=generate makes them" if env.data.generator == "workplace" else ""
    raise DataError(f"env.{name} has no demonstrations to train on (data.source={env.data.source}){hint}")


def _written(path: Path, limit: int | None) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for line in islice(file, limit):
            record = orjson.loads(line)
            yield {"messages": record["messages"], "tools": record.get("tools")}


def _with_answer(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the row as a conversation whose reply is the task's answer alone.

    reasoning_gym's scorers give this text 1.0, and a longer reply less.
    """
    prompt = row["responses_create_params"]["input"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return {"messages": [*messages, {"role": "assistant", "content": row["answer"]}], "tools": None}
