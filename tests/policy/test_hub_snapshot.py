"""A model of the hub is one commit, in one directory, for every process of a run."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

import huggingface_hub
import pytest
from hub_stand_in import COMMIT, Hub, put_into_cache, serve
from whole_run import TINY

from gymexp.cluster.placement import Placement, Share
from gymexp.config.schema import ModelConfig, RunConfig
from gymexp.data import hub as hub_module
from gymexp.engine import vllm
from gymexp.errors import ConfigError
from gymexp.policy import hub_snapshot
from gymexp.policy.model import end_token_ids, load_tokenizer
from gymexp.processes.access_keys import Keys
from gymexp.record.directory import RunDirectory
from gymexp.run import services
from gymexp.run.work import TRAINING

REPO = "acme/tiny"
V2 = "beef" + 36 * "0"


@pytest.fixture(scope="module")
def policies() -> dict[str, dict[str, bytes]]:
    """The files of two revisions, with other weights, another chat template and another end token."""
    main = {path.name: path.read_bytes() for path in TINY.iterdir()}
    v2 = main | {
        "model.safetensors": b"of version two",
        "chat_template.jinja": b"Version two. " + main["chat_template.jinja"],
        "generation_config.json": json.dumps({"eos_token_id": 7}).encode(),
    }
    return {"main": main, "v2": v2}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache that is empty, for this process and for those that it starts."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "hf"


@pytest.fixture
def hub(cache, policies, monkeypatch):
    main, v2 = ({f"{REPO}/{name}": held for name, held in policies[n].items()} for n in ("main", "v2"))
    for extra in (
        "model.gguf",
        "pytorch_model.bin",
        "original/model.safetensors",
        "consolidated.safetensors",
    ):
        main[f"{REPO}/{extra}"] = b"another copy of the weights"
    with serve(Hub(main, refs={"main": COMMIT, "v2": V2}, commits={V2: v2})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


@pytest.fixture
def offline(cache, policies, monkeypatch) -> Path:
    """Both revisions in the cache, as huggingface_hub lays them out, and no hub."""
    put_into_cache(cache, REPO, "main", COMMIT, policies["main"])
    put_into_cache(cache, REPO, "v2", V2, policies["v2"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


def model(revision: str | None = None) -> ModelConfig:
    return ModelConfig("tiny", REPO, revision)


def pin(revision: str | None = None, said: list[str] | None = None) -> ModelConfig:
    return hub_snapshot.pin(model(revision), (said if said is not None else []).append)


def test_what_is_fetched_is_one_copy_of_the_weights_and_what_stands_beside_it(hub, cache, policies):
    said: list[str] = []
    assert pin(said=said).revision == COMMIT
    assert f"downloading main, commit {COMMIT[:12]}" in said[0]
    there = hub_snapshot.directory_of(model(COMMIT))
    assert {path.name for path in there.iterdir()} == set(policies["main"]) - {"README.md"}
    assert there.is_relative_to(cache)
    hub.asked.clear()
    assert pin(COMMIT).revision == COMMIT and hub_snapshot.directory_of(model(COMMIT)) == there
    assert not hub.asked, "a commit that is here needs no hub"


def test_a_branch_that_moves_on_leaves_a_pinned_model_where_it_was(hub):
    pinned = pin()
    hub.refs["main"] = V2
    assert hub_snapshot.directory_of(pinned).name == COMMIT
    assert pin().revision == V2


def test_weights_in_shards_come_with_their_index_and_nothing_of_another_format():
    index = json.dumps(
        {"weight_map": {"a": "model.safetensors-1-of-2.safetensors", "b": "model-2.safetensors"}}
    )
    names = ["config.json", "model.safetensors.index.json", "model.fp16.safetensors", "pytorch_model.bin"]
    names += ["model.safetensors-1-of-2.safetensors", "model-2.safetensors", "pytorch_model.bin.index.json"]
    names += ["tokenizer.model", "additional_chat_templates/tool_use.jinja", "onnx/config.json", "README.md"]
    wanted = hub_snapshot.files_of(names, {"model.safetensors.index.json": index}.__getitem__)
    assert wanted == [
        "additional_chat_templates/tool_use.jinja",
        "config.json",
        "model-2.safetensors",
        "model.safetensors-1-of-2.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
    ]
    only_bin = ["config.json", "pytorch_model.bin", "tokenizer.json", "model.gguf"]
    assert hub_snapshot.files_of(only_bin, {}.__getitem__) == [
        "config.json",
        "pytorch_model.bin",
        "tokenizer.json",
    ]


def test_a_repository_without_weights_that_transformers_loads_is_refused(hub):
    hub.files = {f"{REPO}/config.json": b"{}", f"{REPO}/model.gguf": b"x"}
    with pytest.raises(ConfigError, match=r"no config\.json with model\.safetensors or pytorch_model\.bin"):
        pin()


def test_a_snapshot_of_which_a_part_is_here_is_completed(hub, cache, policies):
    some = {n: c for n, c in policies["v2"].items() if n != "model.safetensors"}
    put_into_cache(cache, REPO, "v2", V2, some)
    assert hub_snapshot.cached(REPO, "v2") is None
    assert (hub_snapshot.directory_of(pin("v2")) / "model.safetensors").read_bytes() == policies["v2"][
        "model.safetensors"
    ]


def test_without_a_hub_a_branch_is_what_it_was_when_it_was_fetched(offline, policies):
    said: list[str] = []
    pinned = pin("v2", said)
    assert pinned.revision == V2 and "HF_HUB_OFFLINE is set; using v2 as downloaded before" in said[0]
    tokenizer = load_tokenizer(pinned)
    assert tokenizer.chat_template.startswith("Version two. ")
    assert 7 in end_token_ids(tokenizer, hub_snapshot.directory_of(pinned))
    assert not load_tokenizer(pin()).chat_template.startswith("Version two. ")


@pytest.mark.parametrize(
    ("mood", "revision", "reason"),
    [
        ("well", "v9", "the model has no such revision"),
        ("private", "main", "HTTP 401"),
        ("broken", "main", "HTTP 500"),
        ("hanging", "main", "did not answer"),
        ("nameless", "main", "not a Hugging Face hub"),
        ("well", "d00d" + 36 * "0", "a run keeps to the commit that it began with"),
    ],
)
def test_what_cannot_be_fetched_is_said_with_ways_on(hub, monkeypatch, mood, revision, reason):
    monkeypatch.setattr(hub_module, "ANSWER_TIMEOUT_S", 1.0)
    hub.mood = mood
    with pytest.raises(ConfigError) as caught:
        pin(revision)
    text = str(caught.value)
    assert reason in text and f"model.path={REPO} at model.revision={revision}" in text
    assert f"hf download {REPO} --revision {revision}" in text and "HF_HUB_CACHE" in text


def test_a_hub_that_is_gone_leaves_what_was_fetched_before(hub, monkeypatch):
    pin()
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    said: list[str] = []
    assert pin(said=said).revision == COMMIT
    assert "cannot be reached" in said[0] and f"commit {COMMIT[:12]}" in said[0]


def test_a_revision_beside_a_directory_is_refused():
    with pytest.raises(ConfigError, match=r"model\.revision must be null where model\.path is a directory"):
        hub_snapshot.pin(ModelConfig("tiny", str(TINY), revision="v2"), print)


def test_gateway_and_vllm_are_started_with_the_directory_of_the_pinned_commit(offline, tmp_path, monkeypatch):
    started: list[list[str]] = []

    async def note(command, *_, **__):
        started.append(command)

    monkeypatch.setattr(services, "spawn", note)
    config = RunConfig(model=pin("v2"))
    placement = Placement("hf", replicas=[], training=[Share(0, [])])
    with socket.create_server(("127.0.0.1", 0)) as sock:
        [service] = services.gateways(
            config, placement, RunDirectory(tmp_path), [sock], ["http://e"], Keys.new(), TRAINING
        )
        asyncio.run(service.start())
    assert started[0][started[0].index("--tokenizer") + 1] == str(hub_snapshot.directory_of(model(V2)))
    command = vllm.serve_command(config.model, config.engine, 8001, vllm.Version(0, 31), "disk")
    assert str(hub_snapshot.directory_of(model(V2))) in command and "--revision" not in command
