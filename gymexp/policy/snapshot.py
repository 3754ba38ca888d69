"""`model.path` as one directory, the same for every process of a run.

A hub id becomes the snapshot of one commit in huggingface_hub's cache. `pin` asks the hub which commit
`model.revision` is, once, before anything starts, and fetches what transformers and vLLM load of it. The
commit is kept in the run's config.yaml, so that prompts, policy, reference model and engine are of that
commit, also in a resumed run, whatever the branch has come to since.
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
# In transformers' order: the first that is there is loaded, whole or in the shards that its index names.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# What else is loaded: configurations, tokenizers, chat templates, code of the model's own.
_SMALL = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".spm", ".bpe", ".py")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def resolve_path(path: str) -> str:
    """`model.path` as transformers takes it: an existing directory as an absolute path, anything else a hub
    id.

    A relative directory is looked for in the working directory, then in the project's root (where `gymexp/`
    lies). Raises ConfigError for what looks like a directory and is none.
    """
    tried = [Path(path).expanduser()]
    if not tried[0].is_absolute():
        tried.append(ROOT / path)
    for candidate in tried:
        if (candidate / "config.json").is_file():
            return str(candidate.resolve())
        if candidate.is_dir():
            raise ConfigError(
                f"model.path must be a model directory with a config.json, got {path!r} "
                f"({candidate.resolve()} has none)"
            )
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        looked = " and ".join(dict.fromkeys(str(candidate.absolute()) for candidate in tried))
        raise ConfigError(
            f"model.path must be a directory that exists, or a hub id like Qwen/Qwen3-0.6B, got {path!r}: "
            f"no such directory (looked at {looked})"
        )
    return path


def pin(model: ModelConfig, say: Say) -> ModelConfig:
    """The model with a commit as its revision, whose files are here; a directory as it is.

    Raises ConfigError with what to do where the hub does not give it and the cache does not have it.
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
    """Where the model's files are. Of a pinned model without a word to the hub, unless this machine's cache
    lacks it. Raises ConfigError."""
    path = resolve_path(model.path)
    return Path(path) if Path(path).is_absolute() else _snapshot(path, model.revision or "main", say)


def cached(repo: str, revision: str) -> Path | None:
    """The snapshot in huggingface_hub's cache if it has weights and a tokenizer; asks no hub."""
    found = try_to_load_from_cache(repo, "config.json", revision=revision)
    if not isinstance(found, str):
        return None
    directory = Path(found).parent
    names = [path.name for path in directory.iterdir() if path.is_file()]  # some are links, and may hang
    try:
        weights = _weight_files(names, lambda name: (directory / name).read_text())
    except (OSError, ValueError, KeyError):
        return None
    whole = weights and all((directory / name).is_file() for name in weights)
    return directory if whole and any(name in names for name in _TOKENIZERS) else None


def files_of(names: Collection[str], read: Callable[[str], str]) -> list[str]:
    """What is fetched of a repository: its weights in one format, and the small files beside them.

    read: the text of a file, for the index of weights in shards. Raises ValueError without weights.
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
    """Those of the format that is loaded, an index of shards among them; none where it has neither format."""
    for whole in _WEIGHTS:
        if whole in names:
            return [whole]
        if (index := f"{whole}.index.json") in names:
            return [index, *sorted(set(json.loads(read(index))["weight_map"].values()))]
    return []


def _snapshot(repo: str, revision: str, say: Say) -> Path:
    here = cached(repo, revision)
    if here and _COMMIT.fullmatch(revision):
        return here  # a commit never changes
    endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")
    try:
        return _download(repo, revision, endpoint, say)
    except (httpx.HTTPError, OSError, HFValidationError, ValueError, hub.Unusable) as error:
        if here and not isinstance(error, RevisionNotFoundError):
            said = hub.reason(error, "model")
            say(f"model.path={repo}: {said}; using {revision} as downloaded before (commit {here.name[:12]})")
            return here
        raise ConfigError(_ways_on(repo, revision, endpoint, error)) from None


def _download(repo: str, revision: str, endpoint: str, say: Say) -> Path:
    """By its own name, not the commit's: that is how huggingface_hub finds it again without the network."""
    where: dict[str, Any] = {"repo_id": repo, "endpoint": endpoint, "token": get_token()}
    info = HfApi(endpoint, where["token"]).model_info(
        repo, revision=revision, timeout=hub.ANSWER_TIMEOUT_S, files_metadata=True
    )
    if not info.sha:
        raise hub.Unusable("what answers there is not a Hugging Face hub (no commit in its answer)")
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}

    def read(name: str) -> str:
        return Path(hub.watched(hf_hub_download, **where, filename=name, revision=info.sha)).read_text()

    wanted = files_of(sizes, read)
    missing = [n for n in wanted if not isinstance(try_to_load_from_cache(repo, n, revision=info.sha), str)]
    if missing:
        size = sum(sizes[name] for name in missing if name in sizes) / 1e9
        say(f"model.path={repo}: downloading {revision}, commit {info.sha[:12]} ({size:.2f} GB)")
    patterns = [glob.escape(name) for name in wanted]
    directory = Path(hub.watched(snapshot_download, **where, revision=revision, allow_patterns=patterns))
    if cached(repo, directory.name) is None:
        raise hub.Unusable(f"{revision} became another commit while it was downloaded: start again")
    return directory


def _ways_on(repo: str, revision: str, endpoint: str, error: Exception) -> str:
    said = hub.reason(error, "model")
    had = "the one given was sent" if get_token() else "none was given"
    lines = [
        f"model.path={repo} at model.revision={revision}: cannot get the model: {said}",
        f"  asked: {endpoint}, and the cache in {constants.HF_HUB_CACHE}",
        f"  a token is taken from HF_TOKEN; {had}",
    ]
    if _COMMIT.fullmatch(revision):
        lines.append("  a run keeps to the commit that it began with (model.revision in its config.yaml)")
    return "\n".join(
        [
            *lines,
            "Ways on:",
            f"  hf download {repo} --revision {revision}    where the hub can be reached, into that cache",
            "  HF_HUB_CACHE=…    names another cache, which has it",
            "  model.path=…    takes a directory with config.json, weights and tokenizer",
        ]
    )
