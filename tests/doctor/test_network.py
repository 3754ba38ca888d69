"""The hub and the tracker, asked on loopback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from gymexp.config.schema import ModelConfig, RunConfig, TrackerConfig
from gymexp.doctor import network
from gymexp.doctor.finding import Finding, Subject

HERE = Subject(RunConfig(model=ModelConfig("tiny", "gymexp/assets/tiny")))
THERE = Subject(RunConfig(model=ModelConfig("some", "nobody/has-this")))


@pytest.fixture
def answers(monkeypatch) -> Iterator[dict[str, int]]:
    """Path -> HTTP status of a hub, 404 where nothing is said; -1 hangs."""
    statuses: dict[str, int] = {}
    closing = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = statuses.get(self.path.partition("?")[0], 404)
            if status < 0:
                closing.wait(30)
                return
            if self.headers.get("Authorization") == "Bearer wrong":
                status = 401
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(network, "get_token", lambda: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield statuses
    closing.set()
    server.shutdown()
    server.server_close()


def levels(found) -> list[str]:
    return [one.level for one in found]


def test_a_model_that_can_be_downloaded_is_well_and_a_gated_one_is_not(answers):
    answers |= {"/api/models": 200, "/nobody/has-this/resolve/main/config.json": 200}
    assert levels(network.hub(THERE)) == ["ok", "ok"]
    answers["/nobody/has-this/resolve/main/config.json"] = 403
    found = list(network.hub(THERE))
    assert levels(found) == ["ok", "fail"] and "gated or private (HTTP 403)" in found[1].text


def test_a_hub_that_hangs_fails_only_a_run_that_needs_it(answers, monkeypatch):
    answers["/api/models"] = -1
    monkeypatch.setattr(network, "_TIMEOUT_S", 0.3)
    assert levels(network.hub(HERE)) == ["warn"]
    found = list(network.hub(THERE))
    assert levels(found) == ["fail"] and "needed for model.path" in found[0].text


def test_a_token_that_the_hub_refuses_is_a_failure(answers, monkeypatch):
    monkeypatch.setattr(network, "get_token", lambda: "wrong")
    assert [(one.level, one.fix) for one in network.hub(HERE)] == [("fail", "hf auth login, or set HF_TOKEN")]


def test_offline_asks_nobody_and_misses_what_is_not_cached(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(network.httpx, "get", lambda *_, **__: pytest.fail("the hub was asked"))
    assert levels(network.hub(HERE)) == ["ok"]
    found = list(network.hub(THERE))
    assert levels(found) == ["fail"] and "hf download nobody/has-this" in found[0].fix


def wandb(mode: str | None = None) -> list[Finding]:
    return list(network.tracker(Subject(RunConfig(tracker=TrackerConfig(kind="wandb", mode=mode)))))


def test_wandb_needs_a_key_unless_it_is_offline(answers, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    assert levels(wandb("offline")) == ["ok"]
    assert "has no key" in wandb()[0].text
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password secret\n")
    assert "cannot be reached" in wandb()[0].text
    monkeypatch.setenv("WANDB_BASE_URL", network.os.environ["HF_ENDPOINT"])
    assert levels(wandb()) == ["ok"]
