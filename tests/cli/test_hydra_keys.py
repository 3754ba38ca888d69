"""Hydra's own keys and flags: each is carried out, or refused by name before anything starts."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeperConf
from hydra.conf import HydraConf
from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf
from omegaconf import OmegaConf

from gymexp.cli import hydra_keys
from gymexp.config.group_options import CONF_DIR
from gymexp.config.hydra_schema import register

TABLES = {
    "carried": hydra_keys.CARRIED,
    "single": hydra_keys.SINGLE,
    "sweep": hydra_keys.SWEEP,
    "refused": hydra_keys.REFUSED,
    "populated": dict.fromkeys(hydra_keys.POPULATED),
}


def leaves(node: Any, at: str = "") -> Iterator[str]:
    """Hydra's keys, from its own dataclasses."""
    for field in dataclasses.fields(node):
        below = field.default_factory if field.default_factory is not dataclasses.MISSING else None
        if dataclasses.is_dataclass(below):
            yield from leaves(below, f"{at}{field.name}.")
        else:
            yield f"{at}{field.name}"


def tables_of(key: str) -> list[str]:
    return [
        name
        for name, table in TABLES.items()
        if any(key == one or key.startswith(f"{one}.") or one.startswith(f"{key}.") for one in table)
    ]


def test_every_key_that_hydra_has_stands_in_one_table():
    keys = [key for key in leaves(HydraConf) if key not in ("defaults", "launcher", "sweeper")]
    keys += [f"sweeper.{key}" for key in leaves(BasicSweeperConf)]
    assert {"job.env_set", "sweep.subdir", "callbacks", "sweeper.max_batch_size"} <= set(keys)
    assert {key: tables_of(key) for key in keys if len(tables_of(key)) != 1} == {}


def test_every_key_of_the_slurm_launcher_is_gymexps_or_goes_to_sbatch():
    sbatchs = set(leaves(SlurmQueueConf)) - hydra_keys.SLURM.keys() - {"_target_"}
    assert sbatchs == {
        *("partition", "qos", "comment", "constraint", "exclude", "gres", "account", "setup"),
        *("cpus_per_gpu", "gpus_per_task", "mem_per_gpu", "mem_per_cpu", "additional_parameters"),
    }  # what sbatch.extras hands on


def problems(*overrides: str, sweep: bool = False) -> str:
    register()
    mode = "MULTIRUN" if sweep else "RUN"
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        composed = [one for one in overrides if not one.startswith("only said: ")]
        cfg = compose("train", [*composed, f"hydra.mode={mode}"], return_hydra_config=True)
    # Hydra takes some keys where a config file has them already, as a sweep's has sweeper.params.
    for one in overrides:
        if one not in composed:
            cfg.hydra.overrides.hydra.append(one.removeprefix("only said: "))
    return "\n".join(hydra_keys.problems(cfg, sweep))


@pytest.mark.parametrize("sweep", [False, True])
def test_what_conf_says_itself_is_taken(sweep):
    assert problems(sweep=sweep) == ""
    assert problems("launcher=slurm", sweep=True) == ""


SAID = {
    "sweep.subdir": "hydra.sweep.subdir=${seed}",
    "job.chdir": "hydra.job.chdir=true",
    "job.env_copy": "hydra.job.env_copy=[HOME]",
    "output_subdir": "hydra.output_subdir=.hydra",
    "job_logging.root": "hydra/job_logging=default",
    "run.dir": "hydra.run.dir=x",
    "job.env_set": "+hydra.job.env_set.X=1",
    "callbacks": "+hydra.callbacks.mine._target_=a.B",
    "verbose": "hydra.verbose=true",
    "sweep.dir": "hydra.sweep.dir=x",
    "sweeper.params": "only said: hydra.sweeper.params.seed=0,1",
    "sweeper.max_batch_size": "hydra.sweeper.max_batch_size=2",
    "job.name": "hydra.job.name=mine",
    "job.id": "+hydra.job.id=3",
    "job.num": "+hydra.job.num=3",
    "job.config_name": "hydra.job.config_name=mine",
    "job.override_dirname": "hydra.job.override_dirname=mine",
    "overrides": "hydra.overrides.task=[]",
    "runtime": "+hydra.runtime.output_dir=x",
}


