"""What was meant by a key that is not known."""

from __future__ import annotations

import pytest

from gymexp.config.explain import explain_key, keys
from gymexp.config.suggestions import ALIASES, nearest, suggestion
from gymexp.training import argument_rules


def test_every_alias_means_a_key_that_there_is_and_is_none_itself():
    known = {*keys(), *(f"trainer.{name}" for name in argument_rules.CARRIED)}
    assert set(ALIASES.values()) <= known
    assert not ALIASES.keys() & {key for key in known if "." not in key}


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("lr", "trainer.learning_rate"),
        ("learning_rate", "trainer.learning_rate"),
        ("batch_size", "trainer.per_device_train_batch_size"),
        ("max_length", "model.max_model_len"),
        ("env.sudoku.max_tokens", "env.sudoku.max_output_tokens"),
        ("trainr.max_steps", "trainer"),
        ("model.lora.rank", "model.lora.r"),
        ("max_failed_share", "rollout.max_failed_share"),
        ("rollout.max_drfit", "rollout.max_drift"),
        ("env.sudko.weight", "env.sudoku"),
    ],
)
def test_a_key_by_another_name_or_at_another_place_is_suggested(key, said):
    trainers = [f"trainer.{name}" for name in argument_rules.CARRIED]
    assert f"did you mean {said}?" in (explain_key(key, more=trainers) or "")


def test_nothing_near_suggests_nothing():
    assert suggestion("zzz", ["weight"], "env.", ["a.b"]) == nearest("zzz", ["weight"]) == ""
