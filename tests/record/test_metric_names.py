"""Names of an environment's metrics: what is made is what is parsed, and TRL's own are left out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gymexp.record.metric_names import as_held_out, before_and_after, by_env, name_of, of_each_env

ENTRY = {
    "sudoku/reward": 0.25,
    "sudoku/rollouts": 8,
    "workplace/reward": None,
    "workplace/rollouts": 8,
    "eval_sudoku/reward": 0.75,
    "eval_sudoku/rollouts": 4,
    "time/step": 4.0,
    "completions/mean_length": 20.0,
    "loss": 0.1,
    "eval_seconds": 3.0,
}


def test_environments_are_those_that_an_entry_counts_the_rollouts_of():
    assert by_env(ENTRY, held_out=False) == {
        "sudoku": {"reward": 0.25, "rollouts": 8},
        "workplace": {"rollouts": 8},
    }
    assert by_env(ENTRY, held_out=True) == {"sudoku": {"reward": 0.75, "rollouts": 4}}
    assert of_each_env(ENTRY, "reward", held_out=False) == {"sudoku": 0.25}


envs = st.text("abz/_", min_size=1).filter(lambda env: not env.startswith("eval_"))
metrics = st.dictionaries(st.text("abz_", min_size=1), st.floats(allow_nan=False))


@given(st.dictionaries(envs, metrics), st.booleans())
def test_what_is_named_is_parsed(measured, held_out):
    measured = {env: values | {"rollouts": 2.0} for env, values in measured.items()}
    entry = {name_of(env, k): v for env, values in measured.items() for k, v in values.items()}
    assert by_env(as_held_out(entry) if held_out else entry, held_out) == measured


@pytest.mark.parametrize("held_out", [False, True])
def test_a_name_is_the_trackers(held_out):
    assert name_of("maze", "reward", held_out) == ("eval_maze/reward" if held_out else "maze/reward")


def test_what_was_measured_after_stands_beside_what_was_measured_before():
    before = {
        "eval_maze/reward": 0.25,
        "eval_maze/rollouts": 4,
        "eval_old/reward": 1.0,
        "eval_old/rollouts": 4,
    }
    after = {
        "eval_maze/reward": 0.75,
        "eval_maze/rollouts": 4,
        "eval_new/reward": 0.5,
        "eval_new/rollouts": 4,
    }
    assert before_and_after(before, after | {"eval_seconds": 4.0, "loss/x": 1.0}) == {
        "maze": {"reward": [0.25, 0.75], "rollouts": [4, 4]},
        "new": {"reward": [None, 0.5], "rollouts": [None, 4]},
    }
