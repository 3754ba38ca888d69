"""Text that gymexp did not write, as HTML: every character is seen, and none is obeyed.

Controls, direction marks and characters without width become small marks that name them. Everything else is
escaped. The text is never taken for markup of any kind, nor for links.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from markupsafe import Markup, escape

from gymexp.printable import UNSAFE

SHOWN = 20_000  # characters of a text that a page shows at once
PART = 100_000  # characters on a page of a long text
_RUNS = re.compile(f"({UNSAFE.pattern})\\1*")


def visible(text: object) -> Markup:
    """Returns a text as HTML. CRLF is a newline, as in a terminal."""
    escaped = str(escape(str(text).replace("\r\n", "\n")))
    return Markup(_RUNS.sub(_mark, escaped))


def _mark(match: re.Match[str]) -> str:
    code = ord(match[1])
    if code < 0x20:
        label = chr(0x2400 + code)
    elif code == 0x7F:
        label = "\u2421"
    else:
        label = f"\u2039U+{code:04X}\u203a"
    name = unicodedata.name(match[1], f"U+{code:04X}")
    count = len(match[0])
    if count == 1 or (count <= 4 and code < 0x80):
        return f'<span class="ctl" title="{name}">{label * count}</span>'
    return f'<span class="ctl" title="{name}">{label}\u00d7{count}</span>'


@dataclass(frozen=True)
class Shown:
    """The part of a text that a page shows. size: characters of the whole text."""

    html: Markup
    size: int
    is_cut: bool


def beginning(text: str, limit: int = SHOWN) -> Shown:
    """Returns the beginning of a text."""
    return Shown(visible(text[:limit]), len(text), len(text) > limit)


def size_of(characters: int) -> str:
    """Returns a number of characters in words: 512 characters, 20 kB, 5.0 MB."""
    if characters < 1000:
        return f"{characters} characters"
    return f"{characters / 1e3:.0f} kB" if characters < 1e6 else f"{characters / 1e6:.1f} MB"
