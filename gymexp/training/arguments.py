"""`trainer.*` and TRL's GRPOConfig: checked before anything starts, and built in the trainer.

TRL's constructor is the schema. Unknown names are found without importing TRL, by reading its source, and
what gymexp refuses by a table (`fields`); the other values are tried out in a process of its own (`verdict`),
whose good verdict is kept for the same values, packages and GPUs.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from gymexp.config import grpo_arguments
from gymexp.config.grpo_arguments import value_of
from gymexp.config.names import suggestion
from gymexp.config.schema import RunConfig
from gymexp.config.space import ends, flat
from gymexp.errors import ConfigError
from gymexp.processes.module_call import call_module
from gymexp.training import fields, sharding, tracker

if TYPE_CHECKING:
    from trl.trainer.grpo_config import GRPOConfig

_CHECK_TIMEOUT_S = 600  # 15 s of work, on a machine that may be busy
_MOST_COMBINATIONS = 64


def check(config: RunConfig, cache: Path) -> None:
    """Raises ConfigError if a run on this machine could not be as `trainer.*` and `model.attn_implementation`
    say. Under a second if these values passed before."""
    (problem,) = problems([config], cache, here=True)
    if problem:
        raise ConfigError(problem)


def problems(configs: Sequence[RunConfig], cache: Path, here: bool = False) -> list[str]:
    """Why each config's `trainer.*` or `model.attn_implementation` would not do, empty where they would. TRL
    is imported once for all, and not at all for values that passed before. here: the runs are this machine's;
    elsewhere there may be GPUs that this one has not."""
    told = [_named_problems(config) for config in configs]
    asked: dict[Path, dict[str, Any]] = {}
    verdicts: list[tuple[int, str, Path]] = []
    machine = [here, _installed(), _gpus(), _rules_read()]
    for index, config in enumerate(configs):
        for tried, trainer in [] if told[index] else _trainers(config):
            if wrong := "\n".join(fields.problems(trainer)) or _group_problem(trainer):
                told[index] = tried + wrong
                break
            question = {
                "trainer": trainer,
                "dtype": config.model.dtype,
                "attn_implementation": config.model.attn_implementation,
                "here": here,
            }
            facts = json.dumps([question, machine, _files(trainer)], sort_keys=True)
            verdict = cache / "arguments" / hashlib.sha256(facts.encode()).hexdigest()[:24]
            if not verdict.exists():
                verdicts.append((index, tried, verdict))
                asked[verdict] = question
    verdicts = [one for one in verdicts if not told[one[0]]]
    if asked := {verdict: asked[verdict] for _, _, verdict in verdicts}:
        answers = dict(zip(asked, _ask_verdicts(list(asked.values())), strict=True))
        for index, tried, verdict in verdicts:
            if wrong := answers[verdict]:
                told[index] = told[index] or tried + wrong
            else:
                with contextlib.suppress(OSError):  # the next run asks again, then
                    verdict.parent.mkdir(parents=True, exist_ok=True)
                    verdict.touch()
    return told


def _installed() -> list[str]:
    """Every package that Python finds, with its version."""
    places = [Path(place) for place in dict.fromkeys(sys.path) if place]
    return sorted(
        entry.name
        for place in places
        if place.is_dir()
        for entry in place.iterdir()
        if entry.suffix in (".dist-info", ".egg-info")
    )


def _gpus() -> list[str | None]:
    """This machine's GPUs as the driver describes them, and which of them may be used."""
    found = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    return [*(path.read_text() for path in found), os.environ.get("CUDA_VISIBLE_DEVICES")]


def _files(trainer: dict[str, Any]) -> list[str]:
    """What stands in the files that are named in place of keys."""
    paths = [
        Path(named) for name in ("deepspeed", "fsdp_config") if isinstance(named := trainer.get(name), str)
    ]
    return [path.read_text() for path in paths if path.is_file()]


def _rules_read() -> str:
    """A digest of what judges the values: a verdict is not kept longer than its judge."""
    judges = (Path(__file__).with_name(name) for name in ("verdict.py", "arguments.py", "sharding.py"))
    return hashlib.sha256(b"".join(judge.read_bytes() for judge in judges)).hexdigest()


