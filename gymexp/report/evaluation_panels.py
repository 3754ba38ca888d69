"""Panels and findings of an evaluation's directory, from its results.json and the index of its rollouts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gymexp.report import figures
from gymexp.report.findings import FAILED, TRUNCATED, Finding, held_out_change, reason_of_failures
from gymexp.report.held_out import compared, number
from gymexp.report.panel import Chart, Panel, Table
from gymexp.report.run_records import Record, RunRecords

PAYS = 0.1  # a mean reward for a canned reply from which it is a finding
_SENTENCE = (
    "Intervals are of 95 %, over the tasks and samples of one policy; they say nothing of other seeds."
)
_NOT_ENDED = "The evaluation has not played to its end yet: there is no results.json."


def results_panel(records: RunRecords) -> Panel:
    """The reward and the success of each policy in each environment, with their intervals."""
    title = "Results"
    if not records.results:
        return Panel("results", title, notes=[_NOT_ENDED], wide=True)
    head = [
        "policy",
        "environment",
        "scored",
        "failed",
        "reward",
        "95 % interval",
        "success",
        "95 % interval",
    ]
    has_failed = any(one["failed"] for _, _, one in _results(records))
    head += ["failures as 0"] if has_failed else []
    head += ["turns", "tokens p50 / p95", "truncated", "always / sometimes / never solved"]
    rows: list[list[str]] = []
    for label, env, one in _results(records):
        row = [label, env, f"{one['scored']}/{one['planned']}", str(one["failed"])]
        row += [*_with_interval(one["reward"]), *_with_interval(one["success"])]
        row += [number((one["reward_failures_as_zero"] or {}).get("mean"))] if has_failed else []
        row += [_short(one["turns"]), f"{_whole(one['tokens_p50'])} / {_whole(one['tokens_p95'])}"]
        row += [_percent(one["truncated"]), f"{one['always']} / {one['sometimes']} / {one['never']}"]
        rows.append(row)
    table = Table(head, rows, range(2, len(head)))
    charts = [
        chart
        for metric in ("reward", "success")
        for chart in _over_policies(metric, _series(records, metric))
    ]
    return Panel("results", title, _SENTENCE, charts, [table], wide=True)


def _results(records: RunRecords) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yields (the policy's label, environment, its numbers) of results.json."""
    for policy in records.results.get("policies", ()):
        for env, numbers in policy["envs"].items():
            yield policy["label"], env, numbers


def _series(records: RunRecords, metric: str) -> dict[str, dict[str, Mapping[str, float]]]:
    """Returns a metric's intervals by environment, then by the policy's label."""
    series: dict[str, dict[str, Mapping[str, float]]] = {}
    for label, env, numbers in _results(records):
        if numbers[metric]:
            series.setdefault(env, {})[label] = numbers[metric]
    return series


