"""What a job does with its run's end: keeps it, counts it, has the job requeued, or says why not."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gymexp.cluster import slurm_job as allocation
from gymexp.cluster.slurm_job import Task
from gymexp.config.schema import ModelConfig, PlacementConfig, RunConfig
from gymexp.errors import ConfigError, Interrupted, NodeLost
from gymexp.sweep import job, kinds
from gymexp.sweep.freeze import FrozenJob

GOOD = {"step": 3, "stopped": False, "held_out": {}}
SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT, signal.SIGINT, signal.SIGHUP)


@pytest.fixture(autouse=True)
def in_slurm(monkeypatch):
    """As the only start of job 7_3; signals are as before afterwards."""
    for name, value in {
        "SLURM_JOB_ID": "9",
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURMD_NODENAME": "node1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    monkeypatch.setattr(allocation, "_TIMEOUT_S", 2.0)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def sweep(tmp_path) -> Path:
    (tmp_path / "3").mkdir()
    return tmp_path


@pytest.fixture
def trained(monkeypatch, sweep) -> Callable[[Any], list[tuple]]:
    """Puts something in the place of training: a result, an error to raise, or a function."""
    frozen = FrozenJob(RunConfig(name="n", model=ModelConfig(name="m", path="p")), ["seed=1"])
    monkeypatch.setattr(job, "read_job", lambda directory: frozen)
    calls: list[tuple] = []

    def put(end: Any) -> list[tuple]:
        def train(*arguments: Any) -> Any:
            calls.append(arguments)
            if isinstance(end, BaseException):
                raise end
            return end() if callable(end) else end

        monkeypatch.setattr(kinds, "train", train)
        return calls

    put.frozen = frozen  # type: ignore[attr-defined]
    return put


def read(sweep: Path, name: str) -> dict:
    return json.loads((sweep / "3" / name).read_text())


def starts(sweep: Path) -> list[dict]:
    return [json.loads(line) for line in (sweep / "3" / "starts.jsonl").read_text().splitlines()]


def exit_code(sweep: Path) -> Any:
    with pytest.raises(SystemExit) as caught:
        job.run(str(sweep), 3)
    return caught.value.code


def test_a_first_start_trains_with_what_was_frozen_and_is_counted(sweep, trained):
    calls = trained(GOOD)
    (sweep / "3" / "result.json").write_text(json.dumps({"error": "of an earlier submission"}))
    assert job.run(str(sweep), 3) == GOOD
    ((config, overrides, directory, where),) = calls
    assert (config.resume, overrides, directory) == (None, ["seed=1"], sweep / "3")
    assert where == allocation.Allocation("7_3", 0, "node1")
    (start,) = starts(sweep)
    assert (start["job_id"], start["restarts"], start["progress"]) == ("7_3", 0, None)
    assert abs(start["time"] - os.stat(sweep / "3" / "starts.jsonl").st_mtime) < 5
    assert not (sweep / "3" / "result.json").exists(), "the run writes its own"


def test_a_job_whose_directory_holds_a_run_goes_on_with_it(sweep, trained):
    calls = trained(GOOD)
    (sweep / "3" / "config.yaml").touch()
    job.run(str(sweep), 3)
    assert (calls[0][0].resume, calls[0][1]) == (str(sweep / "3"), [])


STOPPED = GOOD | {"stopped": True}


@pytest.mark.parametrize(("before", "again"), [(GOOD, False), (STOPPED, True), ({"error": "x"}, True)])
def test_a_run_that_has_its_result_is_not_begun_again(sweep, trained, before, again):
    calls = trained(GOOD | {"step": 4})
    (sweep / "3" / "result.json").write_text(json.dumps(before))
    assert job.run(str(sweep), 3)["step"] == (4 if again else 3)
    assert len(calls) == again


def test_an_error_is_kept_with_the_run_and_fails_the_job(sweep, trained, capsys):
    trained(ConfigError("the reason"))
    assert exit_code(sweep) == 1
    assert capsys.readouterr().err == "error: the reason\n"
    assert read(sweep, "result.json") == {"error": "the reason"}
    status = read(sweep, "status.json")
    assert (status["outcome"], status["job_id"], status["restarts"]) == ("the reason", "7_3", 0)
    assert status["began"] > 0


@pytest.mark.parametrize(("error", "text"), [(ValueError("a bug"), "a bug"), (ValueError(), "ValueError")])
def test_a_bug_of_ours_is_kept_and_not_swallowed(sweep, trained, error, text):
    trained(error)
    with pytest.raises(ValueError):
        job.run(str(sweep), 3)
    assert read(sweep, "result.json") == {"error": text} and read(sweep, "status.json")["outcome"] == text


def test_a_status_that_the_run_has_written_is_kept_but_for_its_outcome(sweep, trained):
    def end() -> None:
        (sweep / "3" / "status.json").write_text(json.dumps({"began": 5.0, "step": 2, "ended": None}))
        raise ConfigError("the reason")

    trained(end)
    assert exit_code(sweep) == 1
    status = read(sweep, "status.json")
    assert (status["began"], status["step"], status["outcome"]) == (5.0, 2, "the reason")


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_warning_of_slurms_has_the_job_requeued(sweep, trained, commands, tmp_path, number, caplog):
    caplog.set_level(logging.INFO)
    commands(squeue="echo RUNNING", scontrol=f"echo $* > {tmp_path}/asked")
    trained(Interrupted(number, "ended after step 2"))
    assert exit_code(sweep) == 0
    assert (tmp_path / "asked").read_text() == "requeue 7_3\n"
    assert read(sweep, "status.json")["outcome"] == "requeued"
    assert not (sweep / "3" / "result.json").exists()
    assert "ended after step 2; requeueing job 7_3" in caplog.text
    for one in (signal.SIGUSR2, signal.SIGTERM):
        assert signal.getsignal(one) is signal.SIG_IGN, "it says no more than is known"


def test_a_job_that_is_taken_down_is_not_brought_back(sweep, trained, commands, tmp_path):
    commands(squeue="echo COMPLETING", scontrol=f"echo $* > {tmp_path}/asked")
    trained(Interrupted(signal.SIGTERM, "ended by SIGTERM after step 2"))
    assert exit_code(sweep) == 128 + signal.SIGTERM
    assert not (tmp_path / "asked").exists()
    outcome = read(sweep, "status.json")["outcome"]
    assert outcome == "ended by Slurm or scancel: ended by SIGTERM after step 2"


def test_a_requeue_that_fails_is_the_jobs_error(sweep, trained, commands, capsys):
    commands(squeue="echo RUNNING", scontrol="echo 'Requested operation is presently disabled' >&2; exit 1")
    trained(Interrupted(signal.SIGUSR2, "ended after step 2"))
    assert exit_code(sweep) == 1
    text = (
        "SIGUSR2 ended the run, and Slurm did not requeue job 7_3: Requested operation is presently disabled"
        f". It goes on with: python -m gymexp.sweep resubmit {sweep}"
    )
    assert read(sweep, "result.json") == {"error": text} and read(sweep, "status.json")["outcome"] == text
    assert capsys.readouterr().err == f"error: {text}\n"


def test_a_job_that_fails_at_once_each_time_is_given_up_at_its_third_start(sweep, trained, commands, capsys):
    commands(squeue="echo RUNNING", scontrol="true")
    calls = trained(Interrupted(signal.SIGTERM, "ended before it began"))
    assert [exit_code(sweep) for _ in range(3)] == [0, 0, 1]
    assert len(calls) == 2 and len(starts(sweep)) == 3
    text = read(sweep, "result.json")["error"]
    assert text.startswith("job 7_3 was started 3 times before its first checkpoint: give it more time")


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_before_the_run_takes_them_over_is_not_lost(sweep, trained, commands, number):
    commands(squeue="echo RUNNING", scontrol="true")
    trained(lambda: os.kill(os.getpid(), number))
    signal.signal(signal.SIGCONT, signal.SIG_IGN)
    assert exit_code(sweep) == 0
    assert read(sweep, "status.json")["outcome"] == "requeued"
    assert signal.getsignal(signal.SIGCONT) is signal.SIG_DFL


def as_task(monkeypatch, trained, rank: int) -> list[str]:
    """One of two nodes of the job; what is done there."""
    placement = PlacementConfig(rollout_nodes=1)
    trained.frozen.config.placement = placement
    done: list[str] = []
    task = Task.__new__(Task)
    object.__setattr__(task, "rank", rank)
    monkeypatch.setattr(job, "read_task", lambda: task)
    monkeypatch.setattr(job.node_agent, "follow", lambda path, task: done.append(f"follows in {path.name}"))
    monkeypatch.setattr(job, "announce", lambda path, task, over: done.append(f"{path.name}: {over}"))
    return done


def test_of_several_nodes_the_first_leads_and_tells_the_others_of_its_end(sweep, trained, monkeypatch):
    calls = trained(GOOD)
    done = as_task(monkeypatch, trained, 0)
    assert job.run(str(sweep), 3) == GOOD and done == ["3: its run has ended"]
    trained(ConfigError("x"))
    assert exit_code(sweep) == 1 and len(done) == 2, "also after an error"
    calls.clear()
    done = as_task(monkeypatch, trained, 1)
    assert job.run(str(sweep), 3) == {} and done == ["follows in 3"] and not calls


def test_an_agent_without_its_lead_says_so_and_fails(sweep, trained, monkeypatch, capsys):
    trained(GOOD)
    as_task(monkeypatch, trained, 1)

    def follow(path: Path, task: Task) -> None:
        raise NodeLost("its lead is gone")

    monkeypatch.setattr(job.node_agent, "follow", follow)
    assert exit_code(sweep) == 1
    assert capsys.readouterr().err == "error: its lead is gone\n"


def test_a_local_job_keeps_its_error_and_an_interruption_is_none(sweep, trained):
    calls = trained(ConfigError("the reason"))
    with pytest.raises(ConfigError):
        job.run_local(str(sweep), 3)
    assert read(sweep, "result.json") == {"error": "the reason"}
    assert calls[0][1:] == (["seed=1"], sweep / "3", None), "no job of Slurm's"
    (sweep / "3" / "result.json").unlink()
    trained(KeyError())
    with pytest.raises(KeyError):
        job.run_local(str(sweep), 3)
    assert read(sweep, "result.json") == {"error": "KeyError"}
    (sweep / "3" / "result.json").unlink()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        trained(lambda number=number: os.kill(os.getpid(), number))
        name = number.name
        with pytest.raises(Interrupted, match=f"^ended by {name} before it began$") as caught:
            job.run_local(str(sweep), 3)
        assert caught.value.number == number and not (sweep / "3" / "result.json").exists()


def test_a_local_job_under_nohup_outlives_its_terminal(sweep, trained):
    trained(lambda: os.kill(os.getpid(), signal.SIGHUP))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    job.run_local(str(sweep), 3)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
