"""The records of a run directory as plain data: read anew, or only what was appended since the last time.

Older runs and evaluation directories lack some of the files; their records are then empty.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson

from gymexp.config.plain_yaml import load_plain_yaml
from gymexp.errors import RunDirectoryError
from gymexp.files import read_json
from gymexp.record.directory import PLAN
from gymexp.record.line_follower import Followed
from gymexp.record.metric_names import name_of
from gymexp.record.own_files import check_own, open_own
from gymexp.record.run_state import RunState, read_run
from gymexp.rollout.rollout_files import is_row, load_older, older_names

Record = dict[str, Any]
Number = int | float
# Files of which a directory must have one, so that it counts as a run or an evaluation.
_MARKS = ("config.yaml", "metrics.jsonl", "status.json", "results.json", "rollouts")


class LineFile:
    """The objects of a JSONL file. `refresh` reads only what was appended since the last call."""

    def __init__(self, run: Path, name: str) -> None:
        self._followed = Followed(lambda: open_own(run, run / name))
        self.records: list[Record] = []

    def refresh(self) -> bool:
        """Reads new lines, or the whole file if it was replaced or cut (a resumed run takes lines back).
        Damaged lines and one that is still being written are left out. Returns whether `records` changed."""
        changed = False
        for is_anew, lines, _ in self._followed.batches():
            changed = True
            self.records = [] if is_anew else self.records
            self.records += [record for line in lines if (record := _parsed(line)) is not None]
        return changed


def _parsed(line: bytes) -> Record | None:
    with contextlib.suppress(ValueError):
        record = orjson.loads(line)
        return record if isinstance(record, dict) else None
    return None


@dataclass(frozen=True, slots=True)
class Span:
    """A phase of an optimizer step. began: seconds since 1970. step: the step being made, from 1; for an
    evaluation the step after which it was played."""

    name: str
    step: int
    began: float
    seconds: float

    @property
    def ended(self) -> float:
        """When the phase ended, in seconds since 1970."""
        return self.began + self.seconds


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU at one time. utilization: 0 to 1. None: the driver does not say."""

    index: int
    utilization: float | None
    memory_mb: float | None
    power_w: float | None


@dataclass(frozen=True, slots=True)
class Sample:
    """The machine at one time. cpu: share of all cores, 0 to 1. rss_mb, cores: by process of the run."""

    time: float
    cpu: float | None
    memory_mb: float | None
    rss_mb: dict[str, float]
    cores: dict[str, float]
    gpus: list[Gpu]


