"""How long the prompts are that rollouts begin with, counted at the start, in a process without torch:

    python -m gymexp.gateway.first_prompts DIRECTORY REQUESTS

REQUESTS is what `gymexp.data.first_requests` made. Prints {key: the prompt's tokens, or why the gateway
refuses the request}.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from gymexp.config.schema import ModelConfig
from gymexp.data.cache import sha256_of
from gymexp.data.prepare import Prepared
from gymexp.errors import DataError, TokenMismatch
from gymexp.gateway.inspection import digest
from gymexp.policy.snapshot import directory_of
from gymexp.processes.module_call import call_module_once

_DEADLINE_S = 3600.0
_MOST_PROBLEMS = 20
_MANY = 2000  # requests, above which several processes count
# What decides a count besides the tokenizer and the requests.
_CODE = (
    *(f"gateway/{name}.py" for name in ("first_prompts", "server", "chat", "history", "reply")),
    "rollout/tokens.py",
    "policy/model.py",
)


def check(model: ModelConfig, prepared: Prepared, cache: Path) -> None:
    """Raises DataError, with line and key, for tasks whose first prompt leaves no room in the context, or
    whose request the gateway refuses. An environment's servers may add to a prompt later on."""
    assert prepared.requests is not None, "tasks of a run that goes on were checked when it began"
    counts = _counts(directory_of(model), prepared.requests, cache)
    tasks = itertools.chain(prepared.train, *prepared.validation.values())
    wrong: dict[str, str] = {}
    for key in (task.key for task in tasks):
        if not isinstance(found := counts[key], int):
            wrong[key] = found
        elif found >= model.max_model_len:
            wrong[key] = f"its prompt has {found} tokens, model.max_model_len is {model.max_model_len}"
    if not wrong:
        return
    places = {line["key"]: line["at"] for line in _lines(prepared.requests) if line.get("key") in wrong}
    listed = [f"{places[key]} ({key}): {why}" for key, why in itertools.islice(wrong.items(), _MOST_PROBLEMS)]
    if hidden := len(wrong) - len(listed):
        listed.append(f"and {hidden} more")
    raise DataError(
        f"the prompts of {len(wrong)} tasks cannot be answered: each must be one that the policy's chat "
        "template takes, and must leave room for a reply in model.max_model_len. Raise model.max_model_len, "
        "or leave out these rows:\n" + "\n".join(listed)
    )


def _counts(directory: Path, requests: Path, cache: Path) -> dict[str, int | str]:
    kept = cache / "prompts" / f"{digest(directory, _CODE, sha256_of(requests))}.json"
    arguments = ["gymexp.gateway.first_prompts", directory, requests]
    return call_module_once(arguments, f"counting the tokens of {requests}", _DEADLINE_S, kept)


def _lines(requests: Path) -> Iterator[dict[str, Any]]:
    with requests.open("rb") as file:
        yield from map(orjson.loads, file)


def count(directory: Path, requests: Path) -> dict[str, int | str]:
    """See above. Imports transformers, without torch where that is not there yet."""
    from gymexp.gateway.server import Gateway, GatewayConfig, load_tokenizer

    gateway = Gateway(GatewayConfig(engine_urls=()), load_tokenizer(directory))
    lines = list(_lines(requests))
    tools = [line["tools"] for line in lines if "tools" in line]
    asked = [line for line in lines if "key" in line]
    keys = [line["key"] for line in asked]
    one = partial(_count_one, gateway, tools)
    if len(asked) < _MANY:
        return dict(zip(keys, map(one, asked), strict=True))
    global _in_child
    _in_child = one  # a fork has it; a tokenizer would have to be pickled otherwise
    with multiprocessing.get_context("fork").Pool() as pool:
        return dict(zip(keys, pool.map(_count_in_child, asked, chunksize=100), strict=True))


_in_child: Any = None


def _count_in_child(line: dict[str, Any]) -> int | str:
    return _in_child(line)


def _count_one(gateway: Any, tools: list[Any], line: dict[str, Any]) -> int | str:
    from gymexp.gateway.chat import BadRequest

    request = line["request"]
    if "tools" in request:
        request = request | {"tools": tools[request["tools"]]}
    try:
        return len(gateway.read(request)[2])
    except (BadRequest, TokenMismatch) as error:
        return str(error)


if __name__ == "__main__":
    print("\n" + json.dumps(count(Path(sys.argv[1]), Path(sys.argv[2]))))
