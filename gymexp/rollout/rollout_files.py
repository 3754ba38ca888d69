"""The files of rollouts in a run directory: written by the trainer, read without parsing more than needed.

`rollouts/<name>.jsonl.zst` has an outcome a line. Each of its zstd frames has one group, so that a reader can
decompress that group alone; `zstd -dc` reads the whole file. `rollouts/index.jsonl` has a line for each
rollout of every file: what a table shows of the rollout, and where its frame is.

Runs from before the index have files of a single frame, which `read_outcomes` reads as well.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import orjson
import zstandard

from gymexp.config.schema import EnvConfig
from gymexp.files import at, read_lines, replacing
from gymexp.rollout.outcome import Failed, Outcome, Truncated, outcome_to_json, task_of

INDEX = "index.jsonl"
_MAX_TEXT = 120  # characters of a rollout's last message in the index


def write_outcomes(
    directory: Path,
    name: str,
    outcomes: Sequence[Outcome],
    group_size: int,
    envs: Mapping[str, EnvConfig],
    append: bool = False,
) -> None:
    """Writes `<name>.jsonl.zst` atomically, then its lines of the index.

    group_size: outcomes in a row that share a frame. append: whether to keep the outcomes that the file has.
    A file that is replaced, as by a resumed run, loses its lines of the index as well.
    """
    path = directory / f"{name}.jsonl.zst"
    directory.mkdir(exist_ok=True)
    earlier = path.read_bytes() if append else b""
    replaced = not append and path.exists()
    first_line = sum(1 for row in read_index(directory) if row["file"] == name) if append else 0
    frames: list[bytes] = []
    rows: list[dict[str, Any]] = []
    offset = len(earlier)
    num_played = Counter[str]()
    for start in range(0, len(outcomes), group_size):
        group = outcomes[start : start + group_size]
        lines = [orjson.dumps(outcome_to_json(outcome)) + b"\n" for outcome in group]
        frame = zstandard.compress(b"".join(lines))
        for number, outcome in enumerate(group):
            task = task_of(outcome)
            where = {"file": name, "offset": offset, "length": len(frame), "line": number}
            place = {"number": first_line + start + number, "group": (first_line + start) // group_size}
            rows.append(where | place | {"index": num_played[task.key]} | _summary(outcome, envs[task.env]))
            num_played[task.key] += 1
        frames.append(frame)
        offset += len(frame)
    with replacing(path) as part:
        part.write_bytes(earlier + b"".join(frames))
    if replaced:
        _write_index(directory, [row for row in read_index(directory) if row["file"] != name] + rows)
    else:
        with at(directory / INDEX), (directory / INDEX).open("ab") as file:
            file.write(_to_lines(rows))


def read_index(directory: Path) -> list[dict[str, Any]]:
    """Returns the lines of the index, without one that is still being written. Empty without an index."""
    return read_lines(directory / INDEX)


def read_outcome(directory: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the outcome, in the form of `outcome_to_json`, that a line of the index is about."""
    with (directory / f"{row['file']}.jsonl.zst").open("rb") as file:
        file.seek(row["offset"])
        lines = zstandard.decompress(file.read(row["length"])).splitlines()
    return orjson.loads(lines[row["line"]])


def read_outcomes(path: Path) -> Iterator[dict[str, Any]]:
    """Yields every outcome of a file, in the form of `outcome_to_json`."""
    with path.open("rb") as file:
        reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        yield from map(orjson.loads, io.BufferedReader(reader))


def _summary(outcome: Outcome, env: EnvConfig) -> dict[str, Any]:
    """Returns what the index has of an outcome beside its place. tokens: that the policy sampled. nll: their
    mean -log-probability in nats. text: the beginning of the last message."""
    task = task_of(outcome)
    row: dict[str, Any] = {"key": task.key, "env": task.env, "outcome": type(outcome).__name__.lower()}
    row["failures"] = outcome.failures
    if isinstance(outcome, Failed):
        return row | {"cause": outcome.cause, "text": outcome.detail[:_MAX_TEXT]}
    if isinstance(outcome, Truncated):
        row["limit"] = outcome.limit
    rollout = outcome.rollout
    logprobs = [value for turn in rollout.turns for value in turn.logprobs]
    return row | {
        "reward": rollout.reward,
        "success": rollout.reward >= env.success_reward,
        "refused": bool(rollout.refused),
        "turns": len(rollout.turns),
        "prompt_tokens": len(rollout.turns[0].prompt_ids),
        "tokens": len(logprobs),
        "nll": round(-fmean(logprobs), 4),
        "tool_calls": sum(item.get("type") == "function_call" for item in rollout.items),
        "began": rollout.began,
        "seconds": rollout.seconds,
        "seed": rollout.seed,
        "replica": rollout.replica,
        "weights_version": rollout.weights_version,
        "text": _last_text(rollout.items)[:_MAX_TEXT],
    }


def _last_text(items: Sequence[Mapping[str, Any]]) -> str:
    """Returns the text of the last message among the items of an episode; "" if it has none."""
    for item in reversed(items):
        if item.get("type") == "message" and isinstance(parts := item.get("content"), list):
            return "".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))
    return ""


def _to_lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return b"".join(orjson.dumps(row) + b"\n" for row in rows)


def _write_index(directory: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with replacing(directory / INDEX) as part:
        part.write_bytes(_to_lines(rows))
