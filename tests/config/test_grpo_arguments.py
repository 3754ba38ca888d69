"""What is read from TRL's source is what TRL's own class says."""

from __future__ import annotations

import dataclasses

import pytest

from gymexp.config.grpo_arguments import default, names, value_of

COMPUTED = {"optim", "include_for_metrics"}


@pytest.fixture(scope="module")
def fields() -> dict[str, dataclasses.Field]:
    from trl.trainer.grpo_config import GRPOConfig

    return {field.name: field for field in dataclasses.fields(GRPOConfig)}


def test_names_are_those_of_the_class(fields):
    assert names() == fields.keys()


def test_defaults_are_those_of_the_class(fields):
    assert {name: default(name) for name in fields.keys() - COMPUTED} == {
        name: field.default for name, field in fields.items() if name not in COMPUTED
    }


@pytest.mark.parametrize("name", sorted(COMPUTED))
def test_a_default_that_is_computed_is_not_guessed(name):
    with pytest.raises(ValueError, match=name):
        default(name)


def test_a_value_of_the_configuration_comes_before_the_default():
    assert value_of({"num_generations": 2}, "num_generations") == 2
    assert value_of({"save_steps": None}, "save_steps") is None
    assert value_of({}, "num_generations") == default("num_generations")


def test_an_unknown_name_is_an_error():
    with pytest.raises(KeyError):
        value_of({}, "num_generation")
