"""Numbers about a batch of outcomes, per environment. Pure. Names are what the trackers show."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev

from gymexp.config.schema import EnvConfig
from gymexp.record.metric_names import name_of
from gymexp.rollout.outcome import Completed, Failed, Outcome, Rollout, Truncated, task_of


def rollout_metrics(outcomes: Sequence[Outcome], envs: Mapping[str, EnvConfig]) -> dict[str, float]:
    """`<env>/reward` and so on. Rewards, turns, tokens and seconds are means over the rollouts that did not
    fail.

    tokens: sampled by the policy in a rollout. seconds: of the attempt that counted. retried: attempts that
    failed and were made again, a rollout. token_mismatches: attempts, of all, whose tokens were not exact.
    refused: share whose answer the environment refused, which has env.<name>.refused_reward.
    prompts_too_long: share that has no reward as its prompt did not fit; no failure.
    """
    by_env: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_env[task_of(outcome).env].append(outcome)
    metrics: dict[str, float] = {}
    for env, some in sorted(by_env.items()):
        of_env: dict[str, float] = {}
        played = [o.rollout for o in some if not isinstance(o, Failed)]
        of_env["rollouts"] = len(some)
        too_long = sum(isinstance(o, Failed) and o.cause == "prompt_too_long" for o in some)
        of_env["failed"] = 1 - (len(played) + too_long) / len(some)
        of_env["prompts_too_long"] = too_long / len(some)
        of_env["refused"] = sum(bool(r.refused) for r in played) / len(some)
        of_env["truncated"] = sum(isinstance(o, Truncated) for o in some) / len(some)
        of_env["retried"] = sum(len(o.failures) - isinstance(o, Failed) for o in some) / len(some)
        of_env["token_mismatches"] = sum(o.failures.count("token_mismatch") for o in some)
        if played:
            of_env |= _of_played(played, envs[env])
        metrics |= {name_of(env, metric): value for metric, value in of_env.items()}
    return metrics


def _of_played(played: Sequence[Rollout], config: EnvConfig) -> dict[str, float]:
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
    """Share of groups whose rewards are all equal: they give no gradient. A group is `num_generations`
    rollouts in a row; where an epoch ends, a batch may have two of the same task."""
    groups = [outcomes[i : i + num_generations] for i in range(0, len(outcomes), num_generations)]
    rewards = [{o.rollout.reward for o in group if not isinstance(o, Failed)} for group in groups]
    return fmean(len(some) < 2 for some in rewards) if rewards else math.nan


def mean_reward(outcomes: Sequence[Outcome]) -> float:
    """Over what was scored; NaN if nothing was."""
    rewards = [o.rollout.reward for o in outcomes if isinstance(o, Completed | Truncated)]
    return fmean(rewards) if rewards else math.nan
