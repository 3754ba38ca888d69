"""Panels that show whether a run learns: held-out and training reward, success, pass@k, groups by kind."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from gymexp.report import figures
from gymexp.report.figures import Number
from gymexp.report.held_out import HeldOut, compared, mean_by_task, number, p_text, rewards_by_task
from gymexp.report.panel import Chart, Panel, Table
from gymexp.report.run_records import Record, RunRecords
from gymexp.statistics import EnvSummary, Interval, reward_interval, success_interval, summarize

NO_STEPS = "No optimizer step has ended yet."
NO_INDEX = "rollouts/index.jsonl is missing: this run was made before gymexp kept an index of rollouts."
KINDS = {
    "mixed": "--c3",
    "all_solved": "--c1",
    "none_solved": "--c2",
    "flat": "--c6",
    "failed": "--c8",
}
SENTENCE = (
    "Intervals are over tasks and samples of this one policy; they say nothing of other training seeds."
)
_SMOOTH = 10  # steps of the running median


def held_out(records: RunRecords) -> dict[str, HeldOut]:
    """Returns the first and the newest evaluation of each environment that was evaluated. Its mean rewards
    are those of the metrics, if a run has them."""
    rewards = {env: of_env for env in records.envs if (of_env := _reward_by_evaluation(records, env))}
    steps = sorted({step for of_env in rewards.values() for step in of_env})
    if not steps:
        return {}
    first, last = (records.rows_of_evaluation.get(step, []) for step in (steps[0], steps[-1]))
    found = compared(first if len(steps) > 1 else [], last)
    return {
        env: dataclasses.replace(
            found.get(env, HeldOut(None, None)),
            reward_before=of_env.get(steps[0]) if len(steps) > 1 else None,
            reward_after=of_env.get(steps[-1]),
        )
        for env, of_env in rewards.items()
    }


def _reward_by_evaluation(records: RunRecords, env: str) -> dict[int, Number]:
    """Returns the mean held-out reward by the evaluation's step, from the metrics, else from rollouts."""
    rewards = dict(records.held_out_series(env, "reward"))
    for step, rows in records.rows_of_evaluation.items():
        if step not in rewards and (by_task := mean_by_task(rows, env)):
            rewards[step] = sum(by_task.values()) / len(by_task)
    return rewards


def held_out_panel(records: RunRecords) -> Panel:
    """Panel 1: held-out reward of each environment with its 95 % interval; first and last as a table."""
    panel = "Held-out reward"
    about = f"The policy on tasks that it never trains on, with 95 % intervals. {SENTENCE}"
    charts: list[Chart] = []
    colours = figures.colours_of(records.envs)
    for env in records.envs:
        rewards = _reward_by_evaluation(records, env)
        if not rewards:
            continue
        steps = sorted(rewards)
        reaches = []
        for step in steps:
            interval = reward_interval(rewards_by_task(records.rows_of_evaluation.get(step, []), env))
            mean = rewards[step]
            reaches.append(
                (max(0.0, mean - interval.low), max(0.0, interval.high - mean)) if interval else (0, 0)
            )
        traces = figures.points(env, steps, [rewards[step] for step in steps], colours[env], reaches)
        traces[-1]["meta"] = figures.EVALUATION
        charts += figures.over_steps(env, traces, "reward")
        layout = charts[-1].figures[""]["layout"]
        layout["showlegend"] = False
        if len(steps) == 1 and records.steps:  # plotly would show the steps from -1 to 1
            layout["xaxis"]["range"] = [-0.5, max(steps[0], records.step_numbers[-1]) + 0.5]
    if not charts:
        return Panel("held-out", panel, about, notes=["No evaluation has ended yet."], wide=True)
    notes = [] if records.rows else [f"No intervals: {NO_INDEX}"]
    return Panel("held-out", panel, about, charts, [_held_out_table(records)], notes, wide=True)


