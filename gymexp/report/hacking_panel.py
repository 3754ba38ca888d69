"""The panel of signs that a reward is gamed: its length, the diversity of answers, the verifiers' fields."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from gymexp.report import figures
from gymexp.report.figures import Number
from gymexp.report.learning_panels import NO_INDEX, NO_STEPS
from gymexp.report.panel import Chart, Panel, Table
from gymexp.report.rollout_panels import per_step
from gymexp.report.run_records import Record, RunRecords

_MAX_DOTS = 1_500  # rollouts in a scatter plot of one environment
_LAST_STEPS = 5
_MAX_CHARTS = 4  # fields of one environment's verifier that are shown over steps
_MAX_VALUES = 8  # of a field that is shown by value; one with more is no category


def hacking_panel(records: RunRecords) -> Panel:
    """Panel 20: reward against length, how alike the answers of a group are, what the verifiers said."""
    title = "Reward, length and diversity"
    about = (
        "Signs that an environment's reward is gamed rather than earned: reward that grows with length "
        "alone, one answer for every rollout of a group, a field of the verifier that goes another way than "
        "the reward. They are signs, not proof: read the rollouts."
    )
    newest, which = _newest(records)
    if not newest:
        return Panel("hacking", title, about, notes=[NO_INDEX if records.steps else NO_STEPS])
    charts = _dots_charts(records, newest, which)
    colours = figures.colours_of(records.envs)
    traces: list[dict[str, Any]] = []
    for env in records.envs:
        traces += figures.line(env, records.step_numbers, per_step(records, env, _diversity), colours[env])
    over_steps = "distinct last messages in a group, of its rollouts"
    charts += figures.over_steps(over_steps, traces, "share", range=[-0.02, 1.02])
    rows: list[list[str]] = []
    notes: list[str] = []
    for env in records.envs:
        of_env = [row for row in newest if row["env"] == env]
        found = _field_rows(env, of_env)
        rows += found
        charts += _field_charts(records, env)
        if of_env and not found:
            notes.append(_why_no_fields(env, of_env))
    head = ["environment", f"field of the verifier, {which}", "value", "share of rollouts", "mean reward"]
    tables = [Table(head, rows, (3, 4))] if rows else []
    return Panel("hacking", title, about, charts, tables, notes, wide=True)


def _newest(records: RunRecords) -> tuple[list[Record], str]:
    """Returns the scored rollouts of the last training steps, else of the newest evaluation; and in words
    which they are."""
    last = sorted(records.rows_of_step)[-_LAST_STEPS:]
    if last:
        rows = [row for step in last for env in records.envs for row in records.scored.get((step, env), ())]
        return rows, f"steps {last[0]} to {last[-1]}"
    if not records.rows_of_evaluation:
        return [], ""
    rows = records.rows_of_evaluation[max(records.rows_of_evaluation)]
    return [row for row in rows if row.get("reward") is not None], "the newest evaluation"


def _dots_charts(records: RunRecords, newest: Sequence[Record], which: str) -> list[Chart]:
    traces: list[dict[str, Any]] = []
    for env, colour in figures.colours_of(records.envs).items():
        rows = [row for row in newest if row["env"] == env and row.get("tokens") is not None]
        shown = rows[:: -(-len(rows) // _MAX_DOTS)] if rows else []
        trace = {
            "type": "scatter",
            "mode": "markers",
            "name": figures.label(env),
            "x": [row["tokens"] for row in shown],
            "y": [figures.compact(row["reward"]) for row in shown],
            "marker": {"color": f"{colour}@0.35", "size": 7},
            "hovertemplate": "%{x} tokens, reward %{y}<extra></extra>",
        }
        traces += [trace] if shown else []
    layout = figures.layout("reward", "sampled tokens", height=280) | {"hovermode": "closest"}
    return [Chart(f"rollouts of {which}", {"": {"data": traces, "layout": layout}})] if traces else []


def _diversity(rows: Sequence[Record]) -> float:
    """Returns the mean over groups of the share of last messages (their beginnings) that are distinct."""
    groups: dict[int | None, list[str]] = defaultdict(list)
    for row in rows:
        groups[row.get("group")].append(row.get("text", ""))
    return fmean(len(set(texts)) / len(texts) for texts in groups.values())


def _fields(rows: Iterable[Record]) -> dict[str, list[tuple[Any, Number]]]:
    """Returns the (value, reward of its rollout) of each field of the verifier, in its order."""
    found: dict[str, list[tuple[Any, Number]]] = defaultdict(list)
    for row in rows:
        for name, value in (row.get("verdict") or {}).items():
            found[name].append((value, row["reward"]))
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _field_rows(env: str, rows: Sequence[Record]) -> list[list[str]]:
    """Returns a line for each number, and for each value of a boolean or of a text with a few values."""
    lines: list[list[str]] = []
    for name, pairs in _fields(rows).items():
        values = [value for value, _ in pairs]
        if all(map(_is_number, values)):
            share = len(values) / len(rows)
            lines.append([env, name, f"mean {fmean(values):.4g}", f"{share:.3f}", "–"])
            continue
        counts = Counter(map(str, values))
        if len(counts) > _MAX_VALUES or (len(counts) == 1 and isinstance(values[0], str)):
            continue  # answers, or the same of every rollout
        for value, count in counts.most_common():
            mean = fmean(reward for one, reward in pairs if str(one) == value)
            lines.append([env, name, value, f"{count / len(rows):.3f}", f"{mean:.3f}"])
    return lines


def _field_charts(records: RunRecords, env: str) -> list[Chart]:
    """Returns the means of an environment's numbers, and the shares of its booleans, over steps."""
    last = max(records.rows_of_step, default=0)
    fields = _fields(records.scored.get((last, env), ()))
    counted = [name for name, pairs in fields.items() if isinstance(pairs[0][0], bool | int | float)]
    charts: list[Chart] = []
    for name in counted[:_MAX_CHARTS]:

        def mean(rows: Sequence[Record], name: str = name) -> Number | None:
            values = [value for value, _ in _fields(rows).get(name, ()) if isinstance(value, int | float)]
            return fmean(values) if values else None

        is_share = isinstance(fields[name][0][0], bool)
        colour = figures.colours_of(records.envs)[env]
        traces = figures.line(name, records.step_numbers, per_step(records, env, mean), colour)
        text = f"{env}: share with {name}" if is_share else f"{env}: {name}, mean"
        unit = "share" if is_share else ""
        charts += figures.over_steps(text, traces, unit, rangemode="tozero", height=200)
    for chart in charts:
        chart.figures[""]["layout"]["showlegend"] = False
    return charts


def _why_no_fields(env: str, rows: Sequence[Record]) -> str:
    if all("verdict" not in row for row in rows):
        return f"Fields of the verifier of {env}: this run was made before gymexp kept them in its index."
    return f"The verifier of {env} says no yes or no, number or word beside the reward."
