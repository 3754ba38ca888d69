"""The table of docs/reliability.md."""

from __future__ import annotations

import re
from dataclasses import dataclass

from whole_run import ROOT

TABLE = ROOT / "docs" / "reliability.md"
ROW = re.compile(r"^\| (?P<fault>[^|]+?) \|.*\| (?P<seconds>[^|]+?) \| (?P<test>[^|]+?) \|$")


@dataclass(frozen=True)
class Row:
    """fault: its first cell. seconds: from the blow until it was dealt with. test: a file of tests/faults."""

    fault: str
    seconds: str
    test: str


def rows() -> list[Row]:
    """Of docs/reliability.md's table."""
    found = [ROW.match(line) for line in TABLE.read_text().splitlines()]
    rows = [Row(row["fault"], row["seconds"], row["test"].strip("`")) for row in found if row]
    return [row for row in rows if row.fault != "fault" and not row.fault.startswith("--")]
