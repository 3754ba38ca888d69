"""docs/reference.md is what the schema says, and every key of a run has a meaning."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from gymexp.cli import reference
from gymexp.config.explain import keys
from gymexp.config.schema import RunConfig
from gymexp.training import argument_rules

PAGE = Path(__file__).parent.parent.parent / "docs" / "reference.md"
ROWS = [row for at, section in reference.sections() for row in reference.rows(section, at)]


# fmt: off
@dataclass
class Commented:
    """Comments in each place where a formatter may put one."""

    beside: int = 1  # after the value
    bare: int = 2
    # on a line of its own,
    # and on another
    below: int = 3
    wrapped: float = (
        4.0  # inside of parentheses
    )
    folded: dict[str, int] = dataclasses.field(
        default_factory=dict
    )  # behind the last parenthesis
    # above,
    both: int = 5  # and after
    hash_in_text: str = "# no comment"
# fmt: on


def test_the_page_is_what_the_command_prints():
    assert PAGE.read_text() == reference.reference(), "python -m gymexp.cli.reference > docs/reference.md"


def test_every_key_of_the_schema_is_listed_once():
    listed = [key for key, *_ in ROWS]
    assert sorted(listed) == sorted(set(keys()) - {"trainer"})
    assert all(f"| `{key}` |" in PAGE.read_text() for key in listed)


@pytest.mark.parametrize(("key", "meaning"), [(key, meaning) for key, _, _, meaning in ROWS])
def test_every_key_has_a_meaning(key, meaning):
    assert meaning.strip(), f"{key} needs a comment after it in its dataclass"


def test_a_meaning_is_found_wherever_its_comment_stands():
    assert reference.meanings(Commented) == {
        "beside": "after the value",
        "below": "on a line of its own, and on another",
        "wrapped": "inside of parentheses",
        "folded": "behind the last parenthesis",
        "both": "above, and after",
    }


def test_a_section_begins_with_its_dataclass_docstring():
    text = " ".join(PAGE.read_text().split())
    assert "## `checkpoint` Which checkpoints are kept. `trainer.save_steps` sets when a" in text
    assert "## `env.<name>` One environment: a NeMo Gym agent" in text


def test_every_argument_of_the_trainer_is_in_its_table():
    section = PAGE.read_text().split("## `trainer`")[1]
    named = set(re.findall(r"`(\w+)`", section))
    for table in (
        argument_rules.CARRIED,
        argument_rules.OWNED,
        argument_rules.REFUSED,
        argument_rules.HARMLESS,
    ):
        assert set(table) <= named


def test_a_run_itself_is_the_first_section():
    assert next(reference.sections()) == ("", RunConfig)
