"""Directories that outlive a run: the cache, and servers of the user's own."""

from __future__ import annotations

import os
from pathlib import Path

from gymexp.files import in_words

# Folders that may contain servers of the user's own; the names are NeMo Gym's.
OWN_SERVERS = ("resources_servers", "responses_api_agents", "responses_api_models", "environment_servers")


def cache_dir() -> Path:
    """Returns the folder of prepared data and NeMo Gym's venv: $GYMEXP_CACHE, else ~/.cache/gymexp."""
    return Path(os.environ.get("GYMEXP_CACHE") or Path.home() / ".cache" / "gymexp")


def cache_refused(error: OSError) -> str:
    """Returns the message for a failed write to the cache, with a fix."""
    return in_words(error, instead="set GYMEXP_CACHE to a folder where this user may write")


def own_servers() -> Path:
    """Returns the folder in which gymexp looks for the user's own servers.

    It is the working directory, or in a job the sweep's copy of the servers ($GYMEXP_SERVERS).
    """
    return Path(os.environ.get("GYMEXP_SERVERS") or Path.cwd())
