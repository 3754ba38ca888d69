"""The environments that an installed NeMo Gym ships, by name, with what its own files say about each.

`env=[name]` takes an entry as an option (`cli/catalogue_source.py`). The catalogue is made in NeMo Gym's
Python on first use, in about 20 s, and kept in the cache. The environments of the user's own directories
(`record.places.own_servers`) come before NeMo Gym's of the same name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from gymexp.config.schema import GymConfig
from gymexp.gym import agent_replies, config_classes, definitions, open_values, server_settings
from gymexp.gym.definitions import (
    FOLDERS,
    RESOLVER,
    Servers,
    asks_policy,
    folders_of,
    keep,
    needs_judge,
    reasons_against,
    resolve,
    server_of,
    servers_of_agent,
)
from gymexp.gym.install import Say, ensure_python, find_made_venv, nemo_gym_version, site_packages
from gymexp.record.places import OWN_SERVERS as KINDS
from gymexp.record.places import own_servers

_SUFFIX = {"resources_servers": "server", "benchmarks": "benchmark", "responses_api_agents": "agent"}
_AGENTS = "responses_api_agents"
_OWN = ("resources_servers", _AGENTS)  # the folders of the user's own that define environments
# The modules that decide an entry's content.
_DECIDES = tuple(
    Path(str(module.__file__))
    for module in (agent_replies, config_classes, definitions, open_values, server_settings)
)
# Words in a server's own files that show that it calls out, or starts other programs than Python.
_NETWORK = re.compile(
    r"\b(tavily|docker|apptainer|singularity|daytona|arxiv|sandbox_host|googleapis|npm)\b",
    re.I,
)


@dataclass(frozen=True)
class Dataset:
    """An entry of `datasets:` of an agent."""

    type: str  # train, validation, example or benchmark
    file: str  # the path of its rows, as in NeMo Gym's file
    repo_id: str | None = None  # of the Hugging Face hub
    repo_file: str | None = None
    gitlab: list[str] | None = None  # name, version, file
    license: str | None = None
    prepare_script: str | None = None
    prompt_config: str | None = None


@dataclass(frozen=True)
class Entry:
    """An environment of NeMo Gym's."""

    name: str
    config_path: str
    agent: str
    harness: str  # the agent's implementation, e.g. simple_agent
    folders: list[str]  # of its servers
    domain: str
    description: str
    max_steps: int | None  # limit on the model turns; None: the agent has none
    datasets: list[Dataset]
    examples: str | None  # the file of its example rows, in NeMo Gym's folders
    num_examples: int = 0
    tools: list[str] = field(default_factory=list)  # of the example rows
    prompt_tokens: int = 0  # of the longest example row, estimated as a third of its characters
    images: bool = False
    judge: bool = False  # a model judges the policy's replies
    network: list[str] = field(default_factory=list)  # words of its servers' files that show a need of it
    needs_judge: bool = False  # gymexp plays it with a judge of the user's
    reasons: list[str] = field(default_factory=list)  # why gymexp cannot play it as it is
    is_own: bool = False  # its file is in the user's own directories


def load_catalogue(gym: GymConfig, cache: Path, say: Say) -> dict[str, Entry]:
    """Returns the entries by name, in alphabetical order. Makes NeMo Gym's venv and the catalogue on first
    use. Raises as `ensure_python`, and ConfigError if NeMo Gym's files cannot be read."""
    python = find_made_venv(gym, cache) or ensure_python(gym, lambda python: (), cache, say)
    site = site_packages(python)
    entries: dict[str, Entry] = {}
    for root in _roots(site):
        kept = _kept(root, site, cache)
        if (found := _read(kept)) is None:
            say(f"reading the environments of {_owner(root, site)}")
            found = {entry.name: entry for entry in _entries(root, site, python, say)}
            keep(kept, json.dumps([dataclasses.asdict(entry) for entry in found.values()]))
        entries |= found
    return dict(sorted(entries.items()))


def kept_catalogue(gym: GymConfig, cache: Path) -> dict[str, Entry]:
    """Returns what the cache has of `load_catalogue`; an empty dict if it lacks NeMo Gym's."""
    python = find_made_venv(gym, cache)
    site = site_packages(python) if python else None
    if site is None or (entries := _read(_kept(site, site, cache))) is None:
        return {}
    for root in _roots(site)[1:]:
        entries |= _read(_kept(root, site, cache)) or {}
    return dict(sorted(entries.items()))


