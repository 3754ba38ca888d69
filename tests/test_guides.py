"""The commands of the README and the guides, run as they stand in a new directory, with less to do.

Each command stands in one of three tables: what is run here and with which further words, what another test
runs, and what no test on this machine can run, with the reason.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hub_stand_in
import pytest
from whole_run import ROOT, SIZES

TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]
WORKPLACE = "nvidia/Nemotron-RL-agent-workplace_assistant"
PATIENCE_S = 540

SMALL_DATA = " ".join(
    f"env.{env}.data.{split}={size}" for env in ("sudoku", "workplace") for split, size in SIZES.items()
)
SUDOKU_DATA = " ".join(f"env.sudoku.data.{split}={size}" for split, size in SIZES.items())
WORKPLACE_DATA = " ".join(f"env.workplace.data.{split}={size}" for split, size in SIZES.items())
ONE_STEP = (
    "trainer.max_steps=1 trainer.per_device_train_batch_size=4 trainer.num_generations=4 "
    "trainer.gradient_accumulation_steps=1 "
    "evaluation.before=false evaluation.after=false"
)
# Run in this order, as a new user would: a later command may look at what an earlier one left.
RUN = {
    "python -m gymexp.doctor": "",
    "python -m gymexp.doctor engine=vllm model=qwen3_4b": "|| test $? = 1",  # which this machine cannot run
    "python -m gymexp.train 'env=[sudoku]' --cfg job": "",
    'eval "$(python -m gymexp.train -sc install=bash)"': "",
    "python -m gymexp.train 'env=[sudoku]' trainer.max_steps=10": f"{ONE_STEP} {SUDOKU_DATA}",
    "python -m gymexp.status outputs/<name>/<date_time>": "",
    "python -m gymexp.status outputs/<name>/<date_time> --follow": "",
    "python -m gymexp.report outputs/<name>/<date_time>": "",
    "python -m gymexp.rollouts outputs/<name>/<date_time>": "",
    "python -m gymexp.rollouts outputs/<name>/<date_time> --worst": "",
    "python -m gymexp.export outputs/<name>/<date_time> --to policy": "",
    "python -m gymexp.view outputs/<name>/<date_time> --export page": "",
    "python -m gymexp.view outputs/<name>/<date_time> --export part --steps 1:5 --env sudoku --limit 200": "",
    "python -m gymexp.train resume=outputs/<name>/<date_time>": "trainer.max_steps=2",
    "python -m gymexp.train resume=latest": "",  # which is finished
    "python -m gymexp.train -m 'env=[sudoku]' trainer.max_steps=10 seed=0,1": f"{ONE_STEP} {SUDOKU_DATA}",
    "python -m gymexp.sweep status outputs/<name>/sweep_<date_time>": "",
    "python -m gymexp.sweep collect outputs/<name>/sweep_<date_time>": "",
    "python -m gymexp.status outputs/<name>/sweep_<date_time>/0 --follow": "",
    "python -m gymexp.prepare 'env=[sudoku,workplace]'": SMALL_DATA,
    "python -m gymexp.envs": "",
    "python -m gymexp.envs --search game": "",
    "python -m gymexp.envs show blackjack": "",
    "python -m gymexp.train 'env=[sudoku,blackjack]'": f"{ONE_STEP} {SUDOKU_DATA}",
    "python -m gymexp.train 'env=[workplace]'": f"{ONE_STEP} {WORKPLACE_DATA}",
    "python -m gymexp.train --config-dir sweeps --config-name search_lr 'env=[sudoku]'": (
        "search.num_trials=1 evaluation.every_steps=1 evaluation.num_tasks=2 trainer.max_steps=2 "
        "trainer.gradient_accumulation_steps=1 "
        f"{SUDOKU_DATA}"
    ),
    "python -m gymexp.train launcher=slurm launcher.dry_run=true": "",
}
OWN_ENVIRONMENT = "tests/test_own_environment.py::test_every_command_of_the_guide"
BY_OTHER_TESTS = {
    "python -m gymexp.envs show between": OWN_ENVIRONMENT,
    "python -m gymexp.prepare 'env=[between]'": OWN_ENVIRONMENT,
    "python -m gymexp.evaluate 'env=[between]' policy=probe": OWN_ENVIRONMENT,
    "python -m gymexp.train 'env=[between]' trainer.max_steps=2": OWN_ENVIRONMENT,
    "python -m gymexp.evaluate 'env=[between,between_twice]' policy=probe": OWN_ENVIRONMENT,
    "python -m gymexp.train 'env=[between,between_twice]' trainer.max_steps=2": OWN_ENVIRONMENT,
    "python -m gymexp.doctor --init": (
        "tests/doctor/test_doctor.py::writes_this_clusters_defaults_once_and_a_run_takes_them"
    ),
    "python -m gymexp.train experiment=quickstart trainer=dr_grpo seed=1": (
        "tests/whole_run.py::experiment=quickstart"
    ),
    "python -m gymexp.train 'env=[sudoku,workplace]' "
    "'dataset.schedule={0:{sudoku:1,workplace:0},100:{sudoku:1,workplace:1}}'": (
        "tests/test_curriculum_runs.py::dataset.schedule={0:{sudoku:1,workplace:0},4:"
    ),
    "python -m gymexp.train 'env=[sudoku,workplace]' dataset.sampling=difficulty": (
        "tests/test_curriculum_runs.py::dataset.sampling=difficulty"
    ),
    "python -m gymexp.train 'env=[workplace]' env.workplace.data.source=generate": (
        "tests/whole_run.py::experiment=quickstart"
    ),
    "python -m gymexp.export outputs/<name>/<date_time> --to policy --checkpoint best": (
        'tests/export/test_folder.py::choose(run, "best")'
    ),
    "python -m gymexp.export outputs/<name>/<date_time> --to policy --adapter": (
        "tests/export/test_folder.py::test_an_adapter_names_its_base_as_others_find_it"
    ),
    "python -m gymexp.export outputs/<name>/<date_time> --to policy --push user/name": (
        "tests/export/test_push.py::test_a_new_repository_is_private_and_has_every_file"
    ),
    "python -m gymexp.export outputs/<name>/<date_time> --inspect rollouts.eval": (
        "tests/export/test_inspect_log.py::test_inspect_reads_back_the_samples_scores_and_messages"
    ),
    "python -m gymexp.evaluate run=outputs/<name>/<date_time>": (
        "tests/test_runs.py::test_an_evaluation_of_a_run_plays_what_the_runs_own_last_evaluation_did"
    ),
    "python -m gymexp.evaluate checkpoint=outputs/<name>/<date_time>/checkpoints/checkpoint-16": (
        "tests/test_evaluations.py::test_a_model_a_checkpoint_and_an_endpoint_are_compared_in_one_table"
    ),
    "python -m gymexp.evaluate 'compare=[outputs/eval/a,outputs/eval/b,outputs/<name>/<date_time>]'": (
        "tests/test_evaluations.py::test_a_model_a_checkpoint_and_an_endpoint_are_compared_in_one_table"
    ),
    "python -m gymexp.evaluate resume=outputs/eval/<name>/<date_time>": (
        "tests/test_evaluations.py::test_one_that_is_killed_half_way_and_resumed_writes_the_same_bytes"
    ),
    "python -m gymexp.evaluate -m run=outputs/a/<date_time>,outputs/b/<date_time> checkpoints=all": (
        "tests/test_evaluations.py::test_several_evaluations_are_made_by_one_command"
    ),
    "python -m gymexp.evaluate launcher=slurm launcher.gpus=2 launcher.time=2:00:00 "
    "run=outputs/<name>/<date_time> checkpoints=all": (
        "tests/faults/test_evaluation_on_slurm.py::test_an_evaluation_whose_job_is_preempted"
    ),
    "python -m gymexp.evaluate 'env=[sudoku]' policy=probe": (
        "tests/test_evaluations.py::test_the_probe_names_what_the_grader_pays_for_each_reply"
    ),
    "python -m gymexp.view outputs/<name>/<date_time>": (
        "tests/view/test_view_command.py::test_the_command_serves_until_it_is_interrupted"
    ),
    "python -m gymexp.view outputs/<name>/<date_time> --port 8000": (
        "tests/view/test_view_command.py::test_a_port_that_is_taken_is_named"
    ),
    "python -m gymexp.train 'env=[sudoku]' env.countdown.like=sudoku "
    "env.countdown.data.options.task=countdown": (
        "tests/test_environment_keys.py::test_two_variants_of_one_server_play_side_by_side_under_their_own_names"
    ),
    "python -m gymexp.train 'env=[mcqa]' env.mcqa.servers.mcqa.grading_mode=lenient_boxed": (
        "tests/test_environment_keys.py::reward_if_complied=0.75"
    ),
    "make setup": ".ci/run::make lint",
    "make test": ".ci/run::make test",
    "source .venv/bin/activate": ".ci/run::.venv/bin/python",
    "python -m gymexp.sweep resubmit outputs/<name>/sweep_<date_time>": (
        "tests/test_runs.py::test_a_sweep_runs_its_points_one_after_the_other_and_goes_on_after_an_interruption"
    ),
}
SAME_AS = {
    "python -m gymexp.train 'env=[sudoku]'": "python -m gymexp.train 'env=[sudoku]' trainer.max_steps=10",
    "python -m gymexp.train 'env=[sudoku,workplace]'": "python -m gymexp.train 'env=[workplace]'",
    "python -m gymexp.train -m 'env=[sudoku],[sudoku,workplace]' trainer.learning_rate=1e-6,1e-5": (
        "python -m gymexp.train -m 'env=[sudoku]' trainer.max_steps=10 seed=0,1"
    ),
    "python -m gymexp.train -m 'env=[sudoku]' seed=0,1 trainer.learning_rate=1e-6,1e-5": (
        "python -m gymexp.train -m 'env=[sudoku]' trainer.max_steps=10 seed=0,1"
    ),
    "python -m gymexp.train --config-dir sweeps --config-name lr_x_generations 'env=[sudoku]'": (
        "python -m gymexp.train --config-dir sweeps --config-name search_lr 'env=[sudoku]'"
    ),
}
NOT_HERE = {
    "python -m gymexp.evaluate -m launcher=slurm launcher.gpus=2 'env=[sudoku],[workplace]' "
    "model=qwen3_1_7b,qwen3_4b": "a cluster with GPUs: tests/slurm has none",
    "python -m gymexp.evaluate 'env=[sudoku,workplace]' model=qwen3_4b": (
        "a GPU; tests/test_evaluations.py evaluates the tiny model"
    ),
    "python -m gymexp.evaluate 'env=[sudoku]' endpoint.url=https://api.openai.com/v1 "
    "endpoint.model=gpt-5-mini endpoint.key_env=OPENAI_API_KEY": (
        "a key; tests/test_evaluations.py has an endpoint on loopback"
    ),
    "python -m gymexp.train 'env=[simpleqa]' env.simpleqa.judge.url=https://api.openai.com/v1 "
    "env.simpleqa.judge.model=gpt-4.1-mini env.simpleqa.judge.key_env=JUDGE_KEY": (
        "a key; tests/test_environment_keys.py has a judge on loopback"
    ),
    "make demo": "ten minutes; run by hand from a fresh clone before each release",
    "pip install -e '.[vllm]'": "vLLM with CUDA is 10 GB; tests/test_vllm_runs.py uses its build for CPUs",
    "pip install -e '.[optuna]'": "`make setup` installs it with the tools",
    "python -m gymexp.train 'env=[sudoku,workplace]' model=qwen3_4b": "a GPU: tests/test_gpu_runs.py",
    "python -m gymexp.train 'env=[between,sudoku]' model=qwen3_0_6b": "a GPU: tests/test_gpu_runs.py",
    "python -m gymexp.train 'env=[sudoku,workplace]' model=qwen3_4b engine=vllm": (
        "GPUs: tests/test_gpu_runs.py"
    ),
    "python -m gymexp.train launcher=slurm 'env=[sudoku,workplace]' placement.rollout_nodes=1 "
    "placement.train_nodes=2": "a cluster of three nodes: tests/slurm does it with two",
    "python -m gymexp.train launcher=slurm launcher.partition=gpu launcher.gpus=8 launcher.time=8:00:00 "
    "model=qwen3_4b": "a cluster with GPUs: tests/slurm has none",
    "python -m gymexp.train -m launcher=slurm seed=0,1,2 trainer.learning_rate=1e-6,1e-5 "
    "launcher.array_parallelism=4": "a cluster: tests/slurm",
    "python -m gymexp.train -m 'env=[sudoku],[sudoku,workplace]' launcher=slurm launcher.gpus=2": (
        "a cluster with GPUs: tests/slurm has none"
    ),
}


def commands() -> set[str]:
    """Every line of a code block that is a command, without its comment; `…` stands for a command above."""
    found: set[str] = set()
    for path in TEXTS:
        for block in re.findall(r"^```\w*\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL):
            for line in re.sub(r"\\\n\s*", "", block).splitlines():
                command = re.split(r"\s+#|\s{2,}", line)[0]
                starts = re.match(r"(python -m gymexp|gymexp |make |pip |source |eval )", command)
                if starts and "…" not in command and command != "python -m gymexp.train":
                    found.add(command.replace("outputs/tiny/", "outputs/<name>/"))
    return found


def test_every_command_is_run_here_or_by_another_test_or_has_a_reason():
    tables = [RUN, BY_OTHER_TESTS, SAME_AS, NOT_HERE]
    assert sum(map(len, tables)) == len(set().union(*tables)), "one table each"
    assert commands() == set().union(*tables)
    assert set(SAME_AS.values()) <= set(RUN)


@pytest.mark.parametrize("named", BY_OTHER_TESTS.values())
def test_what_another_test_runs_is_there(named):
    path, _, text = named.partition("::")
    assert text in (ROOT / path).read_text()


class Shell:
    """Runs commands in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.failed = False
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environ = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0"}

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", command],
            capture_output=True,
            text=True,
            cwd=self.directory,
            env=self.environ,
            timeout=PATIENCE_S,
            check=False,
        )

    def filled_in(self, command: str) -> str:
        """The command with the newest run's or sweep's own name in place of <name> and <date_time>."""
        kind = "sweep_*" if "/sweep_" in command else "[0-9]*"
        for newest in sorted(self.directory.glob(f"outputs/*/{kind}"), key=os.path.getmtime)[-1:]:
            directory = str(newest.relative_to(self.directory))
            return re.sub(r"outputs/<name>/(sweep_)?<date_time>", directory, command)
        return command


@pytest.fixture(scope="module")
def shell(tmp_path_factory, gym_python) -> Iterator[Shell]:
    """In a clone of the project, as far as commands look at it, with a hub that has the workplace's rows."""
    directory = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "sweeps", directory / "sweeps")
    shell = Shell(directory)
    made = shell.run(
        f"python -m gymexp.prepare 'env=[workplace]' env.workplace.data.source=generate {WORKPLACE_DATA}"
    )
    assert made.returncode == 0, made.stdout + made.stderr
    files = re.findall(r"^  (train|validation) .* rows  sha256 \w+  (.+)$", made.stdout, re.MULTILINE)
    rows = {f"{WORKPLACE}/{split}.jsonl": Path(file).read_bytes() for split, file in files}
    with hub_stand_in.serve(hub_stand_in.Hub(rows)) as hub:
        shell.environ |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(directory / "hf")}
        yield shell


@pytest.mark.gym
@pytest.mark.e2e
@pytest.mark.parametrize("command", RUN)
def test_the_command_runs(shell, command):
    line = shell.filled_in(command)
    assert "<" not in line, f"nothing there that {command} could look at"
    done = shell.run(f"{line} {RUN[command]}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
