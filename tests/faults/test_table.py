"""docs/reliability.md and tests/faults say the same."""

from __future__ import annotations

import re
from pathlib import Path

from fault_rows import rows

HERE = Path(__file__).parent


def test_each_row_is_injected_by_the_file_that_it_names_and_has_its_seconds():
    table = rows()
    assert len(table) == len({row.fault for row in table}) >= 30
    for row in table:
        assert f'"{row.fault}"' in (HERE / row.test).read_text(), row
        assert re.fullmatch(r"\d+|\d\.\d", row.seconds), row


def test_each_test_of_a_fault_is_in_the_table():
    for path in HERE.glob("test_*.py"):
        for name in re.findall(r"^def (test_\w+)\((.*)\)", path.read_text(), re.MULTILINE):
            assert path == Path(__file__) or "fault" in name[1], name
