"""The results of an evaluation: results.json, results.csv (a line a task), and results.txt (the table).

results.json depends on what was played alone: it has no time, no path and no duration. So two evaluations of
the same policy with the same seeds write the same file, and one that was killed and resumed does too.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from gymexp.config.schema import RunConfig
from gymexp.evaluation.plan import TASKS, Plan, Policy
from gymexp.evaluation.results_table import results_table
from gymexp.files import read_json, replace_file
from gymexp.printable import csv_cell, printable
from gymexp.record.directory import RunDirectory
from gymexp.rollout.rollout_files import read_index
from gymexp.statistics import EnvSummary, summarize

RESULTS = "results.json"
_TABLE = "results.txt"
_SCHEMA = 1
_COLUMNS = ("policy", "env", "key", "n", "successes", "mean", "sd", "tokens", "turns", "failed", "causes")

Summaries = dict[str, dict[str, EnvSummary]]  # by the policies' labels, then by environment


def write(run: RunDirectory, config: RunConfig, plan: Plan) -> str:
    """Writes the results of an evaluation that was played to its end. Returns its table."""
    rows = _rows_by_file(run.rollouts)
    keys = list(read_json(run.path / TASKS))
    summaries = {p.label: _summaries(rows.get(p.file, []), keys, config, plan) for p in plan.policies}
    results = {
        "schema": _SCHEMA,
        "name": config.name,
        "split": plan.split,
        "samples": plan.samples,
        "seed": config.seed,
        "tasks": len(keys),
        "sampling": _sampling(config),
        "policies": [_policy_to_json(policy, summaries[policy.label]) for policy in plan.policies],
    }
    replace_file(run.path / "results.csv", _to_csv(plan, rows))
    first, last = summaries[plan.policies[0].label], summaries[plan.policies[-1].label]
    held_out = {}
    for env, summary in last.items():
        before = first[env].mean_reward if len(plan.policies) > 1 else None
        held_out[env] = {"reward": [before, summary.mean_reward]}
    run.write_result({"step": plan.policies[-1].step, "stopped": False, "held_out": held_out})
    findings = [line for policy in plan.policies for line in _finding(policy, summaries[policy.label])]
    table = printable("\n".join([results_table(summaries, plan.samples), *findings]))
    replace_file(run.path / _TABLE, table + "\n")
    replace_file(run.path / RESULTS, json.dumps(results, indent=1) + "\n")  # last: it says that all is done
    return table


def read_table(directory: Path) -> str:
    """Returns the table of a finished evaluation, as the terminal showed it."""
    return (directory / _TABLE).read_text().rstrip()


def _rows_by_file(rollouts: Path) -> dict[str, list[dict[str, Any]]]:
    by_file: dict[str, list[dict[str, Any]]] = {}
    for row in read_index(rollouts):
        by_file.setdefault(row["file"], []).append(row)
    return by_file


def env_of(key: str) -> str:
    """Returns the environment in a task's key."""
    return key.split("/", 1)[0]


def _summaries(
    rows: Sequence[dict[str, Any]], keys: Iterable[str], config: RunConfig, plan: Plan
) -> dict[str, EnvSummary]:
    """Returns the summary of each environment."""
    planned: dict[str, int] = {}
    for key in keys:
        planned[env_of(key)] = planned.get(env_of(key), 0) + plan.samples
    return {
        env: summary_of([r for r in rows if r["env"] == env], planned[env], config.env[env].success_reward)
        for env in config.env
        if env in planned
    }


def summary_of(rows: Sequence[Mapping[str, Any]], planned: int, success_reward: float) -> EnvSummary:
    """Returns the summary of rows of the index, some of which may have no count of tokens."""
    if all(row.get("reward") is None or row.get("tokens") is not None for row in rows):
        return summarize(rows, planned, success_reward)
    summary = summarize([{**row, "tokens": 0} for row in rows], planned, success_reward)
    return dataclasses.replace(summary, tokens_p50=None, tokens_p95=None)


def _sampling(config: RunConfig) -> dict[str, Any]:
    evaluation = config.evaluation
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    return {name: getattr(evaluation, name) for name in names} | {
        "max_output_tokens": {name: env.max_output_tokens for name, env in config.env.items()}
    }


def _policy_to_json(policy: Policy, summaries: Mapping[str, EnvSummary]) -> dict[str, Any]:
    """Returns one policy's part of results.json. The digest stands for the place of its weights."""
    of_envs = {env: _to_json(dataclasses.asdict(summary)) for env, summary in summaries.items()}
    names = {"kind": policy.kind, "label": policy.label, "step": policy.step, "file": policy.file}
    return names | {"digest": policy.digest, "envs": of_envs}


def _to_json(value: Any) -> Any:
    """Rounds numbers to 10 digits, which no order of summation changes."""
    if isinstance(value, dict):
        return {str(key): _to_json(inner) for key, inner in value.items()}
    return round(value, 10) if isinstance(value, float) else value


def _to_csv(plan: Plan, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Returns results.csv: a line for each policy and task, in the order of play."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for policy in plan.policies:
        by_key: dict[str, list[Mapping[str, Any]]] = {}
        for row in rows.get(policy.file, []):
            by_key.setdefault(row["key"], []).append(row)
        for key, of_task in by_key.items():
            scored = [row for row in of_task if row.get("reward") is not None]
            rewards = [row["reward"] for row in scored]
            tokens = [row["tokens"] for row in scored if row["tokens"] is not None]
            causes = sorted(row["cause"] for row in of_task if row.get("reward") is None)
            writer.writerow(
                [
                    csv_cell(policy.label),
                    csv_cell(env_of(key)),
                    csv_cell(key),
                    len(scored),
                    sum(row["success"] for row in scored),
                    round(fmean(rewards), 10) if rewards else "",
                    round(stdev(rewards), 10) if len(rewards) > 1 else "",
                    round(fmean(tokens), 4) if tokens else "",
                    round(fmean(row["turns"] for row in scored), 4) if scored else "",
                    len(causes),
                    csv_cell(" ".join(causes)),
                ]
            )
    return out.getvalue()


_PAYS = 0.1  # a mean reward for a canned reply from which it is a finding


def _finding(policy: Policy, summaries: Mapping[str, EnvSummary]) -> list[str]:
    """Returns a sentence for each environment whose grader pays for a canned reply."""
    if policy.kind != "probe":
        return []
    return [
        f"finding: the grader of {env} pays {mean:.3f} on average for the reply {policy.reply!r}, which "
        "solves nothing"
        for env, summary in summaries.items()
        if (mean := summary.mean_reward) is not None and mean >= _PAYS
    ]
