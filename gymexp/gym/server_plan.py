"""Plans the NeMo Gym servers of a run: NeMo Gym's own YAML files, plus replicas, ports and the policy.

An environment consists of its agent and every server that the agent refers to. With `replicas: N` each of
these exists N times, and rollouts are spread over the replicas. The model server, which only passes requests
on to the policy endpoint, is shared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from gymexp.config.schema import EnvConfig, GymConfig
from gymexp.config.suggestions import nearest
from gymexp.errors import ConfigError
from gymexp.record.places import OWN_SERVERS as KINDS
from gymexp.record.places import own_servers
from gymexp.record.services_file import Replica

POLICY = "policy_model"


@dataclass
class Layout:
    """The servers of a run. `config` is what NeMo Gym calls the global config dict."""

    config: dict[str, Any] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)  # server name -> Python module
    replicas: dict[str, list[Replica]] = field(default_factory=dict)  # by environment
    policy_key: str | None = None  # the API key that servers which gymexp did not start send to the policy


def plan(
    envs: Mapping[str, EnvConfig],
    gym: GymConfig,
    site: Path,
    policy_url: str,
    port: Callable[[str], int],
    chat_template_kwargs: Mapping[str, Any] | None = None,
    host: str = "127.0.0.1",
    key: str = "none",
    gives_tokens: bool = True,
) -> Layout:
    """Returns the servers of `envs`.

    site: the directory of NeMo Gym's folders. port: returns the port on `host` of a server, by its name.
    chat_template_kwargs: `model.chat_template_kwargs`, which the model server adds to every request. key: the
    API key that the model server sends to the policy. gives_tokens: whether the policy's answers have token
    ids. Raises ConfigError if a file or an agent does not
    exist.
    """
    layout = Layout(config={"head_server": {"host": "127.0.0.1", "port": 0}})

    def add(name: str, kind: str, implementation: str, values: dict[str, Any]) -> str:
        values = values | {"host": host, "port": port(name)}
        layout.config[name] = {kind: {implementation: values}}
        layout.modules[name] = f"{kind}.{implementation}.{Path(values['entrypoint']).stem}"
        return f"http://{host}:{values['port']}"

    models = [POLICY if i == 0 else f"{POLICY}-{i}" for i in range(gym.model_servers)]
    for model in models:
        values = model_server(policy_url, chat_template_kwargs, key, gives_tokens)
        add(model, "responses_api_models", "vllm_model", values)
    count = 0
    for env_name, env in envs.items():
        defined = read_config(env_name, env, site)
        needed = _servers_of_agent(defined, env.agent)
        layout.replicas[env_name] = []
        for index in range(env.replicas):
            suffix = f"-{index}" if env.replicas > 1 else ""
            names = {old: f"{env_name}-{old}{suffix}" for old in needed}
            model = models[count % len(models)]
            count += 1
            urls = {}
            for old, new in names.items():
                kind, implementation, values = _server_of(defined[old])
                values = _with_new_names(values, names | {POLICY: model})
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
    """Returns the servers that an environment's NeMo Gym file defines, by name. A file in the working
    directory has precedence over NeMo Gym's, and a job's frozen copy over both. Raises ConfigError if the
    file does not exist or does not define the environment's agent."""
    places = (own_servers(), Path.cwd(), site)
    path = next((at / env.config_path for at in places if (at / env.config_path).exists()), None)
    if path is None:
        raise ConfigError(
            f"env.{env_name}.config_path: {env.config_path} is neither in {Path.cwd()} nor in {site}"
        )
    loaded: Any = OmegaConf.load(path)
    for nested in loaded.get("config_paths") or []:
        loaded = OmegaConf.merge(loaded, OmegaConf.load(site / nested))
    defined = OmegaConf.to_container(loaded, resolve=False)
    assert isinstance(defined, dict)
    agents = [str(n) for n, v in defined.items() if isinstance(v, dict) and "responses_api_agents" in v]
    if env.agent not in agents:
        raise ConfigError(
            f"env.{env_name}.agent must be an agent of {env.config_path}, got {env.agent!r}"
            f"{nearest(env.agent, agents)}. Its agents: {', '.join(agents)}"
        )
    return {str(name): value for name, value in defined.items()}


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


def _server_of(entry: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """Returns the kind, the implementation and the configuration of a server, without its data sets."""
    kind = next(k for k in KINDS if k in entry)
    implementation, values = next(iter(entry[kind].items()))
    values = {k: v for k, v in values.items() if k != "datasets"}
    return kind, implementation, values


def _servers_of_agent(defined: dict[str, Any], agent: str) -> list[str]:
    """Returns the agent and every server that it refers to, in the file's order, without the policy's model
    server, which gymexp defines."""
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
    """Returns the names of all servers that a configuration refers to."""
    if _is_reference(value):
        return [value["name"]]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [name for child in children for name in _references(child)]


def _with_new_names(value: Any, names: Mapping[str, str]) -> Any:
    """Returns a configuration whose references to servers have the new names. names: new name by old name."""
    if _is_reference(value):
        return copy.deepcopy(value) | {"name": names.get(value["name"], value["name"])}
    if isinstance(value, dict):
        return {k: _with_new_names(v, names) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_new_names(v, names) for v in value]
    return value
