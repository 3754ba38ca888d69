"""What a log tells of a process's end: the reason, where there is one, and not what happens to stand last."""

from __future__ import annotations

import re
from pathlib import Path

from gymexp.printable import printable

_TAIL_BYTES = 1 << 17
_NUM_LINES = 8
_WIDTH = 300
_BEGIN = "Traceback (most recent call last):"
_FRAME = re.compile(r'\s+File "(?P<file>[^"]+)", line (?P<line>\d+)')
# A dotted name at the line's beginning: what Python prints of an exception, message or none.
_EXCEPTION = re.compile(r"(?:\w+\.)*[A-Z]\w*(?:: .*)?")
# Warnings, and what is left of a traceback without its exception.
_NOISE = re.compile(r'.*Warning: |\s+File "|\s{4}|Traceback \(')
_NUM_MORE = 8
_LINK = "For further information visit "
_CAUSED = "The above exception was the direct cause of the following exception:"


def reason(log: Path, code: int = 1) -> str:
    """For an error message: the log's last exception and where it was raised, or else its last lines; and
    which file it is. code: of the process's end; one that a signal ended has raised no exception."""
    text = printable(_tail(log))
    if code > 0 and (found := last_exception(text)):
        return f"{found}\nLook into {log}"
    lines = [line for line in text.splitlines() if line.strip() and not _NOISE.match(line)]
    said = "\n".join(f"    {line[:_WIDTH]}" for line in lines[-_NUM_LINES:])
    return f"The end of {log}:\n{said}" if said else f"{log} is empty"


def last_exception(text: str) -> str:
    """The last exception that Python printed in `text`, with its place, and of one that was raised from
    another the first; empty without one."""
    at = text.rfind(_BEGIN)
    if at < 0:
        return ""
    found = _exception_at(text, at)
    before = text[:at].rstrip()
    while found and before.endswith(_CAUSED):
        at = before.rfind(_BEGIN)
        if at < 0 or not (cause := _exception_at(text, at)):
            break
        found, before = cause, text[:at].rstrip()
    return found


def _exception_at(text: str, at: int) -> str:
    """Of the traceback that begins at `at`; empty where it is cut short. What a logger puts before each of
    its lines goes."""
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
            more = [one for one in lines[number + 1 :] if one.strip() and _LINK not in one]
            more = more[:_NUM_MORE] if "validation error" in line else []  # pydantic's: two lines a field
            more = [f"  {one.strip()[:_WIDTH]}" for one in more]
            return "\n".join([line[: 2 * _WIDTH] + place, *more])
    return ""


def _tail(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