@dataclass(frozen=True)
class RunRecords:
    """What the directory of a run, or of an evaluation, has recorded.

    steps, evaluations: entries of metrics.jsonl of training steps, and of evaluations. rows: lines of the
    index of rollouts. trained: lines of the index of advantages, by (file, number). spans and events:
    timeline.jsonl. samples: system.jsonl. config: config.yaml as nested dicts, without its interpolations
    resolved. overrides: of the command line. versions: versions.txt. mix: data/mix.json. plan and results:
    evaluation.json and results.json of an evaluation. commit: git's; "" if unknown. is_dirty: whether
    gymexp's code differed from that commit.
    """

    path: Path
    run: RunState
    steps: list[Record] = field(default_factory=list)
    evaluations: list[Record] = field(default_factory=list)
    rows: list[Record] = field(default_factory=list)
    trained: Mapping[tuple[str, int], Record] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    events: list[Record] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    config: Record = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    versions: str = ""
    mix: Record = field(default_factory=dict)
    plan: Record = field(default_factory=dict)
    results: Record = field(default_factory=dict)
    commit: str = ""
    is_dirty: bool = False

    @property
    def is_evaluation(self) -> bool:
        """Whether this is the directory of `python -m gymexp.evaluate`."""
        return bool(self.plan)

    @property
    def policies(self) -> list[Record]:
        """The policies of an evaluation, with the label and the file of rollouts of each."""
        policies = self.plan.get("policies")
        return [one for one in policies if isinstance(one, dict)] if isinstance(policies, list) else []

    @cached_property
    def envs(self) -> list[str]:
        """The environments, in the configuration's order, then others that have metrics or rollouts."""
        configured = self.config.get("env")
        names = list(configured) if isinstance(configured, dict) else []
        names += sorted(
            {name for entry in (*self.steps[-1:], *self.evaluations[:1]) for name in envs_of(entry)}
        )
        names += sorted({row["env"] for row in self.rows})
        return list(dict.fromkeys(names))

    def name_of_evaluation(self, step: int) -> str:
        """Returns the name of what was evaluated: the policy of an evaluation, or a run's step."""
        names = {policy.get("file"): str(policy.get("label")) for policy in self.policies}
        return names.get(f"eval-{step:06d}", str(step))

    @cached_property
    def rows_of_step(self) -> dict[int, list[Record]]:
        """The training rollouts by optimizer step, from 1, in order."""
        return _by_step(self.rows, "step-")

    @cached_property
    def rows_of_evaluation(self) -> dict[int, list[Record]]:
        """The held-out rollouts by the step that they were played after, in order."""
        return _by_step(self.rows, "eval-")

    @cached_property
    def scored(self) -> dict[tuple[int, str], list[Record]]:
        """The training rollouts that did not fail, by (step, environment)."""
        found: dict[tuple[int, str], list[Record]] = defaultdict(list)
        for step, rows in self.rows_of_step.items():
            for row in rows:
                if row.get("reward") is not None and row.get("tokens") is not None:
                    found[step, row["env"]].append(row)
        return found

    @cached_property
    def step_numbers(self) -> list[int]:
        """The optimizer steps of `steps`."""
        return [entry["step"] for entry in self.steps]

    def series(self, name: str) -> list[Number | None]:
        """Returns a metric's value at each of `steps`; None where it was not measured."""
        return [_number(entry.get(name)) for entry in self.steps]

    def env_series(self, env: str, metric: str) -> list[Number | None]:
        """Returns an environment's training metric at each of `steps`."""
        return self.series(name_of(env, metric))

    def held_out_series(self, env: str, metric: str) -> list[tuple[int, Number]]:
        """Returns an environment's held-out metric as (step, value), where it was measured."""
        name = name_of(env, metric, held_out=True)
        values = ((entry["step"], _number(entry.get(name))) for entry in self.evaluations)
        return [(step, value) for step, value in values if value is not None]

    def setting(self, key: str, default: Any = None) -> Any:
        """Returns the value of a key of the configuration, e.g. `trainer.beta`; default if it has none."""
        place: Any = self.config
        for name in key.split("."):
            if not isinstance(place, dict) or name not in place:
                return default
            place = place[name]
        return place


def envs_of(entry: Mapping[str, Any]) -> set[str]:
    """Returns the environments that have metrics, of training or held-out, in an entry of metrics.jsonl."""
    counted = (name.removesuffix("/rollouts") for name in entry if name.endswith("/rollouts"))
    return {name.removeprefix("eval_") for name in counted}


def _number(value: Any) -> Number | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _by_step(rows: Iterable[Record], kind: str) -> dict[int, list[Record]]:
    by_file: dict[str, list[Record]] = defaultdict(list)
    for row in rows:
        if row["file"].startswith(kind):
            by_file[row["file"]].append(row)
    steps = {name.removeprefix(kind): rows for name, rows in by_file.items()}
    return {int(step): steps[step] for step in sorted(steps, key=lambda s: int(s)) if step.isdigit()}


