"""Plays environments of NeMo Gym on their own example rows, and writes docs/environments.md.

    python benchmarks/try_environments.py blackjack xlam_fc …       these
    python benchmarks/try_environments.py --all                     all that were not tried yet
    python benchmarks/try_environments.py                           only writes the page again
    python benchmarks/try_environments.py gym.python=PATH blackjack …   of another NeMo Gym

They are played by evaluations of the tiny policy on a CPU, by `python -m gymexp.evaluate`: NeMo Gym's
agent and servers, gymexp's gateway, and exact tokens, which the collector checks. The tiny policy solves none
of them, so the rewards say only that the graders answer. What ends without results is on the page with its
reason. gymexp/gym/tried_<version>.json keeps what was seen, after each evaluation; `python -m gymexp.envs`
shows it. A name that is tried again replaces its line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gymexp.config.schema import GymConfig
from gymexp.envs import gym_of
from gymexp.errors import GymexpError
from gymexp.files import replace_file
from gymexp.gym.catalogue import Entry, load_catalogue
from gymexp.gym.install import find_made_venv, nemo_gym_version, site_packages
from gymexp.gym.tried import load_tried, tried_file
from gymexp.record.places import cache_dir
from gymexp.rollout.rollout_files import read_index

ROOT = Path(__file__).resolve().parent.parent
RESULTS = tried_file(GymConfig().version)
PAGE = ROOT / "docs" / "environments.md"
_MAX_ROWS = 5
_SETTINGS = [
    "model=tiny",
    "engine=hf",
    "evaluation.temperature=1",
    "rollout.max_failed_share=1",
]
_TITLE = """\
# Environments of NeMo Gym that were played

