"""Plans the NeMo Gym servers of a run: NeMo Gym's own YAML files, plus replicas, ports and the policy.

An environment consists of its agent and every server that the agent refers to. With `replicas: N` each of
these exists N times, and rollouts are spread over the replicas. The model servers, which only pass requests
on to the policy endpoint, are shared. A replica asks one of them, and so one gateway, in all its rollouts.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gymexp.config.schema import EnvConfig, GymConfig
from gymexp.gym.definitions import (
    OF_THE_POLICY,
    POLICY,
    is_reference,
    module_of,
    playable_servers,
    server_of,
    servers_of_agent,
)
from gymexp.gym.environment_server import front_of
from gymexp.gym.open_values import MODELS
from gymexp.gym.server_settings import JUDGE, OF_THE_JUDGE, paths_of
from gymexp.record.places import OWN_SERVERS as KINDS
from gymexp.record.services_file import Replica

_MOST_REPLICAS = 32  # of an environment with replicas=auto


@dataclass
class Layout:
    """The servers of a run. `config` is what NeMo Gym calls the global config dict."""

    config: dict[str, Any] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)  # server name -> Python module
    replicas: dict[str, list[Replica]] = field(default_factory=dict)  # by environment
    judges: dict[str, float] = field(default_factory=dict)  # model server -> limit of a call in seconds
    keys: dict[str, str] = field(default_factory=dict)  # server name -> its key in the user's configuration
    asked: dict[str, list[list[str]]] = field(default_factory=dict)  # server name -> keys that the user sets
    policy_key: str | None = None  # the API key that servers which gymexp did not start send to the policy

    @property
    def spares(self) -> set[str]:
        """The servers that start only once a replica of an environment with replicas=auto is needed."""
        replicas = [replica for of_env in self.replicas.values() for replica in of_env if replica.spare]
        names = {name for replica in replicas for name in replica.services}
        return {name for name in names if "responses_api_models" not in self.config[name]}


def most_replicas(env: EnvConfig) -> int:
    """Returns how many replicas of an environment a run may have at once: with replicas=auto one a core."""
    if isinstance(env.replicas, int):
        return env.replicas
    return max(1, min(len(os.sched_getaffinity(0)), _MOST_REPLICAS))


def plan(
    envs: Mapping[str, EnvConfig],
    gym: GymConfig,
    site: Path,
    policy_urls: Sequence[str],
    port: Callable[[str], int],
    chat_template_kwargs: Mapping[str, Any] | None = None,
    host: str = "127.0.0.1",
    key: str = "none",
    gives_tokens: bool = True,
    python: Path | None = None,
) -> Layout:
    """Returns the servers of `envs`.

    site: the directory of NeMo Gym's folders. policy_urls: the gateways' addresses, one for each model server
    or one for all. port: returns the port on `host` of a server, by its name. chat_template_kwargs:
    `model.chat_template_kwargs`, which a model server adds to every request. key: the API key that a model
    server sends to the policy. gives_tokens: whether the policy's answers have token
    ids. python: NeMo Gym's interpreter, for files with NeMo Gym's directives. Raises ConfigError if an
    environment cannot be played.
    """
    layout = Layout(config={"head_server": {"host": "127.0.0.1", "port": 0}})

    def add(name: str, kind: str, implementation: str, values: dict[str, Any]) -> str:
        values = values | {"host": host, "port": port(name)}
        layout.config[name] = {kind: {implementation: values}}
        layout.modules[name] = module_of(kind, implementation, values)
        return f"http://{host}:{values['port']}"

    models = [POLICY if i == 0 else f"{POLICY}-{i}" for i in range(gym.model_servers)]
    for number, model in enumerate(models):
        url = policy_urls[number % len(policy_urls)]
        values = model_server(url, chat_template_kwargs, key, gives_tokens)
        add(model, "responses_api_models", "vllm_model", values)
    count = 0
    for env_name, env in envs.items():
        defined = playable_servers(env_name, env, site, python, gives_tokens)
        needed = servers_of_agent(defined, env.agent)
        if JUDGE in defined:  # a server may know its address alone
            needed = [JUDGE, *(name for name in needed if name != JUDGE)]
        layout.replicas[env_name] = []
        most = most_replicas(env)
        for index in range(most):
            suffix = f"-{index}" if most > 1 else ""
            names = {old: f"{env_name}-{old}{suffix}" for old in needed}
            model, gateway = models[count % len(models)], count % len(models) % len(policy_urls)
            given = dict(zip(OF_THE_POLICY, (f"{policy_urls[gateway]}/v1", key, "policy"), strict=True))
            count += 1
            urls, of_judge = {}, {}
            for old, new in names.items():
                kind, implementation, values = server_of(defined[old])
                values = _with_new_names(values, names | {POLICY: model}, given | of_judge)
                if old == env.agent and env.max_steps is not None:
                    values["max_steps"] = env.max_steps
                urls[old] = add(new, kind, implementation, values)
                at = f"env.{env_name}.servers.{old}"
                layout.keys[new] = f"env.{env_name}.judge" if old == JUDGE else at
                layout.asked[new] = [[at, *path] for path in paths_of(env.servers.get(old, {}))]
                if kind == MODELS:
                    layout.judges[new] = env.timeout_s
                if old == JUDGE:
                    parts = f"{urls[old]}/v1", "none", env.judge.model or ""
                    of_judge = dict(zip(OF_THE_JUDGE, parts, strict=True))
            services = [*names.values(), model]
            resources = [new for new in names.values() if KINDS[0] in layout.config[new]]
            _, _, agent = server_of(layout.config[names[env.agent]])
            limit = agent.get("max_steps")
            front = front_of(defined, env.agent)
            url = urls[front or env.agent]
            spare = index > 0 and env.replicas == "auto"
            replica = Replica(
                names[env.agent], env.agent, url, services, resources, limit, bool(front), spare, gateway
            )
            layout.replicas[env_name].append(replica)
    return layout


def model_server(
    policy_url: str,
    chat_template_kwargs: Mapping[str, Any] | None,
    key: str = "none",
    gives_tokens: bool = True,
) -> dict[str, Any]:
    """Returns the configuration of NeMo Gym's model server, with the gateway as its policy."""
    return {
        "entrypoint": "app.py",
        "base_url": f"{policy_url}/v1",
        "api_key": key,
        "model": "policy",
        "return_token_id_information": gives_tokens,
        "uses_reasoning_parser": True,
        "chat_template_kwargs": dict(chat_template_kwargs or {}) or None,
    }


def _with_new_names(value: Any, names: Mapping[str, str], given: Mapping[str, str]) -> Any:
    """Returns a configuration whose references to servers have the new names, and whose `${…}` have the given
    values. names: new name by old name."""
    if is_reference(value):
        return copy.deepcopy(value) | {"name": names.get(value["name"], value["name"])}
    if isinstance(value, dict):
        return {k: _with_new_names(v, names, given) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_new_names(v, names, given) for v in value]
    if isinstance(value, str):
        for key, text in given.items():
            value = value.replace(f"${{{key}}}", text)
    return value
