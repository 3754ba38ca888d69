"""Makes tasks for NeMo Gym's workplace_assistant from the server's data, and proves them with its verifier.

A script for NeMo Gym's venv, which needs no network:

    <gym python> gymexp/data/workplace/make.py --train 1200 --validation 120 --seed 42 --output DIR

Writes train.jsonl and validation.jsonl (rows as in the server's example.jsonl), demonstrations.jsonl (an
expert's conversation for each train task) and report.json. The same arguments give the same bytes, except for
`seconds` in the report.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

# Python puts a script's own folder first on sys.path, where a module could hide one of the standard library.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from gymexp.data.workplace.proof import CSV_DATA, Proof, as_actions, prove, remember_tables, tool_schemas
from gymexp.data.workplace.tasks import TEMPLATES, Draft
from gymexp.data.workplace.tasks.world import World, load_world

Cell = tuple[str, str]

# Shares of all tasks: 45% are easy, 35% medium, 20% hard. 8% need two domains; none of these is easy.
SHARES = {"easy": 0.45, "medium": 0.35, "hard": 0.20}
MULTI_DOMAIN_SHARES = {"medium": 0.03, "hard": 0.05}
SYSTEM = (
    "Today's date is Thursday, 2023-11-30 and the current time is 23:59:00. Remember the current date and "
    "time when answering queries. Meetings must not start before 9am or end after 6pm."
)
FINAL_MESSAGE = "Done."
DRAWS_PER_TURN, MAX_TURNS_WITHOUT_NEW_DRAFT = 40, 200


def compute_quotas(total: int) -> dict[Cell, int]:
    """Returns the number of tasks of each (domain, difficulty). The numbers are rounded by largest
    remainders, so that their sum is `total`."""
    single = sorted({domain for domain, _ in TEMPLATES} - {"multi_domain"})
    weights: dict[Cell, float] = {
        ("multi_domain", level): share for level, share in MULTI_DOMAIN_SHARES.items()
    }
    for level, share in SHARES.items():
        weights |= {
            (domain, level): (share - MULTI_DOMAIN_SHARES.get(level, 0)) / len(single) for domain in single
        }
    quotas = {cell: int(total * weight) for cell, weight in weights.items()}
    by_remainder = sorted(weights, key=lambda cell: (quotas[cell] - total * weights[cell], cell))
    for cell in by_remainder[: total - sum(quotas.values())]:
        quotas[cell] += 1
    return quotas


class Drawer:
    """Draws drafts for a cell, a (domain, difficulty), from its templates in turn. No request and no ground
    truth comes twice."""

    def __init__(self, world: World, seed: int):
        self.world, self.seed = world, seed
        self.randoms = {cell: Random(f"{seed}/{cell}") for cell in TEMPLATES}
        self.turns: Counter[Cell] = Counter()
        self.seen: set[str] = set()

    def draw(self, cell: Cell) -> Draft:
        """Returns a new draft of the cell's next template; a template that gives none loses its turn. Raises
        RuntimeError if the cell's templates are exhausted."""
        for _ in range(MAX_TURNS_WITHOUT_NEW_DRAFT):
            template = TEMPLATES[cell][self.turns[cell] % len(TEMPLATES[cell])]
            self.turns[cell] += 1
            for _ in range(DRAWS_PER_TURN):
                drawn = template(self.world, self.randoms[cell])
                if drawn and self.is_new(draft := Draft(*cell, template.__name__, *drawn)):
                    return draft
        raise RuntimeError(f"templates of {cell} are exhausted: ask for fewer tasks or write more templates")

    def is_new(self, draft: Draft) -> bool:
        """Returns whether request and ground truth are new, and remembers both if they are."""
        keys = {draft.user.lower(), json.dumps(draft.ground_truth, sort_keys=True)}
        if keys & self.seen:
            return False
        self.seen |= keys
        return True


def gather_proven(
    quotas: dict[Cell, int], world: World, seed: int
) -> tuple[dict[Cell, list[Proof]], list[Proof]]:
    """Draws and proves drafts until each cell is full. Returns the proven tasks by cell, and all proofs, also
    those that failed."""
    drawer, tried = Drawer(world, seed), []
    proven: dict[Cell, list[Proof]] = {cell: [] for cell in quotas}
    total = sum(quotas.values())
    with multiprocessing.get_context("spawn").Pool(os.cpu_count(), initializer=remember_tables) as pool:
        while missing := {cell: n - len(proven[cell]) for cell, n in quotas.items() if n > len(proven[cell])}:
            drafts = [drawer.draw(cell) for cell, count in missing.items() for _ in range(count)]
            for proof in pool.imap(prove, drafts, chunksize=10):
                tried.append(proof)
                if proof.fault is None:
                    proven[proof.draft.domain, proof.draft.difficulty].append(proof)
                if len(tried) % 100 == 0:
                    print(f"proved {sum(map(len, proven.values()))}/{total}", flush=True)
    print(f"proved {total}/{total}", flush=True)
    return proven, tried


