"""How many rollouts the limit on open files has room for."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from gymexp.config.schema import EnvConfig
from gymexp.errors import ConfigError
from gymexp.processes import open_files


def within(monkeypatch, limit: int, **asked: int | None) -> dict[str, int]:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    return open_files.concurrency({name: EnvConfig(max_concurrency=value) for name, value in asked.items()})


def test_what_is_not_said_is_64_or_as_many_as_have_room(monkeypatch):
    assert within(monkeypatch, 1024, a=None, b=None) == {"a": 64, "b": 64}
    few = within(monkeypatch, 256, a=None, b=None)
    assert few["a"] == few["b"] >= 16
    # As counted with real servers: 5.8 open files a rollout in its agent, 2.7 in the model server.
    assert 9 + 5.8 * few["a"] < 256 and 9 + 2.7 * 2 * few["a"] < 256
    assert within(monkeypatch, 64, a=None)["a"] >= 1
    assert within(monkeypatch, resource.RLIM_INFINITY, a=None, b=500) == {"a": 64, "b": 500}


def test_what_is_asked_for_is_done_or_refused_with_both_numbers(monkeypatch):
    assert within(monkeypatch, 1024, a=128)["a"] == 128
    with pytest.raises(ConfigError) as caught:
        within(monkeypatch, 256, a=128)
    assert str(caught.value) == (
        "env.a.max_concurrency must be at most 36, got 128: an agent would have 808 files open, and the "
        "limit is 256. Raise it (`ulimit -n 808`), or set env.a.max_concurrency=36, or more env.a.replicas"
    )
    with pytest.raises(ConfigError, match=r"at most 72 together, got 108: the model server would have 364"):
        within(monkeypatch, 256, a=36, b=36, c=36)


def test_replicas_share_an_environments_rollouts(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256))
    assert open_files.concurrency({"a": EnvConfig(max_concurrency=60, replicas=2)}) == {"a": 60}


def test_a_process_takes_what_the_system_lets_it_have():
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 300))\n"
        "from gymexp.processes import open_files; open_files.raise_limit(); print(open_files.limit())"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "300"
