"""The sentences on top of a report: at most six, each with its evidence and the panel that shows it.

Each rule is a pure function with its thresholds. A finding is a place to look at, not an alarm.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from gymexp.report.bottleneck import Setup, find_bottleneck, sentence
from gymexp.report.figures import Number, Values
from gymexp.report.held_out import HeldOut, mean_by_task, p_text
from gymexp.report.learning_panels import KINDS, held_out
from gymexp.report.policy_panels import max_drift
from gymexp.report.rollout_panels import causes
from gymexp.report.run_records import Record, RunRecords

MAX_FINDINGS = 6
WINDOW = 10  # steps at the beginning and at the end that are compared
FLAT_GROUPS = 0.5
GAP_GROWTH = 0.1  # by which training's reward may outgrow the held-out reward
LOW_ENTROPY = 0.2  # of the first steps' entropy
FLAT_CHANGE = 0.02  # of reward or success: no change
LONGER = 1.5
TRUNCATED, FAILED, CLIPPED = 0.1, 0.02, 0.2
DRIFT_SHARE = 0.5  # of the bound
FEW_EFFECTIVE = 0.8  # of the trained tokens
ENV_FALL, MEAN_RISE = -0.05, 0.02
SLOWER = 1.3
_MAX_REASON = 200  # characters of why rollouts failed
DROP_SDS, DROP_LEAST = 3.0, 0.05  # robust standard deviations; and the least drop that counts


@dataclass(frozen=True)
class Finding:
    """A sentence with its evidence. panel: the id of the panel that shows it. mark: good, look or fact."""

    text: str
    panel: str
    mark: str = "look"


def present(values: Values) -> list[Number]:
    """Returns the values that were measured."""
    return [value for value in values if value is not None]


def ends(values: Values) -> tuple[float, float] | None:
    """Returns the means of the first and of the last ten measured values; None with fewer than twenty."""
    measured = present(values)
    return (fmean(measured[:WINDOW]), fmean(measured[-WINDOW:])) if len(measured) >= 2 * WINDOW else None


def held_out_change(changes: Mapping[str, HeldOut]) -> Finding | None:
    """The change of the held-out reward from the first evaluation to the last, with intervals."""
    parts, clear = [], []
    for env, one in changes.items():
        if one.reward_before is None or one.reward_after is None:
            continue
        text = f"{env} {one.reward_before:.3f} → {one.reward_after:.3f}"
        if one.change:
            low, high = one.change.low, one.change.high
            text += f" ({one.change.mean:+.3f}, 95 % interval [{low:+.3f}, {high:+.3f}], p {p_text(one.p)})"
            clear.append(one.change.low > 0 or one.change.high < 0)
        parts.append(text)
    if not parts:
        return None
    verdict = (
        "" if not clear else "" if all(clear) else " An interval with 0 in it is no more than noise may give."
    )
    up = bool(clear) and all(one.change is None or one.change.low > 0 for one in changes.values())
    return Finding(f"Held-out reward: {'; '.join(parts)}.{verdict}", "held-out", "good" if up else "fact")


def flat_groups(flat: Values, kinds: Mapping[str, Values]) -> Finding | None:
    """More than half of the groups flat in each of the last ten steps. kinds: shares by kind of group."""
    last = present(flat)[-WINDOW:]
    if len(last) < WINDOW or min(last) <= FLAT_GROUPS:
        return None
    shares = {
        kind: fmean(present(values)[-WINDOW:] or [0]) for kind, values in kinds.items() if kind != "mixed"
    }
    most = max(shares, key=lambda kind: shares[kind], default="")
    kind = f", most of them {most.replace('_', ' ')}" if most and shares[most] > 0 else ""
    return Finding(
        f"{fmean(last):.0%} of the groups of the last {WINDOW} steps have no gradient{kind}.", "groups"
    )


def gap_growth(env: str, train: Values, evaluations: Sequence[tuple[int, Number]]) -> Finding | None:
    """Training's reward outgrew the held-out reward by more than 0.1."""
    trained = ends(train)
    if trained is None or len(evaluations) < 2:
        return None
    gain, held = trained[1] - trained[0], evaluations[-1][1] - evaluations[0][1]
    if gain - held <= GAP_GROWTH:
        return None
    text = f"{env}: training reward changed by {gain:+.3f}, held-out reward by {held:+.3f}: "
    text += "the policy may learn its tasks by heart."
    return Finding(text, "reward")


