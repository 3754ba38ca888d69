"""NeMo Gym servers whose addresses gymexp did not choose, found through their head server.

With `gym.runtime=attach` the servers run already; with `gym.runtime=cli` the user's own checkout starts them
with `gym env start`. In both cases the head server gives the address of each agent.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
import urllib.error
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from gymexp.config.schema import EnvConfig
from gymexp.config.suggestions import nearest
from gymexp.errors import ConfigError, ServiceError
from gymexp.gym.definitions import POLICY
from gymexp.gym.environment_server import KIND, front_of
from gymexp.processes.access_keys import POLICY as POLICY_KEY
from gymexp.processes.http_client import no_proxy, open_url
from gymexp.record.services_file import Replica

_TIMEOUT_S = 5.0


def read_head(host: str, port: int) -> dict[str, Any]:
    """Returns the head server's global config dict. Raises ServiceError if no head server answers.

    The dict contains API keys in clear text: keep it out of logs and files.
    """
    url = f"http://{host}:{port}/global_config_dict_yaml"
    try:
        with open_url(url, _TIMEOUT_S) as response:
            text = json.loads(response.read())
        if not isinstance(text, str):
            raise ValueError("its answer is not YAML in a JSON string")
        config = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
        if not isinstance(config, dict):
            raise ValueError("its answer is not a mapping")
    except (urllib.error.URLError, OSError, ValueError, OmegaConfBaseException, YAMLError) as error:
        raise ServiceError(
            f"gym.head_host and gym.head_port must be those of a running NeMo Gym head server, "
            f"but {url} does not answer as one: {error}"
        ) from None
    return {str(k): v for k, v in config.items()}


def replicas_of(head: Mapping[str, Any], envs: Mapping[str, EnvConfig]) -> dict[str, list[Replica]]:
    """Returns each environment's agent at the address from the head server. head: the global config dict.
    Raises ConfigError if the head server does not list an agent."""
    agents = {
        name: next(iter(entry["responses_api_agents"].values()))
        for name, entry in head.items()
        if isinstance(entry, dict) and "responses_api_agents" in entry
    }
    replicas = {}
    for name, env in envs.items():
        if env.agent not in agents:
            raise ConfigError(
                f"env.{name}.agent must be an agent of the running servers, got {env.agent!r}"
                f"{nearest(env.agent, list(agents))}. They have: {', '.join(agents) or 'none'}"
            )
        limit = agents[env.agent].get("max_steps")
        front = front_of(head, env.agent)
        [values] = head[front][KIND].values() if front else [agents[env.agent]]
        url = f"http://{values['host']}:{values['port']}"
        replicas[name] = [Replica(env.agent, env.agent, url, ["gym"], [], limit, bool(front))]
    return replicas


def check_policy(head: Mapping[str, Any], port: int) -> str:
    """Checks that the running model server uses the gateway as its policy. Returns the API key that the model
    server sends to the gateway.

    head: the global config dict. port: the gateway's port. Raises ConfigError that names the addresses that
    the model server uses instead, or if the model server asks for no token ids.
    """
    models = (head.get(POLICY) or {}).get("responses_api_models") or {}
    if not models:
        raise ConfigError(f"the running NeMo Gym servers must have a model server named {POLICY}, got none")
    for values in models.values():
        urls = values.get("base_url")
        urls = [urls] if isinstance(urls, str) else urls or []
        if not any(f":{port}/" in f"{url}/" for url in urls):
            raise ConfigError(
                "gym.policy_port must be the port of the running servers' policy_base_url "
                f"({', '.join(urls)}), got {port}"
            )
        if not values.get("return_token_id_information"):
            raise ConfigError(
                "the running NeMo Gym model server must have return_token_id_information: true "
                "(vllm_model_for_training.yaml has it); without it rollouts carry no tokens to train on"
            )
    return str(next(iter(models.values())).get("api_key"))


def start_command(python: Path, envs: Mapping[str, EnvConfig], head_port: int, policy_url: str) -> list[str]:
    """Returns the command line of `gym env start` for the environments, with the gateway as the policy and a
    head server on `head_port`."""
    paths = [env.config_path for env in envs.values()]
    paths.append("responses_api_models/vllm_model/configs/vllm_model_for_training.yaml")
    steps = [
        f"++{env.agent}.responses_api_agents.simple_agent.max_steps={env.max_steps}"
        for env in envs.values()
        if env.max_steps is not None
    ]
    return [
        str(python.with_name("gym")),
        "env",
        "start",
        f"+config_paths=[{','.join(dict.fromkeys(paths))}]",
        f"+policy_base_url={policy_url}/v1",
        # A reference to the variable, so that neither `ps` nor the head server shows the key.
        f"+policy_api_key=${{oc.env:{POLICY_KEY},none}}",
        "+policy_model_name=policy",
        f"+head_server.port={head_port}",
        "+head_server.host=127.0.0.1",
        *steps,
    ]


def start_environment(python: Path) -> dict[str, str]:
    """Returns the environment variables of `gym env start`: PATH with its own venv first, and with the `uv`
    that it calls."""
    from uv import find_uv_bin

    path = os.environ.get("PATH", os.defpath)
    return {"PATH": os.pathsep.join([str(python.parent), path, os.path.dirname(find_uv_bin())])} | no_proxy()


async def wait_for_agents(
    head_host: str, head_port: int, envs: Mapping[str, EnvConfig], deadline_s: float
) -> dict[str, list[Replica]]:
    """Waits until every agent answers and returns the replicas. Raises ServiceError after `deadline_s`."""
    until = time.monotonic() + deadline_s
    while True:
        try:
            return await asyncio.to_thread(_answering, head_host, head_port, envs)
        except (ServiceError, OSError) as error:
            if time.monotonic() > until:
                raise ServiceError(
                    f"NeMo Gym's servers were not ready within {deadline_s:.0f} s "
                    f"(gym.start_timeout_s): {error}"
                ) from None
            await asyncio.sleep(0.5)


def _answering(head_host: str, head_port: int, envs: Mapping[str, EnvConfig]) -> dict[str, list[Replica]]:
    replicas = replicas_of(read_head(head_host, head_port), envs)
    for env_replicas in replicas.values():
        open_url(env_replicas[0].url, _TIMEOUT_S).close()
    return replicas
