"""What the machine, its GPUs and the services use; no GPU, no driver and no odd figure disturbs a run."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest

from gymexp.files import read_lines
from gymexp.processes.process import LocalProcess
from gymexp.processes.supervisor import Service
from gymexp.record.directory import RunDirectory
from gymexp.run import system_records
from gymexp.run.system_records import Gpus, ProcessUse, SystemRecorder

BUSY = "import time; b = bytearray(40 << 20)\nwhile True: pass"


@pytest.fixture
def busy():
    """A service that only waits for its child, which computes and holds 40 MiB; and another such child of it
    that is a service itself."""
    start = f"import subprocess, sys; c = [sys.executable, '-c', {BUSY!r}]\n"
    start += "p = [subprocess.Popen(c) for _ in range(2)]; print(*(q.pid for q in p), flush=True)\n"
    start += "[q.wait() for q in p]"
    process = subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    children = [int(pid) for pid in process.stdout.readline().split()]
    yield process.pid, children
    for pid in (*children, process.pid):
        psutil.Process(pid).kill()
    process.wait()
    process.stdout.close()


def test_a_service_counts_with_its_children_but_not_with_those_that_are_services(busy):
    pid, (child, other) = busy
    use = ProcessUse()
    services = {"controller": os.getpid(), "parent": pid, "other": other, "gone": 2**22 + 1}
    use.measure(services)
    time.sleep(0.5)
    before, began = psutil.Process(child).cpu_times().user, time.monotonic()
    use.measure(services)
    time.sleep(1.0)
    measured = use.measure(services)
    seconds = time.monotonic() - began
    cores = (psutil.Process(child).cpu_times().user - before) / seconds
    assert measured.keys() == {"controller", "parent", "other"}
    assert measured["parent"]["cpu"] == pytest.approx(cores, abs=0.25) and measured["parent"]["cpu"] > 0.05
    sizes = [psutil.Process(p).memory_info().rss / 2**20 for p in (pid, child)]
    assert (
        measured["parent"]["rss_mb"] == pytest.approx(sum(sizes), rel=0.1)
        and measured["parent"]["rss_mb"] > 40
    )
    assert measured["other"]["rss_mb"] > 40
    assert measured["controller"]["cpu"] < 1.0, "not its children"


def test_a_call_right_after_another_divides_by_no_zero(monkeypatch):
    monkeypatch.setattr("gymexp.run.system_records.time.monotonic", lambda: 5.0)
    use = ProcessUse()
    assert use.measure({"self": os.getpid()})["self"]["cpu"] == 0.0


class Nvml:
    """In the place of NVML: three GPUs, of which the second gives nothing but its UUID."""

    UUIDS = ("GPU-aa11", "GPU-bb22", "MIG-cc33")

    def __init__(self, monkeypatch) -> None:
        def fail(*_: Any) -> Any:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

        def figure(value):
            return lambda handle: fail() if handle == 1 else value(handle)

        rates = lambda handle: SimpleNamespace(gpu=50 + handle, memory=1)  # noqa: E731
        memory = lambda handle: SimpleNamespace(used=(handle + 1) << 30)  # noqa: E731
        answers = {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetCount": lambda: 3,
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetHandleByUUID": lambda uuid: self.UUIDS.index(uuid),
            "nvmlDeviceGetUUID": lambda handle: self.UUIDS[handle],
            "nvmlDeviceGetIndex": lambda handle: handle,
            "nvmlDeviceGetUtilizationRates": figure(rates),
            "nvmlDeviceGetMemoryInfo": figure(memory),
            "nvmlDeviceGetPowerUsage": lambda handle: 400_500 if handle == 0 else fail(),
        }
        for name, answer in answers.items():
            monkeypatch.setattr(pynvml, name, answer)


def test_the_runs_gpus_are_found_by_number_and_by_uuid_and_what_they_do_not_say_is_null(monkeypatch):
    Nvml(monkeypatch)
    zero = {"index": 0, "utilization": 0.5, "memory_mb": 1024, "power_w": 400.5}
    one = {"index": 1, "utilization": None, "memory_mb": None, "power_w": None}
    two = {"index": 2, "utilization": 0.52, "memory_mb": 3072, "power_w": None}
    assert Gpus(["0"]).measure() == Gpus(["GPU-aa"]).measure() == [zero]
    assert Gpus(["GPU-bb22", "MIG-cc33"]).measure() == [one, two]
    assert Gpus(["7", "GPU-zz", "MIG-zz"][:2]).measure() == []
    assert Gpus([]).measure() == []


@pytest.mark.parametrize(
    "error", [pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND), OSError("no library")]
)
def test_without_a_driver_there_are_no_gpus(monkeypatch, error):
    def fail() -> None:
        raise error

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert Gpus(["0"]).measure() == []


@pytest.fixture
def here():
    """A process of this node that waits."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process.pid
    process.communicate()


