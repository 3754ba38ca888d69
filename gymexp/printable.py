"""Text of others (an environment, a policy, a server's log, whoever reached a port) made fit for a terminal.

Escape sequences move the cursor, change the window's title and the clipboard, and make links; a direction
mark lets a line read as another one than it is (Trojan Source, CVE-2021-42574).
"""

from __future__ import annotations

import logging
import re
import sys
from typing import Any

# C0 and C1 controls but tab and newline; marks of direction; separators that some take for a new line;
# halves of a pair, which no encoding has; what has no width, and hides a difference.
_UNFIT = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff\ufff9-\ufffb]"
)


def printable(text: str) -> str:
    """The text with what is unfit written as Python writes it (`\\x1b`); a line's end is one newline."""
    return _UNFIT.sub(lambda found: ascii(found[0])[1:-1], text.replace("\r\n", "\n"))


def printable_in(value: Any) -> Any:
    """A JSON value with every text in it printable."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable_in(key): printable_in(one) for key, one in value.items()}
    return [printable_in(one) for one in value] if isinstance(value, list) else value


def say(text: object) -> None:
    """Print it."""
    print(printable(str(text)), flush=True)


def say_error(error: object) -> None:
    """Print it to standard error, as what ends the program."""
    print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)


def log_to_stderr(format_: str = "%(asctime)s %(name)s %(levelname)s %(message)s") -> None:
    """Python's log from INFO on, printable."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter(format_))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
