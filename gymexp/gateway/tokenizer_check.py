"""Inspects a model's tokenizer before a run starts, in a process without torch:

    python -m gymexp.gateway.tokenizer_check DIRECTORY

prints {"problem": why gymexp cannot use the tokenizer, or "", "reads_calls": whether gymexp can read the tool
calls that its chat template writes}.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymexp
from gymexp.config.schema import ModelConfig
from gymexp.data.prepare import Prepared
from gymexp.errors import ConfigError
from gymexp.policy.hub_snapshot import directory_of
from gymexp.processes.module_call import call_module_once

_TIMEOUT_S = 600
_FILES = ("*.json", "*.jinja", "*.model", "additional_chat_templates/*")
_CODE = ("gateway/reply.py", "rollout/tokens.py", "policy/model.py", "gateway/tokenizer_check.py")


def check(model: ModelConfig, prepared: Prepared, cache: Path) -> None:
    """Raises ConfigError if the tokenizer has no chat template or no end token, or if tasks have tools and
    gymexp cannot read the tool calls that the chat template writes.

    Takes under a second if the cache has the result of an earlier inspection.
    """
    directory = directory_of(model)
    facts = _facts(directory, cache)
    if facts["problem"]:
        raise ConfigError(facts["problem"])
    if not facts["reads_calls"] and (envs := envs_with_tools(prepared)):
        raise ConfigError(
            f"model.path={model.path}: gymexp cannot read the tool calls that its chat template writes, and "
            f"the tasks of {', '.join(envs)} have tools: each rollout would end after one turn. Take a model "
            "whose calls gymexp reads (Qwen, Llama 3, GLM-4.5, gpt-oss, Gemma 4, Nemotron 3, LFM2.5, or one "
            "that writes calls as one of these does), describe the format in "
            f"{directory / 'tokenizer_config.json'}, as response_template (transformers' documentation, "
            "response parsing), or leave these environments out of env=[…]"
        )


def envs_with_tools(prepared: Prepared) -> list[str]:
    """Returns the names of the environments that have a task which offers the policy a tool."""
    tasks = itertools.chain(prepared.train, *prepared.validation.values())
    env_params = ((task.env, task.row.get("responses_create_params", {})) for task in tasks)
    return list({env: None for env, p in env_params if p.get("tools") and p.get("tool_choice") != "none"})


def _facts(directory: Path, cache: Path) -> dict[str, Any]:
    """Returns {"problem", "reads_calls"}, from the cache or by `inspect_tokenizer` in another process."""
    answer_file = cache / "tokenizers" / f"{digest(directory, _CODE)}.json"
    task = f"model.path: inspecting the tokenizer in {directory}"
    return call_module_once(["gymexp.gateway.tokenizer_check", directory], task, _TIMEOUT_S, answer_file)


def digest(directory: Path, code: Sequence[str], more: str = "") -> str:
    """Returns a digest that names a cached result. It covers the tokenizer's files in `directory`, the
    versions of the packages that read them, the files of gymexp named in `code`, and `more`.
    """
    hasher = hashlib.sha256(more.encode())
    for package in ("transformers", "tokenizers", "trl"):
        hasher.update(f"{package} {importlib.metadata.version(package)}\n".encode())
    package = Path(gymexp.__file__).parent
    files = [path for pattern in _FILES for path in sorted(directory.glob(pattern)) if path.is_file()]
    for path in [*files, *(package / name for name in code)]:
        hasher.update(f"{path.name}\n".encode() + path.read_bytes())
    return hasher.hexdigest()[:24]


def inspect_tokenizer(directory: Path) -> dict[str, Any]:
    """Returns {"problem": why gymexp cannot use the tokenizer, or "", "reads_calls": whether gymexp can read
    the tool calls that its chat template writes}.

    Imports transformers, and keeps it from importing torch unless torch is imported already.
    """
    from gymexp.gateway.server import load_tokenizer

    try:
        tokenizer = load_tokenizer(directory)
    except ConfigError as error:
        return {"problem": str(error), "reads_calls": False}
    from gymexp.gateway.reply import ReplyParser

    try:
        return {"problem": "", "reads_calls": ReplyParser(tokenizer).reads_calls}
    except (ValueError, KeyError, TypeError) as error:
        where = directory / "tokenizer_config.json"
        reason = f"{type(error).__name__}: {error}"
        problem = f"model.path: the response_template in {where} must be one of transformers', but {reason}"
        return {"problem": problem, "reads_calls": False}


if __name__ == "__main__":
    print("\n" + json.dumps(inspect_tokenizer(Path(sys.argv[1]))))
