"""A report that fails or hangs delays a run by no more than its deadline, and leaves no process."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from gymexp.run.report_process import Reports

EVALUATION = {"eval_sudoku/rollouts": 8, "eval_sudoku/reward": 0.5}


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


COUNT = python("import sys, pathlib; open(pathlib.Path(sys.argv[1]) / 'made', 'a').write('x')")
HANG = python("import time; print('hanging', flush=True); time.sleep(600)")


def made(run: Path) -> int:
    return len((run / "made").read_text()) if (run / "made").exists() else 0


@pytest.fixture
def left() -> Callable[[], set[psutil.Process]]:
    """Returns the processes that a test has left so far, without those of tests before it."""
    others = children()
    return lambda: children() - others


def children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def test_a_report_is_made_at_an_evaluation_and_at_the_end_and_not_at_other_entries(run):
    async def live() -> tuple[int, int]:
        reports = Reports(run, lambda: False, COUNT)
        reports.ask({"loss": 0.1, "sudoku/rollouts": 8})
        await asyncio.sleep(1.0)
        before = made(run)
        reports.ask(EVALUATION)
        until = time.monotonic() + 20
        while not made(run) and time.monotonic() < until:
            await asyncio.sleep(0.05)
        at_evaluation = made(run)
        await reports.end(by_signal=False)
        return before, at_evaluation

    assert asyncio.run(live()) == (0, 1)
    assert made(run) == 2


def test_a_report_is_made_every_so_often(run):
    async def live() -> None:
        reports = Reports(run, lambda: False, COUNT, every_s=0.1)
        until = time.monotonic() + 30
        while made(run) < 2 and time.monotonic() < until:
            await asyncio.sleep(0.05)
        await reports.end(by_signal=False)

    asyncio.run(live())
    assert made(run) >= 3


def test_one_that_fails_is_a_line_in_the_log(run):
    async def live() -> None:
        await Reports(run, lambda: False, python("raise SystemExit(3)")).end(by_signal=False)

    asyncio.run(live())
    [line] = (run / "logs" / "report.log").read_text().splitlines()
    assert line.endswith("no report: its process exited with code 3")


def test_one_that_cannot_start_is_no_failure(run):
    (run / "logs").rmdir()

    async def live() -> None:
        await Reports(run, lambda: False, COUNT).end(by_signal=False)

    asyncio.run(live())
    assert made(run) == 0


def test_one_that_hangs_ends_at_its_deadline_and_leaves_no_process(run, left):
    async def live() -> float:
        reports = Reports(run, lambda: False, HANG, every_s=0.1, deadline_s=1.5)
        until = time.monotonic() + 20
        while not (run / "logs" / "report.log").exists() and time.monotonic() < until:
            await asyncio.sleep(0.05)
        began = time.monotonic()
        await reports.end(by_signal=False)
        return time.monotonic() - began

    assert asyncio.run(live()) < 6
    assert "it took more than 2 s" in (run / "logs" / "report.log").read_text()
    assert not left()


def test_a_run_that_hurries_waits_for_no_report(run, left):
    hurried = False

    async def live() -> float:
        nonlocal hurried
        reports = Reports(run, lambda: hurried, HANG, deadline_s=60)
        ending = asyncio.create_task(reports.end(by_signal=False))
        until = time.monotonic() + 20
        while not (run / "logs" / "report.log").exists() and time.monotonic() < until:
            await asyncio.sleep(0.05)
        began = time.monotonic()
        hurried = True
        await ending
        return time.monotonic() - began

    assert asyncio.run(live()) < 3
    assert not left()


def test_the_process_has_a_low_priority(run):
    code = "import os, sys, pathlib, time; time.sleep(1); " + (
        "(pathlib.Path(sys.argv[1]) / 'nice').write_text(str(os.nice(0)))"
    )

    async def live() -> None:
        await Reports(run, lambda: False, python(code)).end(by_signal=False)

    asyncio.run(live())
    assert int((run / "nice").read_text()) >= 15
