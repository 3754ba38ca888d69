"""The table that a run prints at its end: held-out reward before and after training, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gymexp.report.held_out import HeldOut, number, p_text
from gymexp.statistics import Interval

_INTERVALS = "± and [ ] are 95 % intervals over tasks and samples; they say nothing of other training seeds."
_CHANGES = (
    "change, its interval and p are over the tasks that both evaluations scored, paired by task; p is by\n"
    "sign flips and adjusted for the number of environments (Holm). Of true changes as large as detectable,\n"
    "such a comparison finds four of five."
)


def held_out_table(result: Mapping[str, Any], held_out: Mapping[str, HeldOut]) -> str:
    """Returns the table of a result.json as plain text; "" if nothing was evaluated.

    Below the table is a line for each environment with the rollouts that were scored, planned and failed.
    """
    of_result: Mapping[str, Mapping[str, Any]] = result.get("held_out", {})
    if not of_result:
        return ""
    changes = {env: found.change for env, found in held_out.items() if found.change}
    table = [["held-out reward", "before", "after", "change"]]
    if changes:
        table[0] += ["95 % interval", "p", "detectable", "tasks"]
    for env, metrics in of_result.items():
        before, after = metrics.get("reward", [None, None])
        found = held_out.get(env)
        change = number(after - before, "+") if before is not None and after is not None else "–"
        row = [
            env,
            _with_interval(before, found and found.before),
            _with_interval(after, found and found.after),
            change,
        ]
        if paired := changes.get(env):
            p = held_out[env].p
            row[3] = number(paired.mean, "+")
            row += [f"[{paired.low:+.3f}, {paired.high:+.3f}]", p_text(p)]
            row += [number(paired.detectable)]
            row += [f"{paired.better} better, {paired.worse} worse of {paired.num_tasks}"]
        table.append(row + ["–"] * (len(table[0]) - len(row)))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table]
    lines += [line for env, metrics in of_result.items() if (line := _counts(env, metrics))]
    lines += [_INTERVALS] if held_out else []
    return "\n".join([*lines, _CHANGES] if changes else lines)


def _counts(env: str, metrics: Mapping[str, Sequence[float | None]]) -> str:
    """Returns the numbers of rollouts that were scored, planned and failed in each evaluation, and if any
    failed, the mean reward with these as 0. Empty if the evaluations did not count them."""
    parts = []
    for place, name in enumerate(("before", "after")):
        num, failed, too_long, reward = (
            metrics.get(metric, [None, None])[place]
            for metric in ("rollouts", "failed", "prompts_too_long", "reward")
        )
        if num is None or failed is None:
            continue
        unscored = round(num * (failed + (too_long or 0.0)))
        part = f"{name} {num - unscored:.0f} of {num:.0f} scored, {unscored} failed"
        if unscored and reward is not None:
            part += f" (reward {reward * (num - unscored) / num:.3f} with these as 0)"
        parts.append(part)
    return f"{env}: {'; '.join(parts)}" if parts else ""


def _with_interval(value: float | None, interval: Interval | None) -> str:
    return number(value) + (
        f" ± {(interval.high - interval.low) / 2:.3f}" if value is not None and interval else ""
    )
