"""`engine.colocate=auto`: before a run begins, a short run of each placement shows which one has the faster
steps. Apart, some GPUs sample while the others wait to train; shared, all of them do both in turn.

A trial is a run of its own, `python -m gymexp.train`, in `logs/trial_<placement>` of the run's directory,
with the same tasks, draws and number of rollouts in a step. It is ended after its last step, and its weights
are dropped, so the run that follows is that of a configuration which names the placement.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from gymexp.cluster.placement import place
from gymexp.config.grpo_arguments import value_of
from gymexp.config.schema import CheckpointConfig, RunConfig, SearchConfig, TrackerConfig
from gymexp.data.prepare import Prepared, write_prepared
from gymexp.errors import ConfigError, ServiceError
from gymexp.files import replace_file
from gymexp.processes.child_process import child_process
from gymexp.record.directory import RunDirectory

STEPS = 3  # of a trial; the first one, in which everything is done for the first time, does not count
_POLL_S = 0.5
_END_S = 60.0
_PER_RANK = ("gradient_accumulation_steps", "steps_per_generation")
_KEPT = ("metrics.jsonl", "logs", "train.log")


def apart(config: RunConfig) -> RunConfig:
    """Returns the configuration with GPUs that sample and others that train, as far as there are several."""
    return dataclasses.replace(config, engine=dataclasses.replace(config.engine, colocate=False))


def shared(config: RunConfig, gpus: Sequence[str]) -> RunConfig | None:
    """Returns the configuration `config` of `apart` with GPUs that all sample and train, and as many rollouts
    in a step; None where there is nothing to choose, as at most one GPU is there or no vLLM samples.

    Raises ConfigError if the rollouts of a step cannot be divided among so many GPUs.
    """
    now = place(config, [list(gpus)])
    if now.engine != "vllm" or len(gpus) < 2:
        return None
    engine = dataclasses.replace(config.engine, colocate=True)
    placement = dataclasses.replace(config.placement, rollout_gpus=None, train_gpus=None)
    changed = dataclasses.replace(config, engine=engine, placement=placement)
    num_ranks = place(changed, [list(gpus)]).num_ranks
    trainer = dict(config.trainer)
    for key in _PER_RANK:
        if (value := value_of(trainer, key)) is not None:
            trainer[key], left = divmod(value * now.num_ranks, num_ranks)
            if left:
                multiple = num_ranks // math.gcd(num_ranks, now.num_ranks)
                raise ConfigError(
                    f"trainer.{key} must be a multiple of {multiple} with engine.colocate=auto, so that "
                    f"{num_ranks} GPUs can train the rollouts that {now.num_ranks} train otherwise, got "
                    f"{value}"
                )
    return dataclasses.replace(changed, trainer=trainer)


def decided(
    config: RunConfig, gpus: Sequence[str], run: RunDirectory, prepared: Prepared, say: Callable[[str], None]
) -> RunConfig:
    """Returns `config`, which is one of `apart`, or the shared one if its steps are faster."""
    other = shared(config, gpus)
    return config if other is None else faster({"apart": config, "shared": other}, run, prepared, say)


@dataclass
class Tried:
    """What a trial showed. steps_s: the seconds of each step. error: why it has fewer than STEPS, or ""."""

    steps_s: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def step_s(self) -> float:
        """The mean of the steps that count; inf if the trial failed."""
        return fmean(self.steps_s[1:]) if not self.error else math.inf


def faster(
    ways: Mapping[str, RunConfig], run: RunDirectory, prepared: Prepared, say: Callable[[str], None]
) -> RunConfig:
    """Returns the configuration whose steps are faster, and writes placement.json with the steps of each.

    ways: by name. run: claimed by this process. Raises ServiceError if no trial trained its steps.
    """
    tried: dict[str, Tried] = {}
    for name, config in ways.items():
        say(f"engine.colocate=auto: trying {STEPS} steps {name}")
        tried[name] = _try(name, config, run.logs / f"trial_{name}", prepared, say)
        if tried[name].error:
            say(f"{name}: {tried[name].error}")
    best = min(tried, key=lambda name: tried[name].step_s)
    if tried[best].error:
        reasons = "\n".join(f"{name}: {one.error}" for name, one in tried.items())
        raise ServiceError(f"engine.colocate=auto: no trial trained {STEPS} steps.\n{reasons}")
    record = {"chosen": best, "tried": {name: dataclasses.asdict(one) for name, one in tried.items()}}
    replace_file(run.path / "placement.json", json.dumps(record, indent=1) + "\n")
    took = " and ".join(f"{one.step_s:.1f} s {name}" for name, one in tried.items() if not one.error)
    say(f"engine.colocate=auto: a step took {took}; the run goes on {best}")
    return ways[best]


def _try(
    name: str, config: RunConfig, directory: Path, prepared: Prepared, say: Callable[[str], None]
) -> Tried:
    """Runs a trial in `directory`, of which only the logs and the metrics are left."""
    shutil.rmtree(directory, ignore_errors=True)  # of a start that was ended
    trial = RunDirectory.claim(directory)
    write_prepared(prepared, trial.data)
    trial.describe(_short(config), [])
    trial.release()
    with (directory / "train.log").open("w", buffering=1) as log:
        tried = _follow(trial, lambda line: log.write(f"{line}\n"), lambda text: say(f"{name}: {text}"))
    for path in directory.iterdir():
        if path.name not in _KEPT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return tried


def _follow(trial: RunDirectory, on_line: Callable[[str], object], say: Callable[[str], None]) -> Tried:
    """Starts a trial and ends it after its last step. on_line: gets each line of its output."""
    tried, is_over = Tried(), False
    command = [sys.executable, "-m", "gymexp.train", f"resume={trial.path}"]
    with child_process(command, os.environ, on_line) as (child, last_lines):
        while len(tried.steps_s) < STEPS and not is_over:
            time.sleep(_POLL_S)
            is_over = child.poll() is not None  # before the last look at its steps
            for seconds in _steps(trial.metrics)[len(tried.steps_s) : STEPS]:
                tried.steps_s.append(seconds)
                say(f"step {len(tried.steps_s)} took {seconds:.1f} s")
        _end(child)
        if len(tried.steps_s) < STEPS:
            tried.error = f"it ended with {child.returncode} (logs: {trial.path}):\n{last_lines()}"
    return tried


def _short(config: RunConfig) -> RunConfig:
    """Returns the configuration of a trial: without evaluations, checkpoints, tracker and search."""
    trainer = dict(config.trainer) | {"max_steps": STEPS, "logging_steps": 1, "save_strategy": "no"}
    return dataclasses.replace(
        config,
        trainer=trainer,
        output_dir=None,
        evaluation=dataclasses.replace(config.evaluation, every_steps=0, before=False, after=False),
        checkpoint=CheckpointConfig(),
        tracker=TrackerConfig(),
        search=SearchConfig(),
    )


def _steps(metrics: Path) -> list[float]:
    """Returns the seconds of the steps that a run has logged."""
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    return [entry["time/step"] for entry in entries if "loss" in entry]


def _end(child: subprocess.Popen[str]) -> None:
    """Ends a run at once and without a checkpoint, which a second signal asks for."""
    deadline = time.monotonic() + _END_S
    while child.poll() is None and time.monotonic() < deadline:
        child.send_signal(signal.SIGTERM)
        time.sleep(1.0)
