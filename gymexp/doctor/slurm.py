"""The cluster as Slurm tells it: its partitions, one's accounts, and whether a job as asked for can start."""

from __future__ import annotations

import getpass
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass

from gymexp.config.names import nearest
from gymexp.config.schema import LauncherConfig
from gymexp.doctor.finding import Finding, Subject, ask


@dataclass(frozen=True)
class Partition:
    """minutes: its time limit, None without one. gpus, cpus, mem_mb: of the smallest of its nodes with the
    most GPUs. preempt: what Slurm does to its jobs for others, e.g. requeue; empty: nothing."""

    name: str
    is_default: bool
    minutes: float | None
    nodes: int
    gpus: int
    cpus: int
    mem_mb: int
    preempt: str = ""


def partitions() -> list[Partition] | str:
    """Those that are up, the default one first; or Slurm's complaint."""
    shown = ask("sinfo", "--noheader", "--format=%P|%a|%l|%D|%G|%c|%m")
    if shown.code != 0:
        return shown.error or "sinfo failed"
    preempt = {}
    for line in ask("scontrol", "--oneliner", "show", "partition").out.splitlines():
        said = dict(word.split("=", 1) for word in line.split() if "=" in word)
        mode = said.get("PreemptMode", "OFF").lower()
        preempt[said.get("PartitionName")] = "" if mode == "off" else mode
    found: dict[str, Partition] = {}
    for line in shown.out.splitlines():
        cells = line.strip().split("|")
        if len(cells) != 7 or cells[1] != "up":
            continue
        name = cells[0].rstrip("*")
        gpus = sum(int(n) for n in re.findall(r"\bgpu(?::[^:,(\s]+)*?:(\d+)", cells[4]))
        nodes, cpus, mem = (int(cell.rstrip("+")) for cell in (cells[3], cells[5], cells[6]))
        one = Partition(
            name, cells[0].endswith("*"), minutes(cells[2]), nodes, gpus, cpus, mem, preempt.get(name, "")
        )
        other = found.get(name)  # sinfo has a line for each kind of node
        if other is None or (gpus, -cpus) > (other.gpus, -other.cpus):
            found[name] = one
    return sorted(found.values(), key=lambda one: not one.is_default)


def accounts() -> list[str] | None:
    """This user's, the default one first; None where Slurm keeps none."""
    user = getpass.getuser()
    shown = ask("sacctmgr", "-nP", "show", "assoc", f"user={user}", "format=account")
    if shown.code != 0:
        return None
    default = ask("sacctmgr", "-nP", "show", "user", user, "format=defaultaccount").out.split()
    return list(dict.fromkeys([*default, *shown.out.split()])) or None


def minutes(time: str) -> float | None:
    """Of a time as Slurm writes it: 60, 30:00, 4:00:00, 1-00, 1-12:00:00. None: no limit, or no such time."""
    if not (found := re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time.strip())):
        return None
    days, *rest = found.groups()
    a, b, c = (None if part is None else int(part) for part in rest)
    assert a is not None
    if days is not None:
        return int(days) * 1440 + a * 60 + (b or 0) + (c or 0) / 60
    if c is not None:
        return a * 60 + (b or 0) + c / 60
    return a + (b or 0) / 60


def look(subject: Subject) -> Iterable[Finding]:
    """Whether Slurm answers, and has a partition for what the run asks for."""
    wanted = subject.launcher == "slurm"
    if not shutil.which("sinfo"):
        if wanted:
            fix = "submit from a login node of the cluster, or say launcher=local"
            yield Finding("fail", "slurm", "launcher=slurm, and sinfo is not on the PATH", fix)
        else:
            yield Finding("ok", "slurm", "none here")
        return
    found = partitions()
    if isinstance(found, str):
        fix = "ask the cluster's administrators; runs on this machine alone do without (launcher=local)"
        yield Finding("fail" if wanted else "warn", "slurm", found, fix)
        return
    if not found:
        yield Finding("fail" if wanted else "warn", "slurm", "no partition is up", "sinfo shows them all")
        return
    yield Finding("ok", "slurm", f"partitions: {'; '.join(map(describe, found))}")
    yield _accounting()
    if wanted:
        yield from _job(subject.config.launcher, found)


def describe(one: Partition) -> str:
    """A partition in a line."""
    parts = [f"{one.nodes} nodes", f"{one.cpus} CPUs", f"{one.gpus} GPUs", f"{one.mem_mb} MB each"]
    parts.append("no time limit" if one.minutes is None else f"up to {one.minutes / 60:g} h")
    name = one.name + (" (default)" if one.is_default else "")
    return f"{name}: {', '.join(parts)}" + (f", preempted ({one.preempt})" if one.preempt else "")


def _accounting() -> Finding:
    shown = ask("sacct", "--noheader", "-X", "--starttime=now")
    if shown.code == 0:
        return Finding("ok", "slurm: sacct", "answers")
    if "disabled" in shown.error:
        return Finding("ok", "slurm: sacct", "accounting is off: jobs are watched by squeue alone")
    fix = "slurmdbd is down or slow: jobs are watched by squeue meanwhile; tell the administrators"
    return Finding("warn", "slurm: sacct", shown.error or "failed", fix)


def _job(launcher: LauncherConfig, found: list[Partition]) -> Iterable[Finding]:
    what, by_name = "slurm: job", {one.name: one for one in found}
    name = launcher.partition or next((one.name for one in found if one.is_default), None)
    known = ", ".join(by_name)
    if name is None:
        fix = f"say launcher.partition=… (one of {known})"
        yield Finding("fail", what, "no launcher.partition, and this cluster has no default one", fix)
        return
    chosen = [by_name.get(one) for one in name.split(",")]  # sbatch takes several, and uses the first free
    if None in chosen:
        text = f"launcher.partition={name} is not up here{nearest(name, list(by_name))}"
        yield Finding("fail", what, text, f"say one of {known}")
        return
    wrong = []
    for one in filter(None, chosen):
        asked = minutes(launcher.time)
        if one.minutes is not None and asked is not None and asked > one.minutes:
            wrong.append(f"launcher.time={launcher.time} is above {one.name}'s limit, {one.minutes:g} min")
        for key, there in (("gpus", one.gpus), ("cpus", one.cpus)):
            if (getattr(launcher, key) or 0) > there:
                wrong.append(f"launcher.{key}={getattr(launcher, key)}: a node of {one.name} has {there}")
    mine = accounts()
    if launcher.account and mine is not None and launcher.account not in mine:
        wrong.append(f"launcher.account={launcher.account} is not yours: {', '.join(mine)}")
    if wrong:
        yield Finding("fail", what, "; ".join(wrong), "jobs would wait for ever or be refused: change these")
        return
    asked = f"{launcher.gpus or 0} GPUs, {launcher.cpus or 'default'} CPUs, time {launcher.time}"
    yield Finding("ok", what, f"{name} has nodes for it ({asked})")
