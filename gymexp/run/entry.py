"""What every `python -m gymexp.X` does around its work: errors as text, exit codes, Hydra's own messages said better."""

from __future__ import annotations

import functools
import logging
import re
import sys
from collections.abc import Callable
from typing import Any

from hydra.errors import HydraException

from gymexp.config import nearest, options
from gymexp.errors import GymexpError


def guarded(main: Callable[..., Any]) -> Callable[..., Any]:
    """Print a GymexpError as its text, without a traceback, and exit with 1."""

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return main(*args, **kwargs)
        except GymexpError as error:
            print(f"error: {error}", file=sys.stderr)
            number = getattr(error, "number", None)
            sys.exit(128 + number if number else 1)

    return wrapped


def log_to_terminal() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("filelock").setLevel(logging.WARNING)


def explain_missing_option(error: HydraException) -> str | None:
    """Hydra's "Could not find 'env/sudko'" with the group's options and the nearest one; None for other errors."""
    found = re.search(r"[Cc]ould not find '(\w+)/([^']+)'", str(error))
    if not found:
        return None
    group, name = found.groups()
    known = options(group)
    return f"{group}={name} is not known{nearest(name, known, f'{group}=')}. Known: {', '.join(known)}"
