"""Makes the files of docs/results from runs of one experiment with different seeds.

    python benchmarks/learning.py docs/results/NAME RUN_DIR RUN_DIR RUN_DIR

A RUN_DIR is the directory of a finished run: outputs/<name>/<date_time>. The script writes summary.md,
held_out.svg and training.svg, and for each run seed_<n>/ with the data behind them: a copy of metrics.jsonl,
held_out.csv with the reward of each held-out task in the first and the last evaluation, versions.txt with the
commit, config.yaml and overrides.yaml. In the last two an absolute path is shortened to <machine>/<its last
part>, as the rest means nothing on another machine.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import OmegaConf

from gymexp.errors import GymexpError
from gymexp.rollout.rollout_files import read_outcomes
from gymexp.statistics import Change, paired_change
from gymexp.training.drift import MAX_DRIFT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILES = ("metrics.jsonl", "result.json", "config.yaml", "overrides.yaml", "versions.txt", "rollouts")
MAY_DIFFER = re.compile(r"seed|dataset\.seed|name|resume|output_dir|(tracker|gym|placement)(\..*)?")
PATH = re.compile(r"(?:(?<=file://)|(?<![\w.<>}~/-]))~?/(?=[\w.])[^\s'\",\[\]{}]*")
RATIO = "sampling/ratio_mean"
COUNTED = {
    "rollouts": "Rollouts",
    "failed": "Failed rollouts",
    "retried": "Attempts that failed and were made again",
    "token_mismatches": "Token mismatches, of all attempts",
}
STYLE: Any = {
    "svg.hashsalt": "gymexp",  # without a salt, the same picture would give a different file each time
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 9,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Run:
    """A finished run.

    lines: those of metrics.jsonl. The line of a step also has `seconds`: time/step without the evaluation.
    """

    directory: Path
    seed: int
    config: dict[str, Any]
    lines: list[dict[str, Any]]

    @property
    def evaluated(self) -> list[int]:
        """The steps at which the run was evaluated, in order."""
        return sorted({line["step"] for line in self.lines if any(key.startswith("eval_") for key in line)})


def read_run(directory: Path) -> Run:
    """Reads a run. Raises GymexpError unless the run has finished and has logged each step."""
    for name in FILES:
        if not (directory / name).exists():
            raise GymexpError(
                f"RUN_DIR must hold {name}, {directory} does not: name a finished run's directory"
            )
    result = json.loads((directory / "result.json").read_text())
    if result.get("stopped") is not False:
        got = str(result.get("error") or f"one stopped at step {result.get('step')}").splitlines()[0]
        raise GymexpError(f"RUN_DIR must be a finished run, got {got}: go on with it by resume={directory}")
    config: Any = OmegaConf.to_container(OmegaConf.load(directory / "config.yaml"))
    if (every := config["trainer"].get("logging_steps")) != 1:
        raise GymexpError(f"trainer.logging_steps must be 1, got {every} in {directory}: run it with 1")
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "time/step" in line:
            line["seconds"] = line["time/step"] - line.get("time/evaluation", 0.0)
    return Run(directory, config["seed"], config, lines)


def check_one_experiment(runs: Sequence[Run]) -> None:
    """Raises GymexpError unless all runs have different seeds and otherwise the same configuration."""
    first = runs[0]
    for number, run in enumerate(runs):
        for other in runs[:number]:
            if other.seed == run.seed:
                raise GymexpError(
                    f"seed must be another one in each run, got {run.seed} in {other.directory} and "
                    f"{run.directory}: leave one out"
                )
        expected, config = dict(flatten(first.config)), dict(flatten(run.config))
        for key in expected | config:
            if expected.get(key) != config.get(key) and not MAY_DIFFER.fullmatch(key):
                raise GymexpError(
                    f"{key} must be the same in all runs, got {expected.get(key)} in {first.directory} and "
                    f"{config.get(key)} in {run.directory}: name runs of one experiment"
                )
    for env in first.config["env"]:
        if (num := len(series(runs, f"eval_{env}/reward")[0])) < 2:
            raise GymexpError(
                f"env.{env} must have been evaluated twice or more in each run, got {num}: "
                "run with evaluation.before=true evaluation.after=true"
            )


def flatten(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the leaves of a configuration, such as ("trainer.max_steps", 24). Absolute paths are shortened,
    as they may differ between machines."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from flatten(inner, f"{key}.{name}" if key else name)
    else:
        yield key, without_paths(value)


def without_paths(value: Any) -> Any:
    """Returns the value with all absolute paths in its strings shortened to <machine>/<last part>."""
    if isinstance(value, dict):
        return {key: without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_paths(inner) for inner in value]
    if not isinstance(value, str):
        return value
    bare = value.strip("'\"")
    if bare.startswith(("/", "~/")) and "," not in bare:  # one path, perhaps with spaces
        return f"<machine>/{PurePosixPath(bare).name}"
    return PATH.sub(lambda match: f"<machine>/{PurePosixPath(match.group()).name}", value)


def series(runs: Sequence[Run], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns (steps_S, values_NS): the S steps at which all N runs have the metric, and a row per run."""
    by_run = [{line["step"]: line[key] for line in run.lines if line.get(key) is not None} for run in runs]
    steps = sorted(set.intersection(*(set(values) for values in by_run)))
    return np.array(steps, int), np.array([[values[step] for step in steps] for values in by_run], float)


