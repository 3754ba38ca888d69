"""Makes text from outside gymexp (an environment, a policy, a server's log, a network client) safe to print.

Escape sequences move the cursor, change the window's title and the clipboard, and make links. A direction
mark makes a line look like another line (Trojan Source, CVE-2021-42574).
"""

from __future__ import annotations

import logging
import re
import sys
from typing import Any

# C0 and C1 controls except tab and newline; direction marks; separators that some programs read as a new
# line; lone surrogates, which no encoding can write; and characters without width, which hide a difference
# between two texts, or a whole text (tags).
UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff"
    "\ufff9-\ufffb\U000e0000-\U000e007f]"
)

# What begins a formula, but is no number.
_FORMULA = re.compile(r"(?![+-]?[\d.]+(e[+-]?\d+)?$)[=+\-@\t\n]", re.IGNORECASE)


def printable(text: str) -> str:
    """Returns the text with each unsafe character as a Python escape (`\\x1b`), and CRLF as a newline."""
    return UNSAFE.sub(lambda match: ascii(match[0])[1:-1], text.replace("\r\n", "\n"))


def printable_in(value: Any) -> Any:
    """Returns a JSON value with every string in it, keys included, made printable."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable_in(key): printable_in(item) for key, item in value.items()}
    return [printable_in(item) for item in value] if isinstance(value, list) else value


def csv_cell(value: Any) -> Any:
    """Returns a value for a CSV file: a text made printable, with an apostrophe before it if a spreadsheet
    would take it for a formula."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if _FORMULA.match(text) else text


def duration(seconds: float) -> str:
    """Formats seconds as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def say(text: object) -> None:
    """Prints a text to standard output, made printable."""
    print(printable(str(text)), flush=True)


def say_progress(text: object) -> None:
    """Prints a text to standard error, made printable, as standard output is for a command's result."""
    print(printable(str(text)), file=sys.stderr, flush=True)


def say_error(error: object) -> None:
    """Prints `error: …` to standard error, made printable. The caller then ends the program."""
    print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)


def log_to_stderr(
    format_: str = "%(asctime)s %(name)s %(levelname)s %(message)s", level: int = logging.INFO
) -> None:
    """Sends log records of this level and above to standard error, made printable."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter(format_))
    logging.basicConfig(level=level, handlers=[handler])


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