def _roots(site: Path) -> list[Path]:
    """Returns the directories that have folders of environments, the one with the last word last."""
    own = own_servers()
    return [site, own] if own != site and _yaml_files(own, site) else [site]


def _owner(root: Path, site: Path) -> str:
    return f"NeMo Gym {nemo_gym_version(site)}" if root == site else str(root)


def options_of(entry: Entry) -> dict[str, Any]:
    """Returns the values that `env=[name]` sets below `env.<name>`."""
    values: dict[str, Any] = {"config_path": entry.config_path, "agent": entry.agent}
    if entry.max_steps is None and entry.harness == "simple_agent":
        # This agent goes on for ever with a reply that neither calls a tool nor has a text.
        values["max_steps"] = 10 if entry.tools else 1
    return values | {"data": {"source": "nemo_gym"}}


def datasets_of(servers: Servers, agent: str) -> list[Dataset]:
    """Returns the agent's data sets; those of its other servers, as some files of NeMo Gym 0.7 have it, if it
    has none."""
    for name in [agent, *servers_of_agent(servers, agent)]:
        kind = next(kind for kind in KINDS if kind in servers[name])
        [values] = servers[name][kind].values()
        if entries := values.get("datasets"):
            return [_dataset(entry) for entry in entries]
    return []


def _dataset(entry: dict[str, Any]) -> Dataset:
    source = entry.get("source") or {}
    hub = entry.get("huggingface_identifier") or (source if source.get("type") == "huggingface" else {})
    gitlab = entry.get("gitlab_identifier") or (source if source.get("type") == "gitlab" else {})
    return Dataset(
        type=str(entry.get("type")),
        file=str(entry.get("jsonl_fpath")),
        repo_id=hub.get("repo_id"),
        repo_file=hub.get("artifact_fpath"),
        gitlab=[gitlab["dataset_name"], gitlab["version"], gitlab["artifact_fpath"]] if gitlab else None,
        license=entry.get("license"),
        prepare_script=entry.get("prepare_script"),
        prompt_config=entry.get("prompt_config"),
    )


