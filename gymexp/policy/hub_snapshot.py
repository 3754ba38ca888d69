"""Resolves `model.path` to one directory, the same for every process of a run.

A hub id becomes the snapshot of one commit in huggingface_hub's cache. Before any process starts, `pin` asks
the hub once which commit `model.revision` is, and downloads the files that transformers and vLLM load. The
run's config.yaml keeps the commit. So prompts, policy, reference model and engine use this commit, in a
resumed run as well, even if the branch has moved since.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import logging
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import (
    HfApi,
    constants,
    get_token,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HFValidationError, RevisionNotFoundError

from gymexp.config.schema import ModelConfig
from gymexp.data import hub
from gymexp.data.cache import Say
from gymexp.errors import ConfigError

log = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parent.parent.parent
_COMMIT = re.compile(r"[0-9a-f]{40}")
# The weights in the order in which transformers looks for them, whole or in the shards that an index names.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# The suffixes of the other files to download: configurations, tokenizers, chat templates, code of the model.
_SMALL = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".spm", ".bpe", ".py")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def resolve_path(path: str) -> str:
    """Returns `model.path` in transformers' form: the absolute path of an existing directory, or a hub id.

    A relative directory is searched in the working directory, then in the project's root (the parent of
    `gymexp/`). Raises ConfigError if `path` looks like a directory but none exists, or has no config.json.
    """
    candidates = [Path(path).expanduser()]
    if not candidates[0].is_absolute():
        candidates.append(ROOT / path)
    for candidate in candidates:
        if (candidate / "config.json").is_file():
            return str(candidate.resolve())
        if candidate.is_dir():
            raise ConfigError(
                f"model.path must be a model directory with a config.json, got {path!r} "
                f"({candidate.resolve()} has none)"
            )
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        places = " and ".join(dict.fromkeys(str(candidate.absolute()) for candidate in candidates))
        raise ConfigError(
            f"model.path must be a directory that exists, or a hub id like Qwen/Qwen3-0.6B, got {path!r}: "
            f"no such directory (looked at {places})"
        )
    return path


def pin(model: ModelConfig, say: Say) -> ModelConfig:
    """Downloads the files of a hub id, and returns the model config with their commit as its revision.

    The config of a model directory is returned as it is. Raises ConfigError, with what to do, if neither the
    hub nor the cache has the model, or if `model.revision` is set for a directory.
    """
    path = resolve_path(model.path)
    if not Path(path).is_absolute():
        return dataclasses.replace(model, revision=_snapshot(path, model.revision or "main", say).name)
    if model.revision is not None:
        raise ConfigError(
            f"model.revision must be null where model.path is a directory, got {model.revision!r} with "
            f"{path}: say model.path=… with a hub id, or leave model.revision out"
        )
    return model


def directory_of(model: ModelConfig, say: Say = log.info) -> Path:
    """Returns the directory of the model's files. Asks the hub only if the model is not pinned, or if this
    machine's cache lacks it. Raises ConfigError if the model cannot be found."""
    path = resolve_path(model.path)
    return Path(path) if Path(path).is_absolute() else _snapshot(path, model.revision or "main", say)


def cached(repo: str, revision: str) -> Path | None:
    """Returns the snapshot in huggingface_hub's cache if it has weights and a tokenizer. Asks no hub."""
    config_file = try_to_load_from_cache(repo, "config.json", revision=revision)
    if not isinstance(config_file, str):
        return None
    directory = Path(config_file).parent
    names = [path.name for path in directory.iterdir() if path.is_file()]  # a link may be dangling
    try:
        weights = _weight_files(names, lambda name: (directory / name).read_text())
    except (OSError, ValueError, KeyError):
        return None
    is_whole = weights and all((directory / name).is_file() for name in weights)
    return directory if is_whole and any(name in names for name in _TOKENIZERS) else None


