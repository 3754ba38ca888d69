"""Real Slurm: sweeps that are frozen, fail by name, and outlive preemption, time limits, their submitter."""

from __future__ import annotations

import signal
import sys
import time
from itertools import product

import pytest
from slurm_sweeps import collected, limit_job, said_by, waiting_project, with_own_server
from whole_run import steps_of, task_keys_of

from gymexp.sweep import watch

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
SWEPT = ("trainer.num_generations", "trainer.learning_rate")


def test_a_sweep_names_what_failed_and_goes_on_after_preemption_and_a_time_limit(
    submitted, gym_python, tmp_path, fault
):
    """2x2x2 jobs, one a node. Each of three is disturbed; the one after it, of the same seed, is not."""
    swept = ["trainer.num_generations=2,4", "seed=0,1", "trainer.learning_rate=1e-4,2e-4"]
    preempted, limited, failing = 0, 2, 4
    project = waiting_project(tmp_path / "project", gym_python, preempted, limited, failing)
    where = ["launcher.partition=low", "launcher.cpus=9", "launcher.array_parallelism=3"]
    sweep = submitted(*swept, *where, project=project)
    ids = sweep.ids()

    held = sweep.held_after_a_step(limited)  # so that it cannot end before Slurm looks at its limit
    elapsed = int(time.time() - sweep.read(limited, "status.json")["began"]) // 60
    over = fault("A job's time is over")
    limit_job(ids[limited], elapsed + 2)  # less than launcher.signal_s away, and more than a minute
    sweep.held_after_a_step(preempted)  # Slurm's SIGTERM comes with SIGCONT
    node = sweep.read(preempted, "status.json")["node"]
    blow = fault("A job is preempted")
    said_by("sbatch", "-p", "batch", "-w", node, "-c", "16", "-t", "5", "-o", "/dev/null", "--wrap", "true")
    sweep.wait_for(lambda: "ending: saving" in sweep.log(limited), "the warning of the time limit")
    limit_job(ids[limited], 30)
    held.resume()
    killed = sweep.held_after_a_step(failing)
    kill = fault("A job of a sweep fails")
    killed.kill()
    sweep.wait_for(lambda: sweep.read(failing, "result.json").get("error"), "its end")
    kill.over()
    for stopwatch, num in ((over, limited), (blow, preempted)):
        sweep.wait_for(lambda num=num: sweep.read(num, "status.json")["restarts"] == 1, f"job {num} again")
        stopwatch.over()

    assert sweep.ended() == 1, sweep.said
    assert "Traceback" not in sweep.said
    named = sweep.said.split("error: 1 of 8 jobs failed\n")[-1]
    called = f"job {failing} (trainer.num_generations=4 seed=0 trainer.learning_rate=0.0001)"
    assert named.startswith(f"{called} failed: trainer was ended by SIGKILL.")
    assert f"log: {watch.log_of(sweep.sweep, ids[failing])}\n" in named

    for num, (generations, seed, rate) in enumerate(product("24", "01", ("0.0001", "0.0002"))):
        keys = {"trainer.num_generations": generations, "seed": seed, "trainer.learning_rate": rate}
        assert sweep.entries()[num]["swept"] == keys
        assert sweep.read(num, "status.json")["restarts"] == (1 if num in (preempted, limited) else 0)
        result = sweep.read(num, "result.json")
        if num == failing:
            assert "SIGKILL" in result["error"]
            continue
        assert (result["step"], result["stopped"]) == (3, False)
        assert len(result["held_out"]["sudoku"]["reward"]) == 2, "before and after"
        assert steps_of(sweep.sweep / str(num)) == [1, 2, 3]
    rows = collected(sweep.sweep)
    runs = [row for row in rows if row["kind"] == "run"]
    assert [row["job"] for row in runs] == [str(num) for num in range(8)]
    assert [row["state"] for row in runs] == ["failed" if num == failing else "finished" for num in range(8)]
    assert "SIGKILL" in runs[failing]["why"]
    of_rates = [row for row in rows if row["kind"] != "run"]
    assert sorted(row["n"] for row in of_rates) == ["1", "2", "2", "2"], "seeds, without the one that failed"
    for row in of_rates:
        same = [r for r in runs if r["state"] == "finished" and all(r[k] == row[k] for k in SWEPT)]
        mean = sum(float(r["sudoku_after"]) for r in same) / len(same)
        assert float(row["sudoku_after"]) == pytest.approx(mean)

    for num in (preempted, limited):
        disturbed, undisturbed = sweep.sweep / str(num), sweep.sweep / str(num + 1)
        for name in ("train.jsonl", "validation.jsonl", "mix.json"):
            assert (disturbed / "data" / name).read_bytes() == (undisturbed / "data" / name).read_bytes()
        for step in (1, 2, 3):
            assert task_keys_of(disturbed, step) == task_keys_of(undisturbed, step)

    said = said_by(sys.executable, "-m", "gymexp.sweep", "resubmit", str(sweep.sweep))
    assert f"job {failing} failed: trainer was ended by SIGKILL" in said and "; begins anew" in said
    assert said.count(" submitted as ") == 1
    assert [entry["job_id"] for entry in sweep.entries()] != ids, "the newest submission's"
    sweep.wait_for(lambda: sweep.read(failing, "result.json").get("step") == 3, "the job that failed")
    assert steps_of(sweep.sweep / str(failing)) == [1, 2, 3]
    states = [row["state"] for row in collected(sweep.sweep) if row["kind"] == "run"]
    assert states == ["finished"] * 8