def test_each_refusal_has_an_example_here():
    refused = [key for name in ("single", "sweep", "refused", "populated") for key in TABLES[name]]
    assert sorted(SAID) == sorted(refused)


@pytest.mark.parametrize("key", SAID)
def test_a_key_is_refused_where_it_would_be_ignored_and_taken_where_it_is_not(key):
    told = {sweep: problems(SAID[key], sweep=sweep) for sweep in (False, True)}
    for sweep, text in told.items():
        taken = (key in hydra_keys.SINGLE and not sweep) or (key in hydra_keys.SWEEP and sweep)
        assert text == "" if taken else text.startswith(f"hydra.{key}"), (sweep, text)
        assert "\n" not in text, "one problem, said once"


@pytest.mark.parametrize("key", hydra_keys.SLURM)
def test_what_gymexp_decides_of_a_slurm_job_is_named_with_its_own_key(key):
    kind = {field.name: field.type for field in dataclasses.fields(SlurmQueueConf)}[key]
    value = {str: "mine", bool: "true"}.get(kind, "7")
    told = problems("launcher=slurm", f"hydra.launcher.{key}={value}", sweep=True)
    assert told.startswith(f"hydra.launcher.{key} is set by gymexp, got ")
    assert told.endswith(f": use {hydra_keys.SLURM[key]} instead")


@pytest.mark.parametrize(
    ("overrides", "sweep", "said"),
    [
        (
            ["hydra/launcher=submitit_local"],
            True,
            "hydra/launcher is set by launcher=local and launcher=slurm",
        ),
        (["launcher=slurm"], False, "hydra.mode must be MULTIRUN with launcher=slurm"),
        (["hydra.verbose=5"], False, "hydra.verbose must be true, false or names of loggers, got 5"),
        (
            ["launcher=slurm", "launcher.partition=a", "hydra.launcher.partition=b"],
            True,
            "hydra.launcher.partition and launcher.partition set the same",
        ),
        (["output_dir=a", "hydra.run.dir=b"], False, "hydra.run.dir must be left out with output_dir"),
        (["resume=a", "hydra.run.dir=b"], False, "hydra.run.dir must be left out with resume"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides, sweep, said):
    assert said in problems(*overrides, sweep=sweep)


def test_a_key_of_hydras_in_a_config_file_is_seen_as_well():
    register()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("train", ["hydra.mode=MULTIRUN"], return_hydra_config=True)
    OmegaConf.update(cfg, "hydra.job.env_set", {"X": "1"}, force_add=True)
    assert "hydra.job.env_set is for a single run, got {'X': '1'} in a sweep" in "\n".join(
        hydra_keys.problems(cfg, sweep=True)
    )


def train(*arguments: str, cwd: Path, module: str = "gymexp.train") -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(CONF_DIR.parent), str(cwd)])
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path},
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("-m seed=0,1 --cfg job", "--cfg shows one configuration and must be without --multirun"),
        ("--resolve", "--resolve is for --cfg"),
        ("--package model", "--package is for --cfg"),
        ("--run --multirun", "--run and --multirun exclude each other"),
        ("--info --cfg job", "--cfg and --info exclude each other"),
        ("--shell-completion", "--shell-completion needs install=bash"),
        ("--experimental-rerun x", "--experimental-rerun is not for gymexp's runs"),
        ("seed=1 -m env=[sudoku]", "overrides must stand together"),
    ],
)
def test_flags_that_would_do_nothing_or_fail_are_refused(arguments, said):
    with pytest.raises(hydra_keys.ConfigError) as caught:
        hydra_keys.check_flags(arguments.split())
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        "--cfg job",
        "--cfg hydra --resolve",
        "-c all -p model",
        "--info defaults-tree",
        "-m seed=0,1",
        "--run a=1",
    ],
)
def test_flags_that_hydra_obeys_are_left_to_it(arguments):
    hydra_keys.check_flags(arguments.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("-m seed=interval(0,1)", "interval(…) does not list the values of a sweep: write a list"),
        ("-m seed=range(0,0)", "a sweep must have at least one job"),
        ("hydra/sweeper=optuna", "hydra/sweeper=optuna is not known. search.params"),
        ("hydra/job_logging=none_such", "hydra/job_logging=none_such is not known"),
        ("hydra.run.dirr=x", "did you mean hydra.run.dir?"),
        ("hydra.launcher.partition=x", "is for launcher=slurm"),
        ("--run launcher=slurm", "--run is for a single run"),
        ("-m hydra.mode=RUN", "hydra.mode=RUN and -m (--multirun) exclude each other"),
        ("-m hydra.job.chdir=true,false", "Sweeping over Hydra's configuration is not supported"),
        ("name=${none_such}", "Interpolation key 'none_such' not found"),
        ("env=[sudoku,sudoku]", "env must name each of its options once, got sudoku twice"),
        ("env=[sudoku,sudoku] --cfg job", "env must name each of its options once, got sudoku twice"),
        ("-m env=[sudoku],[sudoku,sudoku]", "env must name each of its options once, got sudoku twice"),
    ],
)
def test_the_command_says_so_without_a_traceback_and_leaves_nothing(arguments, said, tmp_path):
    shown = train(*arguments.split(), cwd=tmp_path)
    assert shown.returncode == 1 and said in shown.stderr, shown.stderr
    assert "Traceback" not in shown.stderr + shown.stdout
    assert not list(tmp_path.iterdir())


