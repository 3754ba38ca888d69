"""What NeMo Gym's YAML files define: an environment's agent and every server that it leads to.

A file that uses NeMo Gym's directives (`config_paths`, `_inherit_from`, …) is resolved in NeMo Gym's Python.
The result is kept in the cache, as that takes some seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import orjson
from omegaconf import OmegaConf

from gymexp.config.env_rules import KEY_ENV, variables_of
from gymexp.config.redaction import secrets_at
from gymexp.config.schema import EnvConfig, GymConfig, JudgeConfig
from gymexp.config.suggestions import nearest
from gymexp.errors import ConfigError, ServiceError
from gymexp.files import replace_file
from gymexp.gym import environment_server
from gymexp.gym.agent_replies import lack_token_ids
from gymexp.gym.config_classes import nulls
from gymexp.gym.install import Say, ensure_python, nemo_gym_version, run_script, site_packages
from gymexp.gym.open_values import MODELS, instead_of, is_local, open_values
from gymexp.gym.server_settings import OF_THE_JUDGE, with_judge, with_settings
from gymexp.gym.server_venvs import UnmetNeeds
from gymexp.record.places import OWN_SERVERS as KINDS
from gymexp.record.places import cache_dir, own_servers

POLICY = "policy_model"
# NeMo Gym's folders of environments. A name that several have is that of the first.
FOLDERS = ("environments", "resources_servers", "benchmarks", "responses_api_agents")
RESOLVER = Path(__file__).with_name("yaml_resolver.py")  # not imported: it runs in NeMo Gym's Python
_DIRECTIVE = re.compile(r"^\s*(config_paths|_inherit_from|_copy|_delete_key):|\$\{", re.MULTILINE)
# Values that gymexp gives, as it starts the policy's endpoint.
OF_THE_POLICY: tuple[str, ...] = ("policy_base_url", "policy_api_key", "policy_model_name")
_DEADLINE_S = 300.0
_AVIARY = "aviary_agent"
_FILL_INPUT = (_AVIARY, "gymnasium_agent")  # agents that begin with what their environment says at its reset

Servers = dict[str, Any]  # NeMo Gym's definition of each server, by name


def ensure_environments(
    gym: GymConfig, envs: Mapping[str, EnvConfig], cache: Path, say: Say, gives_tokens: bool = True
) -> Path:
    """Returns an interpreter with NeMo Gym and the requirements of every server of `envs`.

    gives_tokens: whether the policy's answers have token ids. Raises as `ensure_python`, and ConfigError if
    an environment cannot be played, with the reason. An error names the environments that it concerns.
    """

    by_env: dict[str, set[str]] = {}

    def folders(python: Path) -> set[str]:
        site = site_packages(python)
        for name, env in envs.items():
            if gym.runtime == "managed":
                servers = playable_servers(name, env, site, python, gives_tokens)
                by_env[name] = set(folders_of(servers, env.agent))
                if warning := environment_server.warning_of(servers, env.agent, site):
                    say(f"warning: env.{name}: {warning}")
            elif locate(env.config_path, site):  # else it is in the user's own NeMo Gym
                by_env[name] = set(folders_of(read_servers(name, env, site, python), env.agent))
        return {folder for of_env in by_env.values() for folder in of_env}

    try:
        return ensure_python(gym, folders, cache, say)
    except UnmetNeeds as error:
        names = ", ".join(f"env.{name}" for name, of_env in by_env.items() if error.folder in of_env)
        raise ServiceError(f"{names} cannot be played: {error}") from None


def locate(config_path: str, site: Path) -> Path | None:
    """Returns the file that `env.<name>.config_path` or an entry of `config_paths` names, or None.

    A file in the working directory has precedence over NeMo Gym's, and a job's frozen copy over both.
    """
    places = (own_servers(), Path.cwd(), site)
    return next((at / config_path for at in places if (at / config_path).exists()), None)


def read_servers(name: str, env: EnvConfig, site: Path, python: Path | None = None) -> Servers:
    """Returns the servers that the environment's file defines.

    site: the directory of NeMo Gym's folders. python: NeMo Gym's interpreter; a file without directives needs
    none. Raises ConfigError if the file does not exist or does not define the environment's agent.
    """
    at = f"env.{name}"
    path = locate(env.config_path, site)
    if path is None:
        raise ConfigError(f"{at}.config_path: {env.config_path} is neither in {Path.cwd()} nor in {site}")
    texts = list(_texts(path, site))
    if any(_DIRECTIVE.search(text) for text in texts):
        assert python is not None, f"{env.config_path} needs NeMo Gym's Python"
        servers = _resolved(at, path, texts, site, python)
    else:
        servers = _plain(path)
    agents = [n for n, v in servers.items() if "responses_api_agents" in v]
    if env.agent not in agents:
        raise ConfigError(
            f"{at}.agent must be an agent of {env.config_path}, got {env.agent!r}"
            f"{nearest(env.agent, agents)}. Its agents: {', '.join(agents)}"
        )
    return servers


def fills_input(name: str, env: EnvConfig, site: Path, python: Path) -> bool:
    """Returns whether the environment's agent takes the first prompt from its resources server, so that the
    input of a row may be empty. Raises as `read_servers`; False for a file that only the user's own NeMo Gym
    has."""
    if not env.config_path or locate(env.config_path, site) is None:
        return False
    return server_of(read_servers(name, env, site, python)[env.agent])[1] in _FILL_INPUT


def playable_servers(
    name: str, env: EnvConfig, site: Path, python: Path | None = None, gives_tokens: bool = True
) -> Servers:
    """Returns `read_servers` with what the user sets about them. gives_tokens: as for `ensure_environments`.

    Raises ConfigError also if the agent leads to a server or a value that is not defined, or to no model
    server, if the policy would judge itself, or if `env.<name>.servers` or `env.<name>.judge` has nothing to
    change."""
    servers = read_servers(name, env, site, python)
    path = locate(env.config_path, site)
    is_own = path is None or not any(path.is_relative_to(site / folder) for folder in FOLDERS)
    servers = with_settings(name, env, servers, servers_of_agent(servers, env.agent))
    servers = _with_whole_episodes(f"env.{name}.servers.{env.agent}", servers, env.agent)
    if env.judge.url:
        judged = with_judge(servers, servers_of_agent(servers, env.agent), env.judge)
        if judged is None:
            raise ConfigError(f"env.{name}.judge must be left out: {_why_no_judge(name, servers, env.agent)}")
        servers = judged
    variables = {variable for _, variable in variables_of(name, env)}  # `check_variables` asks for them
    roots = (own_servers(), site)
    if reasons := list(
        reasons_against(servers, env.agent, name, is_own, variables, os.environ, roots, gives_tokens)
    ):
        raise ConfigError("\n".join(f"env.{name} cannot be played: {reason}" for reason in reasons))
    return servers


def _with_whole_episodes(at: str, servers: Servers, agent: str) -> Servers:
    """Returns the servers with an aviary agent that answers with its episode. Unless it is told, it answers
    with a list of the prompts of all turns."""
    kind, implementation, values = server_of(servers[agent])
    if implementation != _AVIARY:
        return servers
    if values.get("return_transitions"):
        raise ConfigError(
            f"{at}.return_transitions must be false, as training takes an episode as a whole, got true: "
            f"{at}.return_transitions=false"
        )
    return servers | {agent: {kind: {implementation: values | {"return_transitions": False}}}}


def _why_no_judge(name: str, servers: Servers, agent: str) -> str:
    for server in servers_of_agent(servers, agent):
        if server_of(servers[server])[2].get("should_use_judge") is False:
            return (
                f"{server} has should_use_judge: false; with env.{name}.servers.{server}.should_use_judge="
                "true it asks one"
            )
    return f"none of its servers asks a model to judge ({', '.join(servers_of_agent(servers, agent))})"


def resolve(paths: Sequence[Path], python: Path) -> list[dict[str, Any]]:
    """Returns for each file what `yaml_resolver.py` says of it, {"servers": …} or {"error": …}."""
    lines = "".join(json.dumps(str(path)) + "\n" for path in paths)
    at = own_servers()  # where NeMo Gym looks for files before its own folders
    what = "NeMo Gym's reader of YAML files"
    said = run_script(python, [RESOLVER], what, ConfigError, _DEADLINE_S, lines.encode(), at)
    return [orjson.loads(line) for line in said.splitlines()]


def server_of(definition: Mapping[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """Returns the kind, the implementation and the configuration of a server, without its data sets."""
    kind = next(k for k in KINDS if k in definition)
    implementation, values = next(iter(definition[kind].items()))
    values = environment_server.with_types(values) if kind == environment_server.KIND else values
    return kind, implementation, {k: v for k, v in values.items() if k != "datasets"}


def module_of(kind: str, implementation: str, values: Mapping[str, Any]) -> str:
    """Returns the Python module of a server, e.g. resources_servers.mcqa.app."""
    return f"{kind}.{implementation}.{Path(values['entrypoint']).stem}"


def servers_of_agent(servers: Servers, agent: str) -> list[str]:
    """Returns the agent, the environment server that runs its episodes, and every server that these lead to,
    in the file's order, without the policy's model server, which gymexp defines, and without those that the
    file does not define."""
    front = environment_server.front_of(servers, agent)
    open_ = [agent, front] if front else [agent]
    needed = set(open_)
    while open_:
        for name in references(server_of(servers[open_.pop()])[2]):
            if name != POLICY and name not in needed and name in servers:
                needed.add(name)
                open_.append(name)
    return [name for name in servers if name in needed]


def folders_of(servers: Servers, agent: str) -> list[str]:
    """Returns the folder of each server of the agent, e.g. resources_servers/mcqa."""
    kinds = (server_of(servers[name])[:2] for name in servers_of_agent(servers, agent))
    return [f"{kind}/{implementation}" for kind, implementation in kinds]


def reasons_against(
    servers: Servers,
    agent: str,
    name: str,
    is_own: bool = False,
    variables: Iterable[str] = (),
    environ: Mapping[str, str] = MappingProxyType({}),
    roots: Sequence[Path] = (),
    gives_tokens: bool = True,
) -> Iterator[str]:
    """Yields why an agent's environment cannot be played as its servers are defined, and what to set.

    name: of the environment. is_own: the file is the user's own, who may let the policy judge itself.
    variables: those that the user names as the values of keys. environ: the environment variables. roots: the
    directories that have the servers' code, the first one first; without them it is not read.
    gives_tokens: as for `ensure_environments`.
    """
    yield from environment_server.reasons_against(servers, agent)
    kind, implementation, _ = server_of(servers[agent])
    if not is_own and (reason := _why_no_tokens(servers, agent, gives_tokens)):
        yield f"{reason}: take an environment whose agent has a model_server"
    elif gives_tokens and lack_token_ids(f"{kind}/{implementation}", roots):
        yield (
            f"{agent} ({implementation}) writes its replies anew from a transcript, so they have no token "
            "ids: take an environment whose agent asks its model_server itself, as simple_agent does"
        )
    more = name, is_own, {*OF_THE_POLICY, *OF_THE_JUDGE, *variables}, environ, roots
    reasons = list(_reasons(servers, agent, *more))
    left = reasons
    if judged := with_judge(servers, servers_of_agent(servers, agent), JudgeConfig("http://judge", "judge")):
        left = list(_reasons(judged, agent, *more))
    fix = f"set env.{name}.judge.url=… and env.{name}.judge.model=…"
    for reason, instead in reasons:
        yield f"{reason}: {instead}" if (reason, instead) in left else f"{reason}: {fix}"


def needs_judge(servers: Servers, agent: str, roots: Sequence[Path] = ()) -> bool:
    """Returns whether `env.<name>.judge` is all that an environment of NeMo Gym's lacks to be played.

    roots: as for `reasons_against`."""
    judged = with_judge(servers, servers_of_agent(servers, agent), JudgeConfig("http://judge", "judge"))
    lacks = [list(reasons_against(some, agent, "", roots=roots)) for some in (servers, judged) if some]
    return len(lacks) == 2 and bool(lacks[0]) and not lacks[1]


def _reasons(
    servers: Servers,
    agent: str,
    name: str,
    is_own: bool,
    given: set[str],
    environ: Mapping[str, str],
    roots: Sequence[Path],
) -> Iterator[tuple[str, str]]:
    """Yields each reason, and what to do about it if a judge does not help."""
    for server in servers_of_agent(servers, agent):
        kind, implementation, values = server_of(servers[server])
        for other in dict.fromkeys(references(values)):
            if other != POLICY and other not in servers and other != "???":
                yield (
                    f"{server} refers to the server {other}, which its file does not define",
                    f"define it in a copy of the file in {kind}/ of the working directory",
                )
        if is_local(kind, implementation):
            yield (
                f"{server} would start a vLLM of its own with Ray, which gymexp does not start",
                "serve the model by a vLLM that you start, and in a copy of the file in "
                f"{KINDS[0]}/ of the working directory define {server} as {instead_of(implementation)}",
            )
        if not values.get("entrypoint"):
            yield (
                f"{server} has no entrypoint",
                "write entrypoint: app.py, its Python file, into its definition",
            )
            continue
        no_null = list(nulls(values, module_of(kind, implementation, values), roots))
        for at, text in open_values(kind, implementation, values, given, environ, no_null):
            key = f"env.{name}.servers.{server}.{at}"
            secret = any(secrets_at(key, text))
            yield (
                f"{server} has no value for {at} ({text})",
                f"set {key}.{KEY_ENV}=…, the variable that has it" if secret else f"set {key}=…",
            )
        if not is_own and asks_policy(kind, values):
            yield (
                f"{server} would have the policy judge itself",
                f"name another model in a copy of the file in {KINDS[0]}/ of the working directory",
            )


def _why_no_tokens(servers: Servers, agent: str, gives_tokens: bool) -> str:
    """Returns why the policy's tokens do not come with the replies of one of NeMo Gym's agents, or "".

    NeMo Gym's model server alone passes token ids on, and tells the gateway which rollout a call belongs to.
    So an agent that refers to none, as one that runs a program with a client of its own, has neither.
    """
    _, implementation, values = server_of(servers[agent])
    text = json.dumps(values)
    if any(f'"type": "{kind}"' in text for kind in (MODELS, "responses_api_agents")):
        return ""
    if f"${{{OF_THE_POLICY[0]}}}" not in text:
        return f"{agent} ({implementation}) asks no model server, so the policy would never be asked"
    asks = f"{agent} ({implementation}) asks the policy without NeMo Gym's model server"
    return f"{asks}, so its replies have no token ids" if gives_tokens else ""


def asks_policy(kind: str, values: Mapping[str, Any]) -> bool:
    """Returns whether a server that is no agent sends requests to the policy, as a judge does."""
    if kind == "responses_api_agents" or values.get("should_use_judge") is False:
        return False
    text = json.dumps(values)
    return POLICY in references(values) or f"${{{OF_THE_POLICY[0]}}}" in text


def references(value: Any) -> list[str]:
    """Returns the names of all servers that a configuration refers to."""
    if is_reference(value):
        return [value["name"]]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [name for child in children for name in references(child)]


def is_reference(value: Any) -> bool:
    """Returns whether a value of a server's configuration names another server."""
    return isinstance(value, dict) and value.get("type") in KINDS and isinstance(value.get("name"), str)


