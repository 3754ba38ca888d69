"""system.jsonl: what the machine and the run's processes use, measured every few seconds.

A line has `time` (seconds since 1970), `cpu` (share of all cores, 0 to 1) and `memory_mb` (used) of this
machine, `processes` (of each service `rss_mb` and `cpu`, the number of cores that it used since the line
before) and `gpus` (of those that the run uses on this node `index`, `utilization` from 0 to 1, `memory_mb`
and `power_w`). What cannot be measured is null. Megabytes are MiB.

A service counts with its children, except those that are services themselves. Memory that processes share
counts in each of them. Of a service on another node its agent reports the memory of its first process alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil
import pynvml

from gymexp.processes.process import LocalProcess
from gymexp.processes.supervisor import Service
from gymexp.record.directory import RunDirectory

log = logging.getLogger(__name__)
INTERVAL_S = 5.0
_MIB = 2**20


class ProcessUse:
    """The memory and CPU of services with their children. Each call compares with the one before."""

    def __init__(self) -> None:
        self._seconds: dict[psutil.Process, float] = {}  # CPU time of each process so far
        self._measured = time.monotonic()

    def measure(self, services: Mapping[str, int]) -> dict[str, dict[str, float]]:
        """Returns `rss_mb` and `cpu` (cores used since the last call) by service. A service whose process is
        gone is left out.

        services: the pid of each service's process, a descendant of this process or this process itself.
        """
        owners = {pid: name for name, pid in services.items()}
        this = psutil.Process()
        processes = {process.pid: process for process in [this, *this.children(recursive=True)]}
        parents: dict[int, int | None] = {}
        sizes = dict.fromkeys(processes, 0.0)
        used, seconds = dict.fromkeys(processes, 0.0), {}
        for pid, process in processes.items():
            try:
                with process.oneshot():
                    parents[pid] = process.ppid()
                    sizes[pid] = process.memory_info().rss / _MIB
                    times = process.cpu_times()
            except psutil.Error:  # it has ended
                continue
            seconds[process] = times.user + times.system
            used[pid] = max(0.0, seconds[process] - self._seconds.get(process, 0.0))
        now = time.monotonic()
        elapsed, self._measured, self._seconds = now - self._measured, now, seconds
        totals = {name: [0.0, 0.0] for name, pid in services.items() if pid in parents}
        for pid in parents:
            ancestor: int | None = pid
            while ancestor is not None and ancestor not in owners:
                ancestor = parents.get(ancestor)
            if ancestor is not None and owners[ancestor] in totals:
                total = totals[owners[ancestor]]
                total[0] += sizes[pid]
                total[1] += used[pid]
        return {
            name: {"rss_mb": round(rss, 1), "cpu": round(spent / elapsed, 3) if elapsed > 0 else 0.0}
            for name, (rss, spent) in totals.items()
        }


class Gpus:
    """The run's GPUs on this node, asked through NVML. Without a GPU or NVML there are none."""

    def __init__(self, names: Sequence[str]) -> None:
        """names: as CUDA_VISIBLE_DEVICES has them: numbers, or UUIDs that may be cut short."""
        self._handles: list[tuple[int | None, Any]] = []
        if not names:
            return
        try:
            pynvml.nvmlInit()
            known = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
            for name in names:
                if (found := _find(name, known)) is not None:
                    self._handles.append((_asked(pynvml.nvmlDeviceGetIndex, found), found))
        except (pynvml.NVMLError, OSError) as error:
            log.info("no GPU figures in system.jsonl: %s", error)

    def measure(self) -> list[dict[str, Any]]:
        """Returns `index`, `utilization`, `memory_mb` and `power_w` of each GPU."""
        figures = []
        for index, handle in self._handles:
            rates = _asked(pynvml.nvmlDeviceGetUtilizationRates, handle)
            memory = _asked(pynvml.nvmlDeviceGetMemoryInfo, handle)
            milliwatts = _asked(pynvml.nvmlDeviceGetPowerUsage, handle)
            figures.append(
                {
                    "index": index,
                    "utilization": None if rates is None else rates.gpu / 100,
                    "memory_mb": None if memory is None else round(int(memory.used) / _MIB),
                    "power_w": None if milliwatts is None else round(milliwatts / 1000, 1),
                }
            )
        return figures


def _find(name: str, handles: Sequence[Any]) -> Any:
    """Returns the handle of the GPU that CUDA_VISIBLE_DEVICES calls `name`; None if there is none."""
    if name.isdigit():
        return handles[int(name)] if int(name) < len(handles) else None
    if name.startswith("MIG-"):
        return _asked(pynvml.nvmlDeviceGetHandleByUUID, name)
    return next((h for h in handles if str(_asked(pynvml.nvmlDeviceGetUUID, h)).startswith(name)), None)


def _asked(question: Callable[[Any], Any], of: Any) -> Any:
    """Returns NVML's answer; None if the driver or the GPU does not give this figure."""
    try:
        return question(of)
    except (pynvml.NVMLError, OSError):
        return None


class SystemRecorder:
    """Appends a line to system.jsonl every few seconds, from a thread of its own, so that neither a slow
    driver nor a machine with many processes delays the controller. The thread ends with the process at the
    latest, also if a driver hangs."""

    def __init__(
        self,
        directory: RunDirectory,
        services: Callable[[], Mapping[str, Service]],
        gpus: Sequence[str],
    ) -> None:
        """services: the supervised services of all nodes. gpus: those that the run uses on this node, as
        CUDA_VISIBLE_DEVICES names them."""
        self._directory = directory
        self._services = services
        self._gpu_names = gpus
        self._ended = threading.Event()
        self._use = ProcessUse()
        self._gpus: Gpus | None = None
        threading.Thread(target=self._keep, name="system", daemon=True).start()

    def close(self) -> None:
        """Writes no more lines."""
        self._ended.set()

    def _keep(self) -> None:
        psutil.cpu_percent()  # the next call measures since this one
        try:
            while not self._ended.wait(INTERVAL_S):
                line = self.measure()
                if not self._ended.is_set():
                    self._directory.note_system(line)
        except Exception:  # whatever a driver or a kernel does: the run goes on
            log.exception("system.jsonl gets no more lines")

    def measure(self) -> dict[str, Any]:
        """Returns a line."""
        local, processes = {"controller": psutil.Process().pid}, {}
        for name, service in dict(self._services()).items():
            if isinstance(service.running, LocalProcess):
                local[name] = service.running.pid
            elif service.running:
                processes[name] = {"rss_mb": round(service.rss_mb, 1), "cpu": None}
        if self._gpus is None:
            self._gpus = Gpus(self._gpu_names)
        memory = psutil.virtual_memory()
        return {
            "time": round(time.time(), 3),
            "cpu": round(psutil.cpu_percent() / 100, 4),
            "memory_mb": round((memory.total - memory.available) / _MIB),
            "processes": self._use.measure(local) | processes,
            "gpus": self._gpus.measure(),
        }
