"""Panels of where the time goes: seconds of a step, one step as a Gantt chart, rates, the machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gymexp.report import figures
from gymexp.report.bottleneck import PHASES, tail_seconds
from gymexp.report.figures import Number, Values
from gymexp.report.learning_panels import NO_STEPS
from gymexp.report.panel import Chart, Figure, Panel
from gymexp.report.run_records import Record, RunRecords, Sample

NO_SPANS = "This run was made before gymexp kept spans (timeline.jsonl)."
_COLOURS = {
    "rollout": "--c1",
    "sync": "--c7",
    "logprobs": "--c5",
    "update": "--c2",
    "evaluation": "--c3",
    "other": "--c9",
    "checkpoint": "--c6",
    "save": "--c6",
}
_GANTT_STEPS = 4  # steps that a reader can choose from
_MAX_BARS = 256  # rollouts of an environment in a Gantt chart
_MAX_SAMPLES = 600  # of system.jsonl in a chart


def seconds_panel(records: RunRecords) -> Panel:
    """Panel 15: seconds of a step by phase, and the tail of its rollouts."""
    about = (
        "What a step's seconds go to. Tail: the time in which less than a quarter of its rollouts still play."
    )
    steps = records.step_numbers
    parts = {phase: records.series(f"time/{phase}") for phase in PHASES}
    charts = figures.over_steps("", figures.stack(steps, parts, _COLOURS), "s", height=280)
    tails: list[Number | None] = []
    for step in steps:
        tails.append(tail_seconds(records.rows_of_step.get(step, [])))
    traces = figures.line("tail", steps, tails, "--c8")
    traces += figures.line("all rollouts", steps, records.series("time/rollout"), "--c1")
    if any(value is not None for value in tails):
        charts += figures.over_steps("rollouts and their tail", traces, "s", rangemode="tozero", height=200)
    return Panel("seconds", "Seconds of a step", about, charts, notes=[] if charts else [NO_STEPS])


def gantt_panel(records: RunRecords) -> Panel:
    """Panel 16: the phases and the rollouts of a chosen step on the clock; the last step first."""
    about = (
        "Each thin bar is a rollout, from its start to its end. Strong: the policy samples (its total, "
        "drawn at the start); pale: the environment works. Before it, faint: it waits for its turn."
    )
    title = "One step on the clock"
    if not records.spans:
        return Panel("gantt", title, about, notes=[NO_SPANS if records.steps else NO_STEPS], wide=True)
    played = {span.step for span in records.spans if span.name == "rollout"}
    steps = sorted(played or {span.step for span in records.spans if span.name == "update"})[-_GANTT_STEPS:]
    choices = {f"step {step}": _gantt(records, step) for step in reversed(steps)}
    if not choices:
        return Panel("gantt", title, about, notes=[NO_STEPS], wide=True)
    return Panel("gantt", title, about, [Chart("", choices)], wide=True)


def _gantt(records: RunRecords, step: int) -> Figure:
    """Returns the chart of a step: a lane for each environment, below them one for each kind of phase."""
    spans = [span for span in records.spans if span.step == step]
    rows = [r for r in records.rows_of_step.get(step, ()) if _lasted(r)]
    began = min([span.began for span in spans] + [r["began"] for r in rows])
    traces: list[dict[str, Any]] = []
    lanes: list[tuple[float, str]] = []
    floor = 0.0
    names = [name for name in _COLOURS if any(span.name == name for span in spans)]
    for name in reversed(names):
        of_name = [span for span in spans if span.name == name]
        bars = [(floor + 0.5, span.began - began, span.seconds) for span in of_name]
        traces.append(_bars(name, bars, 0.7, _COLOURS[name], f"{name}: %{{x:.2f}} s<extra></extra>"))
        lanes.append((floor + 0.5, name))
        floor += 1
    colours = figures.colours_of(records.envs)
    for env in reversed(records.envs):
        of_env = sorted((r for r in rows if r["env"] == env), key=lambda r: r["began"])
        if not of_env:
            continue
        of_env = of_env[:: -(-len(of_env) // _MAX_BARS)]
        height = 4.0
        at = [floor + height * (1 - (i + 0.5) / len(of_env)) for i in range(len(of_env))]
        width = height / len(of_env)
        starts = [r["began"] - began for r in of_env]
        waits = [min(r["seconds"].get("queue", 0), max(0.0, s)) for r, s in zip(of_env, starts, strict=True)]
        queue = [(y, s - w, w) for y, s, w in zip(at, starts, waits, strict=True)]
        totals = [(y, s, r["seconds"]["total"]) for y, s, r in zip(at, starts, of_env, strict=True)]
        policy = [
            (y, s, min(r["seconds"].get("policy", 0), r["seconds"]["total"]))
            for y, s, r in zip(at, starts, of_env, strict=True)
        ]
        name = figures.label(env)
        traces.append(_bars("waits", queue, width, "--c9@0.18", "waits %{x:.2f} s<extra></extra>"))
        hover = f"{name}: %{{x:.2f}} s, from second %{{base:.2f}}<extra></extra>"
        traces.append(_bars(f"{name} rollouts", totals, width, f"{colours[env]}@0.4", hover))
        traces.append(
            _bars("policy", policy, width, colours[env], "of it the policy %{x:.2f} s<extra></extra>")
        )
        lanes.append((floor + height / 2, name))
        floor += height + 0.3
    layout = figures.layout("", f"seconds since step {step} began", height=int(90 + 26 * floor))
    layout |= {"barmode": "overlay", "showlegend": False, "hovermode": "closest", "bargap": 0}
    layout["yaxis"] |= {
        "tickmode": "array",
        "tickvals": [round(at, 2) for at, _ in lanes],
        "ticktext": [name for _, name in lanes],
        "showgrid": False,
        "range": [-0.2, round(floor + 0.2, 2)],
        "fixedrange": True,
    }
    layout["xaxis"] |= {"rangemode": "tozero"}
    return {"data": traces, "layout": layout}


def _lasted(row: Record) -> bool:
    return bool(row.get("began")) and "total" in (row.get("seconds") or {})


def _bars(
    name: str, bars: Sequence[tuple[float, float, float]], width: float, colour: str, hover: str
) -> dict[str, Any]:
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "y": [round(y, 3) for y, _, _ in bars],
        "base": [round(start, 3) for _, start, _ in bars],
        "x": [round(seconds, 3) for _, _, seconds in bars],
        "width": round(width, 4),
        "marker": {"color": colour, "line": {"width": 0}},
        "hovertemplate": hover,
    }


def rate_panel(records: RunRecords) -> Panel:
    """Panel 17: sampled tokens and rollouts a second."""
    about = (
        "Sampled tokens a second: while rollouts are played, and over the whole step; and rollouts a second."
    )
    steps = records.step_numbers
    if not steps:
        return Panel("rates", "Rates", about, notes=[NO_STEPS])
    tokens: list[float] = [0.0] * len(steps)
    rollouts: list[float] = [0.0] * len(steps)
    for env in records.envs:
        means, counts = records.env_series(env, "tokens"), records.env_series(env, "rollouts")
        for i, (mean, count) in enumerate(zip(means, counts, strict=True)):
            tokens[i] += (mean or 0) * (count or 0)
            rollouts[i] += count or 0
    playing, whole = records.series("time/rollout"), records.series("time/step")
    traces = figures.line("while sampling", steps, _per_second(tokens, playing), "--c1")
    traces += figures.line("over the step", steps, _per_second(tokens, whole), "--c2")
    trained = _trained_tokens(records)
    if any(trained):
        traces += figures.line("trained, over the step", steps, _per_second(trained, whole), "--c3")
    charts = figures.over_steps("tokens a second", traces, "tokens/s", rangemode="tozero")
    traces = figures.line("rollouts", steps, _per_second(rollouts, playing), "--c1")
    charts += figures.over_steps(
        "rollouts a second, while sampling", traces, "1/s", rangemode="tozero", height=200
    )
    notes = [] if any(trained) else ["Trained tokens: this run was made before gymexp counted them."]
    return Panel("rates", "Rates", about, charts, notes=notes)


def _trained_tokens(records: RunRecords) -> list[float]:
    by_step: dict[str, float] = {}
    for (file, _), row in records.trained.items():
        by_step[file] = by_step.get(file, 0) + (row.get("trained") or 0)
    return [by_step.get(f"step-{step:06d}", 0.0) for step in records.step_numbers]


def _per_second(amounts: Sequence[float], seconds: Values) -> list[Number | None]:
    return [amount / s if s else None for amount, s in zip(amounts, seconds, strict=True)]


def machine_panel(records: RunRecords) -> Panel:
    """Panel 18: load, memory and power of GPUs; CPU and memory of the machine and of the run's processes."""
    about = "Every 5 seconds: GPUs, and the processors and memory of the machine that runs the controller."
    samples = records.samples[:: -(-len(records.samples) // _MAX_SAMPLES)] if records.samples else []
    if not samples:
        reason = "Load of the machine: this run was made before gymexp measured it (system.jsonl)."
        return Panel("machine", "GPUs, CPU and memory", about, notes=[reason])
    minutes = [round((sample.time - samples[0].time) / 60, 2) for sample in samples]
    charts: list[Chart] = []
    gpus = sorted({gpu.index for sample in samples for gpu in sample.gpus})
    for title, field, unit in (
        ("load of the GPUs", "utilization", "share"),
        ("memory of the GPUs", "memory_mb", "MB"),
        ("power of the GPUs", "power_w", "W"),
    ):
        series = {f"GPU {index}": [_of_gpu(sample, index, field) for sample in samples] for index in gpus}
        charts += _over_minutes(title, minutes, series, unit)
    charts += _over_minutes("load of all cores", minutes, {"CPU": [s.cpu for s in samples]}, "share")
    charts += _over_minutes("cores that processes use", minutes, _by_process(samples, "cores"), "cores")
    memory: dict[str, Values] = {"machine": [s.memory_mb for s in samples]}
    charts += _over_minutes("memory", minutes, memory | _by_process(samples, "rss_mb"), "MB")
    notes = [] if gpus else ["GPUs: none on this machine, or its driver does not answer."]
    return Panel("machine", "GPUs, CPU and memory", about, charts, notes=notes, wide=True)


def _of_gpu(sample: Sample, index: int, field: str) -> Number | None:
    return next((getattr(gpu, field) for gpu in sample.gpus if gpu.index == index), None)


def _by_process(samples: Sequence[Sample], field: str) -> dict[str, Values]:
    """Returns the series of the four processes with the highest values."""
    peaks: dict[str, float] = {}
    for sample in samples:
        for name, value in getattr(sample, field).items():
            peaks[name] = max(peaks.get(name, 0.0), value)
    names = sorted(peaks, key=lambda name: -peaks[name])[:4]
    return {name: [getattr(sample, field).get(name) for sample in samples] for name in names}


def _over_minutes(title: str, minutes: Sequence[float], series: Mapping[str, Values], y: str) -> list[Chart]:
    colours = figures.colours_of(list(series))
    traces = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": figures.label(name),
            "x": list(minutes),
            "y": [figures.compact(value) for value in values],
            "line": {"color": colours[name], "width": 1.5},
        }
        for name, values in series.items()
        if any(value is not None for value in values)
    ]
    if not traces:
        return []
    layout = figures.layout(y, "minutes since the first measurement", height=290)
    layout["yaxis"] |= {"rangemode": "tozero"}
    return [Chart(title, {"": {"data": traces, "layout": layout}}, "minutes")]
