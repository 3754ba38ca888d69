"""A fault test injects rows of docs/reliability.md into real processes, and times them: from the blow until
the run has dealt with it or has ended.

`pytest tests/faults --write-seconds` puts the seconds into the table.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from fault_rows import ROW, TABLE, rows


@dataclass
class Stopwatch:
    """Started at the blow. `measured` is told the row and its seconds."""

    fault: str
    measured: Callable[[tuple[str, float]], None]
    began: float = field(default_factory=time.monotonic)

    def over(self) -> float:
        """The seconds until now, for the table."""
        seconds = time.monotonic() - self.began
        self.measured((self.fault, seconds))
        return seconds


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Callable[[str], Stopwatch]:
    """Starts the stopwatch of a row."""
    known = {row.fault for row in rows()}

    def strikes(fault: str) -> Stopwatch:
        assert fault in known, f"docs/reliability.md has no row {fault!r}"
        return Stopwatch(fault, request.node.user_properties.append)

    return strikes


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-seconds", action="store_true", help="write them into docs/reliability.md")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    first, every = config.getoption("--part")
    injecting = [item for item in items if "fault" in getattr(item, "fixturenames", ())]
    for item in injecting:
        item.add_marker("fault")
    for number, item in enumerate(sorted(injecting, key=lambda item: item.nodeid)):
        if number % every != first:
            items.remove(item)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    seconds: dict[str, float] = {}
    for report in terminalreporter.stats.get("passed", []):
        if report.when == "call":
            seconds.update(report.user_properties)
    for fault, took in seconds.items():
        terminalreporter.write_line(f"{took:6.1f} s  {fault}")
    if config.getoption("--write-seconds", default=False):
        lines = TABLE.read_text().splitlines(keepends=True)
        TABLE.write_text("".join(_with_seconds(line, seconds) for line in lines))


def _with_seconds(line: str, seconds: dict[str, float]) -> str:
    row = ROW.match(line)
    if not row or row["fault"] not in seconds:
        return line
    took = seconds[row["fault"]]
    return f"{line[: row.start('seconds')]}{took:.{0 if took >= 10 else 1}f}{line[row.end('seconds') :]}"
