"""Finds secrets by a key's name or a value's form, and removes them from text.

A secret in a configuration is refused, as run directories keep the configuration.
"""

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
_MIN_LENGTH = 8  # of a variable's value, in characters: a shorter one may be a word of ordinary text
_HIDDEN = "***"
# The secret is the only group of each pattern.
_PATTERNS = (
    re.compile(r"\b\w[\w+.-]*://[^\s/@:'\"]*:([^\s/@'\"]+)@"),  # a password in a URL
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
    """Yields the keys at or below `at` that contain a secret, by the key's name or the value's form."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from secrets_at(f"{at}.{name}" if at else str(name), inner)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from secrets_at(f"{at}[{index}]", inner)
    elif isinstance(value, str) and value:
        name = at.rpartition(".")[2].replace("-", "_")
        if _NAMES.fullmatch(name) or any(
            _is_secret(text) for pattern in _PATTERNS for text in pattern.findall(value)
        ):
            yield at


def in_override(override: str) -> str | None:
    """Returns the key of the override `key=value` that contains a secret, or None."""
    key, _, value = override.lstrip("+~-").partition("=")
    return next(secrets_at(key, value.strip("'\"")), None)


def without_secrets(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """Replaces by *** each part of the text that looks like a secret or is one in an environment variable."""
    known = {v for name, v in environ.items() if _VARIABLES.fullmatch(name) and len(v) >= _MIN_LENGTH}
    for secret in sorted(known, key=len, reverse=True):
        text = text.replace(secret, _HIDDEN)
    for pattern in _PATTERNS:
        text = pattern.sub(_hide, text)
    return text


def redacted(value: Any, at: str = "") -> Any:
    """Returns a configuration with *** for each text that is a secret by its key or its form."""
    if isinstance(value, Mapping):
        return {name: redacted(inner, f"{at}.{name}" if at else str(name)) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(inner, f"{at}[{index}]") for index, inner in enumerate(value)]
    if not isinstance(value, str):
        return value
    return _HIDDEN if next(secrets_at(at, value), None) else without_secrets(value)


def _hide(match: re.Match[str]) -> str:
    if not _is_secret(match[1]):
        return match[0]
    start, end = match.start(1) - match.start(), match.end(1) - match.start()
    return match[0][:start] + _HIDDEN + match[0][end:]


def _is_secret(value: str) -> bool:
    """Returns False for a variable, a call or an interpolation (`$TOKEN`, `os.environ[…]`), else True."""
    return not re.match(r"\$|os\.|\*\*\*|(?:null|none|true|false|str|self|None)\b|[\w.]+[(\[]", value)
