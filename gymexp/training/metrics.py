"""Metrics of a batch of outcomes, per environment, under the names that trackers show. Pure."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev
from typing import get_args

from gymexp.config.schema import EnvConfig
from gymexp.record.metric_names import name_of
from gymexp.rollout.group_queue import Batch
from gymexp.rollout.items import num_tool_calls, num_tool_errors
from gymexp.rollout.outcome import Cause, Failed, Limit, Outcome, Rollout, Truncated, task_of

_CAUSES = [cause for cause in get_args(Cause) if cause != "prompt_too_long"]  # which counts by itself


def rollout_metrics(outcomes: Sequence[Outcome], envs: Mapping[str, EnvConfig]) -> dict[str, float]:
    """Returns `<env>/reward` and the other metrics of each environment. Rewards, turns, tokens and seconds
    are means over the rollouts that did not fail.

    tokens: tokens that the policy sampled in a rollout. seconds: duration of the attempt that counted.
    failed_<cause> and truncated_<limit>: the shares that `failed` and `truncated` consist of. nll: mean
    -log-probability of a sampled token (nats) under the distribution that it was drawn from, in training an
    estimate of the policy's entropy. tool_calls, tool_errors: of a rollout; errors are those that an output
    admits (`items.is_error`). replicas: those that played a rollout. retried: failed attempts per rollout
    that were repeated. token_mismatches: number of attempts whose tokens were not exact. refused: share of
    rollouts whose answer the environment refused; they have the reward env.<name>.refused_reward.
    prompts_too_long: share of rollouts without a reward because their prompt did not fit; these do not count
    as failed.
    """
    by_env: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_env[task_of(outcome).env].append(outcome)
    metrics: dict[str, float] = {}
    for env, env_outcomes in sorted(by_env.items()):
        total = len(env_outcomes)
        of_env: dict[str, float] = {}
        played = [o.rollout for o in env_outcomes if not isinstance(o, Failed)]
        of_env["rollouts"] = total
        too_long = sum(isinstance(o, Failed) and o.cause == "prompt_too_long" for o in env_outcomes)
        of_env["failed"] = 1 - (len(played) + too_long) / total
        of_env["prompts_too_long"] = too_long / total
        of_env["refused"] = sum(bool(r.refused) for r in played) / total
        of_env["truncated"] = sum(isinstance(o, Truncated) for o in env_outcomes) / total
        causes = [o.cause for o in env_outcomes if isinstance(o, Failed)]
        limits = [o.limit for o in env_outcomes if isinstance(o, Truncated)]
        of_env |= {f"failed_{cause}": causes.count(cause) / total for cause in _CAUSES}
        of_env |= {f"truncated_{limit}": limits.count(limit) / total for limit in get_args(Limit)}
        of_env["retried"] = sum(len(o.failures) - isinstance(o, Failed) for o in env_outcomes) / total
        of_env["token_mismatches"] = sum(o.failures.count("token_mismatch") for o in env_outcomes)
        if played:
            of_env |= _metrics_of_played(played, envs[env])
        metrics |= {name_of(env, metric): value for metric, value in of_env.items()}
    return metrics


def _metrics_of_played(played: Sequence[Rollout], config: EnvConfig) -> dict[str, float]:
    rewards = [r.reward for r in played]
    logprobs = [value for r in played for turn in r.turns for value in turn.logprobs]
    return {
        "reward": fmean(rewards),
        "reward_std": pstdev(rewards),
        "success": fmean(r >= config.success_reward for r in rewards),
        "replicas": len({r.replica for r in played}),
        "turns": fmean(len(r.turns) for r in played),
        "tokens": fmean(sum(len(t.completion_ids) for t in r.turns) for r in played),
        "seconds": fmean(r.seconds.get("total", 0.0) for r in played),
        "nll": -fmean(logprobs),
        "tool_calls": fmean(num_tool_calls(r.items) for r in played),
        "tool_errors": fmean(num_tool_errors(r.items) for r in played),
    }


_GROUP_KINDS = ("mixed", "all_solved", "none_solved", "failed")


def group_metrics(
    outcomes: Sequence[Outcome], num_generations: int, envs: Mapping[str, EnvConfig]
) -> dict[str, float]:
    """Returns `groups_without_variance`, the share of groups whose rewards are all equal, and for each
    environment the shares of its groups by kind, which add up to 1.

    A group is `num_generations` rollouts in a row. A batch across the end of an epoch may have two groups of
    the same task. Kinds: mixed, its rewards differ; all_solved and none_solved, they are all equal, and at
    least `success_reward` or below it; failed, fewer than two of its rollouts have a reward.
    """
    kinds: dict[str, list[str]] = defaultdict(list)
    for start in range(0, len(outcomes), num_generations):
        group = outcomes[start : start + num_generations]
        env = task_of(group[0]).env
        rewards = [o.rollout.reward for o in group if not isinstance(o, Failed)]
        if len(rewards) < 2:
            kinds[env].append("failed")
        elif len(set(rewards)) > 1:
            kinds[env].append("mixed")
        else:
            kinds[env].append("all_solved" if rewards[0] >= envs[env].success_reward else "none_solved")
    if not kinds:
        return {"groups_without_variance": math.nan}
    flat = fmean(kind != "mixed" for of_env in kinds.values() for kind in of_env)
    shares = {
        name_of(env, f"groups_{kind}"): fmean(one == kind for one in of_env)
        for env, of_env in sorted(kinds.items())
        for kind in _GROUP_KINDS
    }
    return {"groups_without_variance": flat} | shares


def queue_metrics(batch: Batch) -> dict[str, float]:
    """Returns what the queue of groups had when a step took its batch.

    finished, in_flight: the other groups that wait for a later step, and those that are being played.
    out_of_order: share of the batch's groups that are younger than one of these. filtered: groups that were
    left out since the step before, as their rewards were equal.
    """
    return {
        "queue/finished": batch.num_landed,
        "queue/in_flight": batch.num_in_flight,
        "queue/out_of_order": batch.num_overtaken / len(batch.groups),
        "queue/filtered": len(batch.left_out),
    }


def staleness_metrics(outcomes: Sequence[Outcome], version: int, max_staleness: int) -> dict[str, float]:
    """Returns how many optimizer steps older than `version`, which trains, the weights were that sampled.

    mean, max, p95, tokens_<steps>: over sampled tokens; the last ones are shares. in_flight, in_queue: means
    over rollouts, of the steps from a rollout's oldest to its newest token, and from there to its training.
    turns_cut: turns that new weights cut and continued. Rollouts of unknown versions do not count.
    """
    tokens: Counter[int] = Counter()
    in_flight, in_queue, num_cut = [], [], 0
    for outcome in outcomes:
        spans = [] if isinstance(outcome, Failed) else [turn.versions for turn in outcome.rollout.turns]
        if not spans or not all(spans):
            continue
        for number, count in (span for of_turn in spans for span in of_turn):
            tokens[version - number] += count
        newest = max(of_turn[-1][0] for of_turn in spans)
        in_flight.append(newest - min(of_turn[0][0] for of_turn in spans))
        in_queue.append(version - newest)
        num_cut += sum(len(of_turn) > 1 for of_turn in spans)
    if not tokens:
        return {}
    ages, total = sorted(tokens.elements()), tokens.total()
    shares = {f"staleness/tokens_{age}": tokens[age] / total for age in range(max_staleness + 1)}
    return shares | {
        "staleness/mean": fmean(ages),
        "staleness/max": ages[-1],
        "staleness/p95": ages[math.ceil(0.95 * total) - 1],
        "staleness/in_flight": fmean(in_flight),
        "staleness/in_queue": fmean(in_queue),
        "overlap/turns_cut": num_cut,
    }