`python benchmarks/try_environments.py NAME…` makes this page, and `--all` tries all that were not tried yet.
It plays the first five example rows of environments with the tiny policy on a CPU; a benchmark without rows
plays those of its resources server. The tokens of every turn were checked. The policy solves nothing, so the
rewards show that the graders answer, not what a model achieves. What needs a network was tried on a machine
that reaches package registries alone.
`python -m gymexp.envs` lists all environments with these figures, and
[the guide](guides/data.md#any-environment-of-nemo-gyms) says how to train in them.
"""


def main() -> None:
    args = arguments().parse_intermixed_args()
    settings = [word for word in args.names if "=" in word]
    args.names = [word for word in args.names if "=" not in word]
    gym = gym_of(settings)
    changed = {key: value for key, value in vars(gym).items() if value != getattr(GymConfig, key)}
    args.gym = [f"gym.{key}='{value}'" for key, value in changed.items()]
    catalogue = load_catalogue(gym, cache_dir(), print)
    if unknown := [name for name in args.names if name not in catalogue]:
        arguments().error(f"unknown: {', '.join(unknown)}; python -m gymexp.envs lists the names")
    python = find_made_venv(gym, cache_dir())
    assert python is not None, "load_catalogue has made it"
    site = site_packages(python)
    version = nemo_gym_version(site)
    tried = load_tried(version)
    names = [name for name in catalogue if name not in tried] if args.all else args.names
    for start in range(0, len(names), args.together):
        for name, seen in try_some([catalogue[n] for n in names[start : start + args.together]], site, args):
            tried[name] = seen
            print(f"{name}: {seen}", flush=True)
            replace_file(tried_file(version), as_json(tried))
    shown = load_catalogue(GymConfig(), cache_dir(), print)
    PAGE.write_text(page(load_tried(GymConfig.version), shown) + newer_section())


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--all", action="store_true", help="all that were not tried yet")
    parser.add_argument("--max-output-tokens", type=int, default=48, help="of a model turn")
    parser.add_argument("--max-model-len", type=int, default=32768, help="of the tiny policy")
    parser.add_argument("--together", type=int, default=8, help="environments of one evaluation")
    parser.add_argument("--deadline-s", type=float, default=600.0, help="of one evaluation")
    return parser


def try_some(
    entries: list[Entry], site: Path, args: argparse.Namespace
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields for each environment numbers of its rollouts, or {"reason": why there are none}.

    One evaluation plays all of them. If it ends with an error, those that the error names have this reason,
    and the others play again. If it names none, each half of them plays alone.
    """
    playable = []
    for entry in entries:
        if reason := refusal(entry):
            yield entry.name, {"reason": reason}
        else:
            playable.append(entry)
    while playable:
        text, rows = evaluate(playable, site, args)
        if not text:
            yield from ((entry.name, seen_of(entry, rows)) for entry in playable)
            return
        named = [entry for entry in playable if names_it(text, entry.name)]
        if not named and len(playable) > 1:
            half = len(playable) // 2
            yield from try_some(playable[:half], site, args)
            yield from try_some(playable[half:], site, args)
            return
        for entry in named or playable:
            yield entry.name, {"reason": shortened(text)}
        playable = [entry for entry in playable if entry not in (named or playable)]


def names_it(text: str, name: str) -> bool:
    """Returns whether an error names an environment, by its keys or by one of its servers."""
    return bool(re.search(rf"(env\.{name}\b|(^|[\s(:]){name}-)", text))


def seen_of(entry: Entry, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the numbers of an environment's rollouts, or the reason why none has a reward."""
    own = [row for row in rows if row["env"] == entry.name]
    failed = next((f"{row['cause']}: {row.get('text', '')}" for row in own if row.get("cause")), "")
    if not any(row.get("reward") is not None for row in own):
        return {"reason": shortened(failed or "no rollout was played")}
    return figures(own) | ({"failed": shortened(failed)} if failed else {})


def refusal(entry: Entry) -> str:
    """Returns why an environment is not tried, or ""."""
    if entry.reasons:
        return entry.reasons[0]
    if entry.judge:
        return "a model judges the replies: set env.<name>.judge"
    if entry.images:
        return "its rows have images, which gymexp does not pass on"
    return "" if entry.examples else "NeMo Gym ships no example rows"


def evaluate(entries: list[Entry], site: Path, args: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    """Plays the environments' example rows. Returns the error that ended the evaluation, or "" and the index
    of the rollouts."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "run"
        settings = [f"env=[{','.join(entry.name for entry in entries)}]"]
        settings += [*args.gym, f"model.max_model_len={args.max_model_len}", f"output_dir={directory}"]
        for entry in entries:
            at, rows = f"env.{entry.name}", Path(folder) / f"{entry.name}.jsonl"
            write_rows(site / str(entry.examples), rows)
            settings += [f"{at}.max_output_tokens={args.max_output_tokens}", f"{at}.timeout_s=300"]
            settings += [f"{at}.data.source=jsonl", f"{at}.data.train_file={rows}"]
            settings += [f"{at}.data.validation_file={rows}"]
        command = [sys.executable, "-m", "gymexp.evaluate", *_SETTINGS, *settings]
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT
        ) as running:
            try:
                _, said = running.communicate(timeout=args.deadline_s)
            except subprocess.TimeoutExpired:
                running.terminate()  # it ends its own processes
                running.communicate()
                return f"the evaluation took longer than {args.deadline_s:.0f} s", []
        if running.returncode:
            error = re.search(r"^error: (.+)", said, re.MULTILINE | re.DOTALL)  # it may quote others' errors
            return error[1].strip() if error else f"it ended with {running.returncode}", []
        return "", list(read_index(directory / "rollouts"))


def write_rows(shipped: Path, to: Path) -> None:
    """Copies NeMo Gym's example rows, without the agent that they name: a benchmark plays the rows of its
    resources server, by an agent of its own."""
    rows = (json.loads(line) for line in shipped.read_text(encoding="utf-8").splitlines() if line.strip())
    lines = (json.dumps({k: v for k, v in row.items() if k != "agent_ref"}) + "\n" for row in rows)
    to.write_text("".join(itertools.islice(lines, _MAX_ROWS)))


def shortened(text: str) -> str:
    """Returns a text as one line of at most 300 characters, without paths of this machine."""
    for path, name in ((cache_dir(), "~/.cache/gymexp"), (Path.home(), "~"), (ROOT, ".")):
        text = text.replace(str(path), name)
    text = re.sub(r"/tmp/tmp\w+", "…", text)
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:299]}…"


def as_json(tried: dict[str, Any]) -> str:
    """Returns the results as JSON, an environment a line."""
    lines = (f" {json.dumps(name)}: {json.dumps(seen)}" for name, seen in sorted(tried.items()))
    return "{\n" + ",\n".join(lines) + "\n}\n"


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the numbers of rollouts, turns and tokens, and the rewards' range."""
    scored = [row for row in rows if row.get("reward") is not None]
    rewards = [row["reward"] for row in scored]
    return {
        "rollouts": len(rows),
        "scored": len(scored),
        "turns": max(row["turns"] for row in scored),
        "tokens": sum(row["tokens"] or 0 for row in scored),
        "rewards": [min(rewards), max(rewards)],
    }


def page(tried: dict[str, Any], catalogue: dict[str, Entry]) -> str:
    """Returns docs/environments.md."""
    refused = {entry.name: {"reason": reason} for entry in catalogue.values() if (reason := refusal(entry))}
    played = {name: seen for name, seen in sorted(tried.items()) if "reason" not in seen}
    others = {n: seen for n, seen in sorted((tried | refused).items()) if n not in played}
    lines = [_TITLE, f"## Played: {len(played)}\n"]
    lines += [
        "| environment | agent | tools | rollouts | turns | tokens | rewards |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, seen in played.items():
        entry = catalogue.get(name)
        harness, tools = (entry.harness, len(entry.tools) or "-") if entry else ("-", "-")
        low, high = seen["rewards"]
        counts = f"{seen['scored']} of {seen['rollouts']} | {seen['turns']} | {seen['tokens']}"
        lines.append(f"| {name} | {harness} | {tools} | {counts} | {low:g} to {high:g} |")
    lines += [f"\n## Not played: {len(others)}\n", "| environment | it lacks | reason |", "|---|---|---|"]
    lines += [f"| {name} | {lacks(s['reason'])} | {_cell(s['reason'])} |" for name, s in others.items()]
    if untried := [name for name in catalogue if name not in tried and name not in refused]:
        lines += [f"\n## Not tried yet: {len(untried)}\n", ", ".join(untried)]
    return "\n".join(lines) + "\n"


_LACKS = {
    "token ids": r"no token ids|asks no model server",
    "a judge": r"judge|genrm_model",
    "another model": r"refers to the server",
    "images": r"images",
    "a container": r"docker|apptainer|singularity",
    "a GPU": r"CUDA|GPU|vllm",
    "a network": r"git\+|https?:|URLError|Name or service|--python', '3",
    "rows": r"no example rows",
    "a value": r"value \?\?\?|needs a value",
}


def lacks(reason: str) -> str:
    """Returns in a word what an environment would need to be played; "-" if the reason does not say."""
    return next((what for what, words in _LACKS.items() if re.search(words, reason)), "-")


def newer_section() -> str:
    """Returns a table for each other version of NeMo Gym whose environments were tried."""
    lines = []
    for file in sorted(RESULTS.parent.glob("tried_*.json")):
        version = file.stem.removeprefix("tried_")
        if version != GymConfig.version:
            tried = load_tried(version)
            num_played = sum("reason" not in seen for seen in tried.values())
            lines += [
                f"\n## NeMo Gym {version}\n",
                f"Played: {num_played}. Not played: {len(tried) - num_played}.\n",
            ]
            lines += ["| environment | what was seen |", "|---|---|"]
            lines += [f"| {name} | {_in_words(seen)} |" for name, seen in tried.items()]
    return "\n".join(lines) + "\n" if lines else ""


def _in_words(seen: dict[str, Any]) -> str:
    if "reason" in seen:
        return _cell(seen["reason"])
    low, high = seen["rewards"]
    played = f"{seen['scored']} of {seen['rollouts']} rollouts, at most {seen['turns']} turns"
    return f"{played}, {seen['tokens']} tokens, rewards {low:g} to {high:g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "\\<")


if __name__ == "__main__":
    try:
        main()
    except GymexpError as error:
        sys.exit(f"error: {error}")
