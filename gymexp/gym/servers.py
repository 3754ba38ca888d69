"""Which NeMo Gym servers a run needs, and their start: NeMo Gym's own YAML files, with replicas, ports and
the policy.

An environment is its agent and every server that the agent refers to. With `replicas: N` these exist N times
and rollouts are spread over them; the model server, which only passes requests on to the policy endpoint, is
shared.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from omegaconf import OmegaConf

from gymexp.config import EnvConfig, GymConfig
from gymexp.errors import ConfigError, ServiceError
from gymexp.gym.install import environ_for
from gymexp.names import nearest
from gymexp.run.directory import OWN_SERVERS as KINDS
from gymexp.run.directory import own_servers
from gymexp.run.last_words import reason
from gymexp.run.process import Child, LocalProcess, Running

_ALIVE_S = 1.0
_FIRST_WORD_S = 0.5  # for the supervisor to say how the host ended, before its servers say that it did
_HOST = Path(__file__).with_name("host.py")  # not imported: it runs in NeMo Gym's Python
POLICY = "policy_model"


@dataclass(frozen=True)
class Replica:
    """One instance of an environment: where its agent is, and the services that its rollouts pass through."""

    name: str
    agent: str  # the agent's name in NeMo Gym's file: what a row's agent_ref says
    url: str
    services: list[str]
    resources: list[str]  # those of them that are resources servers
    max_steps: int | None = None  # the agent's limit of model turns


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


class _Forked(LocalProcess):
    """A server that the host forked."""

    def __init__(self, pid: int, ended: asyncio.Future[int]) -> None:
        super().__init__(pid)
        self._ended = ended

    async def wait(self) -> int:
        return await asyncio.shield(self._ended)  # who waits may be cancelled before it has ended


class GymHost:
    """The process that holds NeMo Gym and forks its servers (`gymexp/gym/host.py`)."""

    def __init__(
        self, python: Path, layout: Layout, sockets: Mapping[str, Any], log: Path, key: str | None = None
    ) -> None:
        """key: what the servers demand of whoever asks them, each other as well (None: nothing)."""
        self._key = key
        self.python = python
        self._layout = layout
        self._sockets = sockets
        self.log = log
        self._loaded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._starting: asyncio.Queue[asyncio.Future[_Forked]] = asyncio.Queue()
        self._ends: dict[int, asyncio.Future[int]] = {}
        self._order = asyncio.Lock()

    async def start(self, heard: Callable[[], None] = lambda: None) -> Running:
        """Start the host process; its servers can be started once NeMo Gym is imported, which they wait
        for. heard: called whenever the host says something, which it is asked to do every few seconds; while
        it imports NeMo Gym it is taken to be alive."""
        env = environ_for(self.python) | {
            "HF_HOME": os.environ.get("HF_HOME", str(Path.home() / ".cache/huggingface")),
            "RAY_USAGE_STATS_ENABLED": "0",
            # No threads but the main one before the forks; and a server is one core's work anyway.
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "ARROW_DEFAULT_MEMORY_POOL": "system",
        }
        fds = {name: sock.fileno() for name, sock in self._sockets.items()}
        with self.log.open("ab") as out:
            self._process = await asyncio.create_subprocess_exec(
                self.python,
                _HOST,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=out,
                env=env,
                pass_fds=tuple(fds.values()),
                start_new_session=True,
            )
        servers = {name: {"module": module, "fd": fds[name]} for name, module in self._layout.modules.items()}
        own = str(own_servers())
        self._send({"config": self._layout.config, "servers": servers, "own": own, "key": self._key})
        self._reader = asyncio.create_task(self._read(heard))
        self._asking = asyncio.create_task(self._ask_for_life(heard))
        return Child(self._process)

    async def _ask_for_life(self, heard: Callable[[], None]) -> None:
        while self._process.returncode is None:
            if self._loaded.done():
                self._send({"alive": True})
            else:
                heard()  # the supervisor has a deadline for the start of each server
            await asyncio.sleep(_ALIVE_S)

    async def start_server(self, name: str, log: Path) -> Running:
        await asyncio.shield(self._loaded)
        async with self._order:
            started: asyncio.Future[_Forked] = asyncio.get_running_loop().create_future()
            self._starting.put_nowait(started)
            self._send({"start": name, "log": str(log)})
            return await asyncio.shield(started)

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(orjson.dumps(message) + b"\n")

    async def _read(self, heard: Callable[[], None]) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            message = orjson.loads(line)
            heard()
            if "loaded" in message:
                self._loaded.set_result(None)
            elif "started" in message:
                ended = self._ends[message["pid"]] = asyncio.get_running_loop().create_future()
                self._starting.get_nowait().set_result(_Forked(message["pid"], ended))
            elif "exited" in message:
                self._ends.pop(message["exited"]).set_result(message["code"])
            elif "error" in message:
                break
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), 10 * _FIRST_WORD_S)
        await asyncio.sleep(_FIRST_WORD_S)
        error = ServiceError(f"NeMo Gym's host ended. {reason(self.log)}")
        waiting = [self._loaded, *self._ends.values()]
        while not self._starting.empty():
            waiting.append(self._starting.get_nowait())
        for future in waiting:
            if not future.done():
                future.set_exception(error)
                future.exception()  # known: not "never retrieved"
