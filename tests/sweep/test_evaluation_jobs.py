"""Evaluations as jobs of a sweep: what is frozen, how a job goes on, and what its submitter shows. Slurm's
commands are scripts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from whole_run import ROOT, TINY

from gymexp.cluster.slurm_job import Allocation
from gymexp.config import hydra_schema
from gymexp.config.evaluate_load import register
from gymexp.config.group_options import CONF_DIR
from gymexp.errors import ConfigError, GymexpError
from gymexp.evaluation.kept import KeptOutcomes
from gymexp.record.directory import RunDirectory
from gymexp.rollout.outcome import Completed, Failed, Rollout, Task, Turn
from gymexp.sweep import job, kinds
from gymexp.sweep.freeze import FrozenJob, read_job, write_job
from gymexp.sweep.kinds import EVALUATIONS

PROBE = ["env=[sudoku]", "policy=probe", "evaluation.num_tasks=2"]
DONE = {"step": 0, "stopped": False, "held_out": {}}
TASK = Task("sudoku/validation/0", "sudoku", "agent", {})


def frozen(*overrides: str, machine: str = "") -> FrozenJob:
    """machine: more overrides, as a machine's own file would set them."""
    register()
    hydra_schema.register()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("evaluate", [*overrides, *machine.split()])
    return EVALUATIONS.frozen(cfg, list(overrides))


def test_a_job_reads_back_as_it_was_submitted(tmp_path):
    made = frozen(*PROBE, "launcher=slurm", "launcher.partition=gpu", "launcher.time=30")
    write_job(tmp_path, made)
    back = read_job(tmp_path)
    assert back == made and kinds.kind_of(back) is EVALUATIONS
    assert (back.config.launcher.partition, back.config.launcher.time) == ("gpu", "30")
    assert back.config.evaluation.num_tasks == 2 and back.config.name == "probe"


def test_a_policy_that_is_text_asks_for_no_gpu_but_the_command_lines():
    asked = frozen(*PROBE, machine="launcher.gpus=8 launcher.cpus=4")
    assert (asked.config.launcher.gpus, asked.config.launcher.cpus) == (None, 4)
    assert frozen(*PROBE, "launcher.gpus=1").config.launcher.gpus == 1
    model = frozen("env=[sudoku]", "model=tiny", machine="launcher.gpus=8")
    assert model.config.launcher.gpus == 8
    assert (EVALUATIONS.has_engine(asked), EVALUATIONS.has_engine(model)) == (False, True)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["run=outputs/none"], "run must name the directory of a run, but .*outputs/none does not exist"),
        ([*PROBE, "output_dir=x"], "output_dir must not be set in a sweep.*hydra.sweep.dir"),
        (["resume=outputs/eval/x"], "resume must not be set in a sweep.*gymexp.sweep resubmit"),
        (["compare=[a,b]"], "compare must not be set in a sweep or with launcher=slurm"),
        (["env=[sudoku]", "model.path=./none", "model.name=x"], "model.path must be a directory that exists"),
        ([*PROBE, "launcher.time=soon"], "launcher.time must be minutes"),
        (
            ["env=[sudoku]", "endpoint.url=http://x/v1", "endpoint.model=m", "endpoint.key_env=NOT_SET"],
            "endpoint.key_env=NOT_SET must name an environment variable that is set",
        ),
    ],
)
def test_what_cannot_start_is_refused_before_it_is_submitted(overrides, told):
    with pytest.raises(GymexpError, match=told):
        frozen(*overrides)


def test_a_variable_that_the_jobs_setup_sets_need_not_be_set_at_the_submission():
    endpoint = ["env=[sudoku]", "endpoint.url=http://x/v1", "endpoint.model=m", "endpoint.key_env=NOT_SET"]
    frozen(*endpoint, "launcher.setup=['. ~/.keys']")


def test_a_key_of_a_slurm_job_is_refused_on_this_machine():
    with pytest.raises(ConfigError, match="is of a Slurm job, got launcher=local: say launcher"):
        EVALUATIONS.check_local(frozen("env=[sudoku]", "model=tiny", "launcher.gpus=2"))


