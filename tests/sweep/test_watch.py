"""How jobs are, from what Slurm's commands say (here scripts) or fail to say, and from the runs' files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gymexp.cluster.slurm_states import SlurmState
from gymexp.errors import LaunchError
from gymexp.sweep import watch
from gymexp.sweep.freeze import SCHEMA


def test_the_queue_is_asked_first_and_accounting_for_what_it_has_forgotten(commands):
    commands(
        squeue="echo '12_0|RUNNING|node1'; echo '12_1|PENDING|(Resources)'",
        sacct="case \"$*\" in *12,7*) echo '12_2|CANCELLED by 0|node2';; esac",
    )
    assert watch.states(["12_0", "12_1", "12_2", "7"]) == {
        "12_0": "RUNNING",
        "12_1": "PENDING",
        "12_2": "CANCELLED",
        "7": watch.GONE,
    }


def test_without_accounting_a_forgotten_job_is_gone(commands):
    commands(
        squeue="echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1",
        sacct="echo 'Slurm accounting storage is disabled' >&2; exit 1",
    )
    assert watch.states(["7"]) == {"7": watch.GONE}


def test_a_slurm_that_does_not_answer_says_nothing_about_any_job(commands):
    commands(squeue="echo 'Unable to contact slurm controller' >&2; exit 1", sacct="exit 1")
    assert watch.states(["7"]) is None


def end(sweep: Path, result: dict | None, state: str) -> watch.End:
    (sweep / "3").mkdir(exist_ok=True)
    if result is not None:
        (sweep / "3" / "result.json").write_text(json.dumps(result))
    return watch.end_of(sweep, {"num": 3, "job_id": "12_3", "swept": {"seed": "1"}}, state)


def test_an_end_is_what_the_run_says_and_slurms_word_where_it_says_nothing(tmp_path):
    ended = end(tmp_path, None, "OUT_OF_MEMORY")
    assert (ended.name, ended.error) == (
        "job 3 (seed=1)",
        "job 12_3 ended without a result; Slurm says OUT_OF_MEMORY",
    )
    assert ended.log == tmp_path / "slurm" / "12_3_0_log.out"
    gone = end(tmp_path, None, watch.GONE)
    assert gone.error == "job 12_3 ended without a result; Slurm does not know it any more"
    stopped = end(tmp_path, {"step": 2, "stopped": True, "held_out": {}}, "CANCELLED")
    assert stopped.error == "job 12_3 ended without a result; Slurm says CANCELLED"
    assert end(tmp_path, {"error": "why"}, "FAILED").error == "why"
    finished = end(tmp_path, {"step": 3, "stopped": False, "held_out": {}}, watch.GONE)
    assert finished.error is None and finished.result["step"] == 3


class Slurm:
    """Answers one after the other, the last one for ever; an exception is raised."""

    def __init__(self, *answers: dict[str, str] | BaseException | None) -> None:
        self.answers = list(answers)
        self.asked: list[list[str]] = []

    def __call__(self, job_ids) -> dict[str, SlurmState] | None:
        self.asked.append(list(job_ids))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, BaseException):
            raise answer
        return None if answer is None else {job: SlurmState(state) for job, state in answer.items()}


def sweep_of(path: Path, jobs: int = 2) -> Path:
    entries = [
        {"num": num, "job_id": f"12_{num}", "swept": {"seed": str(num)}, "overrides": []}
        for num in range(jobs)
    ]
    path.mkdir(exist_ok=True)
    (path / "sweep.json").write_text(json.dumps({"schema": SCHEMA, "jobs": entries}))
    for num in range(jobs):
        (path / str(num)).mkdir(exist_ok=True)
    return path


@pytest.fixture
def watched(monkeypatch, tmp_path):
    """Waits for two jobs with these answers of Slurm's, and says which lines were shown."""
    monkeypatch.setattr(watch, "_POLL_S", 0.01)
    monkeypatch.setattr(watch, "_FILE_LAG_S", 0.05)
    lines: list[str] = []
    monkeypatch.setattr(watch.View, "say", lambda self, line: lines.append(line))

    def wait(*answers, nums=(0, 1)):
        slurm = Slurm(*answers)
        monkeypatch.setattr(watch, "slurm_states", slurm)
        return watch.wait(sweep_of(tmp_path / "sweep"), nums), lines, slurm

    wait.lines = lines  # type: ignore[attr-defined]
    wait.sweep = sweep_of(tmp_path / "sweep")  # type: ignore[attr-defined]
    return wait


def finish(sweep: Path, num: int, **result) -> None:
    said = {"step": 3, "stopped": False, "held_out": {}} | result
    (sweep / str(num) / "result.json").write_text(json.dumps(said))


