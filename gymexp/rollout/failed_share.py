"""Whether so many rollouts failed that the run must end. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from gymexp.errors import RolloutError
from gymexp.rollout.outcome import Failed, Outcome, task_of


def check_failed_share(outcomes: Sequence[Outcome], max_share: float, total: int | None = None) -> None:
    """Raises RolloutError if more than `max_share` of the outcomes are failures. The message names the
    commonest cause and a log. Prompts that are too long count only if every outcome is a failure.

    total: how many outcomes there will be, if some have not landed yet.
    """
    total = len(outcomes) if total is None else total
    failed = [o for o in outcomes if isinstance(o, Failed)]
    if len(failed) < total:
        failed = [o for o in failed if o.cause != "prompt_too_long"]
    if len(failed) <= max_share * total:
        return
    (env, cause), count = Counter((task_of(o).env, o.cause) for o in failed).most_common()[0]
    example = next(o for o in failed if (o.task.env, o.cause) == (env, cause))
    raise RolloutError(
        f"{len(failed)} of {total} rollouts failed, more than "
        f"rollout.max_failed_share={max_share:g} allows. "
        f"Most often ({count}): {cause} in env.{env}, for example {example.task.key}: {example.detail}\n"
        f"Look into {example.log or 'the logs of the run directory'}"
    )
