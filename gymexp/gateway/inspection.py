"""What a model's tokenizer is good for, looked at before anything starts, in a process without torch:

    python -m gymexp.gateway.inspection DIRECTORY

prints {"problem": what makes it useless, or "", "reads_calls": whether tool calls are read}.
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
from gymexp.policy.snapshot import directory_of
from gymexp.processes.module_call import call_module_once

_TIMEOUT_S = 600
_FILES = ("*.json", "*.jinja", "*.model", "additional_chat_templates/*")
_CODE = ("gateway/reply.py", "rollout/tokens.py", "policy/model.py", "gateway/inspection.py")


def check(model: ModelConfig, prepared: Prepared, cache: Path) -> None:
    """Raises ConfigError if the tokenizer has no chat template or no end token, or if tasks have tools and
    nothing reads the calls that its chat template writes. Under a second if it was looked at before."""
    directory = directory_of(model)
    facts = _facts(directory, cache)
    if facts["problem"]:
        raise ConfigError(facts["problem"])
    if not facts["reads_calls"] and (envs := envs_with_tools(prepared)):
        raise ConfigError(
            f"model.path={model.path}: nothing here reads the tool calls that its chat template writes, and "
            f"the tasks of {', '.join(envs)} have tools: each rollout would end after one turn. Take a model "
            "whose calls are read (Qwen, Llama 3, GLM-4.5, gpt-oss, Gemma 4, Nemotron 3, LFM2.5, or one that "
            "writes calls as one of these), say how they are read in "
            f"{directory / 'tokenizer_config.json'}, as response_template (transformers' documentation, "
            "response parsing), or leave these environments out of env=[…]"
        )


def envs_with_tools(prepared: Prepared) -> list[str]:
    """Environments of which some task offers the policy a tool."""
    tasks = itertools.chain(prepared.train, *prepared.validation.values())
    asked = ((task.env, task.row.get("responses_create_params", {})) for task in tasks)
    return list({env: None for env, p in asked if p.get("tools") and p.get("tool_choice") != "none"})


def _facts(directory: Path, cache: Path) -> dict[str, Any]:
    """Of the tokenizer there."""
    kept = cache / "tokenizers" / f"{digest(directory, _CODE)}.json"
    task = f"model.path: looking at the tokenizer in {directory}"
    return call_module_once(["gymexp.gateway.inspection", directory], task, _TIMEOUT_S, kept)


def digest(directory: Path, code: Sequence[str], more: str = "") -> str:
    """Of the tokenizer there, and of what reads it: packages, and files of gymexp."""
    summed = hashlib.sha256(more.encode())
    for package in ("transformers", "tokenizers", "trl"):
        summed.update(f"{package} {importlib.metadata.version(package)}\n".encode())
    package = Path(gymexp.__file__).parent
    files = [path for pattern in _FILES for path in sorted(directory.glob(pattern)) if path.is_file()]
    for path in [*files, *(package / name for name in code)]:
        summed.update(f"{path.name}\n".encode() + path.read_bytes())
    return summed.hexdigest()[:24]


def look(directory: Path) -> dict[str, Any]:
    """See above. Imports transformers, without torch where that is not there yet."""
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
        said = f"{type(error).__name__}: {error}"
        problem = f"model.path: the response_template in {where} must be one of transformers', but {said}"
        return {"problem": problem, "reads_calls": False}


if __name__ == "__main__":
    print("\n" + json.dumps(look(Path(sys.argv[1]))))
