"""Which NeMo Gym servers a run needs, and their start: NeMo Gym's own YAML files, with replicas, ports and
the policy.

An environment is its agent and every server that the agent refers to. With `replicas: N` these exist N times
and rollouts are spread over them; the model server, which only passes requests on to the policy endpoint, is
shared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from gymexp.config.names import nearest
from gymexp.config.schema import EnvConfig, GymConfig
from gymexp.errors import ConfigError
from gymexp.record.places import OWN_SERVERS as KINDS
from gymexp.record.places import own_servers
from gymexp.record.services import Replica

POLICY = "policy_model"


@dataclass
class Layout:
    """The servers of a run. `config` is what NeMo Gym calls the global config dict."""

    config: dict[str, Any] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)  # server name -> Python module
    replicas: dict[str, list[Replica]] = field(default_factory=dict)  # by environment
    policy_key: str | None = None  # what servers that gymexp did not start say to the policy


def plan(
    envs: Mapping[str, EnvConfig],
    gym: GymConfig,
    site: Path,
    policy_url: str,
    port: Callable[[str], int],
    chat_template_kwargs: Mapping[str, Any] | None = None,
    host: str = "127.0.0.1",
    key: str = "none",
) -> Layout:
    """The servers of `envs`. site: where NeMo Gym's folders lie. port: gives each server, by name, its port
    on `host`.

    chat_template_kwargs: `model.chat_template_kwargs`, which the model server sends along with every request.
    key: what it says to the policy.
    """
    layout = Layout(config={"head_server": {"host": "127.0.0.1", "port": 0}})

    def add(name: str, kind: str, implementation: str, values: dict[str, Any]) -> str:
        values = values | {"host": host, "port": port(name)}
        layout.config[name] = {kind: {implementation: values}}
        layout.modules[name] = f"{kind}.{implementation}.{Path(values['entrypoint']).stem}"
        return f"http://{host}:{values['port']}"

    models = [POLICY if i == 0 else f"{POLICY}-{i}" for i in range(gym.model_servers)]
    for model in models:
        values = model_server(policy_url, chat_template_kwargs, key)
        add(model, "responses_api_models", "vllm_model", values)
    count = 0
    for env_name, env in envs.items():
        defined = read_config(env_name, env, site)
        needed = _closure(defined, env.agent)
        layout.replicas[env_name] = []
        for index in range(env.replicas):
            suffix = f"-{index}" if env.replicas > 1 else ""
            names = {old: f"{env_name}-{old}{suffix}" for old in needed}
            model = models[count % len(models)]
            count += 1
            urls = {}
            for old, new in names.items():
                kind, implementation, values = _server_of(defined[old])
                values = _renamed(values, names | {POLICY: model})
                if old == env.agent and env.max_steps is not None:
                    values["max_steps"] = env.max_steps
                urls[old] = add(new, kind, implementation, values)
            services = [*names.values(), model]
            resources = [new for new in names.values() if KINDS[0] in layout.config[new]]
            _, _, agent = _server_of(layout.config[names[env.agent]])
            limit = agent.get("max_steps")
            replica = Replica(names[env.agent], env.agent, urls[env.agent], services, resources, limit)
            layout.replicas[env_name].append(replica)
    return layout


def read_config(env_name: str, env: EnvConfig, site: Path) -> dict[str, Any]:
    """The servers that an environment's NeMo Gym file defines, by name; the working directory goes before
    NeMo Gym's, and a job's frozen copy before both."""
    places = (own_servers(), Path.cwd(), site)
    path = next((at / env.config_path for at in places if (at / env.config_path).exists()), None)
    if path is None:
        raise ConfigError(f"env.{env_name}.config_path: {env.config_path} is neither here nor in {site}")
    loaded: Any = OmegaConf.load(path)
    for nested in loaded.get("config_paths") or []:
        loaded = OmegaConf.merge(loaded, OmegaConf.load(site / nested))
    defined = OmegaConf.to_container(loaded, resolve=False)
    assert isinstance(defined, dict)
    agents = [str(n) for n, v in defined.items() if isinstance(v, dict) and "responses_api_agents" in v]
    if env.agent not in agents:
        raise ConfigError(
            f"env.{env_name}.agent must be an agent of {env.config_path}, got {env.agent!r}"
            f"{nearest(env.agent, agents)}. Agents there: {', '.join(agents)}"
        )
    return {str(name): value for name, value in defined.items()}


def model_server(
    policy_url: str, chat_template_kwargs: Mapping[str, Any] | None, key: str = "none"
) -> dict[str, Any]:
    """The configuration of NeMo Gym's model server: the gateway is its policy."""
    return {
        "entrypoint": "app.py",
        "base_url": f"{policy_url}/v1",
        "api_key": key,
        "model": "policy",
        "return_token_id_information": True,
        "uses_reasoning_parser": True,
        "chat_template_kwargs": dict(chat_template_kwargs or {}) or None,
    }


def _server_of(entry: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    kind = next(k for k in KINDS if k in entry)
    implementation, values = next(iter(entry[kind].items()))
    values = {k: v for k, v in values.items() if k != "datasets"}
    return kind, implementation, values


def _closure(defined: dict[str, Any], agent: str) -> list[str]:
    """The agent and every server it refers to, in the file's order; the policy model is not one of the file's
    own."""
    needed, open_ = {agent}, [agent]
    while open_:
        for name in _references(_server_of(defined[open_.pop()])[2]):
            if name != POLICY and name not in needed:
                if name not in defined:
                    raise ConfigError(f"{agent} refers to the server {name}, which its file does not define")
                needed.add(name)
                open_.append(name)
    return [name for name in defined if name in needed]


def _is_reference(value: Any) -> bool:
    return isinstance(value, dict) and value.get("type") in KINDS and isinstance(value.get("name"), str)


def _references(value: Any) -> list[str]:
    if _is_reference(value):
        return [value["name"]]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [name for child in children for name in _references(child)]


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    if _is_reference(value):
        return copy.deepcopy(value) | {"name": names.get(value["name"], value["name"])}
    if isinstance(value, dict):
        return {k: _renamed(v, names) for k, v in value.items()}
    if isinstance(value, list):
        return [_renamed(v, names) for v in value]
    return value