def services(here: int | None = None) -> dict[str, Service]:
    """One of this node, one of another node, one that has not begun."""

    async def never() -> Any: ...

    made = {name: Service(name, never, Path("log")) for name in ("here", "there", "nowhere")}
    made["here"].running = LocalProcess(here or os.getpid())  # type: ignore[assignment]
    made["there"].running = SimpleNamespace(pid=1)  # type: ignore[assignment]
    made["there"].rss_mb = 123.45
    return made


def lines_of(directory: Path, at_least: int = 1) -> list[dict[str, Any]]:
    until = time.monotonic() + 20
    while len(lines := read_lines(directory / "system.jsonl")) < at_least and time.monotonic() < until:
        time.sleep(0.02)
    return lines


def test_a_line_has_the_machine_and_the_services_of_all_nodes(tmp_path, monkeypatch, here):
    monkeypatch.setattr(system_records, "INTERVAL_S", 0.05)
    recorder = SystemRecorder(RunDirectory(tmp_path), lambda: services(here), [])
    line, *_ = lines_of(tmp_path, 2)
    recorder.close()
    assert line.keys() == {"time", "cpu", "memory_mb", "processes", "gpus"} and line["gpus"] == []
    assert abs(line["time"] - time.time()) < 60 and 0 <= line["cpu"] <= 1
    assert 0 < line["memory_mb"] < psutil.virtual_memory().total / 2**20
    assert line["processes"].keys() == {"controller", "here", "there"}
    assert line["processes"]["there"] == {"rss_mb": 123.5, "cpu": None}
    assert line["processes"]["here"]["rss_mb"] > 1 < line["processes"]["controller"]["rss_mb"]
    time.sleep(0.2)
    count = len(lines_of(tmp_path))
    time.sleep(0.2)
    assert len(lines_of(tmp_path)) == count, "closed"


def test_a_directory_that_cannot_be_written_to_is_reported_as_other_records_are(tmp_path, monkeypatch):
    monkeypatch.setattr(system_records, "INTERVAL_S", 0.02)
    directory = RunDirectory(tmp_path / "gone")
    monkeypatch.setattr(directory, "loss", lambda: "")
    recorder = SystemRecorder(directory, services, [])
    until = time.monotonic() + 20
    while not directory.what_is_wrong() and time.monotonic() < until:
        time.sleep(0.02)
    recorder.close()
    assert "system.jsonl" in directory.what_is_wrong()


def test_an_error_that_nobody_thought_of_ends_the_lines_and_nothing_else(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(system_records, "INTERVAL_S", 0.02)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: 1 / 0)
    with caplog.at_level(logging.ERROR):
        SystemRecorder(RunDirectory(tmp_path), services, [])
        until = time.monotonic() + 20
        while "no more lines" not in caplog.text and time.monotonic() < until:
            time.sleep(0.02)
    assert "system.jsonl gets no more lines" in caplog.text and not (tmp_path / "system.jsonl").exists()
