"""What is said of Python and of what gymexp was installed with."""

from __future__ import annotations

import importlib.metadata

from gymexp.config.schema import ModelConfig, RunConfig
from gymexp.doctor import machine
from gymexp.doctor.finding import Subject

SUBJECT = Subject(RunConfig(model=ModelConfig("own", "gymexp/assets/tiny")))


def test_packages_that_fit_are_named_and_one_that_does_not_comes_with_what_to_type(monkeypatch):
    assert [one.level for one in machine.python(SUBJECT)] == ["ok", "ok"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["psutil>=99", "not-there>=1", "trl"])
    _, packages = machine.python(SUBJECT)
    assert packages.level == "fail" and "not-there>=1 is missing" in packages.text
    assert "psutil" in packages.text and "not-there>=1" in packages.fix


def test_sources_that_were_never_installed_are_no_failure(monkeypatch):
    def requires(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    python, packages = machine.python(SUBJECT)
    assert (python.level, packages.level) == ("ok", "warn") and "pip install -e" in packages.fix
