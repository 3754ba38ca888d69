import socket
import time
from pathlib import Path

import huggingface_hub
import pytest
from hub_stand_in import COMMIT, Hub, serve

from gymexp.config.schema import DataConfig, EnvConfig
from gymexp.data import hub as hub_module
from gymexp.data.sources import Files, fetch
from gymexp.errors import DataError

REPO = "some-lab/office"
TRAIN, VALIDATION = b'{"n": 1}\n' * 50, b'{"n": 2}\n'


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve(Hub({f"{REPO}/train.jsonl": TRAIN, f"{REPO}/data/validation.jsonl": VALIDATION})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def office(**changes) -> EnvConfig:
    said = {
        "repo_id": REPO,
        "train_file": "train.jsonl",
        "validation_file": "data/validation.jsonl",
    } | changes
    return EnvConfig("resources_servers/x/configs/x.yaml", "x_agent", data=DataConfig("huggingface", **said))


def get(tmp_path: Path, said: list[str] | None = None, **changes) -> Files:
    said = [] if said is None else said
    return fetch("office", office(**changes), None, tmp_path / "cache", said.append)


def failure(tmp_path: Path, **changes) -> tuple[str, float]:
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        get(tmp_path, **changes)
    return str(caught.value), time.monotonic() - start


def test_both_files_arrive_and_the_second_time_come_from_the_cache(hub, tmp_path):
    said: list[str] = []
    files = get(tmp_path, said)
    assert (files.train.read_bytes(), files.validation.read_bytes()) == (TRAIN, VALIDATION)
    assert sum("downloading" in line for line in said) == 2
    hub.asked.clear()
    assert get(tmp_path) == files
    assert {method for method, *_ in hub.asked} == {"HEAD"}


def test_both_files_are_of_the_commit_that_the_first_answer_named(hub, tmp_path):
    get(tmp_path)
    asked = [path.split("/resolve/")[1] for _, path, _ in hub.asked]
    assert set(asked) == {"main/train.jsonl", f"{COMMIT}/data/validation.jsonl"}


def test_a_private_dataset_is_read_with_the_token_of_the_environment(hub, tmp_path, monkeypatch):
    hub.mood = "private"
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert get(tmp_path).train.read_bytes() == TRAIN
    assert {authorization for *_, authorization in hub.asked} == {f"Bearer {hub.token}"}


def test_a_refused_dataset_is_said_with_its_url_the_token_and_the_ways_on(hub, tmp_path):
    hub.mood = "private"
    text, _ = failure(tmp_path, generator="workplace")
    assert "HTTP 401" in text and f"{hub.url}/datasets/{REPO}/resolve/main/train.jsonl" in text
    assert "HF_TOKEN; none was given" in text
    assert "env.office.data.source=generate" in text
    assert (
        "env.office.data.source=jsonl env.office.data.train_file=… env.office.data.validation_file=…" in text
    )


def test_without_a_generator_only_own_files_are_offered(hub, tmp_path):
    hub.mood = "gated"
    text, _ = failure(tmp_path)
    assert "source=generate" not in text and "source=jsonl" in text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"repo_id": "some-lab/nothing"}, "no such dataset, or a private one (HTTP 404)"),
        ({"repo_id": "a/b/c"}, "Repo id must be"),
        ({"revision": "v9"}, "no such revision"),
        ({"train_file": "tarin.jsonl"}, "no such file"),
    ],
)
def test_what_the_hub_does_not_have_is_named(hub, tmp_path, changes, reason):
    text, _ = failure(tmp_path, **changes)
    assert reason in text


@pytest.mark.parametrize(
    ("mood", "reason"),
    [
        ("gated", "gated (HTTP 403)"),
        ("broken", "HTTP 500"),
        ("hanging", "did not answer"),
        ("stalled", "stood still"),
    ],
)
def test_a_hub_in_trouble_ends_the_wait_soon(hub, tmp_path, monkeypatch, mood, reason):
    monkeypatch.setattr(hub_module, "ANSWER_TIMEOUT_S", 1.0)
    monkeypatch.setattr(hub_module, "_STALL_TIMEOUT_S", 2.0)
    hub.mood = mood
    text, seconds = failure(tmp_path)
    assert reason in text and seconds < 6


def test_an_unreachable_hub_is_said_within_seconds(hub, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    text, seconds = failure(tmp_path)
    assert "cannot be reached" in text and str(port) in text and seconds < 5


def test_what_was_downloaded_before_serves_when_the_hub_is_gone(hub, tmp_path, monkeypatch):
    files = get(tmp_path)
    hub.mood = "broken"
    said: list[str] = []
    assert get(tmp_path, said) == files
    assert "HTTP 500; using train.jsonl as downloaded before (commit c0ffee" in said[0]


def test_offline_mode_uses_the_cache_and_asks_nobody(hub, tmp_path, monkeypatch):
    files = get(tmp_path)
    hub.asked.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert get(tmp_path) == files
    text, _ = failure(tmp_path, repo_id="some-lab/other")
    assert "HF_HUB_OFFLINE is set" in text
    assert hub.asked == []


def test_something_that_is_no_hub_is_recognised(hub, tmp_path):
    hub.mood = "nameless"
    text, _ = failure(tmp_path)
    assert "not a Hugging Face hub" in text
