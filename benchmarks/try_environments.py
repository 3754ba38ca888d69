"""Plays environments of NeMo Gym on their own example rows, and writes docs/environments.md.

    python benchmarks/try_environments.py blackjack xlam_fc …       these
    python benchmarks/try_environments.py --all                     all that gymexp does not refuse
    python benchmarks/try_environments.py                           only writes the page again

Each environment is an evaluation of the tiny policy on a CPU, by `python -m gymexp.evaluate`: NeMo Gym's
agent and servers, gymexp's gateway, and exact tokens, which the collector checks. The tiny policy solves none
of them, so the rewards say only that the graders answer. What ends without results is on the page with its
reason. `benchmarks/results/environments_tried.json` keeps what was seen; a name that is tried again replaces
its line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gymexp.config.schema import GymConfig
from gymexp.gym.catalogue import Entry, load_catalogue
from gymexp.gym.install import find_made_venv, site_packages
from gymexp.record.places import cache_dir
from gymexp.rollout.rollout_files import read_index

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "environments_tried.json"
PAGE = ROOT / "docs" / "environments.md"
_SETTINGS = ["model=tiny", "engine=hf", "evaluation.temperature=1", "rollout.max_failed_share=1"]
_TITLE = """\
# Environments of NeMo Gym that were played

`python benchmarks/try_environments.py NAME…` makes this page: it plays the example rows of environments with
the tiny policy on a CPU. The tokens of every turn were checked. The policy solves nothing, so the rewards
show that the graders answer, not what a model achieves. `python -m gymexp.envs` lists all environments;
[the guide](guides/environments.md) says how to train in them.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--all", action="store_true", help="all environments that gymexp does not refuse")
    parser.add_argument("--max-output-tokens", type=int, default=48, help="of a model turn")
    parser.add_argument("--deadline", type=float, default=300.0, help="seconds for one environment")
    args = parser.parse_args()
    gym = GymConfig()
    catalogue = load_catalogue(gym, cache_dir(), print)
    if unknown := [name for name in args.names if name not in catalogue]:
        parser.error(f"unknown: {', '.join(unknown)}; python -m gymexp.envs lists the names")
    names = [name for name, e in catalogue.items() if not e.reasons] if args.all else args.names
    python = find_made_venv(gym, cache_dir())
    assert python is not None, "load_catalogue has made it"
    site = site_packages(python)
    tried: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names:
        began = time.perf_counter()
        tried[name] = try_one(catalogue[name], site, args)
        tried[name] |= {"nemo_gym": gym.version, "seconds": round(time.perf_counter() - began, 1)}
        print(f"{name}: {tried[name]}", flush=True)
        RESULTS.write_text(json.dumps(dict(sorted(tried.items())), indent=1) + "\n")
    PAGE.write_text(page(tried, catalogue))


def try_one(entry: Entry, site: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Returns what was seen: numbers of rollouts, or {"reason": why there are none}."""
    if entry.reasons:
        return {"reason": entry.reasons[0]}
    if entry.images:
        return {"reason": "its rows have images, which gymexp does not pass on"}
    if not entry.examples:
        return {"reason": "NeMo Gym ships no example rows"}
    at = f"env.{entry.name}"
    rows = site / entry.examples
    settings = [
        f"env=[{entry.name}]",
        f"{at}.max_output_tokens={args.max_output_tokens}",
        f"{at}.timeout_s=60",
    ]
    settings += [
        f"{at}.data.source=jsonl",
        f"{at}.data.train_file={rows}",
        f"{at}.data.validation_file={rows}",
    ]
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "run"
        command = [sys.executable, "-m", "gymexp.evaluate", *_SETTINGS, *settings, f"output_dir={directory}"]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=args.deadline,
                cwd=ROOT,
                env=os.environ,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"reason": f"it took longer than {args.deadline:.0f} s"}
        seen = list(read_index(directory / "rollouts")) if (directory / "rollouts").exists() else []
        if done.returncode or not any(row.get("reward") is not None for row in seen):
            return {"reason": why(done, seen)}
        return figures(seen)


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


def why(done: subprocess.CompletedProcess[str], rows: list[dict[str, Any]]) -> str:
    """Returns the reason in one line: the command's error, or the cause of the first failed rollout."""
    text = done.stderr.strip()
    if "error: " in text:
        text = text.rpartition("error: ")[2]
    elif failed := [row for row in rows if row.get("cause")]:
        text = f"{failed[0]['cause']}: {failed[0].get('detail', '')}"
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:299]}…"


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


def _cell(text: str) -> str:
    home = str(Path.home())
    return text.replace("|", "\\|").replace("<", "\\<").replace(home, "~").replace(str(ROOT), ".")


if __name__ == "__main__":
    main()