def test_each_state_is_said_once_and_the_ends_come_in_the_jobs_order(watched):
    finish(watched.sweep, 0)
    finish(watched.sweep, 1)
    ends, lines, slurm = watched(
        {"12_0": "PENDING", "12_1": "RUNNING"},
        {"12_0": "PENDING", "12_1": "RUNNING"},
        {"12_0": "RUNNING", "12_1": "COMPLETED"},
        {"12_0": "COMPLETING"},
        {"12_0": "COMPLETED"},
    )
    assert lines == [
        f"2 jobs submitted: {watched.sweep}",
        "job 0 (12_0): pending",
        "job 1 (12_1): running",
        "job 0 (12_0): running",
        "job 1 (12_1): finished (1/2)",
        "job 0 (12_0): finished (2/2)",
    ]
    assert list(ends) == [0, 1] and [end.error for end in ends.values()] == [None, None]
    assert slurm.asked == [["12_0", "12_1"]] * 3 + [["12_0"]] * 2


def test_only_the_jobs_that_were_asked_for_are_watched(watched):
    finish(watched.sweep, 1)
    ends, lines, slurm = watched({"12_1": "COMPLETED"}, nums=[1])
    assert list(ends) == [1] and slurm.asked == [["12_1"]] and lines[0].startswith("1 jobs submitted")


def test_silence_of_slurms_is_said_once_and_is_no_end(watched, monkeypatch):
    finish(watched.sweep, 0)
    pauses: list[float] = []
    monkeypatch.setattr(watch.time, "sleep", pauses.append)
    answer = {"12_0": "COMPLETED", "12_1": "FAILED"}
    ends, lines, _ = watched(None, None, None, answer)
    assert pauses[:3] == [0.01] * 3, "between two questions"
    assert [line for line in lines if "answer" in line] == [
        "Slurm does not answer; its jobs are assumed to go on",
        "Slurm answers again",
    ]
    assert ends[0].error is None
    assert ends[1].error == "job 12_1 ended without a result; Slurm says FAILED"
    assert "job 1 (12_1): failed: job 12_1 ended without a result; Slurm says FAILED (2/2)" in lines


def test_a_long_silence_ends_the_watch_and_not_the_jobs(watched, monkeypatch):
    monkeypatch.setattr(watch, "_SILENCE_S", 0.05)
    with pytest.raises(LaunchError, match=r"Slurm has not answered for .*; its jobs may go on; later"):
        watched(None)
    monkeypatch.setattr(watch, "_SILENCE_S", 30)
    watched.lines.clear()
    with pytest.raises(RuntimeError, match="enough"):
        watched(*[None] * 20, RuntimeError("enough"))


def test_a_result_that_this_machine_sees_late_is_waited_for_and_anew_after_a_restart(watched, monkeypatch):
    monkeypatch.setattr(watch, "_FILE_LAG_S", 0.3)
    finish(watched.sweep, 1)

    class Late(dict):
        def items(self):
            finish(watched.sweep, 0)
            return {"12_0": "COMPLETED"}.items()

    first = {"12_0": "FAILED", "12_1": "COMPLETED"}
    again = [{"12_0": "RUNNING"}] * 40  # longer than the wait
    ends, _, _ = watched(first, *again, {"12_0": "FAILED"}, {"12_0": "FAILED"}, Late())
    assert ends[0].error is None


def test_a_ctrl_c_leaves_the_jobs_to_themselves(watched):
    with pytest.raises(SystemExit) as caught:
        watched({"12_0": "RUNNING", "12_1": "RUNNING"}, KeyboardInterrupt())
    assert caught.value.code == 130
    assert watched.lines[-1] == f"the jobs go on; python -m gymexp.sweep status {watched.sweep}"


def test_how_far_the_jobs_are_is_said_from_time_to_time(watched, monkeypatch):
    monkeypatch.setattr(watch, "_SUMMARY_S", 0.05)
    statuses = {0: {"phase": "train", "step": 3, "max_steps": 32}, 1: {"phase": "evaluate"}}
    for num, status in statuses.items():
        (watched.sweep / str(num) / "status.json").write_text(json.dumps(status))
    with pytest.raises(RuntimeError):
        watched(*[{"12_0": "RUNNING", "12_1": "RUNNING"}] * 30, RuntimeError("enough"))
    told = [line for line in watched.lines if "train 3/32" in line]
    assert told[0] == "0:00  0: train 3/32  1: evaluate"
    assert 1 <= len(told) < 15, "not at each look"
    (watched.sweep / "0" / "status.json").write_text(json.dumps({"phase": "train", "ended": "finished"}))
    entries = [{"num": num} for num in (0, 1)]
    assert watch._steps(watched.sweep, entries) == "1: evaluate"
