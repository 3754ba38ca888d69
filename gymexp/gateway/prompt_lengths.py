"""Counts the tokens of each task's first prompt before a run starts, in a process without torch:

    python -m gymexp.gateway.prompt_lengths DIRECTORY REQUESTS

DIRECTORY is the model's, REQUESTS is the file that `gymexp.data.request_check` made. The last line of the
output is a JSON object: {task's key: number of tokens, or the gateway's reason for refusing the request}.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import re
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
from gymexp.gateway.tokenizer_check import digest
from gymexp.policy.hub_snapshot import directory_of
from gymexp.processes.module_call import call_module_once

_DEADLINE_S = 3600.0
_MAX_LISTED = 20  # problems in an error message
_IMAGE = re.compile(r"got a part of type '\w*image")
_ADVICE = {
    "image": "have images, which gymexp does not pass to the policy. Leave out these rows:",
    "long": "have a prompt without room for a reply. The longest has {longest} tokens: raise "
    "model.max_model_len to {needed} and the tokens of the replies (env.{env}.max_output_tokens a turn), or "
    "leave out these rows:",
    "refused": "have a prompt that the gateway or the policy's chat template refuses. Leave out these rows:",
}
_MIN_FOR_POOL = 2000  # requests; for fewer, one process counts all
# The files of gymexp that decide a count. The tokenizer and the requests decide it too.
_CODE = (
    *(f"gateway/{name}.py" for name in ("prompt_lengths", "server", "chat", "history", "reply")),
    "rollout/tokens.py",
    "policy/model.py",
)


def check(model: ModelConfig, prepared: Prepared, cache: Path) -> None:
    """Raises DataError if the first prompt of a task leaves no room for a reply in the context, or if the
    gateway refuses its request, e.g. as it has images. The message names the environment, the
    model.max_model_len that it needs, and each task's line and key.

    The environment's servers may add to the prompt later, which this check cannot see.
    """
    assert prepared.requests is not None, "the tasks of a resumed run were checked when the run began"
    counts = _counts(directory_of(model), prepared.requests, cache)
    tasks = itertools.chain(prepared.train, *prepared.validation.values())
    problems: dict[str, str] = {}
    kinds: dict[tuple[str, str], set[str]] = {}  # keys of an environment's tasks, by what is wrong with them
    keys_by_env: dict[str, set[str]] = {}
    for task in tasks:
        key, result = task.key, counts[task.key]
        keys_by_env.setdefault(task.env, set()).add(key)
        if isinstance(result, str):
            problems[key] = result
            kinds.setdefault((task.env, "image" if _IMAGE.search(result) else "refused"), set()).add(key)
        elif result >= model.max_model_len:
            problems[key] = f"its prompt has {result} tokens, model.max_model_len is {model.max_model_len}"
            kinds.setdefault((task.env, "long"), set()).add(key)
    if not problems:
        return
    lines = [f"the prompts of {len(problems)} tasks cannot be answered:"]
    for (env, kind), keys in kinds.items():
        longest = max((n for key in keys if isinstance(n := counts[key], int)), default=0)
        share = f"env.{env}: {len(keys)} of {len(keys_by_env[env])} tasks"
        lines.append(f"{share} {_ADVICE[kind].format(env=env, longest=longest, needed=longest + 1)}")
    places = {line["key"]: line["at"] for line in _lines(prepared.requests) if line.get("key") in problems}
    first = itertools.islice(problems.items(), _MAX_LISTED)
    lines += [f"{places[key]} ({key}): {problem}" for key, problem in first]
    if hidden := len(problems) - _MAX_LISTED:
        lines += [f"and {hidden} more"] * (hidden > 0)
    raise DataError("\n".join(lines))


def _counts(directory: Path, requests: Path, cache: Path) -> dict[str, int | str]:
    """Returns {task's key: token count or refusal}, from the cache or computed by `count` in another
    process.
    """
    answer_file = cache / "prompts" / f"{digest(directory, _CODE, sha256_of(requests))}.json"
    arguments = ["gymexp.gateway.prompt_lengths", directory, requests]
    return call_module_once(arguments, f"counting the tokens of {requests}", _DEADLINE_S, answer_file)


def _lines(requests: Path) -> Iterator[dict[str, Any]]:
    with requests.open("rb") as file:
        yield from map(orjson.loads, file)


def count(directory: Path, requests: Path) -> dict[str, int | str]:
    """Returns {task's key: the tokens of its first prompt, or the gateway's reason for refusing the request}.

    directory: the model's. requests: the file that `gymexp.data.request_check` made. Imports transformers,
    and keeps it from importing torch unless torch is imported already.
    """
    from gymexp.gateway.server import Gateway, GatewayConfig, load_tokenizer

    gateway = Gateway(GatewayConfig(engine_urls=()), load_tokenizer(directory))
    lines = list(_lines(requests))
    tools = [line["tools"] for line in lines if "tools" in line]
    tasks = [line for line in lines if "key" in line]
    keys = [line["key"] for line in tasks]
    count_task = partial(_count_task, gateway, tools)
    if len(tasks) < _MIN_FOR_POOL:
        return dict(zip(keys, map(count_task, tasks), strict=True))
    global _inherited
    _inherited = count_task  # forked workers inherit it, so that the tokenizer need not be pickled
    with multiprocessing.get_context("fork").Pool() as pool:
        return dict(zip(keys, pool.map(_count_in_worker, tasks, chunksize=100), strict=True))


_inherited: Any = None


def _count_in_worker(task: dict[str, Any]) -> int | str:
    return _inherited(task)


def _count_task(gateway: Any, tools: list[Any], task: dict[str, Any]) -> int | str:
    """Returns the number of tokens of the task's first prompt, or the gateway's reason for refusing it; 0 for
    one that is known only when the environment has begun.

    tools: lists of tools; the request names one of them by its index.
    """
    from gymexp.gateway.chat import BadRequest

    request = task["request"]
    if not request["messages"]:
        return 0
    if "tools" in request:
        request = request | {"tools": tools[request["tools"]]}
    try:
        return len(gateway.read(request)[2])
    except (BadRequest, TokenMismatch) as error:
        return str(error)


if __name__ == "__main__":
    print("\n" + json.dumps(count(Path(sys.argv[1]), Path(sys.argv[2]))))
