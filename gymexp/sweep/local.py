"""`launcher=local`: runs a sweep's jobs on this machine, one after the other, each in a process of its own.

The jobs are checked and frozen like those of `launcher=slurm`: a mistake in the last job is reported before
the first one starts, and later edits of code or configuration change no job.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra._internal.core_plugins import basic_launcher
from hydra.core.utils import JobReturn

from gymexp.errors import Interrupted
from gymexp.processes.process import ended
from gymexp.record.directory import RunDirectory, failure_of
from gymexp.sweep.check import End, check_jobs, returns
from gymexp.sweep.freeze import claim, freeze, name_of, read_sweep, take_back
from gymexp.sweep.kinds import Kind
from gymexp.view.progress import View


class LocalLauncher(basic_launcher.BasicLauncher):
    """The launcher that replaces Hydra's basic launcher (`gymexp.cli.entry`)."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self._kind = kind

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run one job for each list of overrides.

        Raises GymexpError before the first job starts if any job is wrong, Interrupted after a signal, and
        LaunchError at the end if jobs failed.
        """
        assert self.config is not None
        sweep = Path(str(self.config.hydra.sweep.dir)).resolve()
        try:
            jobs = check_jobs(self, job_overrides, initial_job_idx, self._kind, self._kind.check_local)
            freeze(sweep, "local", jobs, {})
        except BaseException:
            take_back(sweep, range(initial_job_idx, initial_job_idx + len(job_overrides)))
            raise
        return returns(jobs, run_jobs(sweep, list(jobs)))


def run_jobs(sweep: Path, nums: Sequence[int]) -> dict[int, End]:
    """Start or continue jobs of a frozen sweep, one after the other. Returns their ends by number.

    The first SIGINT, SIGTERM or SIGHUP ends the running job after a checkpoint, and then the sweep: raises
    Interrupted. A second signal ends the job at once.
    """
    claim(sweep)
    record = read_sweep(sweep)
    swept = {entry["num"]: entry["swept"] for entry in record["jobs"]}
    path = os.pathsep.join(filter(None, [str(sweep / "code"), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "GYMEXP_SERVERS": str(sweep / "code")}
    view, ends, received = View(), dict[int, End](), list[int]()
    process: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _: object) -> None:
        received.append(number)
        if process:
            process.send_signal(number)

    def interrupted(when: str) -> Interrupted:
        signal_name = signal.Signals(received[0]).name
        return Interrupted(
            received[0],
            f"ended by {signal_name} {when}; go on with: "
            f"python -m gymexp.sweep resubmit {shlex.quote(str(sweep))}",
        )

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    handlers = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        for at, num in enumerate(nums, 1):
            name, run = name_of(num, swept[num]), RunDirectory(sweep / str(num))
            if received:
                raise interrupted(f"before {name}")
            view.say(f"{name}, {at} of {len(nums)}: {run.path}")
            run.result.unlink(missing_ok=True)  # an old result must not pass for this run's
            command = [sys.executable, "-m", "gymexp.sweep.job", str(sweep), str(num)]
            # In its own process group the job gets a Ctrl-C of the terminal only from pass_on, and so once.
            process = subprocess.Popen(command, env=env, cwd=record["cwd"], process_group=0)
            code = process.wait()
            process = None
            if received:
                raise interrupted(f"in {name}, {at} of {len(nums)}")
            result = run.read_result()
            error = failure_of(result, f"its process {ended(code)}")
            ends[num] = End(name, result, error, run.logs)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return ends
