"""Panels that describe a run: its events, its configuration, its versions and how to make it again."""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
from collections.abc import Iterator, Mapping
from typing import Any

from gymexp.config.redaction import without_secrets
from gymexp.config.schema import EnvConfig, RunConfig
from gymexp.printable import duration
from gymexp.report.panel import Panel, Table
from gymexp.report.run_records import RunRecords

_MAX_EVENTS = 200
_NOT_SETTINGS = ("resume", "output_dir")


def event_panel(records: RunRecords) -> Panel:
    """Panel 21: the run's starts, phases, checkpoints and end."""
    about = "The times of day are those of the machine that ran it (UTC on this page)."
    lines = [line for line in records.events if isinstance(line.get("time"), int | float)]
    spans = [span for span in records.spans if span.name in ("checkpoint", "save")]
    rows = [(line["time"], _event_text(line)) for line in lines]
    rows += [(s.began, f"{s.name} of step {s.step} ({s.seconds:.1f} s)") for s in spans]
    rows.sort()
    if not rows:
        return Panel("events", "Events", about, notes=["timeline.jsonl is missing or empty."])
    began = rows[0][0]
    notes = [f"The last {_MAX_EVENTS} of {len(rows)} events."] if len(rows) > _MAX_EVENTS else []
    table = [[clock_text(at), f"+{duration(max(0, at - began))}", text] for at, text in rows[-_MAX_EVENTS:]]
    run = records.run
    if run.ended:
        table.append(["", "", f"{run.state}{f': {run.why}' if run.why else ''}"])
    return Panel(
        "events", "Events", about, tables=[Table(["time", "since the start", "what"], table)], notes=notes
    )


def _event_text(line: Mapping[str, Any]) -> str:
    what = str(line.get("event") or f"phase: {line.get('phase')}")
    more = {k: v for k, v in line.items() if k not in ("time", "seconds", "event", "phase")}
    return what + (f" {json.dumps(more)}" if more else "")


def clock_text(at: float) -> str:
    """Returns a time of day as text, in UTC."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at))
    except (OverflowError, ValueError, OSError):
        return "–"


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a nested configuration as dotted keys; lists stay as they are."""
    values: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            values |= flat(value, f"{prefix}{name}.")
        else:
            values[f"{prefix}{name}"] = value
    return values


def defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the schema's defaults as dotted keys, with those of each environment of the configuration."""
    values = flat(_plain(RunConfig))
    envs = config.get("env")
    for env in envs if isinstance(envs, Mapping) else ():
        values |= flat(_plain(EnvConfig), f"env.{env}.")
    return values


def _plain(schema: type) -> dict[str, Any]:
    """Returns a dataclass's defaults as nested dicts."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(schema):
        factory = field.default_factory
        if factory is not dataclasses.MISSING:
            values[field.name] = (
                _plain(factory)
                if isinstance(factory, type) and dataclasses.is_dataclass(factory)
                else factory()
            )
        else:
            values[field.name] = field.default
    return values


def differences(records: RunRecords) -> Iterator[tuple[str, str, str, str]]:
    """Yields (key, default, value, where it was set) of each setting that is not the schema's default."""
    known, said = defaults(records.config), {o.lstrip("+~").partition("=")[0] for o in records.overrides}
    for key, value in flat(records.config).items():
        default = known.get(key)
        if value == default or key in _NOT_SETTINGS:
            continue
        given = any(key == one or key.startswith(f"{one}.") for one in said)
        shown = "–" if key not in known or default == "???" else _value(default)
        yield key, shown, _value(value), "command line" if given else "an option's file"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def config_panel(records: RunRecords) -> Panel:
    """Panel 22: the settings that are not the defaults; the whole configuration folded."""
    about = "Settings that differ from the schema's defaults, and where their value comes from."
    if not records.config:
        return Panel("config", "Configuration", about, notes=["config.yaml is missing."])
    rows = [[without_secrets(cell) for cell in row] for row in differences(records)]
    whole = json.dumps(records.config, indent=1, ensure_ascii=False, default=str)
    texts = {"the whole configuration": without_secrets(whole)}
    return Panel(
        "config",
        "Configuration",
        about,
        tables=[Table(["key", "default", "value", "set by"], rows)],
        texts=texts,
        wide=True,
    )


def reproduce_command(records: RunRecords) -> str:
    """Returns the command that makes the run again, with the overrides of its own."""
    kept = [o for o in records.overrides if o.partition("=")[0] not in ("output_dir", "hydra.run.dir")]
    command = "evaluate" if records.is_evaluation else "train"
    return " ".join([f"python -m gymexp.{command}", *map(shlex.quote, kept)])


def version_panel(records: RunRecords) -> Panel:
    """Panel 23: versions, commit, data, and the commands to make it again, resume it and look at it."""
    dirty = " with local changes (code/git-diff.txt)" if records.is_dirty else ""
    facts = [["commit", f"{records.commit[:12]}{dirty}" if records.commit else "unknown: no git"]]
    facts += [
        [line.partition(" ")[0], line.partition(" ")[2]] for line in records.versions.splitlines() if line
    ]
    facts += [["machine", str(records.run.status["host"])]] if records.run.status.get("host") else []
    tables = [Table(["what", "version"], facts)]
    envs = records.mix.get("envs")
    data = [
        [str(env), split, str(one.get(f"{split}_sha256", ""))[:16], str(one.get("source", ""))]
        for env, one in (envs.items() if isinstance(envs, dict) else ())
        if isinstance(one, dict)
        for split in ("train", "validation")
        if one.get(f"{split}_sha256")
    ]
    if data:
        tables.append(Table(["environment", "tasks", "sha256", "source"], data))
    path = shlex.quote(str(records.path))
    commands = [without_secrets(reproduce_command(records))]
    if not records.is_evaluation:
        commands.append(f"python -m gymexp.train resume={path}")
    commands += [f"python -m gymexp.rollouts {path} --worst", f"python -m gymexp.view {path}"]
    tables.append(Table(["command"], [[command] for command in commands]))
    return Panel("versions", "Versions and commands", "What is needed to make this run again.", tables=tables)
