"""`source=nemo_gym`: the data sets that the environment's NeMo Gym file names in `datasets:`."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

from gymexp.config.schema import EnvConfig
from gymexp.data.cache import Say, cached, sha256_of
from gymexp.errors import DataError
from gymexp.gym.catalogue import Dataset, datasets_of, example_file
from gymexp.gym.definitions import Servers, folders_of, locate, read_servers
from gymexp.gym.install import nemo_gym_version, run_script, site_packages
from gymexp.record.places import own_servers

# The types of the data sets that a split may come from, the preferred one first.
_TYPES = {"train": ("train", "benchmark", "example"), "validation": ("validation", "benchmark", "example")}
_FILL = "import sys; from nemo_gym.prompt import materialize_prompts as fill; fill(*sys.argv[1:])"
_DEADLINE_S = 600.0


def fetch_named(name: str, env: EnvConfig, python: Path, cache: Path, say: Say) -> tuple[Path, Path]:
    """Returns the train and the validation file. A split that has no data set of its own gets the example
    rows that NeMo Gym ships, with a warning.

    python: NeMo Gym's interpreter. Raises DataError that says why rows cannot be had, and what to do.
    """
    site = site_packages(python)
    servers = read_servers(name, env, site, python)
    named = datasets_of(servers, env.agent)
    files: dict[str, Path] = {}
    shipped: list[str] = []
    splits = _TYPES if env.data.validation_share is None else {"train": _TYPES["train"]}
    for split, types in splits.items():
        of_type = (dataset for kind in types for dataset in named if dataset.type == kind)
        chosen = next((d for d in of_type if d.type != "example" and _has_source(d, site)), None)
        if chosen is None:
            path, template = _examples(name, env, servers, named, site), env.data.prompt_config
            files[split] = fill_prompts(name, "example", template, path, python, cache, say)
            shipped.append(split)
            continue
        path = _fetch(name, env, chosen, named, servers, site, say)
        say(f"{name}: {split} rows from {chosen.repo_id or path}, licence: {chosen.license or 'not stated'}")
        template = env.data.prompt_config or chosen.prompt_config
        files[split] = fill_prompts(name, chosen.type, template, path, python, cache, say)
    if shipped:
        count = sum(1 for line in files[shipped[0]].read_bytes().splitlines() if line.strip())
        say(
            f"warning: {name}: the {' and the '.join(shipped)} rows are the {count} example rows that NeMo "
            "Gym ships: enough to see the environment run, not to train or to compare"
        )
        if (script := (site / env.config_path).parent / "prepare.py").exists():
            say(f"  {script} makes more; env.{name}.data.source=jsonl takes them")
    return files["train"], files.get("validation", files["train"])


def _has_source(dataset: Dataset, site: Path) -> bool:
    """Returns whether NeMo Gym's file says where the rows come from. Some say only where they would lie."""
    return bool(dataset.repo_id or dataset.gitlab or dataset.prepare_script or locate(dataset.file, site))


def _fetch(
    name: str, env: EnvConfig, dataset: Dataset, named: list[Dataset], servers: Servers, site: Path, say: Say
) -> Path:
    at = f"env.{name}.data"
    if found := locate(dataset.file, site):
        return found
    if dataset.repo_id and dataset.repo_file:
        # Imported only when needed, as it imports huggingface_hub and an HTTP client.
        from gymexp.data.hub import fetch_file

        data = dataclasses.replace(env.data, repo_id=dataset.repo_id)
        path, _ = fetch_file(name, data, dataset.repo_file, env.data.revision, say)
        return path
    lines = [f"{at}.source=nemo_gym cannot get {dataset.file} ({dataset.type} rows):"]
    if dataset.repo_id:
        lines.append(
            f"  NeMo Gym names no file of {dataset.repo_id} on the Hugging Face hub. What you can do:"
        )
        lines.append(f"  {at}.source=huggingface {at}.repo_id={dataset.repo_id} {at}.train_file=… …")
    elif dataset.gitlab:
        package, version, file = dataset.gitlab
        command = ["gym", "dataset", "download", "--storage", "gitlab", "--name", package]
        command += ["--revision", version, "--artifact", file, "--output", dataset.file]
        lines.append("  they are in NVIDIA's GitLab, which NeMo Gym itself reads. In this directory:")
        lines.append(f"  {shlex.join(command)}")
    else:
        command = ["gym", "eval", "prepare", "--config", env.config_path]
        lines.append("  NeMo Gym's own script makes them. In this directory:")
        lines.append(f"  {shlex.join(command)}")
    if path := example_file(named, folders_of(servers, env.agent), (own_servers(), site)):
        lines.append("or play the example rows, to see it run:")
        lines.append(f"  {at}.source=jsonl {at}.train_file={path} {at}.validation_file={path}")
    raise DataError("\n".join(lines))


def _examples(name: str, env: EnvConfig, servers: Servers, named: list[Dataset], site: Path) -> Path:
    path = example_file(named, folders_of(servers, env.agent), (own_servers(), site))
    if path is None:
        raise DataError(
            f"env.{name}.data.source=nemo_gym finds no rows: {env.config_path} names none that exist, and "
            f"NeMo Gym ships no example rows. Use your own: env.{name}.data.source=jsonl "
            f"env.{name}.data.train_file=… env.{name}.data.validation_file=…"
        )
    return path


def fill_prompts(
    name: str, label: str, template: str | None, path: Path, python: Path, cache: Path, say: Say
) -> Path:
    """Returns the rows with their prompts made from a template of NeMo Gym's, which is looked for as NeMo Gym
    does, first in the working directory. label: part of the entry's name in the cache. Raises DataError if
    there is no such file, or if NeMo Gym cannot fill the rows in, as they have prompts or lack a field."""
    if template is None:
        return path
    site = site_packages(python)
    found = locate(str(Path(template).expanduser()), site)
    if found is None:
        raise DataError(f"env.{name}.data.prompt_config: {template} is neither in {Path.cwd()} nor in {site}")
    determined_by = {
        "rows": sha256_of(path),
        "template": sha256_of(found),
        "nemo_gym": nemo_gym_version(site),
    }

    def make(directory: Path) -> None:
        arguments = ["-c", _FILL, path.resolve(), found.resolve(), directory / "rows.jsonl"]
        what = f"env.{name}.data: NeMo Gym's filling of {found} with {path}"
        run_script(python, arguments, what, DataError, _DEADLINE_S)

    entry, _ = cached(cache, f"{name}-{label}", determined_by, make, say)
    return entry / "rows.jsonl"
