"""The real NeMo Gym: its generator, its scorer, and its own idea of a request."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from gymexp.coldstart.demonstrations import demonstrations
from gymexp.config.schema import DataConfig, EnvConfig, RunConfig
from gymexp.data.prepare import prepare
from gymexp.data.rows import load_rows
from gymexp.data.sources import fetch
from gymexp.errors import DataError

pytestmark = pytest.mark.gym


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def sudoku(**options) -> EnvConfig:
    data = DataConfig(
        "generate",
        "reasoning_gym",
        options={"task": "mini_sudoku"} | options,
        train_size=100,
        train_seed=42,
        validation_size=20,
        validation_seed=24,
    )
    return EnvConfig("resources_servers/reasoning_gym/configs/reasoning_gym.yaml", "my_agent", data=data)


def ask(python: Path, code: str, text: str = "") -> str:
    command = [python, "-W", "ignore", "-c", code]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def test_generated_puzzles_load_and_validation_holds_none_of_the_train_puzzles(gym_python, cache):
    env = sudoku()
    files = fetch("sudoku", env, gym_python, cache, print)
    train, validation = (
        load_rows(path, "sudoku", env.agent, server="reasoning_gym")
        for path in (files.train, files.validation)
    )
    assert (len(train), len(validation)) == (100, 20)
    assert not {row["question"] for row in train} & {row["question"] for row in validation}
    assert {row["agent_ref"]["name"] for row in train} == {"my_agent"}


SCORE = """
import json, sys, reasoning_gym
for line in sys.stdin:
    answer, row = json.loads(line)
    score = reasoning_gym.get_score_answer_fn(row["metadata"]["source_dataset"])
    print(score(answer=answer, entry=row))
"""


def test_the_scorer_gives_every_demonstration_a_full_reward(gym_python, cache):
    env = sudoku()
    files = fetch("sudoku", env, gym_python, cache, print)
    rows = [json.loads(line) for line in files.train.read_text().splitlines()]
    answers = [shown["messages"][-1]["content"] for shown in demonstrations("sudoku", env, files)]
    lines = "".join(json.dumps(pair) + "\n" for pair in zip(answers, rows, strict=True))
    assert ask(gym_python, SCORE, lines).split() == ["1.0"] * 100


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"task": "sudoko"}, "'sudoko' not registered"), ({"config": {"min_empty": 13}}, "between 0 and 12")],
)
def test_reasoning_gyms_own_words_reach_the_user(gym_python, cache, options, reason):
    with pytest.raises(DataError, match=reason):
        fetch("sudoku", sudoku(**options), gym_python, cache, print)


def test_the_rows_that_ship_with_nemo_gym_are_accepted(gym_python, cache):
    code = "import nemo_gym, pathlib; print(pathlib.Path(nemo_gym.__path__[0]).parent)"
    servers = Path(ask(gym_python, code).strip().splitlines()[-1]) / "resources_servers"
    for server in ("reasoning_gym", "workplace_assistant"):
        path = servers / server / "data" / "example.jsonl"
        agent = "reasoning_gym_simple_agent" if server == "reasoning_gym" else "a"
        env = EnvConfig(f"resources_servers/{server}/configs/x.yaml", agent)
        env.data = DataConfig("jsonl", train_file=str(path), validation_file=str(path))
        assert len(prepare(RunConfig(env={server: env}), gym_python, cache, print).train) == 5
