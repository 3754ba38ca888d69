"""Generated workplace tasks, as the real server sees them."""

from __future__ import annotations

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.gym

REPOSITORY = Path(__file__).parents[2]
TRAIN, VALIDATION = 40, 10
DOMAINS = {"email", "calendar", "analytics", "project_management", "customer_relationship_manager"}
FILES = ["train.jsonl", "validation.jsonl", "demonstrations.jsonl"]


def generate(gym_python: Path, output: Path, seed: int = 7) -> Path:
    script = REPOSITORY / "gymexp" / "data" / "workplace" / "make.py"
    sizes = ["--train", str(TRAIN), "--validation", str(VALIDATION), "--seed", str(seed)]
    subprocess.run(
        [gym_python, script, *sizes, "--output", output], check=True, timeout=200, cwd=output.parent
    )
    return output


@pytest.fixture(scope="module")
def tasks(gym_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(gym_python, tmp_path_factory.mktemp("workplace") / "tasks")


@pytest.fixture(scope="module")
def said(gym_python: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the live server says to the generated tasks."""
    folder = tmp_path_factory.mktemp("live")
    command = [gym_python, Path(__file__).parent / "workplace_live.py", tasks]
    environment = os.environ | {"HF_HOME": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("SAID "))[5:])


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def all_rows(tasks: Path) -> list[dict[str, Any]]:
    return read(tasks / "train.jsonl") + read(tasks / "validation.jsonl")


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(gym_python, tasks, tmp_path):
    with ThreadPoolExecutor() as both:
        again, other = both.map(
            lambda name, seed: generate(gym_python, tmp_path / name, seed), ("again", "other"), (7, 8)
        )
    assert [(again / f).read_bytes() for f in FILES] == [(tasks / f).read_bytes() for f in FILES]
    assert (other / "train.jsonl").read_bytes() != (tasks / "train.jsonl").read_bytes()


def test_the_sizes_are_those_asked_for(tasks):
    assert [len(read(tasks / f)) for f in FILES] == [TRAIN, VALIDATION, TRAIN]


def test_no_request_and_no_ground_truth_comes_twice(tasks):
    rows = all_rows(tasks)
    requests = {row["responses_create_params"]["input"][1]["content"].lower() for row in rows}
    truths = {json.dumps(row["ground_truth"], sort_keys=True) for row in rows}
    assert len(requests) == len(truths) == len({row["id"] for row in rows}) == TRAIN + VALIDATION


def test_all_domains_come_with_one_and_several_steps(tasks):
    rows = all_rows(tasks)
    domains = {row["category"].removeprefix("workplace_assistant_") for row in rows}
    assert domains == DOMAINS | {"multi_domain"}
    steps = {len(row["ground_truth"]) for row in rows}
    assert 1 in steps and max(steps) > 1
    difficulties = {d["difficulty"] for d in read(tasks / "demonstrations.jsonl")}
    assert difficulties == {"easy", "medium", "hard"}


def test_rows_have_the_shape_of_the_servers_own_examples(gym_python, tasks):
    find = "import resources_servers.workplace_assistant as w; print(list(w.__path__)[0])"
    folder = subprocess.run(
        [gym_python, "-c", find], check=True, capture_output=True, text=True
    ).stdout.strip()
    example = read(Path(folder) / "data" / "example.jsonl")[0]
    params = example["responses_create_params"]
    for row in all_rows(tasks):
        assert list(row) == list(example)
        assert row["responses_create_params"].keys() == {"input", "tools", "parallel_tool_calls"}
        assert row["responses_create_params"]["tools"] == params["tools"]
        assert row["responses_create_params"]["parallel_tool_calls"] is False
        assert row["responses_create_params"]["input"][0] == params["input"][0]
        assert [m["role"] for m in row["responses_create_params"]["input"]] == ["system", "user"]
        assert type(row["id"]) is int
        assert all(type(call[key]) is str for call in row["ground_truth"] for key in ("name", "arguments"))


def test_the_live_server_rewards_the_ground_truth_and_not_doing_nothing(said):
    assert said["rewards"] == [1.0] * (TRAIN + VALIDATION)
    assert said["idle_rewards"] == [0.0] * (TRAIN + VALIDATION)


def test_the_live_server_rewards_each_demonstration(said):
    assert said["expert_rewards"] == [1.0] * TRAIN


def test_demonstrations_hold_what_the_live_server_answers(said):
    assert len(said["outputs"]) > TRAIN
    assert [live for live, _ in said["outputs"]] == [recorded for _, recorded in said["outputs"]]


def test_demonstrations_are_conversations_that_fit_the_turn_limit(tasks):
    for row, demonstration in zip(
        read(tasks / "train.jsonl"), read(tasks / "demonstrations.jsonl"), strict=True
    ):
        messages = demonstration["messages"]
        calls = demonstration["turns"] - 1
        assert messages[:2] == row["responses_create_params"]["input"]
        assert [m["role"] for m in messages[2:]] == ["assistant", "tool"] * calls + ["assistant"]
        assert demonstration["turns"] <= 6
        assert demonstration["id"] == row["id"]
        assert len(demonstration["tools"]) == 27


def test_the_report_counts_what_was_written(tasks):
    report = json.loads((tasks / "report.json").read_text())
    assert report["train"]["tasks"] == sum(report["train"]["by_domain"].values()) == TRAIN
    assert (
        report["proofs"]["ground_truth_reward_1_share"] == report["proofs"]["do_nothing_reward_0_share"] == 1
    )
    assert set(report["sha256"]) == set(FILES)
