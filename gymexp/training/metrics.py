"""Metrics of a batch of outcomes, per environment, under the names that trackers show. Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev

from gymexp.config.schema import EnvConfig
from gymexp.record.metric_names import name_of
from gymexp.rollout.outcome import Completed, Failed, Outcome, Rollout, Truncated, task_of


def rollout_metrics(outcomes: Sequence[Outcome], envs: Mapping[str, EnvConfig]) -> dict[str, float]:
    """Returns `<env>/reward` and the other metrics of each environment. Rewards, turns, tokens and seconds
    are means over the rollouts that did not fail.

    tokens: tokens that the policy sampled in a rollout. seconds: duration of the attempt that counted.
    retried: failed attempts per rollout that were repeated. token_mismatches: number of attempts whose tokens
    were not exact. refused: share of rollouts whose answer the environment refused; they have the reward
    env.<name>.refused_reward. prompts_too_long: share of rollouts without a reward because their prompt did
    not fit; these do not count as failed.
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
        of_env["retried"] = sum(len(o.failures) - isinstance(o, Failed) for o in env_outcomes) / total
        of_env["token_mismatches"] = sum(o.failures.count("token_mismatch") for o in env_outcomes)
        if played:
            of_env |= _metrics_of_played(played, envs[env])
        metrics |= {name_of(env, metric): value for metric, value in of_env.items()}
    return metrics


def _metrics_of_played(played: Sequence[Rollout], config: EnvConfig) -> dict[str, float]:
    rewards = [r.reward for r in played]
    return {
        "reward": fmean(rewards),
        "reward_std": pstdev(rewards),
        "success": fmean(r >= config.success_reward for r in rewards),
        "turns": fmean(len(r.turns) for r in played),
        "tokens": fmean(sum(len(t.completion_ids) for t in r.turns) for r in played),
        "seconds": fmean(r.seconds.get("total", 0.0) for r in played),
    }


def flat_groups(outcomes: Sequence[Outcome], num_generations: int) -> float:
    """Returns the share of groups whose rewards are all equal, which therefore give no gradient; NaN without
    groups. A group is `num_generations` rollouts in a row. A batch across the end of an epoch may have two
    groups of the same task."""
    groups = [outcomes[i : i + num_generations] for i in range(0, len(outcomes), num_generations)]
    rewards = [{o.rollout.reward for o in group if not isinstance(o, Failed)} for group in groups]
    return fmean(len(distinct) < 2 for distinct in rewards) if rewards else math.nan


def mean_reward(outcomes: Sequence[Outcome]) -> float:
    """Returns the mean reward of the rollouts that did not fail; NaN if all failed."""
    rewards = [o.rollout.reward for o in outcomes if isinstance(o, Completed | Truncated)]
    return fmean(rewards) if rewards else math.nan
