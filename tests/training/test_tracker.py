"""tracker=wandb: whether it could begin, by wandb's own rules for finding a login."""

from __future__ import annotations

import pytest

from gymexp.config.schema import TrackerConfig
from gymexp.training import tracker

KEY = "0123456789" * 4


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    """A user without a login, wherever wandb looks."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_LOG_MODEL", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    forget()
    yield
    forget()


def forget() -> None:
    from wandb.sdk import wandb_setup

    tracker._no_login.cache_clear()
    wandb_setup.teardown()


def problems_of(**settings: str) -> str:
    return "\n".join(tracker.problems(TrackerConfig(**{"kind": "wandb"} | settings)))


def test_without_a_login_it_is_refused_with_what_to_do():
    assert problems_of().startswith("tracker=wandb needs a login of wandb's: there is none for https://")
    assert problems_of().endswith("Run `wandb login`, set WANDB_API_KEY, or say tracker.mode=offline")


def test_a_key_that_cannot_be_one_is_named(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    assert "WANDB_API_KEY invalid: API key must have 40+ characters" in problems_of()


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_modes_without_a_server_need_none(mode, monkeypatch):
    assert problems_of(mode=mode) == ""
    forget()
    monkeypatch.setenv("WANDB_MODE", mode)
    assert problems_of() == ""
    assert "needs a login" in problems_of(mode="online"), "tracker.mode goes before the variable"


def test_a_login_of_the_environment_or_of_netrc_is_found(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert problems_of() == ""
    forget()
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    netrc = tmp_path / ".netrc"
    netrc.write_text(f"machine wandb.example.org\n  login user\n  password {KEY}\n")
    netrc.chmod(0o600)
    assert problems_of() == ""
    forget()
    netrc.unlink()
    assert "there is none for https://wandb.example.org" in problems_of()
    assert capfd.readouterr().err == "", "wandb would say where it found it"


def test_uploading_weights_is_refused_for_wandb_alone(monkeypatch):
    monkeypatch.setenv("WANDB_LOG_MODEL", "end")
    assert problems_of(mode="offline").startswith("WANDB_LOG_MODEL must be unset or false with tracker=wandb")
    assert problems_of(kind="none") == ""
    monkeypatch.setenv("WANDB_LOG_MODEL", "False")
    assert problems_of(mode="offline") == ""
