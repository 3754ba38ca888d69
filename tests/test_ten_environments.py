"""Ten environments of NeMo Gym's catalogue in one evaluation of the tiny policy: chosen to differ, played on
their own example rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from whole_run import PATIENCE_S, ROOT, TINY, rollouts_of

from gymexp.gym.install import site_packages

pytestmark = [pytest.mark.gym, pytest.mark.e2e, pytest.mark.timeout(600)]
# Each with the folder of the resources server whose example rows it plays.
ENVIRONMENTS = {
    "example_multi_turn_gymnasium": "example_multi_turn_gymnasium",  # several turns, by the gymnasium agent
    "blackjack": "blackjack",  # the gymnasium agent; a game that the policy may win
    "example_session_state_mgmt": "example_session_state_mgmt",  # tools with a state
    "xlam_fc": "xlam_fc",  # tools that differ from row to row
    "terminal_multi_harness_codex": "terminal_multi_harness",  # tool simulation
    "code_gen": "code_gen",  # imports modules of its own folder; requires numpy==2.2.6
    "polymath": "polymath",  # requires math-verify
    "reasoning_gym": "reasoning_gym",
    "reasoning_gym_server": "reasoning_gym",
    "gpqa": "mcqa",  # a benchmark's entry, which inherits from its server's
}
SCORES = """
import json, sys, reasoning_gym
for line in sys.stdin:
    row, answer = json.loads(line)
    score = reasoning_gym.get_score_answer_fn(row["metadata"]["source_dataset"])
    print(score(answer=answer, entry={k: row[k] for k in ("question", "answer", "metadata")}))
"""


@pytest.fixture(scope="module")
def played(gym_python: Path, tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    """Returns the outcomes of each environment: two tasks, one sample each."""
    folder = tmp_path_factory.mktemp("ten")
    settings = ["model=tiny", "engine=hf", "model.max_model_len=16384", "evaluation.temperature=1"]
    for name, server in ENVIRONMENTS.items():
        shipped = site_packages(gym_python) / "resources_servers" / server / "data" / "example.jsonl"
        rows = [json.loads(line) for line in shipped.read_text().splitlines()[:2]]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row | {"agent_ref": None}) + "\n" for row in rows))
        settings += [f"env.{name}.data.source=jsonl", f"env.{name}.max_output_tokens=16"]
        settings += [f"env.{name}.data.{split}_file={path}" for split in ("train", "validation")]
    settings += [f"env=[{','.join(ENVIRONMENTS)}]", f"output_dir={folder / 'run'}"]
    done = subprocess.run(
        [sys.executable, "-m", "gymexp.evaluate", *settings],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    by_env: dict[str, list[dict[str, Any]]] = {name: [] for name in ENVIRONMENTS}
    lines = (folder / "run" / "data" / "validation.jsonl").read_text().splitlines()
    rows = {task["key"]: task["row"] for task in map(json.loads, lines)}
    for rollout in (outcome["rollout"] for outcome in rollouts_of(folder / "run", "eval-000000")):
        by_env[rollout["task"]["env"]].append(rollout | {"row": rows[rollout["task"]["key"]]})
    return by_env


def test_each_has_a_reward_of_every_task(played):
    rewards = {name: [rollout["reward"] for rollout in rollouts] for name, rollouts in played.items()}
    assert {name: len(r) for name, r in rewards.items() if None not in r} == dict.fromkeys(ENVIRONMENTS, 2)
    assert set(rewards["blackjack"]) <= {-1.0, 0.0, 1.0}


def test_the_tokens_of_every_turn_are_those_of_the_text_and_go_on_where_the_turn_before_ended(played):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    assert max(len(rollout["turns"]) for rollout in played["example_multi_turn_gymnasium"]) > 1
    compared = 0
    for rollout in (rollout for rollouts in played.values() for rollout in rollouts):
        before: list[int] = []
        for turn in rollout["turns"]:
            assert turn["prompt_ids"][: len(before)] == before
            assert len(turn["completion_ids"]) == len(turn["logprobs"]) <= 16
            before = turn["prompt_ids"] + turn["completion_ids"]
        last = rollout["items"][-1]
        if last["type"] == "message":  # and no tool call, of which the item has the parsed parts
            sampled = tokenizer.decode(rollout["turns"][-1]["completion_ids"]).removesuffix("<|im_end|>")
            assert "".join(part["text"] for part in last["content"]).strip() == sampled.strip()
            compared += 1
    assert compared > 10


def test_the_rewards_are_those_that_the_environments_own_library_gives_for_the_answer(played, gym_python):
    rollouts = played["reasoning_gym"] + played["reasoning_gym_server"]
    given = [[r["row"], r["verdict"].get("extracted_answer") or ""] for r in rollouts]
    lines = "".join(json.dumps(pair) + "\n" for pair in given)
    command = [gym_python, "-W", "ignore", "-c", SCORES]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    assert [rollout["reward"] for rollout in rollouts] == pytest.approx(list(map(float, done.stdout.split())))