class RunReader:
    """Reads a run directory as often as needed; after the first time only what has changed."""

    def __init__(self, path: Path, is_own: bool = True) -> None:
        """is_own: whether gymexp's user made the directory. Else rollouts from before the index are left out,
        as their files are read without bounds. Raises RunDirectoryError if it is no run and no evaluation."""
        if not any((path / name).exists() for name in _MARKS):
            raise RunDirectoryError(
                f"{path} must be the directory of a run or of an evaluation, but has no files of one"
            )
        check_own(path)
        self.path = path
        self._metrics = LineFile(path, "metrics.jsonl")
        self._timeline = LineFile(path, "timeline.jsonl")
        self._system = LineFile(path, "system.jsonl")
        self._index = LineFile(path, "rollouts/index.jsonl")
        self._trained = LineFile(path, "rollouts/train_index.jsonl")
        self._is_own = is_own
        self._older: tuple[list[str], list[Record]] = ([], [])  # names of files, lines made from them
        self._constant: dict[str, Any] = {}
        self._last: RunRecords | None = None

    def read(self) -> RunRecords:
        """Returns the records of this moment."""
        files = (self._metrics, self._timeline, self._system, self._index, self._trained)
        changed = [file.refresh() for file in files]
        run = read_run(self.path)
        if self._last is not None and not any(changed) and run == self._last.run:
            return self._last
        rows = [row for row in self._index.records if _is_row(row)]
        self._last = RunRecords(
            self.path,
            run,
            steps=[entry for entry in self._metrics.records if _is_step(entry)],
            evaluations=[entry for entry in self._metrics.records if _is_evaluation(entry)],
            rows=[*self._read_older(rows), *rows],
            trained={
                (row["file"], row["number"]): row for row in self._trained.records if is_row(row, ("number",))
            },
            spans=[span for line in self._timeline.records if (span := _span(line))],
            events=[line for line in self._timeline.records if "event" in line or "phase" in line],
            samples=[sample for line in self._system.records if (sample := _sample(line))],
            plan=read_json(self.path / PLAN),
            results=read_json(self.path / "results.json"),
            **self._read_constant(),
        )
        return self._last

    def _read_older(self, rows: Sequence[Record]) -> list[Record]:
        """Returns the lines of the index for rollouts from before the run had one, which has `rows`."""
        names = older_names(self.path / "rollouts", rows) if self._is_own else []
        if names != self._older[0]:
            self._older = names, load_older(self.path / "rollouts", names)
        return self._older[1]

    def _read_constant(self) -> dict[str, Any]:
        """Returns the fields that a run writes once, when it begins; read again only if they are missing, or
        config.yaml was replaced, as a resumed run may do."""
        config = self.path / "config.yaml"
        stamp = config.stat().st_mtime_ns if config.exists() else 0
        if self._constant.get("stamp") != stamp:
            self._constant = {"stamp": stamp, "fields": _constant(self.path)}
        return self._constant["fields"]


def read_records(path: Path) -> RunRecords:
    """Returns the records of a run directory. Raises RunDirectoryError if it is none."""
    return RunReader(path).read()


def _constant(path: Path) -> dict[str, Any]:
    config, overrides = _yaml(path / "config.yaml"), _yaml(path / "overrides.yaml")
    return {
        "config": config if isinstance(config, dict) else {},
        "overrides": [str(item) for item in overrides] if isinstance(overrides, list) else [],
        "versions": _text(path / "versions.txt"),
        "mix": read_json(path / "data" / "mix.json"),
        "commit": _text(path / "code" / "git-commit.txt").strip(),
        "is_dirty": bool(_text(path / "code" / "git-diff.txt").strip()),
    }


def _yaml(path: Path) -> Any:
    try:
        return load_plain_yaml(path.read_bytes())
    except (OSError, ValueError):
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _is_step(entry: Record) -> bool:
    return isinstance(entry.get("step"), int) and ("time/step" in entry or "loss" in entry)


def _is_evaluation(entry: Record) -> bool:
    return isinstance(entry.get("step"), int) and any(
        name.startswith("eval_") and name.endswith("/rollouts") for name in entry
    )


def _is_row(row: Record) -> bool:
    return is_row(row, ("key", "env", "number", "group"))


def _span(line: Record) -> Span | None:
    name, step, began, seconds = (line.get(key) for key in ("span", "step", "time", "seconds"))
    if isinstance(name, str) and all(isinstance(value, int | float) for value in (step, began, seconds)):
        return Span(name, int(step), began, seconds)  # pyright: ignore[reportArgumentType]
    return None


def _sample(line: Record) -> Sample | None:
    if not isinstance(line.get("time"), int | float):
        return None
    processes: Mapping[str, Any] = line.get("processes") or {}
    gpus: Sequence[Mapping[str, Any]] = line.get("gpus") or []
    return Sample(
        line["time"],
        line.get("cpu"),
        line.get("memory_mb"),
        {name: one["rss_mb"] for name, one in processes.items() if one.get("rss_mb") is not None},
        {name: one["cpu"] for name, one in processes.items() if one.get("cpu") is not None},
        [
            Gpu(g.get("index", n), g.get("utilization"), g.get("memory_mb"), g.get("power_w"))
            for n, g in enumerate(gpus)
        ],
    )
