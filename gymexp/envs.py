"""List NeMo Gym's environments, which env=[NAME,…] takes by name.

python -m gymexp.envs                      all of them, one a line
python -m gymexp.envs --search tool        those with this text in their name, domain or description
python -m gymexp.envs show blackjack       all that NeMo Gym's files say about one
python -m gymexp.envs gym.version=0.7.0    those of another NeMo Gym, named as for a run; or gym.python=PATH

--json prints the same as JSON. Your own are listed first, and go before NeMo Gym's of the same name: files of
conf/env/, and environments in resources_servers/ and responses_api_agents/ of the working directory.
"""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from gymexp.cli.catalogue_source import explain_unknown
from gymexp.cli.terminal import guarded, parser_of
from gymexp.config.group_options import options
from gymexp.config.schema import GymConfig, RunConfig
from gymexp.errors import ConfigError
from gymexp.gym.catalogue import Dataset, Entry, load_catalogue, options_of
from gymexp.gym.install import find_made_venv, nemo_gym_version, site_packages
from gymexp.gym.tried import describe, load_tried
from gymexp.printable import say, say_progress
from gymexp.record.places import cache_dir

_HEAD = (
    "name",
    "domain",
    "agent",
    "tools",
    "turns",
    "data",
    "licence",
    "judge",
    "network",
    "prompt",
    "tried",
)
_WIDTHS = {"name": 60, "agent": 22, "data": 44, "licence": 24}
_SETTINGS = ("gym.version", "gym.python")  # a run's keys that say which NeMo Gym
_NOTE = (
    "turns: limit on a rollout's model turns. prompt: estimate of the tokens of the longest example row; a\n"
    "rollout must fit into model.max_model_len. network: its files call others or start other programs.\n"
    "tried: how many rollouts of the tiny policy had a reward here; no: none of them.\n"
    "judge: a model judges the replies; needed: env.<name>.judge must name it.\n"
    "!: gymexp cannot play it as it is; python -m gymexp.envs show NAME says why."
)


def matches(entry: Entry, text: str) -> bool:
    """Returns whether a text is in what an entry says about itself."""
    said = (entry.name, entry.domain, entry.description, entry.agent, entry.harness, *entry.tools)
    return text.lower() in " ".join(said).lower()


