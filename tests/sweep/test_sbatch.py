"""From launcher.* to sbatch's flags, as submitit writes them."""

from __future__ import annotations

import os
import subprocess

from submitit.slurm.slurm import _make_sbatch_string

from gymexp.config.schema import LauncherConfig, ModelConfig, RunConfig
from gymexp.sweep.sbatch import extras, parameters


def script(tmp_path, more: dict | None = None, **launcher) -> str:
    config = RunConfig(name="n", model=ModelConfig(name="m", path="p"), launcher=LauncherConfig(**launcher))
    asked = parameters(config, more or {}, tmp_path / "a sweep", os.getcwd())
    return _make_sbatch_string(command="true", folder=tmp_path, **asked)


def flags(text: str) -> set[str]:
    return {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")}


def test_the_keys_are_sbatchs_flags(tmp_path):
    said = flags(
        script(tmp_path, partition="p", account="a", qos="q", time="1-12", gpus=8, cpus=64, mem="200G")
    )
    assert {
        "--partition=p",
        "--account=a",
        "--qos=q",
        "--time=1-12",
        "--mem=200G",
        "--gpus-per-node=8",
    } <= said
    assert {
        "--cpus-per-task=64",
        "--nodes=1",
        "--ntasks-per-node=1",
        "--signal=USR2@120",
        "--requeue",
    } <= said
    assert not [flag for flag in said if "wckey" in flag or "mail" in flag]
    assert {"--mail-user=me@x", "--mail-type=END,FAIL"} <= flags(script(tmp_path, mail="me@x"))


def test_other_flags_come_from_hydras_own_launcher_and_gymexps_go_before_them(tmp_path):
    more = extras({"gres": "gpu:h100:8", "partition": "theirs", "timeout_min": 60, "comment": None})
    assert more == {"gres": "gpu:h100:8", "partition": "theirs"}
    more["additional_parameters"] = {"reservation": "r", "requeue": False}
    said = flags(script(tmp_path, more, partition="ours"))
    assert {"--gres=gpu:h100:8", "--partition=ours", "--reservation=r", "--requeue=False"} <= said


def test_a_container_has_the_working_directory_and_what_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = script(tmp_path, container="nvcr.io#x:1", container_mounts=["/data:/data:ro"])
    line = next(line for line in text.splitlines() if line.startswith("srun"))
    assert "--container-image=nvcr.io#x:1" in line and f"--container-workdir={tmp_path}" in line
    assert f"{tmp_path}:{tmp_path}," in line and ",/data:/data:ro" in line
    assert "--container" not in script(tmp_path)


def test_a_job_imports_the_sweeps_code_and_not_the_working_directorys(tmp_path, monkeypatch):
    """The setup is run by a shell, as sbatch does."""
    for place in (tmp_path / "a sweep" / "code", tmp_path / "here", tmp_path / "other"):
        place.mkdir(parents=True)
        (place / "which.py").write_text(f"print({str(place)!r})")
    text = script(tmp_path, setup=["export SEEN=$PYTHONPATH"])
    setup = text.split("# setup\n")[1].split("# command")[0]
    shown = subprocess.run(
        ["bash", "-c", f"export PYTHONPATH={tmp_path}/other\n{setup}\npython3 -m which; echo $SEEN"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path / "here",
    )
    code = str(tmp_path / "a sweep" / "code")
    assert shown.stdout.splitlines() == [code, f"{code}:{tmp_path}/other"]