def _texts(path: Path, site: Path) -> Iterator[str]:
    """Yields the text of a file and of those that it names in `config_paths`, at any depth."""
    seen, open_ = {path}, [path]
    while open_:
        text = open_.pop().read_text(encoding="utf-8")
        yield text
        loaded: Any = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
        for nested in (loaded.get("config_paths") or []) if isinstance(loaded, dict) else []:
            found = locate(str(nested), site)
            if found and found not in seen:  # NeMo Gym says if there is none
                seen.add(found)
                open_.append(found)


def _plain(path: Path) -> Servers:
    loaded: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    return {str(name): value for name, value in loaded.items() if isinstance(value, dict)}


def _resolved(at: str, path: Path, texts: Sequence[str], site: Path, python: Path) -> Servers:
    """Returns the servers of a file with directives, from the cache if it has them."""
    decides = [nemo_gym_version(site), str(path), RESOLVER.read_text(encoding="utf-8"), *texts]
    digest = hashlib.sha256("\0".join(decides).encode()).hexdigest()[:16]
    kept = cache_dir() / "definitions" / f"{path.stem}-{digest}.json"
    try:
        return orjson.loads(kept.read_bytes())
    except (OSError, ValueError):
        pass
    [result] = resolve([path], python)
    if "error" in result:
        raise ConfigError(f"{at}.config_path: NeMo Gym refuses {path}: {result['error']}")
    keep(kept, orjson.dumps(result["servers"]).decode())
    return result["servers"]


def keep(path: Path, text: str) -> None:
    """Writes a file of the cache; a cache that cannot be written is done without."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text)
    except OSError:
        pass
