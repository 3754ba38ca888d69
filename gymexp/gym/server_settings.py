"""What a user sets about the servers of an environment: `env.<name>.servers` and `env.<name>.judge`.

Both change the definitions that NeMo Gym's file makes, before the servers are planned. The judge becomes one
more server, NeMo Gym's own vllm_model in front of the judge's endpoint, and every resources server that asks
a model asks that one. Secrets are named by their environment variables, which the servers' own processes
read, so no file of the run has them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from gymexp.config.env_rules import KEY_ENV, variables_of
from gymexp.config.schema import EnvConfig, JudgeConfig
from gymexp.config.suggestions import nearest
from gymexp.errors import ConfigError
from gymexp.record.places import OWN_SERVERS as KINDS

JUDGE = "user_judge"  # the name of the judge's server among those of its environment
# What stands for the address, the key and the name of the judge's server until that is planned.
OF_THE_JUDGE = ("gymexp_judge_base_url", "gymexp_judge_api_key", "gymexp_judge_model_name")
_MODELS = "responses_api_models"
_OPEN = re.compile(r"\$\{(\w+)\}")
_GENRM = "genrm_model"  # it takes messages that no chat template of another model has


def with_settings(name: str, env: EnvConfig, servers: dict[str, Any], reached: list[str]) -> dict[str, Any]:
    """Returns the servers with what `env.<name>.servers` sets. servers: those of NeMo Gym's file. reached:
    those that the agent leads to. Raises ConfigError for a server that is none of them."""
    changed = dict(servers)
    for server, values in env.servers.items():
        if server not in reached:
            raise ConfigError(
                f"env.{name}.servers.{server} is no server of {env.agent}{nearest(server, reached)}. "
                f"Its servers: {', '.join(reached)}"
            )
        kind = next(kind for kind in KINDS if kind in servers[server])
        [(implementation, defined)] = servers[server][kind].items()
        changed[server] = {kind: {implementation: _merged(defined, values)}}
    return changed


def paths_of(values: Mapping[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yields the path of every key of a server that `env.<name>.servers` sets."""
    for key, value in values.items():
        if isinstance(value, dict) and value and set(value) != {KEY_ENV}:
            yield from paths_of(value, (*at, str(key)))
        else:
            yield *at, str(key)


def with_judge(servers: dict[str, Any], reached: list[str], judge: JudgeConfig) -> dict[str, Any] | None:
    """Returns the servers with the judge in place of every model that the resources servers among `reached`
    ask; None if they ask none."""
    changed = dict(servers)
    for name in reached:
        kind = next(k for k in KINDS if k in servers[name])
        [(implementation, values)] = servers[name][kind].items()
        if kind == "resources_servers" and values.get("should_use_judge") is not False:
            judged = _judged(values, servers)
            if judged != values:
                changed[name] = {kind: {implementation: judged}}
    if changed == servers:
        return None
    definition = {
        "entrypoint": "app.py",
        "base_url": (judge.url or "").rstrip("/"),
        "api_key": _variable(judge.key_env) if judge.key_env else "none",
        "model": judge.model,
        "return_token_id_information": False,
        "uses_reasoning_parser": True,
    }
    return changed | {JUDGE: {_MODELS: {"vllm_model": definition}}}


def check_variables(envs: Mapping[str, EnvConfig]) -> None:
    """Raises ConfigError if an environment variable that servers of `envs` need is not set."""
    for name, env in envs.items():
        for key, variable in variables_of(name, env):
            if not os.environ.get(variable):
                raise ConfigError(
                    f"{key}={variable} must name an environment variable that is set: "
                    f"read -rs {variable}; export {variable}"
                )


def _merged(old: Any, new: Any) -> Any:
    if not isinstance(new, dict):
        return new
    if set(new) == {KEY_ENV}:
        return _variable(new[KEY_ENV])
    old = old if isinstance(old, dict) else {}
    return old | {key: _merged(old.get(key), value) for key, value in new.items()}


def _variable(name: str) -> str:
    return f"${{oc.env:{name}}}"


def _judged(value: Any, servers: Mapping[str, Any], key: str = "") -> Any:
    """Returns a configuration that refers to the judge's server where it refers to a model, and where it says
    `${…}` for something of a judge's."""
    if isinstance(value, dict):
        if value.get("type") == _MODELS and isinstance(value.get("name"), str):
            is_genrm = _GENRM in servers.get(value["name"], {}).get(_MODELS, {})
            return value if is_genrm else value | {"name": JUDGE}
        return {k: _judged(v, servers, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_judged(inner, servers, key) for inner in value]
    if not isinstance(value, str):
        return value
    return _OPEN.sub(lambda match: _of_judge(match, key), value)


def _of_judge(match: re.Match[str], key: str) -> str:
    """Returns what stands for the judge's part that a `${…}` asks for; the same text if it asks for none."""
    url, api_key, model = (f"${{{name}}}" for name in OF_THE_JUDGE)
    asked = match[1]
    if "judge" not in f"{key} {asked}".lower():
        return match[0]
    return url if asked.endswith("url") else api_key if asked.endswith("key") else model
