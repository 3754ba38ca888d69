"""Checks of what every run needs: Python, packages, memory, cores, open files, ports, host name."""

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
    """Yields findings about the Python version, and about whether the installed packages fit gymexp's
    requirements."""
    text = f"gymexp {gymexp.__version__} on Python {platform.python_version()} ({sys.executable})"
    yield Finding("ok", "python", text)
    try:
        requirements = importlib.metadata.requires("gymexp") or []
    except importlib.metadata.PackageNotFoundError:
        fix = f"{sys.executable} -m pip install -e '{Path(gymexp.__file__).parent.parent}'"
        yield Finding("warn", "packages", "gymexp is not installed: its requirements are unknown", fix)
        return
    wrong, versions = [], []
    for line in requirements:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version}, not {requirement.specifier}")
        elif requirement.name in ("torch", "transformers", "trl", "hydra-core"):
            versions.append(f"{requirement.name} {version}")
    if wrong:
        fix = f"{sys.executable} -m pip install {' '.join(repr(w.split(' is ')[0]) for w in wrong)}"
        yield Finding("fail", "packages", "; ".join(wrong), f"install gymexp anew, or: {fix}")
    else:
        yield Finding("ok", "packages", ", ".join(versions))


def memory_and_cores(subject: Subject) -> Iterable[Finding]:
    """Yields a finding about the free memory, within the limit of this process's cgroup, and the cores."""
    free, cores = psutil.virtual_memory().available, len(os.sched_getaffinity(0))
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if limit is not None:
        free = min(free, limit - (used or 0))
    text = f"{free / _GIB:.1f} GiB of memory free, {cores} cores"
    if free < _LITTLE_MEMORY:
        yield Finding("warn", "memory", text, "end other programs, or ask for more (launcher.mem=… on Slurm)")
    elif cores < 2:
        fix = "use more cores (launcher.cpus=… on Slurm): trainer, servers and engine share this one"
        yield Finding("warn", "memory", text, fix)
    else:
        yield Finding("ok", "memory", text)


def _cgroup(name: str) -> int | None:
    """Returns the number in a file of this process's cgroup (v2), None without a cgroup or a limit."""
    try:
        group = Path("/proc/self/cgroup").read_text().splitlines()[-1].rpartition("::")[2]
        return int((Path("/sys/fs/cgroup") / group.lstrip("/") / name).read_text())
    except (OSError, ValueError, IndexError):
        return None


def open_files(subject: Subject) -> Iterable[Finding]:
    """Yields a finding about how many rollouts in flight the limit on open files allows."""
    raise_limit()  # as a run does
    text = f"{limit()} for each process"
    try:
        rollouts = sum(concurrency(subject.config.env).values())
    except ConfigError as error:
        yield Finding("fail", "open files", text, str(error))
    else:
        yield Finding("ok", "open files", f"{text}, which have room for {rollouts} rollouts in flight")


def ports(subject: Subject) -> Iterable[Finding]:
    """Yields a finding about whether servers can listen on loopback, and on how many ephemeral ports."""
    try:
        listen().close()
    except ConfigError as error:
        fix = "the servers of a run communicate on 127.0.0.1: let programs listen on that address"
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
    """Yields a finding about whether this machine's own name resolves, as torch and NCCL need."""
    name = socket.gethostname()
    try:
        address = socket.getaddrinfo(name, None)[0][4][0]
    except OSError as error:
        fix = f"add a line for {name} to /etc/hosts: torch and NCCL look up this machine's name"
        yield Finding("warn", "hostname", f"{name} does not resolve ({error})", fix)
        return
    yield Finding("ok", "hostname", f"{name} is {address}")
