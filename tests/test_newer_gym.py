"""Whole runs with NeMo Gym 0.7: its environments, an environment server of its own kind, and the refusals.

Only with `pytest --gym-version 0.7.0`, as CI has it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from whole_run import NO_WAY_OUT, ROOT, UNEVALUATED, Run

from gymexp.gym.install import site_packages
from gymexp.rollout.rollout_files import read_index

pytestmark = [pytest.mark.gym, pytest.mark.e2e]
# Of 0.7's own: gymnasium_agent, tools, and an agent whose environment server takes typed episodes.
TYPED = "example_single_tool_call_single_agent_turn"
SHIPPED = ["blackjack", TYPED]


@pytest.fixture(scope="module")
def newer(request: pytest.FixtureRequest) -> Path:
    """The interpreter of the NeMo Gym that --gym-version names."""
    if not request.config.getoption("--gym-version"):
        pytest.skip("say --gym-version 0.7.0")
    return request.getfixturevalue("gym_python")


def test_two_steps_of_training_in_environments_of_both_kinds(
    newer: Path, started: Callable[..., Run], tmp_path: Path
):
    """The collector checks the tokens of each turn; the drift check compares the log-probabilities."""
    site = site_packages(newer)
    settings = [f"gym.python='{newer}'", f"env=[sudoku,workplace,{','.join(SHIPPED)}]", *UNEVALUATED]
    for name in SHIPPED:
        at, folder = f"env.{name}", name.removesuffix("_single_agent_turn")
        rows = site / "resources_servers" / folder / "data" / "example.jsonl"
        settings += [f"{at}.data.{split}_file='{rows}'" for split in ("train", "validation")]
        settings += [f"{at}.data.source=jsonl", f"{at}.max_output_tokens=32"]
    run = started("newer", *settings, "trainer.max_steps=2", "rollout.drift_every=1")
    assert run.ended_cleanly() == 0, run.said
    assert run.steps() == [1, 2]
    played = list(read_index(run.directory / "rollouts"))
    assert {row["env"] for row in played} == {"sudoku", "workplace", *SHIPPED}
    assert not [row for row in played if row["outcome"] == "failed"]
    assert "has no environment server" not in run.said, "every file that NeMo Gym ships names one"
    services = json.loads((run.directory / "services.json").read_text())["replicas"]
    assert {env for env, ones in services.items() if ones[0]["takes_episodes"]} == {TYPED}


def test_a_row_with_a_field_that_nobody_carries_out_is_refused_by_name(newer: Path, tmp_path: Path):
    fields = {
        "context_management": [{"type": "compaction"}],
        "conversation": "c",
        "moderation": {"model": "m"},
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "safety_identifier": "s",
        "stream_options": {"include_obfuscation": True},
    }
    rows = tmp_path / "rows.jsonl"
    params = {"input": [{"role": "user", "content": "1"}]} | fields
    rows.write_text(json.dumps({"responses_create_params": params}) + "\n")
    at = "env.blackjack.data"
    files = [f"{at}.{split}_file={rows}" for split in ("train", "validation")]
    command = [sys.executable, "-m", "gymexp.prepare", "model=tiny", "env=[blackjack]", f"{at}.source=jsonl"]
    done = subprocess.run(
        [*command, *files, f"gym.python='{newer}'"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | NO_WAY_OUT,
        check=False,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for name in fields:
        assert f"responses_create_params.{name}: must be left out" in done.stderr, done.stderr


def test_gym_version_alone_names_the_python_that_is_missing(newer: Path, tmp_path: Path):
    """Where no Python fits, and none can be downloaded."""
    if (newer.parent.parent / "pyvenv.cfg").read_text().count("3.13.0") == 0:
        pytest.skip("a Python fits here")
    shown = subprocess.run(
        [sys.executable, "-m", "gymexp.envs", "gym.version=0.7.0"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"GYMEXP_CACHE": str(tmp_path), "UV_PYTHON_DOWNLOADS": "never"},
        check=False,
    )
    assert shown.returncode == 1 and "Traceback" not in shown.stderr
    [error] = [line for line in shown.stderr.splitlines() if "error" in line]
    assert "NeMo Gym 0.7.0 needs Python >=3.13.14: none is on PATH or under pyenv" in error
    assert "set gym.python to an interpreter that has nemo-gym==0.7.0 installed" in error