def deviation(values_NS: np.ndarray) -> np.ndarray:
    """Returns the sample standard deviation (n - 1) over runs; 0 for a single run."""
    return values_NS.std(axis=0, ddof=1 if len(values_NS) > 1 else 0)


def smooth(values_NS: np.ndarray, width: int) -> np.ndarray:
    """Returns the moving mean over `width` (odd) values. At both ends the mean covers fewer values."""
    half = width // 2
    means = [values_NS[:, max(0, i - half) : i + half + 1].mean(axis=1) for i in range(values_NS.shape[1])]
    return np.stack(means, axis=1)


def read_held_out(run: Run) -> dict[str, list[float | None]]:
    """Returns {task key: [reward before, reward after]}, from the first and the last evaluation. A reward is
    None if the rollout failed."""
    rewards: dict[str, list[float | None]] = {}
    for place, step in enumerate((run.evaluated[0], run.evaluated[-1])):
        for record in read_outcomes(run.directory / "rollouts" / f"eval-{step:06d}.jsonl.zst"):
            task = (record.get("rollout") or record)["task"]["key"]
            rewards.setdefault(task, [None, None])[place] = (record.get("rollout") or {}).get("reward")
    return rewards


def paired_changes(runs: Sequence[Run], env: str) -> tuple[list[Change], Change]:
    """Returns the change of the held-out rewards of each run, and that of the means over runs of each task.
    Tasks of which any run has a failed rollout are left out. Raises GymexpError if fewer than two remain."""
    held_out = [read_held_out(run) for run in runs]
    tasks = [task for task in held_out[0] if task.startswith(f"{env}/")]
    complete = [task for task in tasks if all(None not in rewards.get(task, [None]) for rewards in held_out)]
    pairs_NT2: Any = [[rewards[task] for task in complete] for rewards in held_out]
    pairs_NT2 = np.array(pairs_NT2, float).reshape(len(runs), -1, 2)
    *of_runs, of_means = (
        paired_change(
            dict(zip(complete, pairs_T2[:, 0], strict=True)), dict(zip(complete, pairs_T2[:, 1], strict=True))
        )
        for pairs_T2 in [*pairs_NT2, pairs_NT2.mean(axis=0)]
    )
    found = [change for change in of_runs if change]
    if of_means is None:
        raise GymexpError(
            f"env.{env} must have two held-out tasks that no evaluation failed at, got {len(complete)}: "
            "run with more held-out tasks"
        )
    return found, of_means


def margin(change: Change) -> float:
    """Returns half of the width of a change's 95 % interval."""
    return (change.high - change.low) / 2


def count_rollouts(runs: Sequence[Run], prefix: str) -> dict[str, float]:
    """Returns the numbers of rollouts and of what went wrong in them; NaN for a number that older runs lack.

    prefix: "" for training rollouts, "eval_" for held-out rollouts.
    """
    counts = dict.fromkeys(COUNTED, 0.0)
    for line in (line for run in runs for line in run.lines):
        for name in (f"{prefix}{env}" for env in runs[0].config["env"]):
            if num := line.get(f"{name}/rollouts"):
                counts["rollouts"] += num
                counts["failed"] += num * line[f"{name}/failed"]
                counts["retried"] += num * line.get(f"{name}/retried", math.nan)
                counts["token_mismatches"] += line.get(f"{name}/token_mismatches", math.nan)
    return counts