def split(
    proven: dict[Cell, list[Proof]], validation: dict[Cell, int], seed: int
) -> tuple[list[Proof], list[Proof]]:
    """Returns the train and the validation tasks, each in random order. validation: the number of validation
    tasks of each cell; the other tasks are train tasks."""
    r = Random(f"{seed}/split")
    parts: tuple[list[Proof], list[Proof]] = ([], [])
    for cell in sorted(proven):
        shuffled = r.sample(proven[cell], len(proven[cell]))
        parts[1].extend(shuffled[: validation[cell]])
        parts[0].extend(shuffled[validation[cell] :])
    for part in parts:
        r.shuffle(part)
    return parts


def prompt(draft: Draft) -> list[dict[str, str]]:
    """Returns the first messages of a task's conversation: the system's and the user's."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": draft.user}]


def build_row(number: int, draft: Draft, tools: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns a dataset row in the format of the server's verifier."""
    return {
        "id": number,
        "responses_create_params": {"input": prompt(draft), "tools": tools, "parallel_tool_calls": False},
        "ground_truth": as_actions(draft.ground_truth),
        "category": f"workplace_assistant_{draft.domain}",
        "environment_name": "workplace_assistant",
    }


def build_demonstration(number: int, proof: Proof, tools: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the expert's conversation as chat messages. Tool messages are what the live server sends."""
    messages: list[dict[str, Any]] = [*prompt(proof.draft)]
    for (name, arguments), output in zip(proof.draft.calls, proof.outputs, strict=True):
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        messages.append({"role": "tool", "content": output})
    messages.append({"role": "assistant", "content": FINAL_MESSAGE})
    return {
        "id": number,
        "messages": messages,
        "tools": tools,
        "category": f"workplace_assistant_{proof.draft.domain}",
        "difficulty": proof.draft.difficulty,
        "turns": len(proof.draft.calls) + 1,
    }


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    """Writes the rows and returns the file's SHA-256."""
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def summarize(proofs: list[Proof]) -> dict[str, Any]:
    """Returns the numbers of tasks of each kind, and how many calls the tasks take."""

    def count(key: Any) -> dict[str, int]:
        return {str(k): n for k, n in sorted(Counter(map(key, proofs)).items())}

    searches = sum(any(name == "email_search_emails" for name, _ in p.draft.calls) for p in proofs)
    return {
        "tasks": len(proofs),
        "by_domain": count(lambda p: p.draft.domain),
        "by_difficulty": count(lambda p: p.draft.difficulty),
        "by_ground_truth_steps": count(lambda p: len(p.draft.ground_truth)),
        "by_turns": count(lambda p: len(p.draft.calls) + 1),
        "by_template": count(lambda p: f"{p.draft.domain}/{p.draft.difficulty}/{p.draft.template}"),
        "email_search_share": round(searches / max(1, len(proofs)), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--train", type=int, default=1200)
    parser.add_argument("--validation", type=int, default=120)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    start = time.perf_counter()
    world = load_world(CSV_DATA)
    train, validation = compute_quotas(args.train), compute_quotas(args.validation)
    quotas = {cell: train[cell] + validation[cell] for cell in train}
    proven, tried = gather_proven(quotas, world, args.seed)
    train_proofs, validation_proofs = split(proven, validation, args.seed)

    schemas = tool_schemas()
    functions = [
        {"type": "function", "function": {k: s[k] for k in ("name", "description", "parameters")}}
        for s in schemas
    ]
    rows = [build_row(n, p.draft, schemas) for n, p in enumerate(train_proofs + validation_proofs)]
    args.output.mkdir(parents=True, exist_ok=True)
    files = {
        "train.jsonl": rows[: args.train],
        "validation.jsonl": rows[args.train :],
        "demonstrations.jsonl": [build_demonstration(n, p, functions) for n, p in enumerate(train_proofs)],
    }
    hashes = {name: write_jsonl(args.output / name, content) for name, content in files.items()}
    kept = train_proofs + validation_proofs
    faults = Counter(p.fault for p in tried if p.fault)
    report = {
        "seed": args.seed,
        "train": summarize(train_proofs),
        "validation": summarize(validation_proofs),
        "proofs": {
            "replayed": len(tried),
            "kept": len(kept),
            "ground_truth_reward_1_share": mean(p.self_reward for p in kept),
            "do_nothing_reward_0_share": mean(not p.idle_reward for p in kept),
            "dropped": dict(faults.most_common()),
        },
        "sha256": hashes,
        "seconds": round(time.perf_counter() - start, 1),
    }
    (args.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {args.train} + {args.validation} tasks to {args.output} in {report['seconds']} s")


if __name__ == "__main__":
    main()
