"""The files of rollouts in a run directory: written by the trainer, read without parsing more than needed.

`rollouts/<name>.jsonl.zst` has an outcome a line. Each of its zstd frames has one group, so that a reader can
decompress that group alone; `zstd -dc` reads the whole file. `rollouts/index.jsonl` has a line for each
rollout of every file: what a table shows of the rollout, and where its frame is. The names are step-N and
eval-N, and filtered-N for the groups that rollout.dynamic_sampling left out before step N was trained.

`rollouts/<name>.train.jsonl.zst` has a line for each rollout of a training step: what the trainer made of the
rollout (`gymexp.rollout.trained`). Its index is `rollouts/train_index.jsonl`; a line belongs to the rollout
with the same file and number.

Runs from before the index have files of a single frame, which `load_index` and `read_outcomes` read as well.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import orjson
import zstandard

from gymexp.config.plain_yaml import load_plain_yaml
from gymexp.config.schema import EnvConfig
from gymexp.errors import RunDirectoryError
from gymexp.files import at, read_lines, replacing
from gymexp.record.own_files import MAX_FRAME, check_own_file, decompressed, open_own, parsed
from gymexp.rollout.items import last_text, num_tool_calls, num_tool_errors
from gymexp.rollout.outcome import Failed, Outcome, Truncated, outcome_from_json, outcome_to_json, task_of
from gymexp.rollout.trained import Trained

INDEX = "index.jsonl"
TRAIN_INDEX = "train_index.jsonl"
_SUFFIX = ".jsonl.zst"
_TRAIN_SUFFIX = ".train.jsonl.zst"
_MAX_TEXT = 120  # characters of a rollout's last message in the index
MAX_REASON = 300  # characters of why a rollout failed
_MAX_FIELDS = 12  # of a verdict in the index
_MAX_NAME, _MAX_WORD = 40, 24  # characters of such a field's name and of its value, if that is a text
_NAME = re.compile(r"(step|eval|filtered)-\d{6,12}")
_NUMBER, _TEXT = (int, float, type(None)), (str, type(None))
_COUNT = (int, type(None))
# The types that a field of the index may have, where a line has it.
_TYPES: Mapping[str, tuple[type, ...]] = {
    "key": (str,), "env": (str,), "outcome": (str,), "text": (str,), "cause": (str,), "limit": _TEXT,
    "replica": _TEXT, "failures": (list,), "seconds": (dict,), "success": (bool, type(None)),
    "reward": _NUMBER, "nll": _NUMBER, "began": _NUMBER, "advantage": _NUMBER, "ratio_max": _NUMBER,
    "turns": _COUNT, "tokens": _COUNT, "prompt_tokens": _COUNT, "tool_calls": _COUNT, "tool_errors": _COUNT,
    "trained": _COUNT, "seed": _COUNT, "weights_version": _COUNT, "verdict": (dict,),
}  # fmt: skip
_PLACE = ("offset", "length", "line", "number", "group", "index")


class _IndexedFiles:
    """Files of zstd frames, and an index with a line for each of their lines. One process may write."""

    def __init__(self, directory: Path, index: str, suffix: str, last_step: int | None) -> None:
        self._directory = directory
        self._index = directory / index
        self._suffix = suffix
        rows = read_lines(self._index)
        if self._index.exists():
            rows = [row for row in rows if last_step is not None and _step_of(row["file"]) <= last_step]
            self._replace_index(rows)
        self._indexed = {row["file"] for row in rows}

    def write(
        self, name: str, groups: Iterable[Sequence[tuple[Any, dict[str, Any]]]], is_added: bool
    ) -> None:
        """Writes a file atomically, then its lines of the index.

        groups: the groups that get a frame each, with (line, its entry in the index); the entry gets the
        line's place. is_added: whether the file keeps what it has.
        """
        path = self._directory / f"{name}{self._suffix}"
        self._directory.mkdir(exist_ok=True)
        if not is_added and name in self._indexed:
            self._replace_index([row for row in read_lines(self._index) if row["file"] != name])
        content = path.read_bytes() if is_added else b""
        rows: list[dict[str, Any]] = []
        for group in groups:
            lines = [orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n" for line, _ in group]
            frame = zstandard.compress(b"".join(lines))
            for number, (_, entry) in enumerate(group):
                where = {"file": name, "offset": len(content), "length": len(frame), "line": number}
                rows.append(where | entry)
            content += frame
        with replacing(path) as part:
            part.write_bytes(content)
        with at(self._index), self._index.open("ab") as file:
            file.write(_to_lines(rows))
        self._indexed.add(name)

    def _replace_index(self, rows: Sequence[Mapping[str, Any]]) -> None:
        with replacing(self._index) as part:
            part.write_bytes(_to_lines(rows))


class RolloutWriter:
    """Writes the files of a run's rollouts and their index. One process may write at a time."""

    def __init__(self, directory: Path, envs: Mapping[str, EnvConfig], last_step: int | None = None) -> None:
        """last_step: of the checkpoint that a resumed run continues from. The indexes lose their lines of
        later steps, which will be played again; their files stay until then. None: the run begins.
        """
        self._success_rewards = {name: env.success_reward for name, env in envs.items()}
        self._rollouts = _IndexedFiles(directory, INDEX, _SUFFIX, last_step)
        self._trained = _IndexedFiles(directory, TRAIN_INDEX, _TRAIN_SUFFIX, last_step)

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
        num_played = Counter(earlier or {})
        first = num_played.total()
        entries = []
        for number, outcome in enumerate(outcomes, first):
            key = task_of(outcome).key
            place = {"number": number, "group": number // group_size, "index": num_played[key]}
            entries.append((outcome_to_json(outcome), place | _summary(outcome, self._success_rewards)))
            num_played[key] += 1
        self._rollouts.write(name, _in_groups(entries, group_size), is_added=bool(earlier))

    def write_trained(self, name: str, trained: Sequence[Trained], group_size: int, first: int = 0) -> None:
        """Writes `<name>.train.jsonl.zst` atomically, then its lines of the index.

        trained: of the rollouts that the last `write` of this name got, in their order. first: the number of
        the first of them, so of rollouts of earlier collections, whose lines the file keeps.
        """
        entries = []
        for number, one in enumerate(trained, first):
            summary = {"number": number, "advantage": one.advantage, "trained": one.num_trained}
            tokens = {"logprobs": one.logprobs, "ref_logprobs": one.ref_logprobs, "weights": one.weights}
            entries.append((summary | tokens, summary | {"ratio_max": one.max_ratio}))
        self._trained.write(name, _in_groups(entries, group_size), is_added=first > 0)


def _in_groups(entries: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (entries[start : start + size] for start in range(0, len(entries), size))


def _step_of(name: str) -> int:
    """Returns the step in the name of a file: of training the step that it is for, of an evaluation the step
    that it comes after."""
    return int(name.rpartition("-")[2])


def is_rollout_file(name: Any) -> bool:
    """Returns whether a name in an index is one that gymexp gives to a file of rollouts."""
    return isinstance(name, str) and bool(_NAME.fullmatch(name))


def is_row(row: Mapping[str, Any], required: Sequence[str]) -> bool:
    """Returns whether a line of an index, which a stranger may have written, is one that gymexp could write:
    it has the `required` fields, names a file of rollouts, and no field has another type."""
    return (
        is_rollout_file(row.get("file"))
        and all(name in row for name in required)
        and all(type(row[name]) in types for name, types in _TYPES.items() if name in row)
        and all(type(row[name]) is int and 0 <= row[name] < 1 << 53 for name in _PLACE if name in row)
        and all(isinstance(cause, str) for cause in row.get("failures", ()))
        and all(isinstance(value, int | float) for value in row.get("seconds", {}).values())
    )


def read_index(directory: Path) -> list[dict[str, Any]]:
    """Returns the lines of the index, without one that is still being written, or that gymexp did not write.
    Empty without an index."""
    return [row for row in read_lines(directory / INDEX) if is_row(row, ("key", "env"))]


def load_index(directory: Path, file: str | None = None) -> list[dict[str, Any]]:
    """Returns the lines of the index; for files that were written before runs had an index, lines made from
    the files themselves, which takes some milliseconds a rollout.

    directory: the `rollouts` of a run directory, whose config.yaml says which reward is a success. file: the
    name of the only file whose lines are returned. Raises RunDirectoryError if a file is damaged.
    """
    rows = read_index(directory)
    older = load_older(directory, (name for name in older_names(directory, rows) if file in (None, name)))
    whole = (row for row in rows if is_row(row, ("outcome", "text", *_PLACE)))
    return [*older, *(row for row in whole if file in (None, row["file"]))]


def load_older(directory: Path, names: Iterable[str]) -> list[dict[str, Any]]:
    """Returns lines of the index for files that were written before the run had one. names: of
    `older_names`. Raises RunDirectoryError if a file is damaged."""
    names = list(names)
    success_rewards = _read_success_rewards(directory.parent / "config.yaml") if names else {}
    return [row for name in names for row in _index_of(directory, name, success_rewards)]


def read_names(directory: Path) -> list[str]:
    """Returns the names of the files of rollouts that `load_index` has lines of."""
    rows = read_index(directory)
    return sorted({*older_names(directory, rows), *(row["file"] for row in rows)})


def older_names(directory: Path, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the names of the files that were written before the run had its index, whose lines are `rows`.

    A run that began without an index may have been resumed with one. Files of later steps than its first
    line's are left from before a resume: these steps will be played again.
    """
    indexed = {row["file"] for row in rows}
    first = min(map(_step_of, indexed), default=None)
    names = (path.name.removesuffix(_SUFFIX) for path in directory.glob(f"*{_SUFFIX}"))
    files = sorted(name for name in names if is_rollout_file(name) and name not in indexed)
    return [name for name in files if first is None or _step_of(name) < first]


def _index_of(directory: Path, name: str, success_rewards: Mapping[str, float]) -> list[dict[str, Any]]:
    """Returns lines of the index for a file of one frame. Rollouts of a task in a row are its group. `began`
    is None where the file does not have it."""
    path = directory / f"{name}{_SUFFIX}"
    try:
        summaries = [older_summary(record, success_rewards) for record in read_outcomes(path)]
        return with_places(name, path.stat().st_size, enumerate(summaries))
    except (zstandard.ZstdError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise RunDirectoryError(f"{path} must have a rollout of gymexp in each line: {error}") from None


def older_summary(record: Mapping[str, Any], success_rewards: Mapping[str, float]) -> dict[str, Any]:
    """Returns what the index would have of an outcome, beside its place. record: in the form of
    `outcome_to_json`; what a stranger wrote may raise AttributeError, LookupError, TypeError or ValueError.
    success_rewards: of `success_rewards_of`."""
    row = _summary(outcome_from_json(record), success_rewards)
    return row | ({"began": None} if row.get("began") == 0 else {})


def with_places(
    name: str, size: int, summaries: Iterable[tuple[int, dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Returns lines of the index for a file of one frame. size: its bytes. summaries: of `older_summary`,
    each with its line."""
    frame = {"file": name, "offset": 0, "length": size}
    rows: list[dict[str, Any]] = []
    num_played: Counter[str] = Counter()
    group, group_key = -1, None
    for number, summary in summaries:
        key = summary["key"]
        group, group_key = group + (key != group_key), key
        place = {"line": number, "number": number, "group": group, "index": num_played[key]}
        rows.append(frame | place | summary)
        num_played[key] += 1
    return rows


def _read_success_rewards(config: Path) -> dict[str, float]:
    """Returns env.<name>.success_reward of a config.yaml, which an earlier version may have written."""
    try:
        content: Any = load_plain_yaml(config.read_bytes()) if config.exists() else {}
    except ValueError:
        return {}
    return success_rewards_of(content)


def success_rewards_of(content: Any) -> dict[str, float]:
    """Returns env.<name>.success_reward of a parsed config.yaml, as far as it has them."""
    try:
        named = {name: env.get("success_reward") for name, env in content["env"].items()}
    except (AttributeError, KeyError, TypeError):
        return {}
    return {name: reward for name, reward in named.items() if isinstance(reward, int | float)}


def read_train_index(directory: Path) -> list[dict[str, Any]]:
    """Returns the lines of the training steps' index, without one that is still being written. Empty for a
    run that does not have it."""
    return [row for row in read_lines(directory / TRAIN_INDEX) if is_row(row, ("number", "advantage"))]


def read_outcome(directory: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the outcome, in the form of `outcome_to_json`, that a line of the index is about. Raises
    RunDirectoryError if the file no longer has it."""
    record = _read_line(directory / f"{row['file']}{_SUFFIX}", row)
    if not record or (record.get("rollout") or record)["task"]["key"] != row["key"]:
        raise _lost(directory / f"{row['file']}{_SUFFIX}", row)
    return record


def read_trained(directory: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the trainer made of a rollout. row: of the training steps' index. Raises RunDirectoryError
    if the file no longer has it.

    The keys are number, advantage, trained, logprobs, ref_logprobs and weights, as in
    `gymexp.rollout.trained`; a token that is not trained on has null.
    """
    record = _read_line(directory / f"{row['file']}{_TRAIN_SUFFIX}", row)
    if any(record.get(key) != row[key] for key in ("number", "advantage", "trained")):
        raise _lost(directory / f"{row['file']}{_TRAIN_SUFFIX}", row)
    return record


def _read_line(path: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the object in the line of a frame; {} if the file does not have it."""
    file = open_own(path.parent.parent, path)
    if file is None:
        return {}
    with file:
        file.seek(row["offset"])
        content = file.read(min(row["length"], MAX_FRAME))
    try:
        record = parsed(decompressed(content, path).splitlines()[row["line"]])
    except LookupError:
        return {}
    return record if isinstance(record, dict) else {}


def _lost(path: Path, row: Mapping[str, Any]) -> RunDirectoryError:
    return RunDirectoryError(
        f"{path} must have rollout {row['number']}, but was deleted or written again: repeat the command, or "
        "resume the run, which writes the file anew"
    )


def read_outcomes(path: Path) -> Iterator[dict[str, Any]]:
    """Yields every outcome of a file, in the form of `outcome_to_json`. Raises ValueError if a line is none,
    and RunDirectoryError if the file is a link out of its run directory."""
    check_own_file(path.parent.parent, path)
    with path.open("rb") as file:
        reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        buffer = io.BufferedReader(reader)
        while line := buffer.readline(MAX_FRAME):
            record = parsed(line)
            if not isinstance(record, dict):
                raise ValueError("a line is damaged, too long or nested too deep")
            yield record


def _summary(outcome: Outcome, success_rewards: Mapping[str, float]) -> dict[str, Any]:
    """Returns what the index has of an outcome beside its place. tokens: that the policy sampled. nll: their
    mean -log-probability in nats; None for a policy that gives no token ids. tool_errors: as
    `num_tool_errors` counts. text: the beginning of the last message, or why it failed. verdict: the fields
    of it that can be counted. success_rewards: by environment; without one, success is None."""
    task = task_of(outcome)
    row: dict[str, Any] = {"key": task.key, "env": task.env, "outcome": type(outcome).__name__.lower()}
    row["failures"] = outcome.failures
    if isinstance(outcome, Failed):
        return row | {"cause": outcome.cause, "text": " ".join(outcome.detail.split())[:MAX_REASON]}
    if isinstance(outcome, Truncated):
        row["limit"] = outcome.limit
    rollout, usage = outcome.rollout, outcome.rollout.usage
    success_reward = success_rewards.get(task.env)
    logprobs = [value for turn in rollout.turns for value in turn.logprobs]
    return row | {
        "reward": rollout.reward,
        "success": None if success_reward is None else rollout.reward >= success_reward,
        "refused": bool(rollout.refused),
        "turns": len(rollout.turns) if usage is None else usage["turns"],
        "prompt_tokens": len(rollout.turns[0].prompt_ids) if usage is None else usage.get("prompt_tokens"),
        "tokens": len(logprobs) if usage is None else usage.get("completion_tokens"),
        "nll": round(max(0.0, -fmean(logprobs)), 4) if logprobs else None,
        "tool_calls": num_tool_calls(rollout.items),
        "tool_errors": num_tool_errors(rollout.items),
        "began": rollout.began,
        "seconds": rollout.seconds,
        "seed": rollout.seed,
        "replica": rollout.replica,
        "weights_version": rollout.weights_version,
        "text": last_text(rollout.items)[:_MAX_TEXT],
        "verdict": _small_fields(rollout.verdict),
    }


def _small_fields(verdict: Mapping[str, Any]) -> dict[str, bool | float | str]:
    """Returns the fields of a verdict that can be counted: booleans, numbers, and texts of a word or two."""
    small: dict[str, bool | float | str] = {}
    for name, value in verdict.items():
        is_word = isinstance(value, str) and len(value) <= _MAX_WORD and "\n" not in value
        is_number = isinstance(value, int | float) and math.isfinite(value)
        if (is_word or is_number) and len(name) <= _MAX_NAME and len(small) < _MAX_FIELDS:
            small[name] = value
    return small


def _to_lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return b"".join(orjson.dumps(row) + b"\n" for row in rows)
