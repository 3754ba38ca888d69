"""A sweep's job: it does the work of one directory of the sweep, with the code and configuration frozen at
submission.

A Slurm job calls `run`, which is pickled by reference, so that the job imports the sweep's copy of the code.
With several nodes the task of each node calls `run`: the first task is the lead, and the others are agents
(`gymexp.cluster.lead`).

    SIGUSR2 (time limit), SIGTERM (preemption)   the run saves, the job requeues itself, the run continues
    SIGTERM by scancel                           the run saves if time allows, and the job stays ended
    an error                                     result.json has the error, and the job fails
"""

from __future__ import annotations

import dataclasses
import logging
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from gymexp.cli.terminal import guarded, log_to_terminal, outlive_readers
from gymexp.cluster import node_agent
from gymexp.cluster.lead import announce
from gymexp.cluster.placement import num_nodes
from gymexp.cluster.slurm_job import Allocation, read_task
from gymexp.config.schema import RunConfig
from gymexp.errors import GymexpError, Interrupted
from gymexp.files import append_line, read_json, read_lines
from gymexp.printable import say_error
from gymexp.processes import parent_watch
from gymexp.record.directory import Ended, RunDirectory
from gymexp.sweep.freeze import FrozenJob, read_job
from gymexp.sweep.kinds import Kind, kind_of

log = logging.getLogger(__name__)
_MAX_FRUITLESS_RESTARTS = 2  # consecutive restarts without progress before the job fails


def run(sweep_dir: str, num: int) -> dict[str, Any]:
    """Run job `num` of a sweep on Slurm: start its run, or continue the run in its directory.

    Returns the run's result, or {} in an agent's task. Exits with 0 after requeueing the job, with 128 + the
    signal's number if scancel or Slurm ends the job, and with 1 after a GymexpError or a refused requeue.
    Raises any other error.
    """
    directory = RunDirectory(Path(sweep_dir) / str(num))
    job = read_job(directory.path)
    task = read_task() if num_nodes(job.config.placement) > 1 else None
    try:
        if task and task.rank > 0:
            node_agent.follow(directory.path, task)
            return {}
        return _lead(directory, job)
    except GymexpError as error:  # an agent's task: its lead is gone and cannot report the error
        say_error(error)
        sys.exit(1)
    finally:
        if task and task.rank == 0:
            announce(directory.path, task, over="its run has ended")  # for agents that have not joined


def run_local(sweep_dir: str, num: int) -> None:
    """Run job `num` of a local sweep (`gymexp.sweep.local`): start its run, or continue the run in its
    directory. Signals end the run, and the job is not requeued.

    Raises Interrupted after a signal. Writes any other error to result.json and raises it.
    """
    directory = RunDirectory(Path(sweep_dir) / str(num))
    hup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    _raise_on_signals(signal.SIGINT, signal.SIGTERM, *hup)
    try:
        job = read_job(directory.path)
        kind_of(job).do(job, directory, None)
    except Exception as error:
        if not isinstance(error, Interrupted):
            directory.write_error(str(error) or type(error).__name__)
        raise


def _lead(directory: RunDirectory, job: FrozenJob) -> dict[str, Any]:
    """Run the job in the lead's task, or in the only task. Returns, exits and raises as `run` does."""
    allocation = Allocation.of_this_process()
    assert allocation is not None, "a job runs in Slurm"
    kind = kind_of(job)
    if kind.is_done(directory):  # the job was started again after its end, e.g. because its node was lost
        return directory.read_result()
    directory.result.unlink(missing_ok=True)
    _raise_on_signals(signal.SIGUSR2, signal.SIGTERM)
    signal.signal(signal.SIGCONT, signal.SIG_DFL)
    try:
        _count_start(directory, allocation, kind)
        return kind.do(job, directory, allocation)
    except Interrupted as interrupted:
        _start_again(directory, allocation, interrupted)
    except Exception as error:
        text = str(error) or type(error).__name__
        directory.write_error(text)
        _set_end(directory, allocation, Ended.FAILED, text)
        if not isinstance(error, GymexpError):
            raise
        say_error(error)
        sys.exit(1)


def _raise_on_signals(*numbers: int) -> None:
    """Have these signals raise Interrupted until the controller installs its own handlers.

    submitit's handlers would requeue the job at once and ignore SIGTERM.
    """

    def received(number: int, _: object) -> None:
        raise Interrupted(number, f"ended by {signal.Signals(number).name} before it began")

    for number in numbers:
        signal.signal(number, received)


def _count_start(directory: RunDirectory, allocation: Allocation, kind: Kind) -> None:
    """Append this start of the job to starts.jsonl.

    Raises GymexpError if each of the job's last _MAX_FRUITLESS_RESTARTS starts found at least as much
    progress as this start does, so that none of them has got any further.
    """
    path = directory.path / "starts.jsonl"
    progress = kind.progress(directory)
    earlier = read_lines(path)
    line = {"time": round(time.time(), 3), **dataclasses.asdict(allocation), "progress": progress}
    append_line(path, line)
    same_job = [start["progress"] for start in earlier if start.get("job_id") == allocation.job_id]
    last = same_job[-_MAX_FRUITLESS_RESTARTS:]
    if len(last) == _MAX_FRUITLESS_RESTARTS and all((at or 0) >= (progress or 0) for at in last):
        raise GymexpError(
            f"job {allocation.job_id} was started {_MAX_FRUITLESS_RESTARTS + 1} times "
            f"{kind.describe(progress)}: {kind.advice}; then submit it again"
        )


def _start_again(directory: RunDirectory, allocation: Allocation, interrupted: Interrupted) -> NoReturn:
    """Requeue the job after a signal and exit with 0, unless the job is being taken down or Slurm refuses."""
    for number in (signal.SIGUSR2, signal.SIGTERM):  # a second warning must not interrupt the requeueing
        signal.signal(number, signal.SIG_IGN)
    if not allocation.goes_on():
        _set_end(directory, allocation, Ended.STOPPED, f"ended by Slurm or scancel: {interrupted}")
        sys.exit(128 + interrupted.number)
    log.info("%s; requeueing job %s", interrupted, allocation.job_id)
    _set_end(directory, allocation, Ended.REQUEUED, "requeued")
    if error := allocation.requeue():
        text = (
            f"{signal.Signals(interrupted.number).name} ended the run, and Slurm did not requeue job "
            f"{allocation.job_id}: {error}. It goes on with: "
            f"python -m gymexp.sweep resubmit {directory.path.parent}"
        )
        directory.write_result({"error": text})
        _set_end(directory, allocation, Ended.FAILED, text)
        say_error(text)
        sys.exit(1)
    sys.exit(0)


def _set_end(directory: RunDirectory, allocation: Allocation, ended: Ended, outcome: str) -> None:
    """Write to status.json how this start ended, even if it ended before the controller wrote the file."""
    status = read_json(directory.status) or {"began": time.time()}
    directory.write_status(**status | dataclasses.asdict(allocation) | {"ended": ended, "outcome": outcome})


if __name__ == "__main__":
    parent_watch.die_with_parent()
    outlive_readers()
    log_to_terminal()
    guarded(run_local, RunConfig)(sys.argv[1], int(sys.argv[2]))
