"""What a job is: the run of one directory of a sweep, from what was frozen when the sweep began.

Slurm's call `run`, pickled by reference, so that the code is the sweep's own snapshot. With several nodes
each one's task calls it: the first leads, the others do what it says (`gymexp.cluster.lead`).

    SIGUSR2 (time limit), SIGTERM (preemption)   the run saves, the job requeues itself, the run goes on
    SIGTERM by scancel                           the run saves if there is time, and that is all
    an error                                     result.json has it, and the job fails
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
from gymexp.cluster import agent
from gymexp.cluster.job import Allocation, read_task
from gymexp.cluster.lead import announce
from gymexp.cluster.placement import num_nodes
from gymexp.config.schema import RunConfig
from gymexp.errors import GymexpError, Interrupted
from gymexp.files import append_line, read_json, read_lines
from gymexp.printable import say_error
from gymexp.processes import lifeline
from gymexp.record.directory import Ended, RunDirectory, is_whole
from gymexp.run.train import train
from gymexp.sweep.freeze import FrozenJob, read_job
from gymexp.training.checkpoints import newest_step

log = logging.getLogger(__name__)
_IN_VAIN = 2  # restarts one after the other without a new checkpoint, before the run is given up


def run(sweep_dir: str, num: int) -> dict[str, Any]:
    """The run of job `num`: a new one, or on with the one that its directory holds. Returns its result;
    nothing where another task leads.

    Exits without a result when the job is to be started again, and with 1 after an error that has a text.
    """
    held = RunDirectory(Path(sweep_dir) / str(num))
    job = read_job(held.path)
    task = read_task() if num_nodes(job.config.placement) > 1 else None
    try:
        if task and task.rank > 0:
            agent.follow(held.path, task)
            return {}
        return _lead(held, job)
    except GymexpError as error:  # an agent's: its lead is gone, and can say nothing
        say_error(error)
        sys.exit(1)
    finally:
        if task and task.rank == 0:
            announce(held.path, task, over="its run has ended")  # to those that it has not called


def here(sweep_dir: str, num: int) -> None:
    """The run of job `num` of a local sweep (`gymexp.sweep.local`), as `run`; once, and not in Slurm's way.

    Raises GymexpError, Interrupted as well, with result.json saying so.
    """
    held = RunDirectory(Path(sweep_dir) / str(num))
    hup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    _raise_on_signals(signal.SIGINT, signal.SIGTERM, *hup)
    try:
        train(*_said(held, read_job(held.path)), held.path)
    except Exception as error:
        if not isinstance(error, Interrupted):
            held.write_error(str(error) or type(error).__name__)
        raise


def _said(held: RunDirectory, job: FrozenJob) -> tuple[RunConfig, list[str]]:
    """Configuration and overrides: of a new run, or to go on with the one that there is."""
    if held.config.exists():
        return dataclasses.replace(job.config, resume=str(held.path)), []
    return job.config, job.overrides


def _lead(held: RunDirectory, job: FrozenJob) -> dict[str, Any]:
    allocation = Allocation.of_this_process()
    assert allocation is not None, "a job runs in Slurm"
    before = held.read_result()
    if is_whole(before):
        return before  # its node was lost, say, between the run's end and the job's
    held.result.unlink(missing_ok=True)
    _raise_on_signals(signal.SIGUSR2, signal.SIGTERM)
    signal.signal(signal.SIGCONT, signal.SIG_DFL)
    try:
        _count_start(held, allocation)
        return train(*_said(held, job), held.path, allocation)
    except Interrupted as interrupted:
        _start_again(held, allocation, interrupted)
    except Exception as error:
        text = str(error) or type(error).__name__
        held.write_error(text)
        _set_end(held, allocation, Ended.FAILED, text)
        if not isinstance(error, GymexpError):
            raise
        say_error(error)
        sys.exit(1)


def _raise_on_signals(*numbers: int) -> None:
    """Until the controller takes them over. submitit's own would requeue at once and ignore SIGTERM."""

    def received(number: int, _: object) -> None:
        raise Interrupted(number, f"ended by {signal.Signals(number).name} before it began")

    for number in numbers:
        signal.signal(number, received)


def _count_start(held: RunDirectory, allocation: Allocation) -> None:
    """A line of starts.jsonl. Raises GymexpError if the last starts of this job found no older checkpoint
    than this one does."""
    path = held.path / "starts.jsonl"
    step = newest_step(held.checkpoints)
    earlier = read_lines(path)
    append_line(path, {"time": round(time.time(), 3), **dataclasses.asdict(allocation), "checkpoint": step})
    found = [s["checkpoint"] for s in earlier if s.get("job_id") == allocation.job_id][-_IN_VAIN:]
    if len(found) == _IN_VAIN and all((at or 0) >= (step or 0) for at in found):
        since = "before its first checkpoint" if step is None else f"without getting past checkpoint-{step}"
        raise GymexpError(
            f"job {allocation.job_id} was started {_IN_VAIN + 1} times {since}: give it more time "
            "(launcher.time), more time to save (launcher.signal_s), or let it save more often "
            "(trainer.save_steps); then submit it again"
        )


def _start_again(held: RunDirectory, allocation: Allocation, interrupted: Interrupted) -> NoReturn:
    for number in (signal.SIGUSR2, signal.SIGTERM):  # they say no more than is known
        signal.signal(number, signal.SIG_IGN)
    if not allocation.goes_on():
        _set_end(held, allocation, Ended.STOPPED, f"ended by Slurm or scancel: {interrupted}")
        sys.exit(128 + interrupted.number)
    log.info("%s; requeueing job %s", interrupted, allocation.job_id)
    _set_end(held, allocation, Ended.REQUEUED, "requeued")
    if complaint := allocation.requeue():
        text = (
            f"{signal.Signals(interrupted.number).name} ended the run, and Slurm did not requeue job "
            f"{allocation.job_id}: {complaint}. It goes on from its checkpoint with: "
            f"python -m gymexp.sweep resubmit {held.path.parent}"
        )
        held.write_result({"error": text})
        _set_end(held, allocation, Ended.FAILED, text)
        say_error(text)
        sys.exit(1)
    sys.exit(0)


def _set_end(held: RunDirectory, allocation: Allocation, ended: Ended, outcome: str) -> None:
    """Say in status.json how this start ended, also where it ended before a controller wrote it."""
    status = read_json(held.status) or {"began": time.time()}
    held.write_status(**status | dataclasses.asdict(allocation) | {"ended": ended, "outcome": outcome})


if __name__ == "__main__":
    lifeline.die_with_parent()
    outlive_readers()
    log_to_terminal()
    guarded(here, RunConfig)(sys.argv[1], int(sys.argv[2]))