def _held_out_table(records: RunRecords) -> Table:
    head = [
        "environment",
        "first",
        "last",
        "change",
        "95 % interval",
        "p (Holm)",
        "tasks better / same / worse",
    ]
    head += ["detectable", "scored"]
    rows = []
    for env, one in held_out(records).items():
        change, planned = one.change, one.num_scored + one.num_failed
        before, after = one.reward_before, one.reward_after
        plain = after - before if before is not None and after is not None else None
        rows.append(
            [
                env,
                number(after if before is None else before),
                number(None if before is None else after),
                number(change.mean if change else plain, "+"),
                f"[{change.low:+.3f}, {change.high:+.3f}]" if change else "–",
                p_text(one.p),
                f"{change.better} / {change.same} / {change.worse}" if change else "–",
                f"±{change.detectable:.3f}" if change else "–",
                f"{one.num_scored}/{planned}" if planned else "–",
            ]
        )
    return Table(head, rows, range(1, 9))


def reward_panel(records: RunRecords) -> Panel:
    """Panel 2: training reward of each environment, with a running median and the spread of the rollouts."""
    about = "Thin: each step; thick: median of 10 steps; area: the middle 80 % of the rollouts of a step."
    charts: list[Chart] = []
    colours = figures.colours_of(records.envs)
    for env in records.envs:
        values = records.env_series(env, "reward")
        if all(value is None for value in values):
            continue
        lows, highs = _quantiles(records, env)
        steps, colour = records.step_numbers, colours[env]
        at, shown_lows, _, _ = figures.bucketed(steps, lows)
        shown_highs = figures.bucketed(steps, highs)[3]
        traces = figures.band(at, shown_lows, shown_highs, colour, "middle 80 %")
        traces += figures.line("each step", steps, values, colour, faint=True)
        traces += figures.line("median of 10 steps", steps, running_median(values), colour)
        charts += figures.over_steps(env, traces, "reward")
    notes = [] if charts else [NO_STEPS]
    if charts and not records.rows:
        notes = [f"No spread of rollouts: {NO_INDEX}"]
    return Panel("reward", "Training reward", about, charts, notes=notes, wide=True)


def running_median(values: Sequence[Number | None], length: int = _SMOOTH) -> list[Number | None]:
    """Returns the median of each value and of those before it, `length` in all."""
    smooth: list[Number | None] = []
    for end in range(1, len(values) + 1):
        measured = [value for value in values[max(0, end - length) : end] if value is not None]
        smooth.append(median(measured) if measured else None)
    return smooth


def quantile(ordered: Sequence[Number], share: float) -> Number:
    """Returns a quantile of ordered values: the value whose rank is nearest."""
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def _quantiles(records: RunRecords, env: str) -> tuple[list[Number | None], list[Number | None]]:
    """Returns the 10 % and 90 % quantiles of an environment's rewards at each of `steps`."""
    lows: list[Number | None] = []
    highs: list[Number | None] = []
    for step in records.step_numbers:
        rewards = sorted(row["reward"] for row in records.scored.get((step, env), ()))
        lows.append(quantile(rewards, 0.1) if rewards else None)
        highs.append(quantile(rewards, 0.9) if rewards else None)
    return lows, highs


def success_panel(records: RunRecords) -> Panel:
    """Panel 3: share of rollouts that count as solved, in training and held-out."""
    about = (
        "Share of rollouts with at least env.<name>.success_reward. Lines: training, the "
        "median of 10 steps; points: held-out."
    )
    colours = figures.colours_of(records.envs)
    traces: list[dict[str, Any]] = []
    for env in records.envs:
        smooth = running_median(records.env_series(env, "success"))
        traces += figures.line(env, records.step_numbers, smooth, colours[env])
        by_step = dict(records.held_out_series(env, "success"))
        if by_step:
            steps = sorted(by_step)
            reaches = [_success_reach(records, env, step, by_step[step]) for step in steps]
            values = [by_step[step] for step in steps]
            traces += figures.points(f"{env} held-out", steps, values, colours[env], reaches)
            traces[-1] |= {"meta": figures.EVALUATION, "line": traces[-1]["line"] | {"dash": "dot"}}
    charts = figures.over_steps("", traces, "success", range=[-0.02, 1.02])
    return Panel("success", "Success", about, charts, notes=[] if charts else [NO_STEPS])


