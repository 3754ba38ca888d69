"""Facts to store with benchmark results (machine, versions, model), and a function that writes results."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def machine() -> dict[str, Any]:
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {"cores": os.cpu_count(), "cpu": cpu or platform.processor(), "gpus": gpus()}


def gpus() -> list[str]:
    """Returns the names of the machine's NVIDIA GPUs."""
    if not shutil.which("nvidia-smi"):
        return []
    shown = _output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"])
    return [line.strip() for line in shown.splitlines() if line.strip()]


def versions(python: str | os.PathLike[str], packages: Sequence[str]) -> dict[str, str]:
    """Returns the versions of those packages that the interpreter `python` has."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "found = {}\n"
        "for name in sys.argv[1:]:\n"
        "    try: found[name] = m.version(name)\n"
        "    except m.PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    return json.loads(_output([python, "-c", code, *packages]) or "{}")


def model(directory: Path) -> dict[str, Any]:
    """Returns the shape of a model, with its number of parameters (a tied head counts once)."""
    config = json.loads((directory / "config.json").read_text())
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    names += ("intermediate_size", "vocab_size", "tie_word_embeddings", "dtype")
    sizes = dict(_sizes(directory))
    shape = {name: config[name] for name in names if name in config}
    return {"name": directory.name, "parameters": sum(sizes.values())} | shape


def _sizes(directory: Path) -> Iterator[tuple[str, int]]:
    """Yields each tensor's name and number of elements, from the headers of the safetensors files."""
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                yield name, math.prod(entry["shape"])


def write(path: Path, results: dict[str, Any]) -> None:
    """Writes results to a JSON file, whole or not at all, so that a failure keeps earlier measurements."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps({"date": time.strftime("%Y-%m-%d %H:%M:%S")} | results, indent=1) + "\n")
    part.replace(path)


def _output(command: Sequence[str | os.PathLike[str]]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
