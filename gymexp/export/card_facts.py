"""What the model card says of a run, read from the run's files."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from gymexp.config.plain_yaml import load_plain_yaml
from gymexp.config.schema import EnvConfig, RunConfig
from gymexp.export.chosen import Chosen
from gymexp.export.public_text import public_text
from gymexp.files import read_json, read_lines
from gymexp.record.run_state import read_run, wall_seconds
from gymexp.rollout.rollout_files import load_index
from gymexp.statistics import paired_change

Row = Mapping[str, Any]
_NOT_OF_THE_RUN = ("output_dir=", "hydra.", "resume=", "launcher")  # overrides that say where a run ran


def held_out_table(rows: Sequence[Row], step: int, envs: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a line for each environment with an evaluation after `step`: rewards before training and after
    `step`, and the change over the tasks that both evaluations scored."""
    table = []
    for env in envs:
        before = [r for r in rows if r["file"] == "eval-000000" and r["env"] == env]
        after = [r for r in rows if r["file"] == f"eval-{step:06d}" and r["env"] == env]
        if not after:
            continue
        change = paired_change(_by_task(before), _by_task(after)) if step else None
        rewards = list(_by_task(after).values())
        table.append(
            {
                "env": env,
                "before": _mean(list(_by_task(before).values())) if step else None,
                "after": _mean(rewards),
                "num_tasks": len({r["key"] for r in after}),
                "scored": sum(r.get("reward") is not None for r in after),
                "planned": len(after),
                "success": _mean([float(r["success"]) for r in after if r.get("success") is not None]),
                "change": change,
            }
        )
    return table


def _by_task(rows: Sequence[Row]) -> dict[str, float]:
    """Returns the mean reward of each task, without rollouts that failed."""
    rewards: dict[str, list[float]] = {}
    for row in rows:
        if row.get("reward") is not None:
            rewards.setdefault(row["key"], []).append(row["reward"])
    return {key: fmean(values) for key, values in rewards.items()}


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def ends_of_rollouts(rows: Sequence[Row], step: int, env: str) -> dict[str, Any]:
    """Returns how the training rollouts up to `step` ended: their number, and the shares that failed (with
    the commonest cause) and that a limit cut off."""
    mine = [
        r
        for r in rows
        if r["env"] == env and r["file"].startswith("step-") and int(r["file"].rpartition("-")[2]) <= step
    ]
    causes = Counter(str(r.get("cause")) for r in mine if r["outcome"] == "failed")
    number = len(mine)
    return {
        "number": number,
        "failed": causes.total() / number if number else 0.0,
        "cause": causes.most_common(1)[0][0] if causes else "",
        "truncated": sum(r["outcome"] == "truncated" for r in mine) / number if number else 0.0,
    }


def command_of(run: Path, hosts: set[str]) -> str:
    """Returns the command that trains such a policy, without the overrides that say where the run ran."""
    path = run / "overrides.yaml"
    overrides = load_plain_yaml(path.read_bytes()) if path.is_file() else []
    overrides = overrides if isinstance(overrides, list) else []
    kept = [str(o) for o in overrides if not str(o).lstrip("+~").startswith(_NOT_OF_THE_RUN)]
    words = (shlex.quote(public_text(override, hosts)) for override in kept)
    return " ".join(["python -m gymexp.train", *words]).replace("```", "'''")


def versions_of(run: Path) -> dict[str, str]:
    """Returns the versions of the libraries that trained, by name, and the commit of gymexp's code."""
    path = run / "versions.txt"
    lines = path.read_text().splitlines() if path.is_file() else []
    versions = dict(line.split(" ", 1) for line in lines if " " in line)
    commit = run / "code" / "git-commit.txt"
    if commit.is_file():
        diff = run / "code" / "git-diff.txt"
        changed = " with local changes" if diff.is_file() and diff.read_text().strip() else ""
        versions["commit of gymexp"] = f"{commit.read_text().strip()}{changed}"
    return versions


def hardware_of(run: Path, config: RunConfig, versions: Mapping[str, str]) -> list[str]:
    """Returns what is known of the machines: training processes, GPUs, the engine, the hours."""
    processes = read_json(run / "data" / "mix.json").get("training", {}).get("processes", 1)
    samples = read_lines(run / "system.jsonl")
    names = [gpu.get("name") for gpu in (samples[-1].get("gpus") or [])] if samples else []
    gpus = f"{len(names)} × {names[0] or 'GPU'}" if names else ""
    if not names and ("+cpu" in versions.get("torch", "") or (samples and not names)):
        gpus = "CPU only"
    hours = wall_seconds(read_run(run)) / 3600
    return [
        f"{processes} training process{'es' if processes > 1 else ''}",
        *([gpus] if gpus else []),
        *([f"engine {config.engine.kind}"] if config.engine.kind != "auto" else []),
        f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes",
    ]


def data_of(run: Path, config: RunConfig) -> list[dict[str, Any]]:
    """Returns the source, the number and the hash of each environment's tasks."""
    mix = read_json(run / "data" / "mix.json").get("envs", {})
    return [
        {
            "env": name,
            "source": source_of(env),
            "train_tasks": mix.get(name, {}).get("in_epoch"),
            "validation_tasks": mix.get(name, {}).get("validation_tasks"),
            "train_sha256": mix.get(name, {}).get("train_sha256", ""),
            "validation_sha256": mix.get(name, {}).get("validation_sha256", ""),
        }
        for name, env in config.env.items()
    ]


def source_of(env: EnvConfig) -> str:
    """Returns where an environment's tasks come from, as words."""
    data = env.data
    if data.source == "huggingface":
        return f"dataset {data.repo_id}, revision {data.revision}"
    if data.source == "generate":
        task = f" ({data.options['task']})" if isinstance(data.options.get("task"), str) else ""
        return f"generator {data.generator}{task}, seeds {data.train_seed} and {data.validation_seed}"
    return f"own files {Path(data.train_file or '').name}, {Path(data.validation_file or '').name}"


def facts_of(chosen: Chosen, hosts: set[str]) -> dict[str, Any]:
    """Returns the values of the card's template."""
    run, config = chosen.run, chosen.config
    rows = load_index(run / "rollouts")
    versions = versions_of(run)
    trainer = config.trainer
    return {
        "step": chosen.step,
        "table": held_out_table(rows, chosen.step, list(config.env)),
        "ends": {env: ends_of_rollouts(rows, chosen.step, env) for env in config.env},
        "command": command_of(run, hosts),
        "versions": versions,
        "hardware": hardware_of(run, config, versions),
        "data": data_of(run, config),
        "envs": config.env,
        "gym_version": config.gym.version,
        "seed": config.seed,
        "lora": config.model.lora,
        # Of a float32 model `vllm serve` makes a float16 one, unless it is told not to.
        "vllm_dtype": " --dtype float32" if config.model.dtype == "float32" else "",
        # The defaults are TRL's.
        "loss": trainer.get("loss_type", "dapo"),
        "learning_rate": trainer.get("learning_rate", 1e-6),
        "num_generations": trainer.get("num_generations", 8),
        "max_model_len": config.model.max_model_len,
    }
