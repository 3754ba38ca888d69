"""The rules of what a user sets about an environment of NeMo Gym's: its judge, its servers, its prompts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from gymexp.config.schema import EnvConfig, JudgeConfig

_VARIABLE = r"[A-Za-z_][A-Za-z0-9_]{0,63}"
KEY_ENV = "key_env"  # {key_env: NAME} as the value of a server's key
# Keys of a server's configuration that gymexp gives, and what to set instead.
_GIVEN = {
    "host": "gymexp chooses it",
    "port": "gymexp chooses it",
    "num_workers": "env.<name>.replicas makes more of a server",
    "entrypoint": "a server of your own in the working directory has another",
    "name": "gymexp chooses it",
    "datasets": "env.<name>.data says where the rows come from",
}


def problems_of_environment(at: str, env: EnvConfig, runtime: str) -> Iterator[str]:
    """Yields a line for each rule that the environment breaks. at: its key, e.g. env.sudoku."""
    yield from _judge_problems(f"{at}.judge", env.judge)
    yield from _server_problems(f"{at}.servers", env.servers)
    if env.system_prompt is not None and not env.system_prompt.strip():
        yield f"{at}.system_prompt must have a text, got {env.system_prompt!r}: leave it out"
    for key in ("judge", "servers"):
        if runtime != "managed" and getattr(env, key) != getattr(EnvConfig(), key):
            yield (
                f"{at}.{key} must be left out with gym.runtime={runtime}, whose servers are configured by "
                "their own files"
            )
    yield from _data_problems(at, env)


def _judge_problems(at: str, judge: JudgeConfig) -> Iterator[str]:
    if judge == JudgeConfig():
        return
    if not re.fullmatch(r"https?://[^\s@?#/]+(/[^\s@?#]*)?", judge.url or ""):
        yield f"{at}.url must be an address like http://127.0.0.1:8000/v1, got {judge.url!r}"
    elif (judge.url or "").rstrip("/").endswith("/completions"):
        yield f"{at}.url must end before /chat/completions, which NeMo Gym adds, got {judge.url!r}"
    if not judge.model:
        yield f"{at}.model must be the server's name of the model, got {judge.model!r}"
    if judge.key_env is not None and not re.fullmatch(_VARIABLE, judge.key_env):
        yield f"{at}.key_env must be the name of an environment variable, not the key itself"


def _server_problems(at: str, servers: Mapping[str, Any]) -> Iterator[str]:
    for server, values in servers.items():
        if not isinstance(values, dict) or not values:
            yield f"{at}.{server} must have keys of that server, as in {at}.{server}.<key>=…, got {values!r}"
            continue
        for key in values:
            if key in _GIVEN:
                yield f"{at}.{server}.{key} must be left out: {_GIVEN[key]}"
        for path, name in variables_in(values, f"{at}.{server}"):
            if not isinstance(name, str) or not re.fullmatch(_VARIABLE, name):
                yield f"{path}.{KEY_ENV} must be the name of an environment variable, not the value itself"


def variables_in(value: Any, at: str) -> Iterator[tuple[str, Any]]:
    """Yields the path and the variable's name of each {key_env: NAME} at or below `at`."""
    if isinstance(value, dict) and set(value) == {KEY_ENV}:
        yield at, value[KEY_ENV]
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from variables_in(inner, f"{at}.{key}")


def variables_of(name: str, env: EnvConfig) -> Iterator[tuple[str, str]]:
    """Yields the key and the environment variable of each secret that an environment's servers need."""
    if env.judge.key_env:
        yield f"env.{name}.judge.{KEY_ENV}", env.judge.key_env
    for path, variable in variables_in(env.servers, f"env.{name}.servers"):
        yield f"{path}.{KEY_ENV}", variable


def _data_problems(at: str, env: EnvConfig) -> Iterator[str]:
    data, at = env.data, f"{at}.data"
    for key in ("validation_share", "prompt_config"):
        if data.source == "generate" and getattr(data, key) is not None:
            yield f"{at}.{key} must be left out with source=generate, whose tasks are made whole"
    if data.validation_share is None:
        return
    if not 0 < data.validation_share < 1:
        yield f"{at}.validation_share must be above 0 and below 1, got {data.validation_share!r}"
    if data.validation_file and data.source in ("jsonl", "huggingface"):
        yield (
            f"{at}.validation_share holds out a part of the training tasks, and {at}.validation_file names "
            f"others, got {data.validation_file!r}: leave one of them out ({at}.validation_file=null)"
        )