def overrides(run: Run) -> list[str]:
    lines = (run.directory / "overrides.yaml").read_text().splitlines()
    parts = (line.removeprefix("- ").partition("=") for line in lines)
    return [f"{key}{equals}{without_paths(value)}" for key, equals, value in parts]


def copy_run(run: Run, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run.directory / "metrics.jsonl", target / "metrics.jsonl")
    shutil.copyfile(run.directory / "config.yaml", target / "config.yaml")
    rows = [",".join([task, *map(_shown, pair)]) for task, pair in sorted(read_held_out(run).items())]
    (target / "held_out.csv").write_text("\n".join(["task,before,after", *rows]) + "\n")
    if (config := without_paths(run.config)) != run.config:
        note = "# Absolute paths are shortened to <machine>/<last part>.\n"
        (target / "config.yaml").write_text(note + OmegaConf.to_yaml(OmegaConf.create(config)))
    (target / "overrides.yaml").write_text("".join(f"- {override}\n" for override in overrides(run)))
    versions = (run.directory / "versions.txt").read_text()
    commit, diff = (run.directory / "code" / f"git-{name}.txt" for name in ("commit", "diff"))
    if commit.exists():
        changed = " with uncommitted changes" if diff.exists() and diff.read_text().strip() else ""
        versions += f"commit {commit.read_text().strip()}{changed}\n"
    (target / "versions.txt").write_text(versions)


def _shown(reward: float | None) -> str:
    return "" if reward is None else f"{reward:.6g}"


def build_summary(name: str, runs: Sequence[Run]) -> str:
    rows, steps = [], []
    for env in runs[0].config["env"]:
        steps, rewards_NS = series(runs, f"eval_{env}/reward")
        columns_3N = np.stack([rewards_NS[:, 0], rewards_NS[:, -1], rewards_NS[:, -1] - rewards_NS[:, 0]])
        of_runs, of_means = paired_changes(runs, env)
        for run, (before, after, change), paired in zip(runs, columns_3N.T, of_runs, strict=True):
            changed = f"{change:+.3f} ± {margin(paired):.3f}"
            rows.append(f"| {env} | {run.seed} | {before:.3f} | {after:.3f} | {changed} |")
        before, after, change = columns_3N.mean(axis=1)
        spread = [f" ({sd:.3f})" if len(runs) > 1 else "" for sd in deviation(columns_3N.T)]
        rows.append(
            f"| **{env}** | **mean** | **{before:.3f}{spread[0]}** | **{after:.3f}{spread[1]}** | "
            f"**{change:+.3f} ± {margin(of_means):.3f}{spread[2]}** |"
        )
    trained, held_out = count_rollouts(runs, ""), count_rollouts(runs, "eval_")
    counts = "\n".join(
        f"* {title}: not counted by these runs"
        if math.isnan(trained[name] + held_out[name])
        else f"* {title}: {trained[name]:,.0f} in training, {held_out[name]:,.0f} held out"
        for name, title in COUNTED.items()
    )
    drift = [line["drift"] for run in runs for line in run.lines if line.get("drift") is not None]
    seconds = np.median([line["seconds"] for run in runs for line in run.lines if "seconds" in line])
    commands = "\n".join(f"python -m gymexp.train {shlex.join(overrides(run))}" for run in runs)
    table = "\n".join(rows)
    return f"""# {name}

Mean reward on held-out tasks. ±: the 95 % interval of the change over tasks, paired (Student's t; for the
mean of seeds, of each task's mean). In parentheses the standard deviation over seeds (n - 1).

| environment | seed | step {steps[0]} | step {steps[-1]} | change |
|---|---|---|---|---|
{table}

![Held-out reward against optimizer step](held_out.svg)

* Optimizer steps: {steps[-1]} with each seed
{counts}
* Highest drift: {f"{max(drift):.2g} nats" if drift else "not measured"}
* Median seconds a step: {seconds:.1f}, without evaluations

![Training against optimizer step](training.svg)

The commands; `seed_<n>/` has the versions, the configuration and the metrics.

```
{commands}
```
"""


