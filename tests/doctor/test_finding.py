"""Nothing that a check asks can hang it, and no check can hang or break the others."""

from __future__ import annotations

import threading
import time

import psutil

from gymexp.config.schema import RunConfig
from gymexp.doctor.finding import Check, Finding, Subject, run_checks, run_command
from gymexp.errors import ConfigError

SUBJECT = Subject(RunConfig())


def test_a_command_that_hangs_is_ended_with_its_children():
    began = time.monotonic()
    answer = run_command("sh", "-c", "sleep 61.25 & sleep 61.25", timeout_s=0.5)
    assert (answer.code, answer.error) == (None, "sh gave no answer within 0.5 s")
    assert time.monotonic() - began < 5
    time.sleep(0.2)
    left = [p.pid for p in psutil.process_iter(["cmdline"]) if "61.25" in (p.info["cmdline"] or [])]
    assert not left


def test_a_command_that_leaves_a_child_behind_is_not_waited_for_longer():
    began = time.monotonic()
    assert run_command("sh", "-c", "sleep 20 & echo said").out == "said\n"
    assert time.monotonic() - began < 5


def test_a_command_that_is_not_there_is_told_by_name():
    assert run_command("no-such-command").error == "no-such-command: No such file or directory"


def test_a_check_that_hangs_or_breaks_leaves_the_others_their_findings_in_order():
    release = threading.Event()

    def hangs(subject):
        release.wait(60)
        return []

    def breaks(subject):
        yield Finding("ok", "half", "said before")
        raise KeyError("gone")

    def refuses(subject):
        raise ConfigError("a rule is broken")

    def works(subject):
        return [Finding("ok", "works", "well")]

    checks = [
        Check("hangs", hangs, 0.3),
        Check("breaks", breaks, 5),
        Check("refuses", refuses, 5),
        Check("works", works, 5),
    ]
    try:
        assert run_checks(checks, SUBJECT) == [
            Finding("fail", "hangs", "no answer within 0.3 s"),
            Finding("fail", "breaks", "the check broke: KeyError: 'gone'"),
            Finding("fail", "refuses", "a rule is broken"),
            Finding("ok", "works", "well"),
        ]
    finally:
        release.set()