def entropy_fall(entropy: Values, reward: Values) -> Finding | None:
    """Entropy below a fifth of its beginning, while the reward of the run's second half is flat."""
    both = ends(entropy)
    half = present(reward)[len(present(reward)) // 2 :]
    if both is None or both[0] <= 0 or both[1] >= LOW_ENTROPY * both[0] or len(half) < 2:
        return None
    middle = len(half) // 2
    if abs(fmean(half[middle:]) - fmean(half[:middle])) >= FLAT_CHANGE:
        return None
    text = f"Entropy fell from {both[0]:.3g} to {both[1]:.3g} nats while the reward is flat: "
    text += "exploration may be over."
    return Finding(text, "entropy")


def length_growth(env: str, tokens: Values, success: Values) -> Finding | None:
    """Rollouts half as long again, without more success."""
    both, solved = ends(tokens), ends(success)
    if both is None or solved is None or both[1] < LONGER * both[0]:
        return None
    if solved[1] - solved[0] >= FLAT_CHANGE:
        return None
    text = f"{env}: rollouts grew from {both[0]:.0f} to {both[1]:.0f} tokens, "
    text += f"and success did not ({solved[0]:.2f} → {solved[1]:.2f})."
    return Finding(text, "lengths")


def truncations(env: str, truncated: Values) -> Finding | None:
    """More than a tenth of the rollouts of the last ten steps cut off by a limit."""
    last = present(truncated)[-WINDOW:]
    if not last or fmean(last) <= TRUNCATED:
        return None
    return Finding(f"{env}: a limit cut off {fmean(last):.0%} of the rollouts of the last steps.", "endings")


def reason_of_failures(rows: Iterable[Mapping[str, Any]]) -> str:
    """Returns why rollouts failed, as the index has it: the commonest reason, where those that differ in
    numbers alone are one; "" if none failed."""
    reasons = [row["text"] for row in rows if row.get("outcome") == "failed" and row.get("text")]
    kinds = Counter(re.sub(r"\d+", "0", text) for text in reasons)
    kind = max(kinds, key=lambda text: kinds[text], default=None)
    reason = next((text for text in reasons if re.sub(r"\d+", "0", text) == kind), "")
    return reason if len(reason) <= _MAX_REASON else f"{reason[: _MAX_REASON - 1]}…"


def failures(env: str, failed: Values, by_cause: Mapping[str, Values], reason: str = "") -> Finding | None:
    """More than 2 % of all training rollouts failed; with the commonest cause and reason."""
    measured = present(failed)
    if not measured or fmean(measured) <= FAILED:
        return None
    means = {cause: fmean(present(values) or [0]) for cause, values in by_cause.items()}
    cause = max(means, key=lambda name: means[name], default="")
    most = f", most by {cause.replace('_', ' ')}" if cause and means[cause] > 0 else ""
    why = f" ({reason})" if reason else ""
    return Finding(f"{env}: {fmean(measured):.1%} of the rollouts failed{most}{why}.", "endings")


def high_drift(drift: Values, limit: float) -> Finding | None:
    """Engine and trainer differ by more than half of what ends the run."""
    measured = present(drift)
    if not measured or measured[-1] <= DRIFT_SHARE * limit:
        return None
    return Finding(
        f"Drift of engine and trainer is {measured[-1]:.2g} nats, of {limit:g} that end the run.", "ratio"
    )


def far_from_samples(sizes: Values) -> Finding | None:
    """The effective sample size was below 80 % of the tokens in one of the last ten steps."""
    last = present(sizes)[-WINDOW:]
    if not last or min(last) >= FEW_EFFECTIVE:
        return None
    return Finding(
        f"The tokens of a step counted as {min(last):.0%} of their number (effective sample size): the "
        "policy that trains is far from the one that sampled. A lower overlap.max_staleness or "
        "trainer.learning_rate keeps them closer.",
        "ratio",
    )


def clipping(clipped: Values) -> Finding | None:
    """More than a fifth of the tokens of the last ten steps clipped."""
    last = present(clipped)[-WINDOW:]
    if not last or fmean(last) <= CLIPPED:
        return None
    return Finding(f"The loss clips {fmean(last):.0%} of the tokens of the last steps.", "clip")


def one_falls(by_env: Mapping[str, Values]) -> Finding | None:
    """One environment's training reward falls while the mean over environments rises."""
    pairs = {env: both for env, values in by_env.items() if (both := ends(values))}
    if len(pairs) < 2:
        return None
    changes = {env: after - before for env, (before, after) in pairs.items()}
    env = min(changes, key=lambda name: changes[name])
    if changes[env] >= ENV_FALL or fmean(changes.values()) <= MEAN_RISE:
        return None
    mean = fmean(changes.values())
    text = f"{env} gets worse ({changes[env]:+.3f} in training) while the mean rises ({mean:+.3f})."
    return Finding(text, "reward")


def slower_steps(seconds: Values, parts: Mapping[str, Values]) -> Finding | None:
    """Steps take 30 % longer than at the beginning; names the part that grew most. The first step, which
    warms up, does not count."""
    measured = present(seconds)[1:]
    if len(measured) < 2 * WINDOW:
        return None
    before, after = median(measured[:WINDOW]), median(measured[-WINDOW:])
    if after < SLOWER * before:
        return None
    grown: dict[str, float] = {}
    for name, values in parts.items():
        own = present(values)[1:]
        if len(own) >= 2 * WINDOW:
            grown[name] = median(own[-WINDOW:]) - median(own[:WINDOW])
    most = max(grown, key=lambda name: grown[name], default="")
    part = f", most of it {most} ({grown[most]:+.1f} s)" if most else ""
    return Finding(f"A step takes {after:.1f} s, at the beginning {before:.1f} s{part}.", "seconds")


@dataclass(frozen=True)
class Drop:
    """A sudden drop of an environment's training reward. place: of its first step among the values. usual,
    low: the median of the ten steps before, the mean of the three steps from there."""

    env: str
    place: int
    usual: float
    low: float


def largest_drop(by_env: Mapping[str, Values]) -> Drop | None:
    """Returns the largest drop below the median of the ten steps before, if it is at least three robust
    standard deviations and 0.05, and the mean of three steps stays low."""
    worst: Drop | None = None
    for env, values in by_env.items():
        for i in range(WINDOW, len(values) - 2):
            before = present(values[i - WINDOW : i])
            after = present(values[i : i + 3])
            if len(before) < WINDOW or len(after) < 3:
                continue
            usual = median(before)
            drop = usual - fmean(after)
            enough = drop >= max(DROP_SDS * _spread(before), DROP_LEAST) and usual - after[0] >= DROP_LEAST
            if enough and (worst is None or drop > worst.usual - worst.low):
                worst = Drop(env, i, usual, fmean(after))
    return worst


def _spread(values: Sequence[Number]) -> float:
    """Returns a robust standard deviation."""
    return 1.4826 * median([abs(value - median(values)) for value in values])


def moved_with(place: int, series: Mapping[str, Values]) -> list[str]:
    """Returns what changed as much as a drop at this place, each as text: by three robust standard
    deviations and by a tenth."""
    moved: list[str] = []
    for name, values in series.items():
        before, after = present(values[max(0, place - WINDOW) : place]), present(values[place : place + 3])
        if len(before) == WINDOW and len(after) == 3:
            usual, now = median(before), fmean(after)
            if abs(now - usual) >= max(DROP_SDS * _spread(before), 0.1 * abs(usual), 1e-3):
                moved.append(f"{name} {usual:.3g} → {now:.3g}")
    return moved


def fallen_tasks(rows_of_step: Mapping[int, Sequence[Record]], env: str, step: int) -> list[str]:
    """Returns the two tasks of a step and of the two after it whose mean reward fell most since they were
    played before, each as text. Empty if none was."""
    before: dict[str, float] = {}
    falls: dict[str, tuple[float, float]] = {}
    for at in sorted(rows_of_step):
        if at > step + 2:
            break
        now = mean_by_task(rows_of_step[at], env)
        if at >= step:
            falls |= {key: (before[key], reward) for key, reward in now.items() if key in before}
        else:
            before |= now
    fallen = [(was - now, key) for key, (was, now) in falls.items() if was > now]
    return [f"{key} {falls[key][0]:.2f} → {falls[key][1]:.2f}" for _, key in sorted(fallen, reverse=True)[:2]]


def sudden_drop(drop: Drop | None, step: int, moved: Sequence[str], tasks: Sequence[str]) -> Finding | None:
    """A sudden drop, with what changed in the same step and the tasks that fell most."""
    if drop is None:
        return None
    text = f"{drop.env}: reward dropped from {drop.usual:.3f} to {drop.low:.3f} at step {step}"
    text += f"; with it {', '.join(moved)}" if moved else "; nothing else changed as much"
    text += f"; most on {' and '.join(tasks)}" if tasks else ""
    return Finding(f"{text}.", "reward")


def _drop(records: RunRecords, by_env: Mapping[str, Values]) -> Finding | None:
    drop = largest_drop(by_env)
    if drop is None:
        return None
    names = {"tokens": "tokens", "nll": "entropy", "truncated": "cut off", "failed": "failed"}
    series = {text: records.env_series(drop.env, metric) for metric, text in names.items()}
    series |= {"gradient norm": records.series("grad_norm"), "drift": records.series("drift")}
    step = records.step_numbers[drop.place]
    moved = moved_with(drop.place, series)
    return sudden_drop(drop, step, moved, fallen_tasks(records.rows_of_step, drop.env, step))


def all_well(failed: float, truncated: float, mismatches: int, drift: Values, limit: float) -> Finding:
    """The checks that found nothing, as one sentence with their figures. failed, truncated: shares."""
    measured = present(drift)
    parts = [
        f"failed {failed:.1%}",
        f"truncated {truncated:.1%}",
        f"attempts with inexact tokens {mismatches}",
    ]
    parts += [f"drift {measured[-1]:.1g} nats (bound {limit:g})"] if measured else []
    return Finding(f"Checks: {', '.join(parts)}.", "endings", "fact")


def setup_of(records: RunRecords) -> Setup:
    """Returns what of a run's configuration decides the remedy of its bottleneck."""
    gpus = {gpu.index for sample in records.samples[-20:] for gpu in sample.gpus}
    colocated = bool(records.setting("engine.colocate")) or records.setting("engine.kind") == "hf"
    replicas = {env: records.setting(f"env.{env}.replicas", 1) or 1 for env in records.envs}
    return Setup(
        len(gpus) > 1 and not colocated,
        bool(gpus),
        replicas,
        records.setting("overlap.max_staleness", 0),
        records.setting("overlap.lead", 1),
        records.setting("model.packing", "none"),
        records.setting("rollout.correction", "auto"),
    )


def find(records: RunRecords) -> list[Finding]:
    """Returns at most six findings of a run: what it learned, its bottleneck, then what to look at."""
    by_env = {env: records.env_series(env, "reward") for env in records.envs}
    looks: list[Finding | None] = [_drop(records, by_env), one_falls(by_env)]
    for env in records.envs:
        series = lambda metric, env=env: records.env_series(env, metric)  # noqa: E731
        by_cause = {cause: series(f"failed_{cause}") for cause in causes()}
        trained = (row for rows in records.rows_of_step.values() for row in rows if row["env"] == env)
        looks.append(failures(env, series("failed"), by_cause, reason_of_failures(trained)))
        looks.append(truncations(env, series("truncated")))
        looks.append(gap_growth(env, series("reward"), records.held_out_series(env, "reward")))
        looks.append(length_growth(env, series("tokens"), series("success")))
    limit, drift = max_drift(records), records.series("drift")
    kinds = {kind: _mean_over_envs(records, f"groups_{kind}") for kind in KINDS}
    looks += [
        flat_groups(records.series("groups_without_variance"), kinds),
        entropy_fall(records.series("entropy"), records.series("reward")),
        high_drift(drift, limit),
        far_from_samples(records.series("sampling/effective_sample_size")),
        clipping(records.series("clip_ratio/region_mean")),
        slower_steps(
            records.series("time/step"),
            {p: records.series(f"time/{p}") for p in ("rollout", "update", "sync")},
        ),
    ]
    found = [held_out_change(held_out(records)), _bottleneck(records)]
    found += [look for look in looks if look][: MAX_FINDINGS - 2]
    if records.steps and len([one for one in found if one]) < MAX_FINDINGS:
        found.append(_checks(records, drift, limit))
    return [one for one in found if one][:MAX_FINDINGS]


def _bottleneck(records: RunRecords) -> Finding | None:
    bottleneck = find_bottleneck(records.steps, records.rows_of_step)
    if bottleneck is None:
        return None
    return Finding(sentence(bottleneck, setup_of(records)), "gantt" if records.spans else "seconds")


def _mean_over_envs(records: RunRecords, metric: str) -> list[Number | None]:
    columns = zip(*(records.env_series(env, metric) for env in records.envs), strict=True)
    return [fmean(measured) if (measured := present(column)) else None for column in columns]


def _checks(records: RunRecords, drift: Values, limit: float) -> Finding:
    shares: dict[str, float] = {}
    for metric in ("failed", "truncated"):
        values: list[Any] = [v for env in records.envs for v in present(records.env_series(env, metric))]
        shares[metric] = fmean(values) if values else 0.0
    mismatches = sum(sum(present(records.env_series(env, "token_mismatches"))) for env in records.envs)
    return all_well(shares["failed"], shares["truncated"], int(mismatches), drift, limit)
