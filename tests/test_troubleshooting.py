"""The symptoms that docs/guides/troubleshooting.md names are texts that gymexp's source has."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "docs" / "guides" / "troubleshooting.md"
ANY = "…"  # what differs: in the guide, and where a text of the source has a value


def symptoms() -> list[str]:
    """The errors in the tables: what stands as code in a row's first two cells, and is a sentence."""
    found = []
    for line in GUIDE.read_text().splitlines():
        cells = line.split(" | ")
        if line.startswith("| ") and len(cells) == 3:
            symptom = cells[1] if re.fullmatch(r"\| `\w+`", cells[0]) else cells[0]
            found += [text for text in re.findall(r"`([^`]+)`", symptom) if text.count(" ") > 2]
    return [text for text in found if not text.startswith("no matches found")]


def texts() -> str:
    """Every string of the source, one a line."""
    lines = []
    for path in sorted((ROOT / "gymexp").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (str(p.value) if isinstance(p, ast.Constant) else ANY for p in node.values)
                lines.append("".join(parts).replace("\n", " "))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                lines.append(node.value.replace("\n", " "))
    return "\n".join(lines)


TEXTS = texts()


def test_the_guide_has_symptoms():
    assert len(symptoms()) > 40


@pytest.mark.parametrize("symptom", symptoms())
def test_a_symptom_is_a_text_of_the_source(symptom):
    parts = [re.escape(part.strip()) for part in symptom.split(ANY) if len(part.strip()) > 3]
    assert re.search(".*".join(parts), TEXTS), symptom