SHOWS = """
import os
from pathlib import Path
from hydra.core.hydra_config import HydraConfig
from gymexp.cli.entry import hydra_main
from gymexp.sweep.launchers import LAUNCHERS

@hydra_main(config_name="train", launchers=LAUNCHERS)
def main(cfg):
    print(os.environ.get("SET"), HydraConfig.get().runtime.output_dir, os.getcwd(), cfg.seed)
    (Path(HydraConfig.get().runtime.output_dir) / "kept").touch()

main()
"""


def test_a_single_run_has_hydras_directory_variables_and_searchpath(tmp_path):
    (tmp_path / "shows.py").write_text(SHOWS)
    (tmp_path / "more" / "experiment").mkdir(parents=True)
    (tmp_path / "more" / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 7\n")
    said = ["hydra.run.dir=here/${hydra.job.override_dirname}", "+hydra.job.env_set.SET=yes"]
    said += ["hydra.searchpath=[file://more]", "experiment=mine"]
    shown = train(*said, cwd=tmp_path, module="shows")
    assert shown.stdout.split() == ["yes", str(tmp_path / "here" / "experiment=mine"), str(tmp_path), "7"]


@pytest.mark.parametrize("after_s", [0, 0.3, 1, 3])
def test_ctrl_c_in_the_first_seconds_is_a_line_and_130(after_s, tmp_path):
    """Sent to the whole group, as a terminal does."""
    command = [sys.executable, "-X", "importtime", "-m", "gymexp.train", "trainer.warmup_steps=3"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(CONF_DIR.parent), "GYMEXP_CACHE": str(tmp_path / "cache")},
        start_new_session=True,
    )
    try:
        assert process.stdout
        for line in process.stdout:  # Python's own start comes before anything of gymexp's
            if line.endswith("| gymexp\n"):
                break
        time.sleep(after_s)
        os.killpg(process.pid, signal.SIGINT)
        shown, _ = process.communicate(timeout=60)
    finally:
        process.terminate()
    said = "\n".join(line for line in shown.splitlines() if not line.startswith("import time:"))
    assert process.returncode == 130, said
    assert "Traceback" not in said and said.count("error: ended by SIGINT") == 1, said


INTERRUPTED = """
from gymexp.cli.terminal import guarded
from gymexp.config.schema import RunConfig

def main():
    exec("raise KeyboardInterrupt")

guarded(main, RunConfig)()
"""


def test_ctrl_c_within_an_exec_is_130_too(tmp_path):
    """Importing a dataclass runs text by `exec`; `python -m` remembers an interrupt there."""
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    shown = train(cwd=tmp_path, module="interrupted")
    assert (shown.returncode, shown.stderr) == (130, "error: ended by SIGINT before it began\n")
