"""Checks of the GPUs and their driver, and of whether torch and vLLM can use them."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterable

from gymexp.doctor.finding import Finding, Subject, run_command
from gymexp.engine import vllm
from gymexp.errors import ConfigError

_TORCH_S = 60.0  # to import torch from a cold network disk
_BUSY = 0.05  # a GPU with a larger share of its memory in use before the run counts as busy
_TORCH = """
import json, torch
available = torch.cuda.is_available()
print(json.dumps([torch.__version__, torch.version.cuda, torch.cuda.device_count() if available else 0]))
"""


def look(subject: Subject) -> Iterable[Finding]:
    """Yields findings about the GPUs: their driver, their free memory, and whether torch sees them."""
    if not shutil.which("nvidia-smi"):
        if subject.launcher == "slurm":
            yield Finding("ok", "gpu", "none here (no nvidia-smi); jobs get theirs from Slurm")
        elif subject.config.engine.kind == "vllm" and not subject.config.engine.urls:
            fix = "install the NVIDIA driver, or say engine=hf; vLLM's CPU build is for trying things out"
            yield Finding("warn", "gpu", "none (no nvidia-smi)", fix)
        else:
            yield Finding("ok", "gpu", "none (no nvidia-smi): runs use the CPU")
        return
    columns = "index,name,memory.total,memory.used,driver_version"
    result = run_command("nvidia-smi", f"--query-gpu={columns}", "--format=csv,noheader,nounits")
    rows = [[cell.strip() for cell in line.split(",")] for line in result.out.splitlines()]
    rows = [row for row in rows if len(row) == 5]
    if result.code != 0 or not rows:
        reason = result.error or result.out.strip() or "no GPU"
        fix = "the driver does not answer: dmesg names the cause (Xid); it takes the machine's administrator"
        yield Finding("fail", "gpu", f"nvidia-smi: {reason}", fix)
        return
    names = sorted({row[1] for row in rows})
    text = f"{len(rows)} × {', '.join(names)}, {_gib(rows[0][2])} GiB, driver {rows[0][4]}"
    busy = [row for row in rows if row[2].isdigit() and int(row[3]) > _BUSY * int(row[2])]
    if busy:
        memory = ", ".join(f"GPU {row[0]}: {_gib(row[3])} GiB" for row in busy)
        fix = f"end the processes that use it{_processes()}, or leave those GPUs out of CUDA_VISIBLE_DEVICES"
        yield Finding("warn", "gpu", f"{text}; memory in use: {memory}", fix)
    else:
        yield Finding("ok", "gpu", text)
    yield _torch()


def _gib(mebibytes: str) -> str:
    return f"{int(mebibytes) / 1024:.0f}" if mebibytes.isdigit() else mebibytes


def _processes() -> str:
    result = run_command("nvidia-smi", "--query-compute-apps=pid,process_name", "--format=csv,noheader")
    lines = [line.strip() for line in result.out.splitlines() if line.strip()]
    return f" ({'; '.join(lines[:4])})" if result.code == 0 and lines else ""


def _torch() -> Finding:
    result = run_command(sys.executable, "-c", _TORCH, timeout_s=_TORCH_S)
    if result.code != 0:
        reason = (result.error.splitlines() or ["no output"])[-1]
        return Finding("fail", "torch", reason, f"try: {sys.executable} -c 'import torch'")
    version, cuda, count = json.loads(result.out.splitlines()[-1])
    if cuda is None:
        fix = "install torch for CUDA (pytorch.org names the command)"
        return Finding("fail", "torch", f"torch {version} is built without CUDA", fix)
    if count:
        return Finding("ok", "torch", f"torch {version}, CUDA {cuda}, sees {count} GPUs")
    driver = re.search(r"CUDA (?:UMD )?Version:\s*([\d.]+)", run_command("nvidia-smi").out)
    text = f"torch {version} (CUDA {cuda}) sees no GPU"
    if driver and int(driver[1].split(".")[0]) < int(cuda.split(".")[0]):
        fix = f"update the driver, or install a torch built for CUDA {driver[1].split('.')[0]}"
        return Finding("fail", "torch", f"{text}: the driver goes up to CUDA {driver[1]}", fix)
    return Finding("fail", "torch", text, "look at CUDA_VISIBLE_DEVICES, and at the container's GPU flags")


def vllm_version(subject: Subject) -> Iterable[Finding]:
    """Yields findings about the vLLM that the run would use: whether gymexp supports its version, and whether
    it is a CPU build on a machine with GPUs."""
    engine = subject.config.engine
    if engine.kind == "hf" or engine.urls:
        text = "engine.urls: servers that already run" if engine.urls else "not used with engine=hf"
        yield Finding("ok", "vllm", text)
        return
    try:
        version = vllm.read_version(engine)
    except ConfigError as error:
        if engine.kind == "vllm":
            yield Finding("fail", "vllm", str(error))
        elif shutil.which("nvidia-smi"):
            yield Finding("warn", "vllm", "none that fits: engine=auto samples with transformers", str(error))
        else:
            yield Finding("ok", "vllm", "none that fits; without a GPU engine=auto does not use it")
        return
    kind = " (a CPU build)" if version.is_cpu else ""
    yield Finding("ok", "vllm", f"vLLM {version.major}.{version.minor}{kind} fits")
    if version.is_cpu and shutil.which("nvidia-smi"):
        yield Finding("fail", "vllm", "a CPU build, on a machine with GPUs", "install vLLM for CUDA")