def test_a_waiting_job_runs_what_was_submitted_and_needs_no_submitter(submitted, gym_python, tmp_path, fault):
    """Held in the queue while its submitter is killed, and its project's code, configuration and own server
    change."""
    project = tmp_path / "project"
    app = with_own_server(project, gym_python, "\nprint('the server as it was')\n")
    changes = ["trainer.max_steps=1", "evaluation.before=false", "evaluation.after=false"]
    sweep = submitted(*changes, "+hydra.launcher.additional_parameters.hold=true", project=project)
    (job_id,) = sweep.ids()
    killed = fault("The submitter of a sweep is killed")
    sweep.process.send_signal(signal.SIGKILL)
    sweep.process.wait()
    (project / "gymexp" / "train.py").write_text("raise SystemExit('edited')\n")
    app.write_text("raise SystemExit('edited')\n")
    tiny = project / "conf" / "model" / "tiny.yaml"
    tiny.write_text(tiny.read_text().replace("learning_rate: 2e-4", "learning_rate: 0.5"))
    assert "0.5" in tiny.read_text()
    said_by("scontrol", "release", job_id)
    sweep.wait_for(lambda: sweep.read(0, "status.json").get("outcome"), "the run's end")
    killed.over()
    assert sweep.read(0, "status.json")["outcome"] == "finished", sweep.log(0)
    sweep.wait_for(lambda: watch.states([job_id])[job_id] not in watch.GOING_ON, "the job's end")
    (row,) = (row for row in collected(sweep.sweep) if row["kind"] == "run")
    assert (row["state"], row["step"]) == ("finished", "1"), "though its submitter was killed"
    assert "learning_rate: 0.0002" in (sweep.sweep / "0" / "config.yaml").read_text()
    logs = (path.read_text() for path in (sweep.sweep / "0" / "logs").glob("*.log"))
    assert any("the server as it was" in log for log in logs)
    assert "edited" not in (sweep.sweep / "0" / "code" / "gymexp" / "train.py").read_text()


def test_a_cancelled_job_is_named_and_stays_cancelled(submitted, fault):
    sweep = submitted("seed=0,1", "launcher.array_parallelism=1")
    running, waiting = sweep.ids()
    sweep.wait_for(lambda: sweep.read(0, "status.json").get("services", {}).get("trainer"), "a trainer")
    cancelled = fault("A job is cancelled")
    said_by("scancel", running, waiting)
    assert sweep.ended() == 1
    cancelled.over()
    assert "Traceback" not in sweep.said
    for num, job_id in enumerate((running, waiting)):
        assert (
            f"job {num} (seed={num}) failed: job {job_id} ended without a result; Slurm says CANCELLED"
            in (sweep.said)
        )
    assert watch.states([running, waiting]) == {running: "CANCELLED", waiting: "CANCELLED"}
    assert sweep.read(0, "status.json")["restarts"] == 0