def _kept(root: Path, site: Path, cache: Path) -> Path:
    """Returns the file of a directory's entries. Its name has a hash of all that decides the content."""
    files = _yaml_files(root, site)
    if root != site:
        patterns = ("*/data/example*.jsonl", "*/*.py")
        files += [
            p for folder in KINDS for pattern in patterns for p in sorted((root / folder).glob(pattern))
        ]
    stats = [(str(p.relative_to(root)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    place = [] if root == site else [str(root), str(site)]
    code = [path.read_text() for path in (RESOLVER, Path(__file__), *_DECIDES)]
    digest = hashlib.sha256(json.dumps([stats, place, code]).encode()).hexdigest()[:16]
    name = "nemo-gym" if root == site else "own-nemo-gym"
    return cache / "catalogue" / f"{name}-{nemo_gym_version(site)}-{digest}.json"


def _read(kept: Path) -> dict[str, Entry] | None:
    try:
        listed = orjson.loads(kept.read_bytes())
        entries = [Entry(**e | {"datasets": [Dataset(**d) for d in e["datasets"]]}) for e in listed]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return {entry.name: entry for entry in entries}


def _yaml_files(root: Path, site: Path) -> list[Path]:
    folders = FOLDERS if root == site else _OWN
    return [path for folder in folders for path in sorted((root / folder).rglob("*.yaml"))]


def _entries(root: Path, site: Path, python: Path, say: Say) -> Iterator[Entry]:
    """Yields an entry for each agent that a file of `root` defines itself and that has a server."""
    paths = [p for p in _yaml_files(root, site) if _own_keys(p)]
    taken: set[str] = set()
    for path, result in zip(paths, resolve(paths, python), strict=True):
        if "error" in result and root != site:
            say(f"warning: {path} defines no environment, as NeMo Gym refuses it: {result['error']}")
        servers: Servers = result.get("servers", {})
        agents = [name for name in _own_keys(path) if _AGENTS in servers.get(name, {})]
        whole = [a for a in agents if len(servers_of_agent(servers, a)) > 1]
        for agent in whole:
            name = _name(path.relative_to(root), agent if len(whole) > 1 else "", taken)
            taken.add(name)
            yield _entry(name, str(path.relative_to(root)), agent, servers, [root, site])


def _own_keys(path: Path) -> list[str]:
    """Returns the top-level keys of a YAML file that define something."""
    return re.findall(r"""^["']?([\w.-]+)["']?:\s*$""", path.read_text(encoding="utf-8"), re.MULTILINE)


def _name(path: Path, agent: str, taken: set[str]) -> str:
    """Returns an environment's name: that of its folder, and of its file where the folder has several."""
    kind, folder, *_ = path.parts
    parts = [folder, *(part for part in path.parts[2:-1] if part != "configs")]
    stem = path.stem.removeprefix("config").strip("_").removesuffix(f"_{folder}")
    if stem.startswith(folder):
        parts = [stem]
    elif stem:
        parts.append(stem)
    name = re.sub(r"\W", "_", "_".join([*parts, *([agent] if agent else [])])).lower()
    return f"{name}_{_SUFFIX.get(kind, kind)}" if name in taken else name


def _entry(name: str, config_path: str, agent: str, servers: Servers, roots: list[Path]) -> Entry:
    """roots: where the environment's files are looked for, in this order; the last one is NeMo Gym's."""
    _, harness, values = server_of(servers[agent])
    folders = folders_of(servers, agent)
    datasets = datasets_of(servers, agent)
    described = [server_of(servers[s])[2] for s in servers_of_agent(servers, agent)]
    examples = example_file(datasets, folders, roots)
    is_own = roots[0] != roots[-1]
    return Entry(
        name=name,
        config_path=config_path,
        agent=agent,
        harness=harness,
        folders=folders,
        domain=next((str(v["domain"]) for v in described if v.get("domain")), ""),
        description=next((str(v["description"]) for v in described if v.get("description")), ""),
        max_steps=values.get("max_steps"),
        datasets=datasets,
        examples=examples and str(examples.relative_to(next(r for r in roots if examples.is_relative_to(r)))),
        judge=any(_is_judged(servers, server) for server in servers_of_agent(servers, agent)),
        network=_network(servers, agent, roots),
        needs_judge=needs_judge(servers, agent, roots),
        reasons=list(reasons_against(servers, agent, name, is_own, roots=roots)),
        is_own=is_own,
        **(_row_facts(examples) if examples else {}),
    )


def _is_judged(servers: Servers, name: str) -> bool:
    kind, _, values = server_of(servers[name])
    asks_other = kind == "resources_servers" and '"responses_api_models"' in json.dumps(values)
    return asks_policy(kind, values) or (asks_other and values.get("should_use_judge") is not False)


def _network(servers: Servers, agent: str, roots: list[Path]) -> list[str]:
    words: set[str] = set()
    for name in servers_of_agent(servers, agent):
        kind, implementation, values = server_of(servers[name])
        text = json.dumps(values)
        folder = next(
            (r / kind / implementation for r in roots if (r / kind / implementation).exists()), None
        )
        for path in sorted(folder.glob("*.py")) if folder else ():
            text += path.read_text(encoding="utf-8", errors="replace")
        words |= {word.lower() for word in _NETWORK.findall(text)}
    return sorted(words)


def example_file(datasets: list[Dataset], folders: list[str], roots: Sequence[Path]) -> Path | None:
    """Returns the file of example rows that `datasets` or else the resources server's folder has."""
    named = [dataset.file for dataset in datasets if dataset.type == "example"]
    beside = [f"{folder}/data/example.jsonl" for folder in folders if not folder.startswith(_AGENTS)]
    places = (root / file for file in [*named, *beside] for root in roots)
    return next((path for path in places if path.exists()), None)


def _row_facts(path: Path) -> dict[str, Any]:
    """Returns the facts of an entry that its example rows decide."""
    try:
        rows = [orjson.loads(line) for line in path.read_bytes().splitlines() if line.strip()]
        return _facts_of(rows)
    except (ValueError, TypeError, AttributeError):
        return {}  # a file of the user's own: the check of the data refuses it, with its line


def _facts_of(rows: list[Any]) -> dict[str, Any]:
    params = [row.get("responses_create_params") or {} for row in rows]
    tools = {tool.get("name", "") for p in params for tool in p.get("tools") or []}
    sizes = [len(json.dumps([p.get("input"), p.get("tools")], ensure_ascii=False)) for p in params]
    texts = [json.dumps(p.get("input")) for p in params]
    return {
        "num_examples": len(rows),
        "tools": sorted(filter(None, tools)),
        "prompt_tokens": max(sizes, default=0) // 3,
        "images": any("input_image" in text or "image_url" in text for text in texts),
    }