def make_panels(num: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    num_rows = (num + 1) // 2
    figure = Figure(figsize=(9, 2.9 * num_rows), layout="constrained")
    panels = [figure.add_subplot(num_rows, min(num, 2), 1 + i, xlabel="optimizer step") for i in range(num)]
    return figure, panels


def draw_mean(axes: Axes, steps_S: np.ndarray, values_NS: np.ndarray, label: str) -> None:
    mean_S, deviation_S = values_NS.mean(axis=0), deviation(values_NS)
    low_S, high_S = mean_S - deviation_S, mean_S + deviation_S
    axes.plot(steps_S, mean_S, color="black", linewidth=2, label=label)
    axes.fill_between(steps_S, low_S, high_S, color="black", alpha=0.15, linewidth=0, label="± 1 sd of seeds")


def draw_held_out(runs: Sequence[Run]) -> Figure:
    envs = list(runs[0].config["env"])
    figure, panels = make_panels(len(envs))
    for axes, env in zip(panels, envs, strict=True):
        steps_S, values_NS = series(runs, f"eval_{env}/reward")
        for run, values_S in zip(runs, values_NS, strict=True):
            axes.plot(steps_S, values_S, linewidth=1, alpha=0.8, label=f"seed {run.seed}")
        draw_mean(axes, steps_S, values_NS, "mean of seeds")
        low, high = axes.get_ylim()
        pad = max(0.0, 0.1 - (high - low)) / 2  # without padding a tiny change would look steep
        axes.set(title=f"{env}: held-out tasks", ylabel="mean reward", ylim=(low - pad, high + pad))
    panels[0].legend()
    return figure


def draw_training(runs: Sequence[Run]) -> Figure:
    trends = {f"{env}/reward": f"{env}: mean reward in training" for env in runs[0].config["env"]}
    trends |= {
        RATIO: "ratio of trainer to engine, mean over tokens",
        "seconds": "seconds a step, without evaluations",
    }
    trends = {key: title for key, title in trends.items() if len(series(runs, key)[0])}
    figure, (*panels, last) = make_panels(len(trends) + 1)
    for axes, (key, title) in zip(panels, trends.items(), strict=True):
        steps_S, values_NS = series(runs, key)
        width = 5 if len(steps_S) < 200 else 15
        axes.plot(
            steps_S, values_NS.mean(axis=0), color="tab:blue", alpha=0.5, linewidth=0.8, label="mean of seeds"
        )
        draw_mean(axes, steps_S, smooth(values_NS, width), f"the same over {width} steps")
        axes.set_title(title)
    panels[0].legend()
    panels[-1].set_ylim(bottom=0)
    draw_drift(last, runs)
    last.set_xlim(panels[0].get_xlim())
    return figure


def draw_drift(axes: Axes, runs: Sequence[Run]) -> None:
    bound = runs[0].config["rollout"]["max_drift"] or MAX_DRIFT[runs[0].config["model"]["dtype"]]
    steps_S, values_NS = series(runs, "drift")
    for run, values_S in zip(runs, values_NS, strict=True):
        axes.plot(steps_S, values_S, "o", markersize=3, alpha=0.8, label=f"seed {run.seed}")
    axes.axhline(bound, color="black", linestyle="--", linewidth=1, label="rollout.max_drift")
    lowest = min(values_NS[values_NS > 0], default=bound)
    low, high = (10.0 ** math.floor(math.log10(value)) for value in (lowest, bound))
    axes.set(title="drift: engine against trainer, nats", yscale="log", ylim=(low, 10 * high))
    axes.legend()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", type=Path, metavar="docs/results/NAME")
    parser.add_argument("runs", type=Path, metavar="RUN_DIR", nargs="+")
    args = parser.parse_args()
    try:
        runs = sorted(map(read_run, args.runs), key=lambda run: run.seed)
        check_one_experiment(runs)
        others = {path.name for path in args.target.glob("seed_*")} - {f"seed_{run.seed}" for run in runs}
        if others:
            raise GymexpError(
                f"{args.target} must hold only these runs, got {min(others)} as well: remove it"
            )
    except GymexpError as error:
        raise SystemExit(f"error: {error}") from None
    import matplotlib

    matplotlib.rcParams.update(STYLE)
    for run in runs:
        copy_run(run, args.target / f"seed_{run.seed}")
    for name, draw in {"held_out": draw_held_out, "training": draw_training}.items():
        draw(runs).savefig(args.target / f"{name}.svg", metadata={"Date": None, "Creator": None})
    (args.target / "summary.md").write_text(build_summary(args.target.name, runs))


if __name__ == "__main__":
    main()