def row(entry: Entry, seen: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """Returns an entry's line of the table. seen: of `load_tried`."""
    data = [_where(d) for d in entry.datasets if d.repo_id or d.gitlab or d.prepare_script or entry.is_own]
    licences = [dataset.license for dataset in entry.datasets if dataset.license]
    return (
        f"{entry.name} !" if entry.reasons and not entry.needs_judge else entry.name,
        entry.domain or "-",
        entry.harness,
        str(len(entry.tools) or "-"),
        _turns(entry),
        ", ".join(dict.fromkeys(data)) or (f"{entry.num_examples} examples" if entry.examples else "-"),
        ", ".join(dict.fromkeys(licences)) or "-",
        "needed" if entry.needs_judge else "yes" if entry.judge else "-",
        "yes" if entry.network else "-",
        (f"{entry.prompt_tokens}" if entry.prompt_tokens else "-") + (" images" if entry.images else ""),
        "-" if seen is None else "no" if "reason" in seen else f"{seen['scored']} of {seen['rollouts']}",
    )


def table(entries: Sequence[Entry], tried: Mapping[str, Any]) -> str:
    """Returns the entries as an aligned table."""
    lines = [_HEAD, *(row(entry, tried.get(entry.name)) for entry in entries)]
    cells = [[_cut(cell, _WIDTHS.get(_HEAD[i], 40)) for i, cell in enumerate(line)] for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def description(entry: Entry, seen: Mapping[str, Any] | None = None) -> str:
    """Returns all that is known of an entry, one thing a line. seen: of `load_tried`."""
    facts: dict[str, Any] = {
        "domain": entry.domain,
        "agent": f"{entry.agent} ({entry.harness})",
        "servers": ", ".join(entry.folders),
        "file": entry.config_path,
        "turns": _turns(entry),
        "tools": ", ".join(entry.tools),
        "judge": "a model judges the replies" if entry.judge else "none",
        "network": f"its files name {', '.join(entry.network)}"
        if entry.network
        else "none that its files show",
        "examples": f"{entry.num_examples} rows in {entry.examples}" if entry.examples else "none",
        "prompt": f"about {entry.prompt_tokens} tokens in the longest example row" if entry.examples else "",
        "images": "in its rows" if entry.images else "",
        "tried here": describe(seen),
    }
    lines = [entry.name, *textwrap.wrap(entry.description, 100), ""]
    lines += [f"  {key:<10} {value}" for key, value in facts.items() if value]
    for dataset in entry.datasets:
        licence = f", licence: {dataset.license}" if dataset.license else ""
        lines.append(f"  {dataset.type:<10} {_where(dataset)}{licence}")
    judge = f" env.{entry.name}.judge.url=… env.{entry.name}.judge.model=…" if entry.needs_judge else ""
    if judge or not entry.reasons:
        lines += ["", f"  python -m gymexp.train 'env=[{entry.name}]'{judge}"]
    else:
        lines += [f"  cannot be played: {reason}" for reason in entry.reasons]
    return "\n".join(lines)


def _as_json(entry: Entry, tried: Mapping[str, Any]) -> dict[str, Any]:
    return dataclasses.asdict(entry) | {"tried": tried.get(entry.name)}


def _turns(entry: Entry) -> str:
    limit = options_of(entry).get("max_steps", entry.max_steps)
    return "no limit" if limit is None else str(limit)


def _where(dataset: Dataset) -> str:
    if dataset.repo_id:
        return dataset.repo_id
    if dataset.gitlab:
        return f"GitLab {dataset.gitlab[0]}"
    return "prepare script" if dataset.prepare_script else dataset.file


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def gym_of(settings: Sequence[str]) -> GymConfig:
    """Returns the NeMo Gym that settings such as gym.version=0.7.0 name. Raises ConfigError for any other."""
    values: dict[str, Any] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in _SETTINGS or not value:
            raise ConfigError(
                f"a setting must be {' or '.join(f'{key}=…' for key in _SETTINGS)}, got {setting}"
            )
        values[key.removeprefix("gym.")] = value.strip("'\"")
    return GymConfig(**values)


def _version(gym: GymConfig) -> str:
    python = find_made_venv(gym, cache_dir())
    return nemo_gym_version(site_packages(python)) if python else gym.version


def _one(catalogue: Mapping[str, Entry], name: str) -> Entry:
    if name in catalogue:
        return catalogue[name]
    if name in options("env"):
        raise ConfigError(
            f"{name} is a file of conf/env/: python -m gymexp.train 'env=[{name}]' --cfg job --package env"
        )
    raise ConfigError(explain_unknown(name, catalogue))


def main() -> None:
    parser = parser_of("envs", __doc__ or "")
    parser.add_argument("words", nargs="*", metavar="show NAME", help="show one environment")
    parser.add_argument("--search", metavar="TEXT", help="list only those with this text")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    settings = [word for word in args.words if "=" in word]
    words = [word for word in args.words if "=" not in word]
    if words and (words[0] != "show" or len(words) != 2 or args.search):
        parser.error("say `show NAME`, or --search TEXT, or neither")
    gym = gym_of(settings)
    catalogue = load_catalogue(gym, cache_dir(), say_progress)
    tried = load_tried(_version(gym))
    if words:
        entry = _one(catalogue, words[1])
        seen = tried.get(entry.name)
        say(json.dumps(_as_json(entry, tried), indent=1) if args.json else description(entry, seen))
        return
    entries = [entry for entry in catalogue.values() if matches(entry, args.search or "")]
    if args.json:
        say(json.dumps([_as_json(entry, tried) for entry in entries], indent=1))
        return
    files = [name for name in options("env") if (args.search or "") in name]
    own = [entry.name for entry in entries if entry.is_own]
    say(f"own files: {', '.join(files) or 'none'}")
    say(f"in this directory: {', '.join(own) or 'none'}\n")
    of_gym = len(entries) - len(own)
    say(f"{table(entries, tried)}\n\n{of_gym} environments of NeMo Gym {_version(gym)}\n{_NOTE}")


if __name__ == "__main__":
    guarded(main, RunConfig)()
