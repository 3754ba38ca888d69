"""An exported folder goes to the hub: a stand-in on loopback, which speaks the hub's own protocol."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import huggingface_hub
import pytest
from exported_run import write_run
from hub_stand_in import COMMIT, Hub, serve

from gymexp.config.schema import ModelConfig
from gymexp.errors import GymexpError
from gymexp.export.card import build_card
from gymexp.export.chosen import choose
from gymexp.export.push import check_login, push

REPO = "ann/policy"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the stand-in has no content store of Xet's
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve(Hub({})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        yield hub


def folder_of(path: Path, run: str = "1", **files: bytes) -> Path:
    contents = {"model.safetensors": b"w" * 1000, "README.md": b"---\nlicense: mit\n---\n# x\n"} | files
    contents["gymexp/export.json"] = json.dumps({"run": run, "step": 4}).encode()
    for name, content in contents.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def on(hub: Hub) -> dict[str, bytes]:
    return {name.removeprefix(f"{REPO}/"): content for name, content in hub.files.items()}


def test_a_new_repository_is_private_and_has_every_file(hub, tmp_path):
    folder = folder_of(tmp_path / "a")
    assert push(folder, REPO, public=False) == f"{hub.url}/{REPO}"
    assert hub.repos == {REPO: True} and on(hub) == files_of(folder)
    assert {authorization for method, _, authorization in hub.asked if method == "POST"} == {
        f"Bearer {hub.token}"
    }


def test_public_is_public(hub, tmp_path):
    push(folder_of(tmp_path / "a"), REPO, public=True)
    assert hub.repos == {REPO: False}


def test_a_later_export_of_the_run_replaces_the_files_and_removes_those_it_lacks(hub, tmp_path):
    push(folder_of(tmp_path / "a", **{"old.json": b"{}"}), REPO, public=False)
    later = folder_of(tmp_path / "b", **{"model.safetensors": b"v" * 1000})
    push(later, REPO, public=False)
    assert on(hub) == files_of(later)


def test_a_push_that_was_refused_half_way_goes_on(hub, tmp_path):
    hub.mood = "full"
    folder = folder_of(tmp_path / "a")
    with pytest.raises(GymexpError, match=r"refuses the token \(HTTP 403\).*ann.*goes on with it"):
        push(folder, REPO, public=False)
    assert set(on(hub)) == {"gymexp/export.json"}
    hub.mood = "well"
    push(folder, REPO, public=False)
    assert on(hub) == files_of(folder)


@pytest.mark.parametrize(("public", "fix"), [(True, "leave --public out"), (False, "say --public")])
def test_a_repository_of_the_other_visibility_is_left_alone(hub, tmp_path, public, fix):
    hub.repos[REPO] = public
    with pytest.raises(GymexpError, match=f"the repository exists and is .*{fix}"):
        push(folder_of(tmp_path / "a"), REPO, public=public)
    assert hub.files == {}


@pytest.mark.parametrize("mark", [None, b'{"run": "2"}', b"[]", b"not json"])
def test_a_repository_with_something_else_is_left_alone(hub, tmp_path, mark):
    hub.repos[REPO] = True
    hub.files[f"{REPO}/model.safetensors"] = b"other"
    if mark is not None:
        hub.files[f"{REPO}/gymexp/export.json"] = mark
    before = dict(hub.files)
    with pytest.raises(
        GymexpError, match=r"no export of this run \(.*model.safetensors.*choose another name"
    ):
        push(folder_of(tmp_path / "a"), REPO, public=False)
    assert hub.files == before


def test_a_token_that_may_not_write_is_named(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(GymexpError, match=r"refuses the token \(HTTP 401\): say `hf auth login`"):
        push(folder_of(tmp_path / "a"), REPO, public=False)


def test_without_a_login_it_says_how_to_log_in(hub, monkeypatch):
    check_login()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(GymexpError, match="say `hf auth login`, or set HF_TOKEN"):
        check_login()


def test_a_hub_that_is_gone_is_one_line(hub, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    with pytest.raises(GymexpError, match=f"{port} cannot be reached .*the same command goes on") as caught:
        push(folder_of(tmp_path / "a"), REPO, public=False)
    assert "\n" not in str(caught.value)


BASE = "lab/tiny"
CARDS = {
    "license: llama3.1": {"license": "llama3.1"},
    "license: other\nlicense_name: lab-1\nlicense_link: LICENSE": {
        "license": "other",
        "license_name": "lab-1",
        "license_link": "LICENSE",
    },
    "language: en": {},
}


@pytest.mark.parametrize("card", CARDS)
def test_the_card_has_the_license_of_the_base_models_card_and_no_other(hub, tmp_path, card):
    hub.files[f"{BASE}/README.md"] = f"---\n{card}\n---\n# tiny, under the MIT license\n".encode()
    run = write_run(tmp_path / "run", model=ModelConfig("tiny", BASE, revision=COMMIT, dtype="float32"))
    text = build_card(choose(run, "last"), REPO, False, False, set(), ask_hub=True)
    data = huggingface_hub.ModelCard(text).data.to_dict()
    assert {name: value for name, value in data.items() if name.startswith("license")} == CARDS[card]
    assert data["base_model"] == BASE and data["base_model_relation"] == "finetune"


def test_without_an_answer_of_the_hub_the_card_names_no_license(hub, tmp_path):
    hub.files[f"{BASE}/README.md"] = b"---\nlicense: mit\n---\n"
    hub.mood = "broken"
    run = write_run(tmp_path / "run", model=ModelConfig("tiny", BASE, revision=COMMIT, dtype="float32"))
    for ask_hub in (True, False):
        text = build_card(choose(run, "last"), REPO, False, False, set(), ask_hub)
        assert "license" not in huggingface_hub.ModelCard(text).data.to_dict()
    assert f"/{BASE}/resolve/{COMMIT}/README.md" in {path for _, path, _ in hub.asked}


def test_a_name_that_is_no_repositorys_is_named(hub, tmp_path):
    with pytest.raises(GymexpError, match="--push must be a name like user/name, got 'a/b/c'"):
        push(folder_of(tmp_path / "a"), "a/b/c", public=False)