def files_of(names: Collection[str], read: Callable[[str], str]) -> list[str]:
    """Returns the names of a repository's files to download: weights in one format, and the small files.

    read: returns the text of a file, for the index of sharded weights. Raises ValueError if the repository
    has no weights or no config.json.
    """
    weights = _weight_files(names, read)
    if not weights or "config.json" not in names:
        raise ValueError(
            "it has no config.json with model.safetensors or pytorch_model.bin (or their shards) beside it"
        )
    small = [
        name
        for name in names
        if name.endswith(_SMALL)
        and not name.endswith(".index.json")
        and ("/" not in name or name.startswith("additional_chat_templates/"))
    ]
    return sorted([*small, *weights])


def _weight_files(names: Collection[str], read: Callable[[str], str]) -> list[str]:
    """Returns the weight files in the format that transformers would load, with the index of shards if there
    is one; an empty list if the repository has neither format."""
    for whole in _WEIGHTS:
        if whole in names:
            return [whole]
        if (index := f"{whole}.index.json") in names:
            return [index, *sorted(set(json.loads(read(index))["weight_map"].values()))]
    return []


def _snapshot(repo: str, revision: str, say: Say) -> Path:
    snapshot = cached(repo, revision)
    if snapshot and _COMMIT.fullmatch(revision):
        return snapshot  # a commit never changes
    endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")
    try:
        return _download(repo, revision, endpoint, say)
    except (httpx.HTTPError, OSError, HFValidationError, ValueError, hub.Unusable) as error:
        if snapshot and not isinstance(error, RevisionNotFoundError):
            reason, commit = hub.reason(error, "model"), snapshot.name[:12]
            say(f"model.path={repo}: {reason}; using {revision} as downloaded before (commit {commit})")
            return snapshot
        raise ConfigError(_explain(repo, revision, endpoint, error)) from None


def _download(repo: str, revision: str, endpoint: str, say: Say) -> Path:
    """Downloads the files of `revision` and returns the snapshot's directory.

    The download names the revision (a branch, say) and not its commit, so that huggingface_hub can find the
    revision in the cache without the network. Raises hub.Unusable or the hub's own errors.
    """
    source: dict[str, Any] = {"repo_id": repo, "endpoint": endpoint, "token": get_token()}
    info = HfApi(endpoint, source["token"]).model_info(
        repo, revision=revision, timeout=hub.ANSWER_TIMEOUT_S, files_metadata=True
    )
    if not info.sha:
        raise hub.Unusable("the server is not a Hugging Face hub (no commit in its answer)")
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}

    def read(name: str) -> str:
        return Path(hub.watched(hf_hub_download, **source, filename=name, revision=info.sha)).read_text()

    wanted = files_of(sizes, read)
    missing = [n for n in wanted if not isinstance(try_to_load_from_cache(repo, n, revision=info.sha), str)]
    if missing:
        size = sum(sizes[name] for name in missing if name in sizes) / 1e9
        say(f"model.path={repo}: downloading {revision}, commit {info.sha[:12]} ({size:.2f} GB)")
    patterns = [glob.escape(name) for name in wanted]
    directory = Path(hub.watched(snapshot_download, **source, revision=revision, allow_patterns=patterns))
    if cached(repo, directory.name) is None:
        raise hub.Unusable(f"{revision} became another commit while it was downloaded: start again")
    return directory


def _explain(repo: str, revision: str, endpoint: str, error: Exception) -> str:
    reason = hub.reason(error, "model")
    token = "the one given was sent" if get_token() else "none was given"
    lines = [
        f"model.path={repo} at model.revision={revision}: cannot get the model: {reason}",
        f"  tried: {endpoint}, and the cache in {constants.HF_HUB_CACHE}",
        f"  a token is taken from HF_TOKEN; {token}",
    ]
    if _COMMIT.fullmatch(revision):
        lines.append("  a run keeps to the commit that it began with (model.revision in its config.yaml)")
    return "\n".join(
        [
            *lines,
            "What you can do:",
            f"  hf download {repo} --revision {revision}    where the hub can be reached, into that cache",
            "  HF_HUB_CACHE=…    names another cache, which has the model",
            "  model.path=…    takes a directory with config.json, weights and tokenizer",
        ]
    )