def _trainers(config: RunConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """`trainer.*` as it is, or as a study may make it, with what to say of each: ranges' ends and choices, in
    every combination where they are few."""
    tried = {
        key.removeprefix("trainer."): ends(space)
        for key, space in flat(config.search.params).items()
        if key.startswith("trainer.")
    }
    if config.search.trial is None or not tried:
        yield "", config.trainer
    if not tried:
        return
    pairs = [[(key, value) for value in values] for key, values in tried.items()]
    some = (
        product(*pairs)
        if math.prod(map(len, pairs)) <= _MOST_COMBINATIONS
        else ([p] for ps in pairs for p in ps)
    )
    for combination in some:
        cfg = OmegaConf.create(config.trainer)
        for key, value in combination:
            OmegaConf.update(cfg, key, value)
        said = ", ".join(f"trainer.{key}={value}" for key, value in combination)
        trainer: Any = OmegaConf.to_container(cfg)
        yield f"search.params allow {said}: ", trainer


def _named_problems(config: RunConfig) -> str:
    """What is seen without TRL's import."""
    known = grpo_arguments.names()
    found = []
    searched = dict.fromkeys(config.search.params.get("trainer", {}))
    for name in searched | config.trainer:
        if name not in known:
            found.append(
                f"trainer.{name} is not an argument of trl.GRPOConfig"
                f"{suggestion(name, sorted(known), 'trainer.')}"
            )
    found.extend(fields.problems({n: None for n in searched if n in fields.OWNED} | config.trainer))
    for name in ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"):
        if config.trainer.get(name) is not None and config.tracker.kind != "trackio":
            found.append(f"trainer.{name} is for tracker=trackio, got tracker.kind={config.tracker.kind}")
    if config.trainer.get("deepspeed") and not importlib.util.find_spec("deepspeed"):
        found.append(
            "trainer.deepspeed needs a package that is not installed: pip install 'gymexp[deepspeed]'"
        )
    if isinstance(file := config.trainer.get("deepspeed"), str) and not Path(file).is_file():
        found.append(
            "trainer.deepspeed must be DeepSpeed's configuration, as keys "
            f"(trainer.deepspeed.zero_optimization.stage=3) or in a JSON file, got {file!r}"
        )
    if (kind := config.tracker.kind) != "none" and not importlib.util.find_spec(kind):
        found.append(f"tracker.kind={kind} needs a package that is not installed: pip install {kind}")
    else:
        found.extend(tracker.problems(config.tracker))
    if config.search.trial is not None and not importlib.util.find_spec("optuna"):
        found.append("search needs a package that is not installed: pip install 'gymexp[optuna]'")
    return "\n".join(found)


def _ask_verdicts(questions: list[dict[str, Any]]) -> list[str]:
    """The answer of `verdict` to each question."""
    task = "trainer: trying out its values"
    return call_module(["gymexp.training.verdict"], task, _CHECK_TIMEOUT_S, stdin=questions)


def build(config: RunConfig, output_dir: Path, run_name: str) -> GRPOConfig:
    """TRL's arguments for this run (imports torch). run_name: what trackers call it."""
    tracker = config.tracker
    return construct(
        config.trainer,
        config.model.dtype,
        output_dir=str(output_dir),
        seed=config.seed,
        report_to=[] if tracker.kind == "none" else [tracker.kind],
        project=tracker.project,
        run_name=run_name,
    )


def construct(trainer: dict[str, Any], dtype: str, **more: Any) -> GRPOConfig:
    """GRPOConfig with what gymexp sets. Raises TypeError, ValueError."""
    import torch
    from trl.trainer.grpo_config import GRPOConfig

    args = GRPOConfig(
        **sharding.complete(trainer),
        **more,
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        shuffle_dataset=False,
        eval_strategy="no",
    )
    sharding.keep_precision(args)
    return args


def _group_problem(trainer: dict[str, Any]) -> str:
    """TRL's rule for whole groups, said with the keys to change (for one training process)."""
    per_device = value_of(trainer, "per_device_train_batch_size")
    steps = value_of(trainer, "steps_per_generation") or value_of(trainer, "gradient_accumulation_steps")
    generations = value_of(trainer, "num_generations")
    batch = value_of(trainer, "generation_batch_size") or per_device * steps
    if not all(isinstance(n, int) and n > 0 for n in (batch, generations)):
        return ""  # TRL's constructor says which
    if generations < 2:
        return f"trainer.num_generations must be >= 2 for a group to have a baseline, got {generations}"
    if batch % generations:
        lower, upper = batch // generations * generations, -(-batch // generations) * generations
        fits = " or ".join(str(n) for n in (lower, upper) if n)
        return (
            f"trainer.num_generations={generations} must divide the generation batch of {batch} rollouts "
            f"(per_device_train_batch_size={per_device} x steps_per_generation={steps}), so that every batch "
            f"holds whole groups: choose a divisor of {batch}, or a batch of {fits}"
        )
    return ""
