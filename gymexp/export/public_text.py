"""Texts of a run directory without what a published copy must not have: secrets, paths, hosts, addresses."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable
from pathlib import Path

from gymexp.config.redaction import without_secrets
from gymexp.files import read_json
from gymexp.printable import printable

# An absolute path of at least two parts, in a value or after "=". The second pattern is for a home folder.
_PATH = re.compile(r"(?<![\w/:.<>~*-])/(?:[^\s/'\",:;()\[\]{}<>|]+/)+[^\s/'\",:;()\[\]{}<>|]*")
_HOME = re.compile(r"(?<![\w/])~/(?:[^\s/'\",:;]+/)*[^\s/'\",:;]*")
_FILE_URL = re.compile(r"file://[^\s'\"]+")
_MAIL = re.compile(r"\b[\w.+-]+@[\w-]+\.[\w.-]+\b")


def hosts_of(run: Path) -> set[str]:
    """Returns the names of the machine that a run's controller ran on, and of this one."""
    names = {read_json(run / "status.json").get("host"), socket.gethostname()}
    return {name for name in names if isinstance(name, str) and name not in ("", "localhost")}


def public_text(text: str, hosts: Iterable[str] = ()) -> str:
    """Returns a text for publication: secrets as ***, an absolute path as <machine>/ and its last part, the
    names in `hosts` as <host>, a mail address as <mail>, and unsafe characters as escapes."""
    text = without_secrets(printable(text))
    text = _MAIL.sub("<mail>", _FILE_URL.sub(_last_part, text))
    text = _HOME.sub(_last_part, _PATH.sub(_last_part, text))
    for host in sorted(hosts, key=len, reverse=True):
        text = re.sub(rf"(?<![\w<-]){re.escape(host)}(?![\w>-])", "<host>", text)
    return text


def _last_part(match: re.Match[str]) -> str:
    return f"<machine>/{match[0].rstrip('/').rsplit('/', 1)[-1]}"
