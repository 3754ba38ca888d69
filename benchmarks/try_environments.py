"""Plays environments of NeMo Gym on their own example rows, and writes docs/environments.md.

    python benchmarks/try_environments.py blackjack xlam_fc …       these
    python benchmarks/try_environments.py --all                     all that gymexp does not refuse
    python benchmarks/try_environments.py                           only writes the page again
    python benchmarks/try_environments.py gym.python=PATH blackjack …   of another NeMo Gym

They are played by evaluations of the tiny policy on a CPU, by `python -m gymexp.evaluate`: NeMo Gym's
agent and servers, gymexp's gateway, and exact tokens, which the collector checks. The tiny policy solves none
of them, so the rewards say only that the graders answer. What ends without results is on the page with its
reason. `benchmarks/results/environments_tried.json` keeps what was seen, and a file with the version in its
name that of another NeMo Gym; a name that is tried again replaces its line.
"""

from __future__ import annotations

import argparse
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
from gymexp.gym.catalogue import Entry, load_catalogue
from gymexp.gym.install import find_made_venv, nemo_gym_version, site_packages
from gymexp.record.places import cache_dir
from gymexp.rollout.rollout_files import read_index

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "environments_tried.json"
PAGE = ROOT / "docs" / "environments.md"
_SETTINGS = [
    "model=tiny",
    "model.max_model_len=16384",
    "engine=hf",
    "evaluation.temperature=1",
    "rollout.max_failed_share=1",
]
_TITLE = """\
# Environments of NeMo Gym that were played

`python benchmarks/try_environments.py NAME…` makes this page. It plays the example rows of environments with
the tiny policy on a CPU; a benchmark without rows plays those of its resources server. The tokens of every
turn were checked. The policy solves nothing, so the rewards show that the graders answer, not what a model
achieves.
`python -m gymexp.envs` lists all environments, and
[the guide](guides/data.md#any-environment-of-nemo-gyms) says how to train in them.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--all", action="store_true", help="all environments that gymexp does not refuse")
    parser.add_argument("--max-output-tokens", type=int, default=48, help="of a model turn")
    parser.add_argument("--together", type=int, default=8, help="environments of one evaluation")
    args = parser.parse_args()
    settings = [word for word in args.names if "=" in word]
    args.names = [word for word in args.names if "=" not in word]
    gym = gym_of(settings)
    changed = {key: value for key, value in vars(gym).items() if value != getattr(GymConfig, key)}
    args.gym = [f"gym.{key}='{value}'" for key, value in changed.items()]
    catalogue = load_catalogue(gym, cache_dir(), print)
    if unknown := [name for name in args.names if name not in catalogue]:
        parser.error(f"unknown: {', '.join(unknown)}; python -m gymexp.envs lists the names")
    names = [name for name, e in catalogue.items() if not e.reasons] if args.all else args.names
    python = find_made_venv(gym, cache_dir())
    assert python is not None, "load_catalogue has made it"
    site = site_packages(python)
    version = nemo_gym_version(site)
    results = RESULTS if version == GymConfig.version else RESULTS.with_stem(f"{RESULTS.stem}-{version}")
    tried: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    for start in range(0, len(names), args.together):
        for name, seen in try_some([catalogue[n] for n in names[start : start + args.together]], site, args):
            tried[name] = seen | {"nemo_gym": version, "agent": catalogue[name].harness}
            print(f"{name}: {seen}", flush=True)
            results.write_text(json.dumps(dict(sorted(tried.items())), indent=1) + "\n")
    tried = json.loads(RESULTS.read_text())
    PAGE.write_text(page(tried, load_catalogue(GymConfig(), cache_dir(), print)) + newer_section())


def try_some(
    entries: list[Entry], site: Path, args: argparse.Namespace
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields for each environment numbers of its rollouts, or {"reason": why there are none}.

    One evaluation plays all of them. If it ends with an error that names some, the others play again.
    """
    playable = []
    for entry in entries:
        if reason := refusal(entry):
            yield entry.name, {"reason": reason}
        else:
            playable.append(entry)
    while playable:
        done, rows = evaluate(playable, site, args)
        text = error_of(done)
        named = [e for e in playable if re.search(rf"(env\.|^|\(){e.name}\b", text, re.MULTILINE)]
        if done.returncode and named != playable and len(playable) > 1:
            again = named or playable[:1]
            print(f"{', '.join(e.name for e in playable)}: {text}", file=sys.stderr, flush=True)
            if not named:  # the error says of nobody that it is theirs
                yield from try_some(again, site, args)
            else:
                yield from ((entry.name, {"reason": shortened(text)}) for entry in named)
            playable = [entry for entry in playable if entry not in again]
            continue
        for entry in playable:
            of_env = [row for row in rows if row["env"] == entry.name]
            scored = not done.returncode and any(row.get("reward") is not None for row in of_env)
            failed = next(
                (f"{row['cause']}: {row.get('detail', '')}" for row in of_env if row.get("cause")), text
            )
            yield entry.name, figures(of_env) if scored else {"reason": shortened(text or failed)}
        return


