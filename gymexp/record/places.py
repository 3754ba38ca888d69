"""Where things lie that outlive a run: the cache, and servers of the user's own."""

from __future__ import annotations

import os
from pathlib import Path

from gymexp.files import in_words

# Folders of NeMo Gym's names, with servers of the user's own.
OWN_SERVERS = ("resources_servers", "responses_api_agents", "responses_api_models")


def cache_dir() -> Path:
    """Where prepared data and NeMo Gym's venv are kept between runs: $GYMEXP_CACHE, else ~/.cache/gymexp."""
    return Path(os.environ.get("GYMEXP_CACHE") or Path.home() / ".cache" / "gymexp")


def cache_refused(error: OSError) -> str:
    """In words, with what to do."""
    return in_words(error, instead="set GYMEXP_CACHE to a folder where this user may write")


def own_servers() -> Path:
    """Where the user's own servers are looked for: the working directory, or in a job its sweep's copy."""
    return Path(os.environ.get("GYMEXP_SERVERS") or Path.cwd())
