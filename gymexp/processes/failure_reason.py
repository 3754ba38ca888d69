"""Finds the reason of a process's end in its log: the last exception, which is often not the last line."""

from __future__ import annotations

import re
from pathlib import Path

from gymexp.printable import printable

_TAIL_BYTES = 1 << 17
_NUM_LINES = 8
_WIDTH = 300
_BEGIN = "Traceback (most recent call last):"
_FRAME = re.compile(r'\s+File "(?P<file>[^"]+)", line (?P<line>\d+)')
# A dotted name at the start of a line, as Python prints an exception with or without a message.
_EXCEPTION = re.compile(r"(?:\w+\.)*[A-Z]\w*(?:: .*)?")
# Warnings, and the rest of a traceback whose exception is missing.
_NOISE = re.compile(r'.*Warning: |\s+File "|\s{4}|Traceback \(')
_NUM_MORE = 8
_NUMBER = re.compile(r"0x[0-9a-f]+|\d+")
# Errno 11, 12, 23, 24, 28, 98, 110, 111, 113: busy, no memory, too many files, disk full, address in use, …
_PASSES = re.compile(
    r"Connect|Timeout|timed out|URLError|HTTPError|SSLError|gaierror|RemoteDisconnected|IncompleteRead"
    r"|BrokenPipe|BlockingIOError|CalledProcessError|MemoryError|OutOfMemory|out of memory"
    r"|\[Errno (11|12|23|24|28|98|110|111|113)\]|[Tt]emporar|Too Many Requests"
)
_LINK = "For further information visit "
_CAUSED = "The above exception was the direct cause of the following exception:"


def reason(log: Path, code: int = 1) -> str:
    """Returns a text for an error message: the log's last exception with its place, else its last lines.

    The text names the log file. code: the process's exit code. A process that a signal ended (code < 0)
    raised no exception, so its last lines are shown.
    """
    text = printable(_tail(log))
    if code > 0 and (exception := last_exception(text)):
        return f"{exception}\nLook into {log}"
    lines = [line for line in text.splitlines() if line.strip() and not _NOISE.match(line)]
    end = "\n".join(f"    {line[:_WIDTH]}" for line in lines[-_NUM_LINES:])
    return f"The end of {log}:\n{end}" if end else f"{log} is empty"


def exception_since(log: Path, offset: int) -> str:
    """Returns the last exception that a process printed to its log after the first `offset` bytes; "" if
    there is none."""
    return last_exception(printable(_tail(log, offset)))


def is_same(one: str, other: str) -> bool:
    """Returns whether two exceptions differ in nothing but numbers and addresses, as of ports or objects."""
    return _NUMBER.sub("0", one) == _NUMBER.sub("0", other)


def may_pass(exception: str) -> bool:
    """Returns whether an exception may be gone at the next try: it is about a network, about memory, disk or
    files that others use too, or about another program."""
    return bool(_PASSES.search(exception))


def last_exception(text: str) -> str:
    """Returns the last exception that Python printed in `text`, with its place; "" if there is none.

    Of a chain `raise … from …`, it returns the first cause.
    """
    at = text.rfind(_BEGIN)
    if at < 0:
        return ""
    exception = _exception_at(text, at)
    before = text[:at].rstrip()
    while exception and before.endswith(_CAUSED):
        at = before.rfind(_BEGIN)
        if at < 0 or not (cause := _exception_at(text, at)):
            break
        exception, before = cause, text[:at].rstrip()
    return exception


def _exception_at(text: str, at: int) -> str:
    """Returns the exception of the traceback that begins at `at`; "" if the traceback is incomplete.

    A prefix that a logger put before each line is removed.
    """
    begins = text.rfind("\n", 0, at) + 1
    lines = text[begins:].splitlines()[1:]
    width = at - begins
    if lines and _FRAME.match(lines[0][width:]):
        lines = [line[width:] for line in lines]
    place = ""
    for number, line in enumerate(lines):
        if frame := _FRAME.match(line):
            place = f" ({frame['file']}:{frame['line']})"
        elif line and not line[0].isspace():
            if not _EXCEPTION.fullmatch(line):
                return ""
            details = [detail for detail in lines[number + 1 :] if detail.strip() and _LINK not in detail]
            # pydantic's validation errors have two more lines for each field.
            details = details[:_NUM_MORE] if "validation error" in line else []
            details = [f"  {detail.strip()[:_WIDTH]}" for detail in details]
            return "\n".join([line[: 2 * _WIDTH] + place, *details])
    return ""


def _tail(log: Path, offset: int = 0) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(offset, log.stat().st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
