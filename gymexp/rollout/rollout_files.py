"""The files of rollouts in a run directory: written by the trainer, read without parsing more than needed.

`rollouts/<name>.jsonl.zst` has an outcome a line. Each of its zstd frames has one group, so that a reader can
decompress that group alone; `zstd -dc` reads the whole file. `rollouts/index.jsonl` has a line for each
rollout of every file: what a table shows of the rollout, and where its frame is.

Runs from before the index have files of a single frame, which `read_outcomes` reads as well.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import orjson
import zstandard

from gymexp.config.schema import EnvConfig
from gymexp.errors import RunDirectoryError
from gymexp.files import at, read_lines, replacing
from gymexp.rollout.outcome import Failed, Outcome, Truncated, outcome_to_json, task_of

INDEX = "index.jsonl"
_MAX_TEXT = 120  # characters of a rollout's last message in the index


class RolloutWriter:
    """Writes the files of a run's rollouts and their index. One process may write at a time."""

    def __init__(self, directory: Path, envs: Mapping[str, EnvConfig], last_step: int | None = None) -> None:
        """last_step: of the checkpoint that a resumed run continues from. The index loses its lines of later
        steps, which will be played again; their files stay until then. None: the run begins.
        """
        self._directory = directory
        self._envs = envs
        self._index = directory / INDEX
        rows = read_index(directory)
        if self._index.exists():
            rows = [row for row in rows if last_step is not None and _step_of(row["file"]) <= last_step]
            self._replace_index(rows)
        self._indexed = {row["file"] for row in rows}

    def write(
        self,
        name: str,
        outcomes: Sequence[Outcome],
        group_size: int,
        earlier: Mapping[str, int] | None = None,
    ) -> None:
        """Writes `<name>.jsonl.zst` atomically, then its lines of the index.

        group_size: outcomes in a row that share a frame. earlier: the number of rollouts of each task that
        the file has already, to which the outcomes are added; None or empty: the file is new, or replaced.
        """
        path = self._directory / f"{name}.jsonl.zst"
        self._directory.mkdir(exist_ok=True)
        if not earlier and name in self._indexed:
            self._replace_index([row for row in read_index(self._directory) if row["file"] != name])
        content = path.read_bytes() if earlier else b""
        num_played = Counter(earlier or {})
        first = num_played.total()
        rows: list[dict[str, Any]] = []
        for start in range(0, len(outcomes), group_size):
            group = outcomes[start : start + group_size]
            lines = [orjson.dumps(outcome_to_json(outcome)) + b"\n" for outcome in group]
            frame = zstandard.compress(b"".join(lines))
            for line, outcome in enumerate(group):
                task = task_of(outcome)
                number = first + start + line
                where = {"file": name, "offset": len(content), "length": len(frame), "line": line}
                place = {"number": number, "group": number // group_size, "index": num_played[task.key]}
                rows.append(where | place | _summary(outcome, self._envs[task.env]))
                num_played[task.key] += 1
            content += frame
        with replacing(path) as part:
            part.write_bytes(content)
        with at(self._index), self._index.open("ab") as file:
            file.write(_to_lines(rows))
        self._indexed.add(name)

    def _replace_index(self, rows: Sequence[Mapping[str, Any]]) -> None:
        with replacing(self._index) as part:
            part.write_bytes(_to_lines(rows))


def _step_of(name: str) -> int:
    """Returns the step in the name of a file: of training the step that it is for, of an evaluation the step
    that it comes after."""
    return int(name.rpartition("-")[2])


def read_index(directory: Path) -> list[dict[str, Any]]:
    """Returns the lines of the index, without one that is still being written. Empty without an index."""
    return read_lines(directory / INDEX)


def read_outcome(directory: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the outcome, in the form of `outcome_to_json`, that a line of the index is about. Raises
    RunDirectoryError if the file no longer has it."""
    path = directory / f"{row['file']}.jsonl.zst"
    try:
        with path.open("rb") as file:
            file.seek(row["offset"])
            lines = zstandard.decompress(file.read(row["length"])).splitlines()
        record = orjson.loads(lines[row["line"]])
        if (record.get("rollout") or record)["task"]["key"] != row["key"]:
            raise ValueError("another rollout")
        return record
    except (FileNotFoundError, zstandard.ZstdError, LookupError, ValueError):
        raise RunDirectoryError(
            f"{path} must have rollout {row['number']}, but was deleted or written again: repeat the "
            "command, or resume the run, which writes the file anew"
        ) from None


def read_outcomes(path: Path) -> Iterator[dict[str, Any]]:
    """Yields every outcome of a file, in the form of `outcome_to_json`."""
    with path.open("rb") as file:
        reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        yield from map(orjson.loads, io.BufferedReader(reader))


def _summary(outcome: Outcome, env: EnvConfig) -> dict[str, Any]:
    """Returns what the index has of an outcome beside its place. tokens: that the policy sampled. nll: their
    mean -log-probability in nats; None for a policy that gives no token ids. text: the beginning of the last
    message."""
    task = task_of(outcome)
    row: dict[str, Any] = {"key": task.key, "env": task.env, "outcome": type(outcome).__name__.lower()}
    row["failures"] = outcome.failures
    if isinstance(outcome, Failed):
        return row | {"cause": outcome.cause, "text": outcome.detail[:_MAX_TEXT]}
    if isinstance(outcome, Truncated):
        row["limit"] = outcome.limit
    rollout, usage = outcome.rollout, outcome.rollout.usage
    logprobs = [value for turn in rollout.turns for value in turn.logprobs]
    return row | {
        "reward": rollout.reward,
        "success": rollout.reward >= env.success_reward,
        "refused": bool(rollout.refused),
        "turns": len(rollout.turns) if usage is None else usage["turns"],
        "prompt_tokens": len(rollout.turns[0].prompt_ids) if usage is None else usage.get("prompt_tokens"),
        "tokens": len(logprobs) if usage is None else usage.get("completion_tokens"),
        "nll": round(max(0.0, -fmean(logprobs)), 4) if logprobs else None,
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
    messages = (item for item in reversed(items) if item.get("type", "message") == "message")
    return next((text_of(item.get("content")) for item in messages), "")


def text_of(content: Any) -> str:
    """Returns the text of a message's content in OpenAI's Responses API: a string, or a list of parts."""
    if isinstance(content, list):
        return "".join(_text_of_part(part) for part in content)
    return content if isinstance(content, str) else json.dumps(content)


def _text_of_part(part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    return text if isinstance(text, str) else json.dumps(part)


def _to_lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return b"".join(orjson.dumps(row) + b"\n" for row in rows)
