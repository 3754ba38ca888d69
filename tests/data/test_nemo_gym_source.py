"""`source=nemo_gym`: rows come from where NeMo Gym's file says, or NeMo Gym's own command is named."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest
from hub_stand_in import Hub, serve
from huggingface_hub import constants

from gymexp.config.schema import DataConfig, EnvConfig
from gymexp.data.sources import fetch
from gymexp.errors import DataError
from gymexp.gym.install import site_packages

FILE = """
rooms:
  resources_servers:
    rooms: {entrypoint: app.py}
walker:
  responses_api_agents:
    simple_agent:
      entrypoint: app.py
      resources_server: {type: resources_servers, name: rooms}
      datasets: [%s]
"""
ENV = EnvConfig("resources_servers/rooms/configs/rooms.yaml", "walker", data=DataConfig("nemo_gym"))
EXAMPLE = "{name: e, type: example, jsonl_fpath: resources_servers/rooms/data/example.jsonl}"


def entry(kind: str, **more: str) -> str:
    fields = {"name": kind, "type": kind, "jsonl_fpath": f"resources_servers/rooms/data/{kind}.jsonl"} | more
    return "{" + ", ".join(f"{key}: {value}" for key, value in fields.items()) + "}"


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """Fetches the rows of an environment whose file has these data sets; gives files and what was said."""
    site = tmp_path / "site"
    (site / "nemo_gym").mkdir(parents=True)
    data = site / "resources_servers" / "rooms" / "data"
    data.mkdir(parents=True)
    (data / "example.jsonl").write_text("{}\n" * 5)
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {site}/nemo_gym\n")
    python.chmod(0o755)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def fetch_rows(*datasets: str):
        path = site / ENV.config_path
        path.parent.mkdir(exist_ok=True)
        path.write_text(FILE % ", ".join(datasets))
        said: list[str] = []
        return fetch("rooms", ENV, python, tmp_path / "cache", said.append), "\n".join(said)

    return fetch_rows


def test_example_rows_are_both_splits_where_nothing_else_is_named_and_a_warning_says_so(fetched, tmp_path):
    (tmp_path / "site" / "resources_servers/rooms/configs").mkdir()
    (tmp_path / "site" / "resources_servers/rooms/configs/prepare.py").touch()
    files, said = fetched(EXAMPLE)
    assert files.train == files.validation
    assert files.train == tmp_path / "site/resources_servers/rooms/data/example.jsonl"
    assert "warning: rooms: the train and the validation rows are the 5 example rows" in said
    assert "configs/prepare.py makes more" in said


def test_files_of_the_hub_are_downloaded_and_their_licence_is_said(fetched, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    hub = "huggingface_identifier: {repo_id: lab/rooms, artifact_fpath: %s}, license: Apache 2.0"
    train = EXAMPLE.replace("example", "train").replace("}", f", {hub % 'train.jsonl'}}}")
    source = "source: {type: huggingface, repo_id: lab/rooms, artifact_fpath: held/out.jsonl}"
    held_out = EXAMPLE.replace("example", "validation").replace("}", f", {source}}}")
    with serve(Hub({"lab/rooms/train.jsonl": b"1\n", "lab/rooms/held/out.jsonl": b"2\n"})) as stand_in:
        monkeypatch.setenv("HF_ENDPOINT", stand_in.url)
        files, said = fetched(train, held_out, EXAMPLE)
    assert (files.train.read_bytes(), files.validation.read_bytes()) == (b"1\n", b"2\n")
    assert "train rows from lab/rooms, licence: Apache 2.0" in said
    assert "validation rows from lab/rooms, licence: not stated" in said


def test_a_file_that_was_fetched_into_the_working_directory_is_used(fetched, tmp_path):
    gitlab = "{dataset_name: rooms, version: 0.0.1, artifact_fpath: t.jsonl}"
    mine = tmp_path / "here" / "resources_servers" / "rooms" / "data" / "train.jsonl"
    mine.parent.mkdir(parents=True)
    mine.write_text("{}\n")
    files, _ = fetched(entry("train", gitlab_identifier=gitlab), EXAMPLE)
    assert files.train == mine and files.validation.name == "example.jsonl"


def test_gitlab_is_refused_with_nemo_gyms_command_and_the_example_rows_way_out(fetched, tmp_path):
    gitlab = "{dataset_name: rooms, version: 0.0.1, artifact_fpath: t.jsonl}"
    with pytest.raises(DataError) as caught:
        fetched(entry("train", gitlab_identifier=gitlab), EXAMPLE)
    text = str(caught.value)
    assert (
        "gym dataset download --storage gitlab --name rooms --revision 0.0.1 --artifact t.jsonl "
        "--output resources_servers/rooms/data/train.jsonl"
    ) in text
    example = tmp_path / "site/resources_servers/rooms/data/example.jsonl"
    assert f"env.rooms.data.source=jsonl env.rooms.data.train_file={example}" in text


def test_a_benchmark_is_refused_with_the_command_that_prepares_it(fetched):
    with pytest.raises(DataError, match=r"gym eval prepare --config resources_servers/rooms/configs/rooms"):
        fetched(entry("benchmark", prepare_script="x/prepare.py"))


def test_without_any_rows_the_users_own_are_asked_for(fetched, tmp_path):
    (tmp_path / "site/resources_servers/rooms/data/example.jsonl").unlink()
    with pytest.raises(DataError, match=r"env\.rooms\.data\.source=jsonl"):
        fetched(EXAMPLE)


@pytest.mark.gym
def test_nemo_gym_fills_in_the_prompts_of_a_benchmark(gym_python, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    env = EnvConfig("benchmarks/gsm8k/config.yaml", "gsm8k_math_with_judge_simple_agent")
    env.data = DataConfig("nemo_gym")
    rows = Path("benchmarks/gsm8k/data/gsm8k_benchmark.jsonl")
    rows.parent.mkdir(parents=True)
    rows.write_text('{"question": "What is 2 + 2?", "expected_answer": "4"}\n')
    files = fetch("gsm8k", env, gym_python, tmp_path / "cache", print)
    [row] = [orjson.loads(line) for line in files.train.read_bytes().splitlines()]
    assert "What is 2 + 2?" in row["responses_create_params"]["input"][-1]["content"]
    template = (site_packages(gym_python) / "benchmarks/prompts/generic/math.yaml").read_text()
    assert "boxed" in template and "boxed" in row["responses_create_params"]["input"][-1]["content"]