def refusal(entry: Entry) -> str:
    """Returns why an environment is not tried, or ""."""
    if entry.reasons:
        return entry.reasons[0]
    if entry.images:
        return "its rows have images, which gymexp does not pass on"
    return "" if entry.examples else "NeMo Gym ships no example rows"


def evaluate(
    entries: list[Entry], site: Path, args: argparse.Namespace
) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    """Returns the ended command, and the index of the rollouts that it played."""
    settings = [f"env=[{','.join(entry.name for entry in entries)}]"]
    for entry in entries:
        at, rows = f"env.{entry.name}", site / str(entry.examples)
        settings += [f"{at}.max_output_tokens={args.max_output_tokens}", f"{at}.timeout_s=900"]
        settings += [f"{at}.data.source=jsonl", f"{at}.data.train_file={rows}"]
        settings += [f"{at}.data.validation_file={rows}"]
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "run"
        settings += [*args.gym, f"output_dir={directory}"]
        command = [sys.executable, "-m", "gymexp.evaluate", *_SETTINGS, *settings]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        rollouts = directory / "rollouts"
        return done, list(read_index(rollouts)) if rollouts.exists() else []


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """Returns the text of the command's error; "" if it has none."""
    return done.stderr.rpartition("error: ")[2].strip() if done.returncode else ""


def shortened(text: str) -> str:
    """Returns a text as one line of at most 300 characters, without paths of this machine."""
    line = " ".join(text.replace(str(Path.home()), "~").replace(f"{ROOT}/", "").split())
    return line if len(line) <= 300 else f"{line[:299]}…"


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
    played = {name: seen for name, seen in sorted(tried.items()) if "reason" not in seen}
    others = {name: seen for name, seen in sorted(tried.items()) if "reason" in seen}
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
    lines += [f"\n## Not played: {len(others)}\n", "| environment | reason |", "|---|---|"]
    lines += [f"| {name} | {_cell(seen['reason'])} |" for name, seen in others.items()]
    return "\n".join(lines) + "\n"


def newer_section() -> str:
    """Returns a table for each other version of NeMo Gym whose environments were tried."""
    lines = []
    for file in sorted(RESULTS.parent.glob(f"{RESULTS.stem}-*.json")):
        lines += [f"\n## NeMo Gym {file.stem.rpartition('-')[2]}\n"]
        lines += ["| environment | agent | what was seen |", "|---|---|---|"]
        for name, seen in json.loads(file.read_text()).items():
            what = _cell(seen["reason"]) if "reason" in seen else _in_words(seen)
            lines.append(f"| {name} | {seen['agent']} | {what} |")
    return "\n".join(lines) + "\n" if lines else ""


def _in_words(seen: dict[str, Any]) -> str:
    low, high = seen["rewards"]
    played = f"{seen['scored']} of {seen['rollouts']} rollouts, at most {seen['turns']} turns"
    return f"{played}, {seen['tokens']} tokens, rewards {low:g} to {high:g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "\\<")


if __name__ == "__main__":
    main()
