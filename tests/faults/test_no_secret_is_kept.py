"""No file of a sweep, or of a run in it, has a secret of the environment, of git or of a proxy's URL."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard
from whole_run import OVERRIDES, ROOT, UNEVALUATED

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
CANARIES = {
    "WANDB_API_KEY": "c0ffee" * 6 + "cafe",
    "HF_TOKEN": "hf_CanaryCanaryCanaryCanaryCan",
    "OPENAI_API_KEY": "sk-canary-openai-0123456789",
    "JUDGE_PASSWORD": "canary password of a judge",
    "AWS_SECRET_ACCESS_KEY": "canaryAwsSecretAccessKey00",
    "VLLM_API_KEY": "canary-of-another-vllm",
    "http_proxy": "http://me:canaryOfTheProxy@127.0.0.1:9",
}
IN_THE_DIFF = ["hf_CanaryInAFileThatIsTracked000", "canaryOfARemote"]
SUDOKU = ["env=[sudoku]", "env.sudoku.data.train_size=64", "env.sudoku.data.validation_size=8"]
CHANGES = [*(o for o in OVERRIDES if "workplace" not in o), *SUDOKU, *UNEVALUATED, "trainer.max_steps=2"]


def git(where: Path, *command: str) -> None:
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", "-C", where, *who, *command], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path) -> Path:
    """One of gymexp's, with secrets in tracked files: in lines that are gone, and in new ones."""
    copy = tmp_path / "checkout"
    for folder in ("gymexp", "conf"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    option = copy / "conf" / "tracker" / "none.yaml"
    plain = option.read_text()
    option.write_text(
        f"{plain}# HF_TOKEN={IN_THE_DIFF[0]}\n# https://me:{IN_THE_DIFF[1]}@example.org/x.git\n"
    )
    git(copy, "init", "-q")
    git(copy, "remote", "add", "origin", f"https://me:{IN_THE_DIFF[1]}@example.org/x.git")
    git(copy, "add", "-A")
    git(copy, "commit", "-qm", "with secrets")
    option.write_text(plain)
    (copy / "settings.env").write_text("nothing yet\n")
    git(copy, "add", "settings.env")
    git(copy, "commit", "-qm", "settings", "settings.env")
    (copy / "settings.env").write_text("\n".join(IN_THE_DIFF) + "\n")
    return copy


def test_no_file_of_a_sweep_or_of_its_runs_has_a_secret(checkout, tmp_path, gym_python, fault):
    sweep = tmp_path / "sweep"
    command = [sys.executable, "-m", "gymexp.train", "-m", "seed=1", f"hydra.sweep.dir={sweep}", *CHANGES]
    environ = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}
    kept = fault("Secrets in the environment")
    done = subprocess.run(
        [*command, "tracker=wandb", "tracker.mode=offline"],
        capture_output=True,
        text=True,
        check=False,
        cwd=checkout,
        env=environ | CANARIES | {"PYTHONPATH": str(checkout)},
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((sweep / "0" / "result.json").read_text())
    assert result["step"] == 2
    assert "conf/tracker/none.yaml" in (sweep / "code" / "git-diff.txt").read_text(), "the diff is kept"
    assert list(sweep.glob("0/wandb/offline-run-*")), "the tracker wrote"
    secrets = [*CANARIES.values(), "canaryOfTheProxy", *IN_THE_DIFF]
    found = {}
    for path in (one for one in sweep.rglob("*") if one.is_file()):
        held = path.read_bytes()
        held += zstandard.decompress(held) if path.suffix == ".zst" else b""
        if has := [secret for secret in secrets if secret.encode() in held]:
            found[str(path.relative_to(sweep))] = has
    assert found == {}
    kept.over()
    assert "Traceback" not in done.stdout + done.stderr
    assert not any(secret in done.stdout + done.stderr for secret in secrets)
