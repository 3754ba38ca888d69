"""Every relative link of the documents leads to a file that is there, and to a heading that this file has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(ROOT / "outputs").glob("*.md"),
    *(ROOT / "benchmarks").glob("*.md"),
    *sorted((ROOT / "docs").rglob("*.md")),
]
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def links(page: Path) -> list[str]:
    """The targets of a page's links that are no address of the web's."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [target for target in found if not re.match(r"https?:|mailto:", target)]


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings: letters, digits and hyphens, in lower case."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.+?) *$", prose(page), flags=re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found[anchor] = found.get(anchor, -1) + 1
    return found.keys() | {f"{anchor}-{n}" for anchor, last in found.items() for n in range(1, last + 1)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_resolves(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{target}: no such file"
        assert there.is_relative_to(ROOT), f"{target} leaves the repository"
        assert not anchor or anchor in anchors(there), f"{target}: no such heading"


def test_links_and_headings_are_found():
    assert "docs/guides/runs.md" in links(ROOT / "README.md")
    assert "envname" in anchors(ROOT / "docs" / "reference.md")
    assert "203m-parameters-on-h200s-200-steps-three-seeds" in anchors(ROOT / "docs" / "results.md")


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.name)
def test_the_first_page_leads_to_every_guide(guide):
    assert f"docs/guides/{guide.name}" in links(ROOT / "README.md")
