"""What tests share: NeMo Gym's interpreter, and a cache that outlives a test session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gymexp.config import GymConfig
from gymexp.gym.install import ensure_python
from gymexp.run.directory import cache_dir

SERVERS = (
    "resources_servers/reasoning_gym/configs/reasoning_gym.yaml",
    "resources_servers/workplace_assistant/configs/workplace_assistant.yaml",
)

os.environ.setdefault("WANDB_MODE", "disabled")


@pytest.fixture(scope="session")
def gym_python() -> Path:
    """NeMo Gym's interpreter with what both environments need; made on first use, as a run makes it."""
    return ensure_python(GymConfig(), SERVERS, cache_dir(), print)
