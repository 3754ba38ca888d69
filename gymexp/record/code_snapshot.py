"""Copies the code, the configuration files and the versions of a run into its directory."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import gymexp
from gymexp.config.group_options import CONF_DIR
from gymexp.config.redaction import without_secrets
from gymexp.record.places import OWN_SERVERS

_VERSIONED = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "vllm",
    "hydra-core",
    "omegaconf",
    "datasets",
)


def snapshot(target: Path, runnable: bool = False) -> None:
    """Copies gymexp's code and configuration files to `target`, with git's commit and diff of them.

    A job of a sweep already runs from the sweep's snapshot, which lies next to the job's own directory. Then
    `target` becomes a link to that snapshot.

    runnable: also copy what a job needs to run from `target`: the shipped policy, and the user's own servers.
    """
    package = Path(gymexp.__file__).parent
    if package.parent == target.parent.parent / "code":
        target.unlink(missing_ok=True)
        target.symlink_to(Path("..") / "code")
        return
    # NeMo Gym's and other servers read API keys from env.yaml and .env, so these are not copied.
    private = ("machine", "env.yaml", ".env", ".git")
    skip = shutil.ignore_patterns("__pycache__", *(() if runnable else ("assets",)), *private)
    shutil.copytree(package, target / "gymexp", ignore=skip, dirs_exist_ok=True)
    shutil.copytree(CONF_DIR, target / "conf", ignore=skip, dirs_exist_ok=True)
    for own in OWN_SERVERS if runnable else ():
        if Path(own).is_dir():
            shutil.copytree(own, target / own, ignore=skip, dirs_exist_ok=True)
    git = {"commit": ["rev-parse", "HEAD"], "diff": ["diff", "HEAD", "--", package.name, CONF_DIR.name]}
    if not shutil.which("git"):
        return
    for name, command in git.items():
        result = subprocess.run(
            ["git", "-C", package.parent, *command], capture_output=True, text=True, check=False
        )
        if result.returncode == 0:
            (target / f"git-{name}.txt").write_text(without_secrets(result.stdout))


def _versions() -> str:
    lines = [f"gymexp {gymexp.__version__}", f"python {platform.python_version()} {sys.platform}"]
    for name in _VERSIONED:
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return "\n".join(lines) + "\n"
