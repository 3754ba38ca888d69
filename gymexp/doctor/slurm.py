"""The check of Slurm: its partitions, the user's accounts, and whether the run's job can start."""

from __future__ import annotations

import getpass
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass

from gymexp.config.schema import LauncherConfig
from gymexp.config.suggestions import nearest
from gymexp.doctor.finding import Finding, Subject, run_command


@dataclass(frozen=True)
class Partition:
    """A partition of the cluster.

    minutes: its time limit, None without one. nodes, gpus, cpus, mem_mb: of the kind of node with the most
    GPUs, and of several such kinds the one with the fewest CPUs. preempt: what Slurm does to the partition's
    jobs when it preempts them, e.g. requeue; empty if it never does.
    """

    name: str
    is_default: bool
    minutes: float | None
    nodes: int
    gpus: int
    cpus: int
    mem_mb: int
    preempt: str = ""


def partitions() -> list[Partition] | str:
    """Returns the partitions that are up, the default one first, or the error of sinfo."""
    result = run_command("sinfo", "--noheader", "--format=%P|%a|%l|%D|%G|%c|%m")
    if result.code != 0:
        return result.error or "sinfo failed"
    preempt = {}
    for line in run_command("scontrol", "--oneliner", "show", "partition").out.splitlines():
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        mode = fields.get("PreemptMode", "OFF").lower()
        preempt[fields.get("PartitionName")] = "" if mode == "off" else mode
    by_name: dict[str, Partition] = {}
    for line in result.out.splitlines():
        cells = line.strip().split("|")
        if len(cells) != 7 or cells[1] != "up":
            continue
        name = cells[0].rstrip("*")
        gpus = sum(int(n) for n in re.findall(r"\bgpu(?::[^:,(\s]+)*?:(\d+)", cells[4]))
        nodes, cpus, mem = (int(cell.rstrip("+")) for cell in (cells[3], cells[5], cells[6]))
        partition = Partition(
            name, cells[0].endswith("*"), minutes(cells[2]), nodes, gpus, cpus, mem, preempt.get(name, "")
        )
        other = by_name.get(name)  # sinfo prints a line for each kind of node
        if other is None or (gpus, -cpus) > (other.gpus, -other.cpus):
            by_name[name] = partition
    return sorted(by_name.values(), key=lambda partition: not partition.is_default)


def accounts() -> list[str] | None:
    """Returns this user's Slurm accounts, the default one first, or None if Slurm lists none."""
    user = getpass.getuser()
    result = run_command("sacctmgr", "-nP", "show", "assoc", f"user={user}", "format=account")
    if result.code != 0:
        return None
    default = run_command("sacctmgr", "-nP", "show", "user", user, "format=defaultaccount").out.split()
    return list(dict.fromkeys([*default, *result.out.split()])) or None


def minutes(time: str) -> float | None:
    """Returns the minutes of a time as Slurm writes it: 60, 30:00, 4:00:00, 1-00, 1-12:00:00.

    Returns None for any other text, such as `infinite`.
    """
    if not (match := re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time.strip())):
        return None
    days, *rest = match.groups()
    a, b, c = (None if part is None else int(part) for part in rest)
    assert a is not None
    if days is not None:
        return int(days) * 1440 + a * 60 + (b or 0) + (c or 0) / 60
    if c is not None:
        return a * 60 + (b or 0) + c / 60
    return a + (b or 0) / 60


def look(subject: Subject) -> Iterable[Finding]:
    """Yields findings about Slurm: whether it answers, its partitions, its accounting, and with
    launcher=slurm whether the run's job can start."""
    is_needed = subject.launcher == "slurm"
    if not shutil.which("sinfo"):
        if is_needed:
            fix = "submit from a login node of the cluster, or say launcher=local"
            yield Finding("fail", "slurm", "launcher=slurm, and sinfo is not on the PATH", fix)
        else:
            yield Finding("ok", "slurm", "none here")
        return
    found = partitions()
    if isinstance(found, str):
        fix = "ask the cluster's administrators; runs on this machine alone need no Slurm (launcher=local)"
        yield Finding("fail" if is_needed else "warn", "slurm", found, fix)
        return
    if not found:
        yield Finding("fail" if is_needed else "warn", "slurm", "no partition is up", "sinfo shows them all")
        return
    yield Finding("ok", "slurm", f"partitions: {'; '.join(map(describe, found))}")
    yield _accounting()
    if is_needed:
        yield from _job(subject.config.launcher, found)


def describe(partition: Partition) -> str:
    """Returns a line about a partition: its nodes, its time limit, and whether its jobs are preempted."""
    parts = [f"{partition.nodes} nodes", f"{partition.cpus} CPUs", f"{partition.gpus} GPUs"]
    parts.append(f"{partition.mem_mb} MB each")
    limit = partition.minutes
    parts.append("no time limit" if limit is None else f"up to {limit / 60:g} h")
    name = partition.name + (" (default)" if partition.is_default else "")
    preempted = f", preempted ({partition.preempt})" if partition.preempt else ""
    return f"{name}: {', '.join(parts)}{preempted}"


def _accounting() -> Finding:
    """Returns a finding about whether sacct answers."""
    result = run_command("sacct", "--noheader", "-X", "--starttime=now")
    if result.code == 0:
        return Finding("ok", "slurm: sacct", "answers")
    if "disabled" in result.error:
        return Finding("ok", "slurm: sacct", "accounting is off: jobs are watched by squeue alone")
    fix = "slurmdbd is down or slow: jobs are watched by squeue meanwhile; tell the administrators"
    return Finding("warn", "slurm: sacct", result.error or "failed", fix)


def _job(launcher: LauncherConfig, partitions: list[Partition]) -> Iterable[Finding]:
    """Yields a finding about whether a job with the options of `launcher` can start."""
    title, by_name = "slurm: job", {partition.name: partition for partition in partitions}
    name = launcher.partition or next((p.name for p in partitions if p.is_default), None)
    known = ", ".join(by_name)
    if name is None:
        fix = f"say launcher.partition=… (one of {known})"
        yield Finding("fail", title, "no launcher.partition, and this cluster has no default one", fix)
        return
    # sbatch takes several partitions, and uses the first one that is free.
    chosen = [by_name.get(part) for part in name.split(",")]
    if None in chosen:
        text = f"launcher.partition={name} is not up here{nearest(name, list(by_name))}"
        yield Finding("fail", title, text, f"say one of {known}")
        return
    wrong = []
    for partition in filter(None, chosen):
        time, limit = minutes(launcher.time), partition.minutes
        if limit is not None and time is not None and time > limit:
            wrong.append(f"launcher.time={launcher.time} is above {partition.name}'s limit, {limit:g} min")
        for key, available in (("gpus", partition.gpus), ("cpus", partition.cpus)):
            if (value := getattr(launcher, key) or 0) > available:
                wrong.append(f"launcher.{key}={value}: a node of {partition.name} has {available}")
    own_accounts = accounts()
    if launcher.account and own_accounts is not None and launcher.account not in own_accounts:
        wrong.append(f"launcher.account={launcher.account} is not yours: {', '.join(own_accounts)}")
    if wrong:
        yield Finding("fail", title, "; ".join(wrong), "jobs would wait for ever or be refused: change these")
        return
    options = f"{launcher.gpus or 0} GPUs, {launcher.cpus or 'default'} CPUs, time {launcher.time}"
    yield Finding("ok", title, f"{name} has nodes for it ({options})")
