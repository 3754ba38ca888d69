"""One run over three nodes of a real Slurm cluster: one that samples, two that train. Whatever of it is
killed, it ends or goes on as documented, and nothing stays on any node."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from hydra import compose, initialize_config_dir
from whole_run import OVERRIDES, ROOT, Run

from gymexp.config.group_options import CONF_DIR
from gymexp.config.hydra_schema import register
from gymexp.config.load import load
from gymexp.sweep.freeze import FrozenJob, write_job

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]
SHORT = [
    *(o for o in OVERRIDES if "workplace" not in o),
    "env=[sudoku]",
    "trainer.max_steps=3",
    "trainer.per_device_train_batch_size=4",  # on each of two ranks
    "evaluation.before=false",
    "evaluation.after=false",
    "evaluation.every_steps=0",
    "rollout.drift_every=1",
    "rollout.max_drift=1e-3",
    "placement.rollout_nodes=1",
    "placement.train_nodes=2",
]
IN_TASK = "import sys; from gymexp.sweep import job; job.run(sys.argv[1], 0)"
COME_BACK = {
    "Over nodes: an engine is killed": "gymexp.engine.hf.replica",
    "Over nodes: the gateway is killed": "gymexp.gateway.server",
}
PATIENCE_S = 60  # for the end of a run whose part was killed


class NodesRun(Run):
    """A job of three tasks, each on a node of its own, as a launcher submits it."""

    def __init__(self, sweep: Path) -> None:
        self.directory = sweep / "0"
        register()
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            config = load(compose("train", SHORT))
        write_job(self.directory, FrozenJob(config, SHORT))
        self.output = sweep / "output.txt"
        self.name = f"nodes-{os.getpid()}-{time.monotonic_ns()}"
        command = ["srun", "-N3", "--ntasks-per-node=1", "-c2", "--label", "--kill-on-bad-exit=1"]
        with self.output.open("w") as out:
            self.process = subprocess.Popen(
                [*command, f"--job-name={self.name}", sys.executable, "-c", IN_TASK, str(sweep)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                start_new_session=True,
            )

    def processes(self) -> list[tuple[psutil.Process, str, dict[str, str]]]:
        """Those of the job on all nodes, with command and environment."""
        found = []
        for process in psutil.process_iter():
            try:
                command, environ = " ".join(process.cmdline()), process.environ()
            except psutil.Error:
                continue
            if environ.get("SLURM_JOB_NAME") == self.name and process.pid != self.process.pid:
                found.append((process, command, environ))
        return found

    def left(self) -> list[psutil.Process]:
        return [process for process, *_ in self.processes()]

    def part(self, what: str, **environ: str) -> psutil.Process:
        """The process whose command has `what` in it, and whose environment has `environ`."""
        found = [
            process
            for process, command, there in self.processes()
            if what in command and environ.items() <= there.items()
        ]
        assert found, f"{what} {environ} is not there:\n{self.said}"
        return min(found, key=psutil.Process.create_time)

    def kill(self) -> None:
        for process in [*self.left(), self.process]:
            process.kill()
        self.process.wait()


@pytest.fixture
def nodes_run(tmp_path: Path, slurm: None) -> Iterator[Callable[[], NodesRun]]:
    runs: list[NodesRun] = []

    def start() -> NodesRun:
        runs.append(NodesRun(tmp_path))
        return runs[-1]

    yield start
    for run in runs:
        run.kill()


def test_two_nodes_train_with_what_a_third_one_samples_though_engine_and_gateway_are_killed(nodes_run, fault):
    run = nodes_run()
    run.wait_for_step(1)
    for row, part in COME_BACK.items():
        steps = len(run.steps())
        blow = fault(row)
        run.part(part).kill()
        run.wait_for(lambda steps=steps: len(run.steps()) > steps)
        blow.over()
    places = {rank: run.part("gymexp.training.trainer_process", RANK=rank) for rank in ("0", "1")}
    nodes = [process.environ()["SLURMD_NODENAME"] for process in places.values()]
    engine = run.part("gymexp.engine.hf.replica").environ()["SLURMD_NODENAME"]
    assert len({*nodes, engine}) == 3
    assert run.ended_cleanly() == 0, run.said
    steps = [entry for entry in run.metrics() if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3]
    assert all(entry["drift"] < 1e-3 and entry["sudoku/rollouts"] == 16 for entry in steps)
    assert run.status()["outcome"] == "finished"
    assert (run.directory / "model" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("row", "what", "environ", "said"),
    [
        (
            "Over nodes: rank 0 is killed",
            "gymexp.training.trainer_process",
            {"RANK": "0"},
            "trainer was ended by SIGKILL",
        ),
        (
            "Over nodes: another rank is killed",
            "gymexp.training.trainer_process",
            {"RANK": "1"},
            "trainer-1 was ended by SIGKILL",
        ),
        ("Over nodes: NeMo Gym's host is killed", "gym/host.py", {}, "gym-host was ended by SIGKILL"),
        ("Over nodes: a node's agent is killed", "job.run", {"SLURM_PROCID": "1"}, "node {node} is lost"),
        ("Over nodes: the lead is killed", "job.run", {"SLURM_PROCID": "0"}, "the lead is gone"),
    ],
    ids=["rank0", "rank1", "gym_host", "agent", "lead"],
)
def test_a_run_that_loses_what_it_cannot_do_without_ends_everywhere_and_says_what(
    nodes_run, fault, row, what, environ, said
):
    run = nodes_run()
    run.wait_for_step(1)
    victim = run.part(what, **environ)
    said = said.format(node=victim.environ()["SLURMD_NODENAME"])
    blow = fault(row)
    victim.send_signal(signal.SIGKILL)
    assert run.ended() != 0
    while run.left() and time.monotonic() - blow.began < PATIENCE_S:
        time.sleep(0.1)
    assert run.left() == []
    assert blow.over() < PATIENCE_S
    assert said in run.said and "Traceback" not in run.said