def _over_policies(metric: str, series: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[Chart]:
    traces: list[dict[str, Any]] = []
    for env, colour in figures.colours_of(list(series)).items():
        intervals = series[env].values()
        means = [one["mean"] for one in intervals]
        reaches = [(one["mean"] - one["low"], one["high"] - one["mean"]) for one in intervals]
        traces += figures.points(env, range(len(means)), means, colour, reaches)
        traces[-1] |= {"x": [figures.label(label) for label in series[env]], "mode": "markers"}
    if not traces:
        return []
    layout = figures.layout(metric, "", height=260)
    layout["xaxis"] |= {"type": "category"}
    layout["yaxis"] |= {"rangemode": "tozero"}
    return [Chart(f"{metric} by policy", {"": {"data": traces, "layout": layout}})]


def samples_panel(records: RunRecords) -> Panel:
    """pass@k, pass^k and best@k of each policy, if each task has several samples."""
    title = "Several samples"
    about = (
        "pass@k: at least one of k samples solves the task; pass^k: all of them do; best@k: the best reward "
        f"of k. {_SENTENCE}"
    )
    if not records.results:
        return Panel("samples", title, notes=[_NOT_ENDED])
    ks = sorted({int(k) for _, _, one in _results(records) for k in one["pass_at"]})
    if len(ks) < 2:
        reason = (
            "pass@k: not measured, as each task was played once; evaluation.samples=4 plays it four times."
        )
        return Panel("samples", title, notes=[reason])
    rows: list[list[str]] = []
    for label, env, one in _results(records):
        for name, metric in (("pass@k", "pass_at"), ("pass^k", "pass_hat"), ("best@k", "best_at")):
            cells = (" ".join(_with_interval(one[metric].get(str(k)))) for k in ks)
            rows.append([label, env, name, *cells])
    head = ["policy", "environment", "", *(f"k = {k}" for k in ks)]
    return Panel("samples", title, about, tables=[Table(head, rows, range(3, 3 + len(ks)))], wide=True)


def endings_panel(records: RunRecords) -> Panel:
    """How the rollouts of each policy ended: completed, cut off, refused, failed by cause."""
    about = "Numbers of rollouts. A failed one has no reward and stands outside every mean."
    counts: dict[tuple[str, str], Counter[str]] = {}
    for step, rows in records.rows_of_evaluation.items():
        for row in rows:
            counts.setdefault((records.name_of_evaluation(step), row["env"]), Counter())[_ending(row)] += 1
    if not counts:
        return Panel("endings", "How rollouts ended", notes=["No rollout has ended yet."])
    endings = sorted({ending for of_one in counts.values() for ending in of_one})
    table = [[label, env, *(str(count[one]) for one in endings)] for (label, env), count in counts.items()]
    head = ["policy", "environment", *endings]
    return Panel("endings", "How rollouts ended", about, tables=[Table(head, table, range(2, len(head)))])


def _ending(row: Record) -> str:
    if row.get("outcome") == "truncated":
        return f"cut off by {row.get('limit')}"
    if row.get("outcome") == "failed":
        return f"failed by {row.get('cause')}"
    return "refused" if row.get("refused") else "completed"


def find_in_evaluation(records: RunRecords) -> list[Finding]:
    """Returns the findings of an evaluation: what it measured, how the last policy differs from the first,
    what a grader pays for nothing, and what failed or was cut off."""
    kinds = {policy["kind"] for policy in records.results.get("policies", ())}
    labels = list(dict.fromkeys(label for label, _, _ in _results(records)))
    found: list[Finding | None] = []
    if kinds == {"probe"}:
        found += _paid(records)
    elif len(labels) == 1:
        parts = [_sentence(env, one) for _, env, one in _results(records)]
        found.append(Finding(f"{'; '.join(parts)}.", "results", "fact"))
    elif labels:
        first, last = (records.rows_of_evaluation[step] for step in _ends(records))
        change = held_out_change(compared(first, last))
        if change:
            text = change.text.replace("Held-out reward:", f"{labels[0]} → {labels[-1]}:", 1)
            found.append(Finding(text, "results", change.mark))
    for label, env, one in _results(records):
        rows = (row for rows in records.rows_of_evaluation.values() for row in rows if row["env"] == env)
        found.append(_lost(label, env, one, reason_of_failures(rows)))
    return [one for one in found if one]


def _ends(records: RunRecords) -> tuple[int, int]:
    return min(records.rows_of_evaluation), max(records.rows_of_evaluation)


def _sentence(env: str, one: Mapping[str, Any]) -> str:
    reward, success = (" ".join(_with_interval(one[metric])) for metric in ("reward", "success"))
    return f"{env}: reward {reward}, success {success}, {one['scored']} of {one['planned']} rollouts scored"


def _paid(records: RunRecords) -> list[Finding | None]:
    paid = [
        (one["reward"]["mean"], label, env)
        for label, env, one in _results(records)
        if one["reward"] and one["reward"]["mean"] >= PAYS
    ]
    if not paid:
        return [Finding(f"No canned reply is paid {PAYS} or more on average.", "results", "good")]
    return [
        Finding(
            f"The grader of {env} pays {mean:.3f} on average for “{label}”, which solves nothing.", "results"
        )
        for mean, label, env in sorted(paid, reverse=True)[:4]
    ]


def _lost(label: str, env: str, one: Mapping[str, Any], reason: str) -> Finding | None:
    failed = one["failed"] / one["planned"] if one["planned"] else 0.0
    cut = one["truncated"] or 0.0
    parts = [f"{failed:.1%} of the rollouts failed{f' ({reason})' * bool(reason)}"] if failed > FAILED else []
    parts += [f"a limit cut off {cut:.0%} of them"] if cut > TRUNCATED else []
    return Finding(f"{label} in {env}: {' and '.join(parts)}.", "endings") if parts else None


def _with_interval(interval: Mapping[str, float] | None) -> Sequence[str]:
    if not interval:
        return ["–", "–"]
    return [number(interval["mean"]), f"[{interval['low']:.3f}, {interval['high']:.3f}]"]


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _whole(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"
