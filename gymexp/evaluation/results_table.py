"""The table of an evaluation's results as plain text. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gymexp.statistics import EnvSummary, Interval

_NOTE = (
    "Intervals are of 95 %, over the tasks and samples of this one policy. They say nothing of other "
    "training seeds."
)


def results_table(summaries: Mapping[str, Mapping[str, EnvSummary]], samples: int) -> str:
    """Returns the table: a row for each policy and environment, then what the numbers leave open.

    summaries: by the policies' labels, then by environment. samples: of each task.
    """
    several = len(summaries) > 1
    has_failed = any(summary.failed for of_envs in summaries.values() for summary in of_envs.values())
    ks = sorted({max(s.pass_at, default=1) for of_envs in summaries.values() for s in of_envs.values()})
    k = ks[-1] if ks else 1
    head = ["policy"] if several else []
    head += ["environment", "tasks", "k", "scored", "failed", "reward", "95 % CI", "success", "95 % CI"]
    head += ["failures as 0"] if has_failed else []
    head += [f"pass@{k}", f"pass^{k}"] if k > 1 else []
    head += ["turns", "tokens p50/p95", "truncated"]
    rows = [head]
    for label, of_envs in summaries.items():
        for env, summary in of_envs.items():
            rows.append(([label] if several else []) + _cells(env, summary, samples, k, has_failed))
    return "\n".join(
        [
            aligned(rows),
            *_solved(summaries, samples, several),
            *_noise(summaries, samples, several),
            *_about_intervals(summaries),
            _NOTE,
        ]
    )


def _cells(env: str, summary: EnvSummary, samples: int, k: int, has_failed: bool) -> list[str]:
    cells = [env, str(summary.planned // samples), str(samples), f"{summary.scored}/{summary.planned}"]
    cells += [str(summary.failed), _number(summary.mean_reward, 3), _ends(summary.reward)]
    cells += [_number(summary.mean_success, 3), _ends(summary.success)]
    if has_failed:
        cells.append(_mean(summary.reward_failures_as_zero))
    if k > 1:
        cells += [_mean(summary.pass_at.get(k)), _mean(summary.pass_hat.get(k))]
    tokens = f"{_number(summary.tokens_p50, 0)} / {_number(summary.tokens_p95, 0)}"
    truncated = "–" if summary.truncated is None else f"{100 * summary.truncated:.1f} %"
    return [*cells, _number(summary.turns, 1), tokens, truncated]


def _solved(summaries: Mapping[str, Mapping[str, EnvSummary]], samples: int, several: bool) -> list[str]:
    """Returns how many tasks were solved by all, some and none of their scored samples."""

    def of_env(env: str, s: EnvSummary) -> str:
        unscored = s.planned // samples - s.always - s.sometimes - s.never
        others = f" and {unscored} without a scored sample" if unscored else ""
        return f"{env} {s.always}/{s.sometimes}/{s.never}{others}"

    return [
        f"always / sometimes / never solved{f', {label}' if several else ''}: "
        + ", ".join(of_env(env, summary) for env, summary in of_envs.items())
        for label, of_envs in summaries.items()
    ]


def _about_intervals(summaries: Mapping[str, Mapping[str, EnvSummary]]) -> list[str]:
    """Returns a line for each kind of interval that is missing or may surprise."""
    found = [(env, summary) for of_envs in summaries.values() for env, summary in of_envs.items()]
    lines = []
    if any(s.scored and s.reward is None for _, s in found):
        lines.append("–: an interval needs two tasks with a scored sample.")
    if any(s.reward and s.reward.low == s.reward.high for _, s in found):
        lines.append("all equal: every task has the same mean reward, so their spread is not known.")
    beyond = [
        f"{env} [{s.lowest:.3f}, {s.highest:.3f}]"
        for env, s in found
        if s.reward and s.lowest is not None and s.highest is not None
        if s.reward.low < s.lowest - 1e-9 or s.reward.high > s.highest + 1e-9
        if s.reward.low < s.reward.high
    ]
    if beyond:
        lines.append(
            "An interval of a reward is Student's t, which knows no bounds: with so few tasks it reaches "
            f"beyond the rewards that were given ({', '.join(dict.fromkeys(beyond))})."
        )
    return lines


def _noise(summaries: Mapping[str, Mapping[str, EnvSummary]], samples: int, several: bool) -> list[str]:
    """Returns how much rewards differ between tasks and between samples of one task."""
    return [
        f"standard deviation{f', {label}' if several else ''}, {env}: "
        f"{summary.between_tasks:.3f} between tasks, {summary.between_samples:.3f} between samples of a task"
        for label, of_envs in summaries.items()
        for env, summary in of_envs.items()
        if summary.between_tasks is not None and summary.between_samples is not None
    ]


def _ends(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    return "all equal" if interval.low == interval.high else f"[{interval.low:.3f}, {interval.high:.3f}]"


def _mean(interval: Interval | None) -> str:
    return "–" if interval is None else f"{interval.mean:.3f}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Returns a table as lines, each column as wide as its widest cell."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
