"""Secrets by their names and looks: refused where a run would write them down, blackened in others' text."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

_WORDS = r"api_?key|access_?key|secret_?key|private_?key|secret|password|passwd|passphrase|credentials?"
_TOKENS = (
    r"(?:hf|hub|hugging_?face(?:_?hub)?|api|access|auth|bearer|refresh|github|gh|wandb|session|secret)_?token"
)
_NAME = rf"(?:\w*_)?(?:{_WORDS}|{_TOKENS})"
_NAMES = re.compile(_NAME, re.IGNORECASE)
_VARIABLES = re.compile(r"\w*(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)", re.IGNORECASE)
_LEAST = 8  # characters of a variable's value: shorter ones are words that stand anywhere
_HIDDEN = "***"
# Each with the secret as its only group.
_LOOKS = (
    re.compile(r"\b\w[\w+.-]*://[^\s/@:'\"]*:([^\s/@'\"]+)@"),  # a URL's
    re.compile(rf"\b{_NAME}['\"]?\s*[=:]\s*['\"]?(\S.{{3,}})", re.IGNORECASE),
    re.compile(r"\b(hf_[A-Za-z0-9]{20,})"),
    re.compile(r"\b(sk-[A-Za-z0-9_-]{20,})"),
    re.compile(r"\b(gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,})"),
    re.compile(r"\b((?:AKIA|ASIA)[A-Z0-9]{16})\b"),
    re.compile(r"\b(nvapi-[A-Za-z0-9_-]{20,})"),
    re.compile(r"\b(xox[abprs]-[A-Za-z0-9-]{10,})"),
    re.compile(r"(?i)\bbearer\s+([A-Za-z0-9._~+/-]{16,}=*)"),
)


def secrets_at(at: str, value: Any) -> Iterator[str]:
    """The keys at or below `at` that hold one, by the key's name or the value's look."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from secrets_at(f"{at}.{name}" if at else str(name), inner)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from secrets_at(f"{at}[{index}]", inner)
    elif isinstance(value, str) and value:
        name = at.rpartition(".")[2].replace("-", "_")
        if _NAMES.fullmatch(name) or any(
            _is_secret(found) for look in _LOOKS for found in look.findall(value)
        ):
            yield at


def in_override(override: str) -> str | None:
    """The key of a `key=value` of the command line that holds a secret; None where none does."""
    key, _, value = override.lstrip("+~-").partition("=")
    return next(secrets_at(key, value.strip("'\"")), None)


def without_secrets(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """The text with *** for what looks like one, and for each that a variable of the environment holds."""
    known = {v for name, v in environ.items() if _VARIABLES.fullmatch(name) and len(v) >= _LEAST}
    for secret in sorted(known, key=len, reverse=True):
        text = text.replace(secret, _HIDDEN)
    for look in _LOOKS:
        text = look.sub(_hide, text)
    return text


def _hide(found: re.Match[str]) -> str:
    if not _is_secret(found[1]):
        return found[0]
    start, end = found.start(1) - found.start(), found.end(1) - found.start()
    return found[0][:start] + _HIDDEN + found[0][end:]


def _is_secret(value: str) -> bool:
    """Not a variable's name, a call or an interpolation that gives one (`$TOKEN`, `os.environ[…]`)."""
    return not re.match(r"\$|os\.|\*\*\*|(?:null|none|true|false|str|self|None)\b|[\w.]+[(\[]", value)
