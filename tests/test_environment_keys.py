"""Whole runs as a user starts them, with what a user sets about environments of NeMo Gym's: a judge, keys of
servers, two variants of one environment, a system message, a split of one file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from aiohttp import web
from loopback import serving
from whole_run import NO_WAY_OUT, PATIENCE_S, ROOT, metrics_of, rollouts_of

from gymexp.config.load import from_yaml

pytestmark = [pytest.mark.gym, pytest.mark.e2e, pytest.mark.timeout(600)]
KEY = "a-key-of-the-judge-9e3f"
JUDGED = "over_refusal_detection"
SETTINGS = [
    f"env=[{JUDGED}]",
    f"env.{JUDGED}.judge.model=wise",
    f"env.{JUDGED}.judge.key_env=MY_JUDGE_KEY",
    f"env.{JUDGED}.servers.{JUDGED}.reward_if_complied=0.75",
    f"env.{JUDGED}.system_prompt='Be kind, please.'",
    f"env.{JUDGED}.data.validation_share=0.4",
    *(f"env.{JUDGED}.{key}" for key in ("weight=1", "max_output_tokens=8")),
]
VARIANTS = [
    f"env.{name}.{key}"
    for name, task in (("countdown", "countdown"), ("letters", "letter_counting"))
    for key in (
        "like=sudoku",
        f"data.options.task={task}",
        "data.train_size=8",
        "data.validation_size=2",
        "max_output_tokens=8",
    )
]
SHORT = [
    "model=tiny",
    "engine=hf",
    "trainer.max_steps=1",
    "trainer.per_device_train_batch_size=12",
    "trainer.gradient_accumulation_steps=1",
    "trainer.num_generations=2",
    "evaluation.before=false",
]


def command(*overrides: str, code: int, **env: str) -> str:
    """What a training run printed."""
    done = subprocess.run(
        [sys.executable, "-m", "gymexp.train", *SHORT, *overrides],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        cwd=ROOT,
        env=os.environ | NO_WAY_OUT | env,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    assert "Traceback" not in said and KEY not in said
    return said


@pytest.fixture(scope="module")
def run(folder: Path, gym_python: Path) -> Iterator[SimpleNamespace]:
    """A run in a judged environment and two variants; `keys` are those that the judge was sent."""
    keys: list[str | None] = []

    async def judge(request: web.Request) -> web.Response:
        keys.append(request.headers.get("Authorization"))
        said = {"role": "assistant", "content": "Fine.\n[[COMPLIED]]"}
        choice = {"index": 0, "message": said, "finish_reason": "stop"}
        about = {"id": "j", "object": "chat.completion", "created": 1, "model": "wise"}
        return web.json_response(about | {"choices": [choice]})

    app = web.Application()
    app.add_routes([web.post("/v1/chat/completions", judge)])
    directory = folder / "judged"
    with serving(app) as url:
        more = f"output_dir='{directory}'", f"env.{JUDGED}.judge.url={url}/v1"
        said = command(*SETTINGS, *VARIANTS, *more, code=0, MY_JUDGE_KEY=KEY)
    yield SimpleNamespace(directory=directory, keys=keys, said=said)


def tasks(run: SimpleNamespace, part: str) -> dict[str, dict]:
    """The rows of a part of the data, by the keys of their tasks."""
    lines = map(json.loads, (run.directory / "data" / f"{part}.jsonl").read_text().splitlines())
    return {task["key"]: task["row"] for task in lines}


def test_the_judge_decides_the_rewards_by_the_keys_that_the_user_set(run):
    played = [line["rollout"] for line in rollouts_of(run.directory, "step-000001")]
    rollouts = [rollout for rollout in played if rollout["task"]["env"] == JUDGED]
    assert rollouts and {rollout["reward"] for rollout in rollouts} == {0.75}
    assert len(run.keys) >= len(rollouts) and set(run.keys) == {f"Bearer {KEY}"}
    for rollout in rollouts:
        messages = tasks(run, "train")[rollout["task"]["key"]]["responses_create_params"]["input"]
        assert [message["role"] for message in messages] == ["system", "user"]
        assert messages[0]["content"] == "Be kind, please."


def test_no_file_of_the_run_has_the_key(run):
    files = [path for path in run.directory.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path
    judge = from_yaml(run.directory / "config.yaml").env[JUDGED].judge
    assert judge.key_env == "MY_JUDGE_KEY"


def test_two_variants_of_one_server_play_side_by_side_under_their_own_names(run):
    [entry] = [entry for entry in metrics_of(run.directory) if "loss" in entry]
    assert {f"{name}/reward" for name in ("countdown", "letters", JUDGED)} <= entry.keys()
    logs = {path.stem for path in (run.directory / "logs").glob("*.log")}
    for name in ("countdown", "letters"):
        assert {f"{name}-reasoning_gym", f"{name}-reasoning_gym_simple_agent"} <= logs
    played = {line["rollout"]["task"]["key"] for line in rollouts_of(run.directory, "step-000001")}
    sources = {
        key.partition("/")[0]: row["metadata"]["source_dataset"]
        for key, row in tasks(run, "train").items()
        if key in played and not key.startswith(JUDGED)
    }
    assert sources == {"countdown": "countdown", "letters": "letter_counting"}


def test_the_rows_of_one_file_are_in_one_part_each(run):
    train, validation = (
        {
            json.dumps(row["responses_create_params"]["input"])
            for key, row in tasks(run, part).items()
            if key.startswith(JUDGED)
        }
        for part in ("train", "validation")
    )
    assert (len(train), len(validation)) == (3, 2), "of NeMo Gym's five"
    assert not train & validation


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([f"env.{JUDGED}.judge.key_env=NOT_SET"], f"env.{JUDGED}.judge.key_env=NOT_SET must name an environ"),
        ([f"env.{JUDGED}.judge={{}}"], f"set env.{JUDGED}.judge.url=… and env.{JUDGED}.judge.model=…"),
    ],
)
def test_what_cannot_be_carried_out_ends_the_run_with_its_name(overrides, said, tmp_path, gym_python):
    judge = f"env.{JUDGED}.judge.url=http://127.0.0.1:9/v1"
    where = f"output_dir='{tmp_path / 'run'}'"
    given = [] if overrides[0].endswith("{}") else [judge, *SETTINGS[1:3]]
    assert said in command(SETTINGS[0], *given, where, *overrides, code=1, MY_JUDGE_KEY=KEY)
