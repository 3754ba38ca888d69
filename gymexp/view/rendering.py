"""Renders the viewer's pages with Jinja2: every text is escaped, and every character of others is seen.

A template cannot print a text raw by mistake: what it prints passes `printable` first, and the filter
`visible` shows controls as marks.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from gymexp.printable import duration, printable
from gymexp.view.visible_text import beginning, size_of, visible

_TEMPLATES = Path(__file__).parent / "templates"


def build_environment() -> Environment:
    """Returns the templates' environment."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printed,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "visible": visible,
        "beginning": beginning,
        "size": size_of,
        "number": number,
        "signed": lambda value: number(value, "+"),
        "clock": clock,
        "duration": lambda value: "–" if value is None else duration(value),
        "ending": ending,
        "reward_class": reward_class,
    }
    return environment


def _printed(value: Any) -> Any:
    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(value)
    return "–" if value is None else value


def number(value: float | None, sign: str = "", digits: int = 3) -> str:
    """Returns a number with three decimals; – for None."""
    return "–" if value is None else f"{value:{sign}.{digits}f}"


def clock(seconds: float | None) -> str:
    """Returns seconds since 1970 as the date and time of this machine; – without them."""
    try:
        return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S") if seconds else "–"
    except (OverflowError, ValueError, OSError):
        return "–"


def ending(row: Mapping[str, Any]) -> str:
    """Returns how a rollout ended: `completed`, or `failed (timeout)`."""
    return f"{row['outcome']} ({row['why']})" if row["why"] else row["outcome"]


def reward_class(row: Mapping[str, Any]) -> str:
    """Returns the class of the square that shows a rollout's reward: r0 to r4 in fifths from 0 to 1, s for a
    success, f without a reward."""
    if row["reward"] is None:
        return "f"
    if row.get("success"):
        return "s"
    return f"r{max(0, min(4, int(row['reward'] * 5)))}"
