"""Python, memory, cores, open files, ports: what a run takes for granted of its machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import sys
from collections.abc import Iterable
from pathlib import Path

import psutil
from packaging.requirements import Requirement

import gymexp
from gymexp.doctor.finding import Finding, Subject
from gymexp.errors import ConfigError
from gymexp.processes.open_files import concurrency, limit, raise_limit
from gymexp.processes.ports import listen

_GIB = 2**30
_LITTLE_MEMORY = 6 * _GIB
_FEW_PORTS = 5000


def python(subject: Subject) -> Iterable[Finding]:
    """Also that what gymexp is installed with is what it asks for."""
    text = f"gymexp {gymexp.__version__} on Python {platform.python_version()} ({sys.executable})"
    yield Finding("ok", "python", text)
    try:
        needs = importlib.metadata.requires("gymexp") or []
    except importlib.metadata.PackageNotFoundError:
        fix = f"{sys.executable} -m pip install -e '{Path(gymexp.__file__).parent.parent}'"
        yield Finding("warn", "packages", "gymexp is not installed: what it needs is not known here", fix)
        return
    wrong, there = [], []
    for line in needs:
        wanted = Requirement(line)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{wanted} is missing")
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            wrong.append(f"{wanted.name} is {version}, not {wanted.specifier}")
        elif wanted.name in ("torch", "transformers", "trl", "hydra-core"):
            there.append(f"{wanted.name} {version}")
    if wrong:
        fix = f"{sys.executable} -m pip install {' '.join(repr(w.split(' is ')[0]) for w in wrong)}"
        yield Finding("fail", "packages", "; ".join(wrong), f"install gymexp anew, or: {fix}")
    else:
        yield Finding("ok", "packages", ", ".join(there))


def memory_and_cores(subject: Subject) -> Iterable[Finding]:
    """What is free for the run, within the limits of its cgroup."""
    free, cores = psutil.virtual_memory().available, len(os.sched_getaffinity(0))
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if limit is not None:
        free = min(free, limit - (used or 0))
    text = f"{free / _GIB:.1f} GiB of memory free, {cores} cores"
    if free < _LITTLE_MEMORY:
        yield Finding("warn", "memory", text, "end other programs, or ask for more (launcher.mem=… on Slurm)")
    elif cores < 2:
        fix = "give it more cores (launcher.cpus=… on Slurm): trainer, servers and engine share this one"
        yield Finding("warn", "memory", text, fix)
    else:
        yield Finding("ok", "memory", text)


def _cgroup(name: str) -> int | None:
    """A number of this process's cgroup (v2); None without one, and where there is no limit."""
    try:
        group = Path("/proc/self/cgroup").read_text().splitlines()[-1].rpartition("::")[2]
        return int((Path("/sys/fs/cgroup") / group.lstrip("/") / name).read_text())
    except (OSError, ValueError, IndexError):
        return None


def open_files(subject: Subject) -> Iterable[Finding]:
    """How many rollouts in flight the limit on open files has room for."""
    raise_limit()  # as a run does
    text = f"{limit()} for each process"
    try:
        rollouts = sum(concurrency(subject.config.env).values())
    except ConfigError as error:
        yield Finding("fail", "open files", text, str(error))
    else:
        yield Finding("ok", "open files", f"{text}, which have room for {rollouts} rollouts in flight")


def ports(subject: Subject) -> Iterable[Finding]:
    """Whether servers may listen on loopback, and on how many ports."""
    try:
        listen().close()
    except ConfigError as error:
        fix = "the servers of a run talk on 127.0.0.1: let programs listen there"
        yield Finding("fail", "ports", str(error), fix)
        return
    text = "loopback listens"
    span = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if span.exists():
        first, last = map(int, span.read_text().split())
        text += f", {last - first + 1} ephemeral ports"
        if last - first + 1 < _FEW_PORTS:
            fix = "widen net.ipv4.ip_local_port_range (sysctl): many rollouts at once run out of ports"
            yield Finding("warn", "ports", text, fix)
            return
    yield Finding("ok", "ports", text)


def hostname(subject: Subject) -> Iterable[Finding]:
    """Whether the machine's own name resolves, which torch and NCCL need."""
    name = socket.gethostname()
    try:
        address = socket.getaddrinfo(name, None)[0][4][0]
    except OSError as error:
        fix = f"add a line for {name} to /etc/hosts: torch and NCCL look the own name up"
        yield Finding("warn", "hostname", f"{name} does not resolve ({error})", fix)
        return
    yield Finding("ok", "hostname", f"{name} is {address}")