def _success_reach(records: RunRecords, env: str, step: int, mean: Number) -> tuple[Number, Number]:
    by_task: dict[str, list[bool]] = defaultdict(list)
    for row in records.rows_of_evaluation.get(step, []):
        if row["env"] == env and row.get("reward") is not None:
            by_task[row["key"]].append(bool(row.get("success")))
    interval: Interval | None = success_interval(by_task)
    return (max(0.0, mean - interval.low), max(0.0, interval.high - mean)) if interval else (0, 0)


def pass_panel(records: RunRecords) -> Panel:
    """Panel 4: pass@k of the last evaluation, if it has several samples a task, and of training's groups."""
    about = "Share of training groups with at least one solved rollout; held-out pass@k with several samples."
    colours = figures.colours_of(records.envs)
    traces: list[dict[str, Any]] = []
    for env in records.envs:
        shares = [_solved_share(records.rows_of_step.get(step, ()), env) for step in records.step_numbers]
        traces += figures.line(env, records.step_numbers, running_median(shares), colours[env])
    charts = figures.over_steps(
        "training groups solved at least once, median of 10 steps", traces, "share", range=[-0.02, 1.02]
    )
    tables = [table for table in [_pass_table(records)] if table]
    notes = []
    if not tables:
        notes.append("Held-out pass@k: not measured, as an evaluation of a run plays each task once.")
    if not charts:
        notes.append(NO_STEPS if records.rows or not records.steps else NO_INDEX)
    return Panel("pass", "pass@k", about, charts, tables, notes)


def _solved_share(rows: Iterable[Record], env: str) -> float | None:
    groups: dict[int | None, bool] = {}
    for row in rows:
        if row["env"] == env:
            groups[row.get("group")] = groups.get(row.get("group"), False) or bool(row.get("success"))
    return sum(groups.values()) / len(groups) if groups else None


def summaries(records: RunRecords) -> dict[str, EnvSummary]:
    """Returns the statistics of the last evaluation of each environment, from the index."""
    if not records.rows_of_evaluation:
        return {}
    rows = records.rows_of_evaluation[max(records.rows_of_evaluation)]
    found = {}
    for env in records.envs:
        # Turns and tokens have no part in what is shown of these.
        of_env = [{**row, "turns": 0, "tokens": 0} for row in rows if row["env"] == env]
        if of_env:
            found[env] = summarize(
                of_env, len(of_env), float(records.setting(f"env.{env}.success_reward", 1.0))
            )
    return found


def _pass_table(records: RunRecords) -> Table | None:
    by_env = summaries(records)
    ks = sorted({k for summary in by_env.values() for k in summary.pass_at})
    if len(ks) < 2:
        return None

    def cells(values: Mapping[int, Interval]) -> list[str]:
        intervals = (values.get(k) for k in ks)
        return [f"{i.mean:.3f} [{i.low:.2f}, {i.high:.2f}]" if i else "–" for i in intervals]

    rows = []
    for env, summary in by_env.items():
        rows.append([env, "pass@k", *cells(summary.pass_at)])
        rows.append([env, "pass^k", *cells(summary.pass_hat)])
        rows.append([env, "best@k", *cells(summary.best_at)])
    return Table(["environment", "", *(f"k = {k}" for k in ks)], rows, range(2, 2 + len(ks)))


def groups_panel(records: RunRecords) -> Panel:
    """Panel 5: groups by kind, of each environment. Only a mixed group gives a gradient."""
    about = (
        "A group is the rollouts of one task in a step. Only a mixed one has a gradient: where all rewards "
        "are equal, every advantage is 0."
    )
    charts: list[Chart] = []
    colours = {kind.replace("_", " "): colour for kind, colour in KINDS.items()}
    for env in records.envs:
        parts = {kind.replace("_", " "): records.env_series(env, f"groups_{kind}") for kind in KINDS}
        traces = figures.stack(records.step_numbers, parts, colours)
        charts += figures.over_steps(env, traces, "share of groups", range=[0, 1])
    notes = (
        []
        if charts or not records.steps
        else ["Groups by kind: this run was made before gymexp counted them."]
    )
    if not charts:
        flat = records.series("groups_without_variance")
        traces = figures.line("groups without variance", records.step_numbers, flat, "--c2")
        charts = figures.over_steps("all environments", traces, "share of groups", range=[0, 1])
    return Panel("groups", "Groups by kind", about, charts, notes=notes if records.steps else [NO_STEPS])
