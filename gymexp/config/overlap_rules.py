"""The rules of `overlap.*` and of `rollout.dynamic_sampling`."""

from __future__ import annotations

from collections.abc import Iterator

from gymexp.config.schema import OverlapConfig, RolloutConfig, RunConfig
from gymexp.config.value_rules import one_of

ORDERS = ("finished", "exact")
UPDATES = ("abort", "wait")


def problems_of_overlap(config: RunConfig) -> Iterator[str]:
    """Yields a line for each rule that these keys break, with key, rule, value and fix."""
    overlap, rollout = config.overlap, config.rollout
    if rollout.max_resampled < 1:
        yield f"rollout.max_resampled must be >= 1, got {rollout.max_resampled}"
    elif not rollout.dynamic_sampling and rollout.max_resampled != RolloutConfig.max_resampled:
        yield (
            "rollout.max_resampled must be left out without rollout.dynamic_sampling=true, got "
            f"{rollout.max_resampled}"
        )
    if rollout.dynamic_sampling:
        yield from _problems_of_tasks(config, "rollout.dynamic_sampling=true")
    if overlap.max_staleness < 0:
        yield f"overlap.max_staleness must be >= 0, got {overlap.max_staleness}"
    elif overlap.max_staleness:
        yield from _problems_of_keys(overlap)
        yield from _problems_with_other_keys(config)
    elif overlap != OverlapConfig():
        yield (
            "overlap.max_staleness must be >= 1 where other keys of overlap are set, got 0: say e.g. "
            "overlap.max_staleness=4"
        )


def _problems_of_keys(overlap: OverlapConfig) -> Iterator[str]:
    for key, allowed in (("order", ORDERS), ("update", UPDATES)):
        yield from one_of(f"overlap.{key}", getattr(overlap, key), allowed)
    if overlap.lead < 1:
        yield f"overlap.lead must be >= 1, got {overlap.lead}"
    elif overlap.lead > overlap.max_staleness:
        yield (
            f"overlap.lead must be at most overlap.max_staleness={overlap.max_staleness}, as a batch that is "
            f"played so far ahead is as stale, got {overlap.lead}"
        )
    elif overlap.order == "exact" and overlap.lead != overlap.max_staleness:
        yield (
            f"overlap.lead must be overlap.max_staleness={overlap.max_staleness} with overlap.order=exact, "
            f"where no rollout overtakes another, got {overlap.lead}"
        )


def _problems_with_other_keys(config: RunConfig) -> Iterator[str]:
    on = f"overlap.max_staleness={config.overlap.max_staleness}"
    yield from _problems_of_tasks(config, on)
    if colocate := config.engine.colocate:
        yield f"engine.colocate must be false with {on}: vLLM sleeps while its GPU trains, got {colocate!r}"
    for name, env in config.env.items():
        if env.replicas == "auto":
            yield (
                f"env.{name}.replicas must be a number with {on}, which plays batches without a beginning "
                "and an end by which replicas could be measured, got 'auto'"
            )
    mode = config.trainer.get("vllm_importance_sampling_mode")
    if isinstance(mode, str) and mode.startswith("sequence"):
        yield (
            f"trainer.vllm_importance_sampling_mode must be token_truncate or token_mask with {on}, as the "
            f"weight of a whole rollout vanishes if older weights sampled it, got {mode!r}"
        )
    if config.rollout.correction == "none":
        yield (
            f"rollout.correction must be behavior or decoupled with {on}, as nothing else corrects for the "
            "older weights that sampled, got 'none'"
        )


def _problems_of_tasks(config: RunConfig, on: str) -> Iterator[str]:
    """The curriculum draws a whole batch once the results of all batches before it are known."""
    if config.dataset.schedule:
        yield f"dataset.schedule must be left out with {on}, which needs a fixed order of the tasks"
    if config.dataset.sampling == "difficulty":
        yield f"dataset.sampling must be uniform with {on}, which needs a fixed order of the tasks"
