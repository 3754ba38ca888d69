"""Whether a reward, or a change of it, is more than noise: intervals, tests and summaries. Pure functions.

The unit is a task. Rollouts of one task resemble each other, so an interval that counts rollouts would be too
narrow. An interval is over the tasks and the samples of one policy; it says nothing of other training seeds.
"""

from gymexp.statistics.changes import Change, holm, paired_change, sign_flip_p
from gymexp.statistics.intervals import Interval, mean_over_tasks, reward_interval, success_interval
from gymexp.statistics.samples import best_at_k, pass_at_k, pass_hat_k
from gymexp.statistics.summary import EnvSummary, summarize

__all__ = [
    "Change",
    "EnvSummary",
    "Interval",
    "best_at_k",
    "holm",
    "mean_over_tasks",
    "paired_change",
    "pass_at_k",
    "pass_hat_k",
    "reward_interval",
    "sign_flip_p",
    "success_interval",
    "summarize",
]
