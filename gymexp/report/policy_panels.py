"""Panels of the policy's update: entropy, KL, ratios and drift, clipping, loss, advantages."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from gymexp.report import figures
from gymexp.report.figures import Number
from gymexp.report.learning_panels import NO_STEPS, quantile
from gymexp.report.panel import Chart, Panel
from gymexp.report.run_records import RunRecords

_DRIFT_LIMIT = {"float32": 0.001}  # rollout.max_drift's default by model.dtype; else 0.02


def max_drift(records: RunRecords) -> float:
    """Returns the bound on the drift that ends the run."""
    limit = records.setting("rollout.max_drift")
    return float(limit if limit is not None else _DRIFT_LIMIT.get(records.setting("model.dtype", ""), 0.02))


def entropy_panel(records: RunRecords) -> Panel:
    """Panel 6: TRL's entropy of the policy, and each environment's mean -log-probability of a token."""
    about = (
        "The policy's entropy over all tokens (TRL's), and for each environment the mean -log-probability of "
        "a sampled token: at temperature 1 an unbiased estimate of the entropy there. In nats."
    )
    colours = figures.colours_of(records.envs)
    traces = figures.line(
        "entropy (TRL)", records.step_numbers, records.series("entropy"), "--c9", dash="dot"
    )
    for env in records.envs:
        traces += figures.line(env, records.step_numbers, records.env_series(env, "nll"), colours[env])
    charts = figures.over_steps("", traces, "nats a token", rangemode="tozero")
    return Panel("entropy", "Entropy", about, charts, notes=[] if charts else [NO_STEPS])


def kl_panel(records: RunRecords) -> Panel:
    """Panel 7: KL to the reference policy, and between engine and trainer."""
    about = (
        "KL divergence to the reference policy, as TRL estimates it, and between the engine and the trainer."
    )
    steps = records.step_numbers
    traces = figures.line("to the reference", steps, records.series("kl"), "--c1")
    between = figures.line("engine to trainer", steps, records.series("sampling/kl"), "--c2")
    notes = []
    if not traces:
        beta = records.setting("trainer.beta", 0.0) or 0.0
        known = f"not measured, trainer.beta={beta:g}" if isinstance(beta, int | float) else "not measured"
        notes.append(f"KL to the reference: {known}. With trainer.beta above 0 it is part of the loss.")
    if not between:
        notes.append(
            "KL of engine and trainer: not measured; the panel of ratios has their log-probabilities."
        )
    charts = figures.over_steps("", [*traces, *between], "nats")
    return Panel("kl", "KL", about, charts, notes=notes)


def ratio_panel(records: RunRecords) -> Panel:
    """Panel 8: ratio of trainer to engine, difference of log-probabilities, drift with its bound."""
    about = "Whether tokens were sampled from the policy that is trained: the trainer's probabilities "
    about += "against the engine's."
    steps, charts, notes = records.step_numbers, [], []
    traces: list[dict[str, Any]] = []
    for part, colour in {"mean": "--c9", "max": "--c2"}.items():
        traces += figures.line(part, steps, records.series(f"sampling/ratio_{part}"), colour)
    charts += figures.over_steps("ratio trainer / engine of a trained token", traces, "ratio")
    traces = []
    for part, colour in {"min": "--c1", "mean": "--c9", "max": "--c2"}.items():
        series = records.series(f"sampling/importance_sampling_ratio/{part}")
        traces += figures.line(part, steps, series, colour)
    charts += figures.over_steps("TRL's importance weights", traces, "weight")
    traces = figures.line("cut off", steps, records.series("sampling/clipped"), "--c4")
    charts += figures.over_steps("ratios that the correction cuts off", traces, "share", rangemode="tozero")
    traces = []
    for part, colour in {"mean": "--c1", "max": "--c2"}.items():
        series = records.series(f"sampling/sampling_logp_difference/{part}")
        traces += figures.line(part, steps, series, colour)
    charts += figures.over_steps("|Δ log-probability| of a token", traces, "nats")
    charts += _drift_charts(records)
    sizes = figures.line("effective", steps, records.series("sampling/effective_sample_size"), "--c3")
    charts += figures.over_steps("effective sample size of the ratios", sizes, "share", range=[0, 1.02])
    if not charts:
        notes.append(NO_STEPS if not records.steps else "This run measured neither ratio nor drift.")
    return Panel("ratio", "Ratio and drift", about, charts, notes=notes)


def _drift_charts(records: RunRecords) -> list[Chart]:
    colours = figures.colours_of(records.envs)
    drift = {env: records.env_series(env, "drift") for env in records.envs}
    drift = {env: values for env, values in drift.items() if any(v is not None for v in values)}
    traces: list[dict[str, Any]] = []
    for env, values in drift.items():
        at = [i for i, value in enumerate(values) if value is not None]
        steps = [records.step_numbers[i] for i in at]
        traces += figures.points(env, steps, [values[i] for i in at], colours[env])
    charts = figures.over_steps("drift: mean |Δ log-probability|", traces, "nats")
    for chart in charts:
        chart.figures[""]["layout"] |= figures.threshold(max_drift(records), "rollout.max_drift")
        chart.figures[""]["layout"]["yaxis"] |= {"type": "log", "exponentformat": "power", "dtick": 1}
        value = max_drift(records)
        # On a logarithmic axis, plotly takes a note's position as the logarithm, but a shape's as the value.
        chart.figures[""]["layout"]["annotations"][0]["y"] = round(math.log10(value), 4) if value > 0 else 0
    return charts


def clip_panel(records: RunRecords) -> Panel:
    """Panel 9: the share of tokens whose ratio the loss clips."""
    about = "Share of tokens whose probability ratio is outside the loss's bounds. 0 with one update a batch."
    steps = records.step_numbers
    names = {
        "clip_ratio/region_mean": ("any", "--c9"),
        "clip_ratio/low_mean": ("low, mean", "--c1"),
        "clip_ratio/low_min": ("low, min", "--c7"),
        "clip_ratio/high_mean": ("high, mean", "--c2"),
        "clip_ratio/high_max": ("high, max", "--c4"),
        "cispo_clip_ratio": ("CISPO", "--c3"),
    }
    traces: list[dict[str, Any]] = []
    for name, (text, colour) in names.items():
        traces += figures.line(text, steps, records.series(name), colour)
    for number, name in enumerate(_names_that_start(records, "vespo/")):
        traces += figures.line(name, steps, records.series(name), f"--c{5 + number % 5}")
    charts = figures.over_steps("", traces, "share of tokens", rangemode="tozero")
    empty = f"Clipping: trainer.loss_type={records.setting('trainer.loss_type')} reports none."
    notes = [] if charts else [empty if records.steps else NO_STEPS]
    return Panel("clip", "Clipping", about, charts, notes=notes)


def _names_that_start(records: RunRecords, prefix: str) -> list[str]:
    return sorted({name for entry in records.steps[-1:] for name in entry if name.startswith(prefix)})


def loss_panel(records: RunRecords) -> Panel:
    """Panel 10: loss, gradient norm, learning rate."""
    about = "The loss of a step's batch (near 0 for GRPO, where advantages add up to 0), and its gradient."
    steps, charts = records.step_numbers, []
    for title, name, colour in (
        ("gradient norm", "grad_norm", "--c2"),
        ("loss", "loss", "--c1"),
        ("learning rate", "learning_rate", "--c3"),
    ):
        traces = figures.line(title, steps, records.series(name), colour)
        height = 190
        charts += figures.over_steps(title, traces, "", height=height, exponentformat="power")
        for chart in charts[-1:] if traces else ():
            chart.figures[""]["layout"]["showlegend"] = False
    return Panel("loss", "Loss and gradient", about, charts, notes=[] if charts else [NO_STEPS])


def advantage_panel(records: RunRecords) -> Panel:
    """Panel 11: the advantages of a step's rollouts: their spread, and how many are not 0."""
    about = "An advantage is how much better a rollout was than its group. A rollout with 0 changes nothing."
    by_step = _advantages(records)
    if not by_step:
        reason = "Advantages: this run was made before gymexp kept them (rollouts/train_index.jsonl)."
        return Panel("advantages", "Advantages", about, notes=[reason if records.steps else NO_STEPS])
    steps = sorted(by_step)
    columns = {name: [by_step[step][name] for step in steps] for name in ("low", "high", "middle", "nonzero")}
    traces = figures.band(steps, columns["low"], columns["high"], "--c1", "5–95 %")
    traces += figures.line("95 %", steps, columns["high"], "--c1", faint=True)
    traces += figures.line("median", steps, columns["middle"], "--c1")
    traces += figures.line("5 %", steps, columns["low"], "--c1", faint=True)
    charts = figures.over_steps("advantages of the rollouts", traces, "advantage")
    traces = figures.line("not 0", steps, columns["nonzero"], "--c3")
    charts += figures.over_steps(
        "rollouts whose advantage is not 0", traces, "share", range=[-0.02, 1.02], height=190
    )
    return Panel("advantages", "Advantages", about, charts)


def _advantages(records: RunRecords) -> dict[int, Mapping[str, Number]]:
    values: dict[int, list[float]] = defaultdict(list)
    for (file, _), row in records.trained.items():
        step = file.rpartition("-")[2]
        if isinstance(row.get("advantage"), int | float) and step.isdigit():
            values[int(step)].append(row["advantage"])
    found: dict[int, Mapping[str, Number]] = {}
    for step, advantages in values.items():
        ordered = sorted(advantages)
        found[step] = {
            "low": quantile(ordered, 0.05),
            "middle": quantile(ordered, 0.5),
            "high": quantile(ordered, 0.95),
            "nonzero": sum(value != 0 for value in ordered) / len(ordered),
        }
    return found
