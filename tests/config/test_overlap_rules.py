"""The rules of overlap and of dynamic sampling: what is refused, and how it is said."""

from __future__ import annotations

import re

import pytest
from hydra import compose, initialize_config_dir

from gymexp.config.group_options import CONF_DIR
from gymexp.config.hydra_schema import register
from gymexp.config.load import from_yaml, load, to_yaml
from gymexp.config.schema import OverlapConfig, RunConfig
from gymexp.errors import ConfigError
from gymexp.training import schedule


def loaded(*overrides: str) -> RunConfig:
    register()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return load(compose("train", overrides=["env=[sudoku]", *overrides]))


ON = "overlap.max_staleness=4"
DYNAMIC = "rollout.dynamic_sampling=true"


def test_what_overlaps_is_read_from_the_command_line_and_from_the_runs_own_file(tmp_path):
    config = loaded(ON, "overlap.lead=4", "overlap.order=exact", "overlap.update=wait", DYNAMIC)
    assert config.overlap == OverlapConfig(4, 4, "exact", "wait") and config.rollout.dynamic_sampling
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert from_yaml(tmp_path / "config.yaml") == config
    assert loaded().overlap == OverlapConfig() == OverlapConfig(0, 1, "finished", "abort")
    assert loaded(ON).overlap == OverlapConfig(4, 1, "finished", "abort")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("overlap.max_staleness=-1", r"overlap.max_staleness must be >= 0, got -1"),
        (
            "overlap.lead=2",
            r"overlap.max_staleness must be >= 1 where other keys of overlap are set, got 0: say e\.g\.",
        ),
        ("overlap.update=wait", r"overlap.max_staleness must be >= 1 where other keys"),
        (f"{ON} overlap.lead=0", r"overlap.lead must be >= 1, got 0"),
        (f"{ON} overlap.lead=5", r"overlap.lead must be at most overlap.max_staleness=4, .*, got 5"),
        (
            f"{ON} overlap.order=exact",
            r"overlap.lead must be overlap.max_staleness=4 with overlap.order=exact, .*, got 1",
        ),
        (f"{ON} overlap.order=exakt", r"overlap.order must be one of finished, exact, got 'exakt'.*exact"),
        (f"{ON} overlap.update=keep", r"overlap.update must be one of abort, wait, got 'keep'"),
        (f"{ON} engine=vllm engine.colocate=true", r"engine.colocate must be false with overlap.max_stalen"),
        (f"{ON} engine=vllm engine.colocate=auto", r"engine.colocate must be false with overlap.max_stalen"),
        (f"{ON} dataset.sampling=difficulty", r"dataset.sampling must be uniform with overlap.max_stalenes"),
        (
            f"{DYNAMIC} dataset.schedule={{0:{{sudoku:1}}}}",
            r"dataset.schedule must be left out with rollout.dynamic_sampling=true, which needs a fixed",
        ),
        (
            f"{ON} env.sudoku.replicas=auto",
            r"env.sudoku.replicas must be a number with overlap.*'auto'",
        ),
        (
            f"{ON} trainer.vllm_importance_sampling_mode=sequence_mask",
            r"trainer.vllm_importance_sampling_mode must be token_truncate or token_mask with overlap",
        ),
        (
            f"{ON} rollout.correction=none",
            r"rollout.correction must be behavior or decoupled with overlap.max_staleness=4",
        ),
        (f"{DYNAMIC} rollout.max_resampled=0", r"rollout.max_resampled must be >= 1, got 0"),
        (
            "rollout.max_resampled=3",
            r"rollout.max_resampled must be left out without rollout.dynamic_sampling=true, got 3",
        ),
    ],
)
def test_a_mistake_is_answered_by_key_rule_value_and_fix(overrides, message):
    with pytest.raises(ConfigError) as error:
        loaded(*overrides.split())
    assert re.search(message, str(error.value)), error.value


@pytest.mark.parametrize(
    ("overrides", "num_ranks", "steps"),
    [
        (f"{ON} ++trainer.num_iterations=2", 1, "2"),
        (f"{DYNAMIC} ++trainer.steps_per_generation=8 trainer.gradient_accumulation_steps=2", 1, "4"),
        (f"{ON} ++trainer.generation_batch_size=64 trainer.gradient_accumulation_steps=2", 8, "1/"),
    ],
)
def test_a_batch_of_several_optimizer_steps_is_refused(overrides, num_ranks, steps):
    config = loaded(*overrides.split())
    with pytest.raises(ConfigError, match=f"a batch of rollouts must be one optimizer step, got {steps}"):
        schedule.check(config, num_ranks)
    assert schedule.check(loaded(ON, DYNAMIC), num_ranks).steps_per_batch == 1