@pytest.fixture
def evaluated(monkeypatch, tmp_path) -> list[tuple]:
    """The calls of `evaluate`, which writes its last file in the tests' place; job 0 is a probe's."""
    write_job(tmp_path / "0", frozen(*PROBE))
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    monkeypatch.setattr(job, "_raise_on_signals", lambda *_: None)
    calls: list[tuple] = []

    def evaluate(*arguments) -> None:
        calls.append(arguments)
        (tmp_path / "0" / "result.json").write_text(json.dumps(DONE))
        (tmp_path / "0" / "results.json").write_text("{}")

    monkeypatch.setattr(kinds, "evaluate", evaluate)
    return calls


def test_a_job_evaluates_in_its_directory_then_goes_on_there_and_is_done_with_its_results(
    evaluated, tmp_path
):
    directory = tmp_path / "0"
    assert job.run(str(tmp_path), 0) == DONE
    ((config, cfg, overrides, where, allocation),) = evaluated
    assert (config.policy, config.evaluation.num_tasks, config.resume) == ("probe", 2, None)
    assert (cfg.policy, overrides, where, allocation.job_id) == ("probe", PROBE, directory, "9")
    assert job.run(str(tmp_path), 0) == DONE and len(evaluated) == 1, "it has its results"
    (directory / "results.json").unlink()  # with vLLM each policy writes a result.json
    (directory / "config.yaml").touch()
    job.run(str(tmp_path), 0)
    assert evaluated[1][0].resume == str(directory)


def test_a_job_that_scores_nothing_more_is_given_up_and_one_that_scores_is_not(tmp_path):
    run = RunDirectory(tmp_path)
    kept = KeptOutcomes(tmp_path, "eval-000000", {TASK.key: TASK})

    def start(number: int) -> None:
        job._count_start(run, Allocation("1", number, "node1"), EVALUATIONS)

    start(0)
    for number in range(1, 5):
        rollout = Rollout(TASK, [Turn([1], [2], [-1.0])], 1.0, [])
        kept.add([((TASK.key, number), Completed(rollout)), ((TASK.key, 9), Failed(TASK, "timeout", "late"))])
        start(number)
    assert EVALUATIONS.progress(run) == 4, "without those that failed"
    assert EVALUATIONS.going_on(run) == "goes on after 4 scored rollouts"
    start(5)
    with pytest.raises(GymexpError, match=r"started 3 times without scoring more than 4 rollouts: give it m"):
        start(6)


def test_the_submitter_follows_the_job_and_shows_its_table(commands, tmp_path):
    """From a login node: sbatch gets the script, and the job's files say the rest."""
    sweep = tmp_path / "a sweep"
    job_dir = f"'{sweep}/0'"
    done = f"echo '{json.dumps(DONE)}' > {job_dir}/result.json"
    table = f"echo 'environment  tasks\nsudoku       2' > {job_dir}/results.txt"
    commands(
        srun="exit 1",
        sbatch=f"cat \"$1\" > '{tmp_path}/script'; {done}; {table}; echo 'Submitted batch job 77'",
        squeue="echo '77|COMPLETED|node1'",
    )
    command = [sys.executable, "-m", "gymexp.evaluate", "launcher=slurm", f"hydra.sweep.dir='{sweep}'"]
    said = subprocess.run(
        [*command, *PROBE, "launcher.partition=cpu", "launcher.mem=4G"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ).stdout
    assert "job 0 (77): finished (1/1)" in said
    assert said.endswith(f"environment  tasks\nsudoku       2\nevaluation directory: {sweep / '0'}\n"), (
        "and no line about GPUs"
    )
    assert "asks Slurm for no GPU" not in said
    script = (tmp_path / "script").read_text()
    for flag in ("--partition=cpu", "--mem=4G", "--job-name=probe", "--requeue", "--signal=USR2@120"):
        assert f"#SBATCH {flag}\n" in script
    assert read_job(sweep / "0").overrides == [
        "launcher=slurm",
        *PROBE,
        "launcher.partition=cpu",
        "launcher.mem=4G",
    ]
    assert (Path(sweep) / "code" / "gymexp" / "evaluate.py").exists()


def test_a_sweep_on_this_machine_names_the_jobs_that_are_wrong(tmp_path):
    command = [sys.executable, "-m", "gymexp.evaluate", "-m", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    done = subprocess.run(
        [*command, f"model.path={TINY}", "model.name=a", "env=[sudoku]", "evaluation.samples=1,0"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1
    assert "job 1 (evaluation.samples=0):\nevaluation.samples must be >= 1, got 0" in done.stderr
    assert not (tmp_path / "sweep").exists()
