"""Checks of the directories that a run writes to: free space, permissions, locks, speed."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import constants

from gymexp.config.schema import ModelConfig
from gymexp.doctor.finding import Finding, Subject, run_command
from gymexp.policy.hub_snapshot import cached, resolve_path
from gymexp.record.places import cache_dir

GIB = 2**30
_DEADLINE_S = 15.0
_SLOW_S = 0.5  # for one small file; a run writes several such files a step
_FEW_INODES = 10_000
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# Free space in GiB of each place: below the first figure the check fails, below the second it warns.
_ROOM = {"outputs": (1, 20), "cache": (1, 5), "hub cache": (1, 20), "tmp": (0.2, 2), "shm": (0.05, 1)}


def look(subject: Subject) -> Iterable[Finding]:
    """Yields a finding for each place that a run writes to: free space, permissions, locks, speed."""
    places = {
        "outputs": Path(subject.config.output_dir or "outputs"),
        "cache": cache_dir(),
        "hub cache": Path(constants.HF_HUB_CACHE),
        "tmp": Path(tempfile.gettempdir()),
        "shm": Path("/dev/shm"),
    }
    with ThreadPoolExecutor() as pool:
        yield from pool.map(lambda item: _look_at(item[0], item[1], subject), places.items())


def _look_at(name: str, path: Path, subject: Subject) -> Finding:
    title = f"disk: {name}"
    module = "gymexp.doctor.disk_probe"
    result = run_command(sys.executable, "-m", module, str(path), timeout_s=_DEADLINE_S)
    if result.code != 0:
        reason = (result.error.splitlines() or ["no output"])[-1]
        if result.code is None:
            reason = f"no answer within {_DEADLINE_S:g} s: the file system hangs"
        return Finding("fail", title, f"{path}: {reason}", f"{_how_to_move(name)}, or have it repaired")
    facts = json.loads(result.out)
    free = facts["free"] / GIB
    text = f"{path} ({facts['type']}): {free:.1f} GiB free"
    if facts["error"]:
        return Finding("fail", title, f"{text}; {facts['where']} {facts['error']}", _how_to_move(name))
    least, comfortable = _ROOM[name]
    if name == "outputs" and (needed := checkpoint_bytes(subject.config.model)):
        text += f"; a checkpoint of this model takes about {needed / GIB:.1f} GiB"
        least = max(least, 2 * needed / GIB)  # the newest checkpoint stays until the next one is complete
    if free < least:
        return Finding("fail", title, text, f"make room ({least:.1f} GiB at least), or {_how_to_move(name)}")
    if facts["inodes_free"] is not None and facts["inodes_free"] < _FEW_INODES:
        text += f", and only {facts['inodes_free']} more files"
        return Finding("warn", title, text, f"delete files there, or {_how_to_move(name)}")
    if free < comfortable:
        return Finding("warn", title, text, f"make room, or {_how_to_move(name)}")
    if facts["write_s"] > _SLOW_S:
        text += f"; a small file took {facts['write_s']:.1f} s"
        return Finding("warn", title, text, f"{_how_to_move(name)} that is faster")
    return Finding("ok", title, text)


def _how_to_move(name: str) -> str:
    return {
        "outputs": "say output_dir=… (hydra.sweep.dir=… for a sweep) on another disk",
        "cache": "set GYMEXP_CACHE to a directory on another disk",
        "hub cache": "set HF_HOME to a directory on another disk",
        "tmp": "set TMPDIR to a directory on another disk",
        "shm": "give the container a larger /dev/shm (docker: --shm-size=8g, or --ipc=host)",
    }[name]


def checkpoint_bytes(model: ModelConfig) -> int | None:
    """Returns the size of a checkpoint: weights and AdamW's state in float32, 12 bytes a parameter.

    Returns None with an adapter, or if the model is not on this machine.
    """
    if model.lora.r is not None:
        return None
    directory = _directory_of(model)
    if directory is None:
        return None
    model_config = json.loads((directory / "config.json").read_text())
    dtype = model_config.get("dtype") or model_config.get("torch_dtype") or "float32"
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    return 12 * size // _BYTES.get(dtype, 4) or None


def _directory_of(model: ModelConfig) -> Path | None:
    path = resolve_path(model.path)
    return Path(path) if Path(path).is_absolute() else cached(path, model.revision or "main")
