"""The controller alone: a small process in the trainer's place; no environments, gateways or engines."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest

from gymexp.cluster.placement import Placement, Share
from gymexp.config.schema import RunConfig
from gymexp.gym.server_plan import Layout
from gymexp.record.directory import RunDirectory
from gymexp.run import controller, services
from gymexp.run.work import Work
from gymexp.view.progress import View

ALONE = Placement("hf", training=[Share(0, [])], replicas=[])
TRAINS_S = 20


class BreaksOnce(View):
    """A view that fails with what nothing foresaw, at its second call."""

    calls = 0

    def services(self, states: dict[str, str]) -> None:
        self.calls += 1
        if self.calls == 2:
            raise ArithmeticError("no such state")


async def without_environments(*_: object) -> Layout:
    return Layout()


def test_a_status_writer_that_breaks_ends_the_run_and_its_trainer(tmp_path, monkeypatch):
    (tmp_path / "trains.py").write_text(f"import time\ntime.sleep({TRAINS_S})\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(services, "gym_layout", without_environments)
    for left_out in ("gym_servers", "gateways"):
        monkeypatch.setattr(services, left_out, lambda *_: [])
    run = RunDirectory.claim(tmp_path / "run")
    began = time.monotonic()
    with pytest.raises(ArithmeticError, match="no such state"):
        given = RunConfig(), run, Path("python"), tmp_path, ALONE, BreaksOnce(io.StringIO())
        controller.run(*given, work=Work("trainer", "trains"))
    assert time.monotonic() - began < TRAINS_S, "the trainer was ended"
    status = json.loads(run.status.read_text())
    assert (status["ended"], status["outcome"]) == ("failed", "no such state")
