"""The check of `trainer.*` before anything starts, and TRL's GRPOConfig built from it in the trainer.

TRL's constructor is the schema. Unknown names are found by reading TRL's source, without importing it. A
table (`argument_rules`) names the values that gymexp refuses. A separate process tries out the other values
(`argument_trial`); a good verdict is cached for the same values, packages and GPUs.
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

from gymexp.config import correction, grpo_arguments, packing
from gymexp.config.grpo_arguments import value_of
from gymexp.config.schema import RunConfig
from gymexp.config.search_space import ends, flat
from gymexp.config.suggestions import suggestion
from gymexp.errors import ConfigError
from gymexp.processes.module_call import call_module
from gymexp.training import argument_rules, sharding, tracker

if TYPE_CHECKING:
    from trl.trainer.grpo_config import GRPOConfig

_CHECK_TIMEOUT_S = 600  # The check takes 15 s, and longer on a busy machine.
_MOST_COMBINATIONS = 64


def check(config: RunConfig, cache: Path) -> None:
    """Raises ConfigError if `trainer.*` or `model.attn_implementation` cannot work in a run on this machine.

    Takes less than a second for values that passed before.
    """
    (problem,) = problems([config], cache, on_this_machine=True)
    if problem:
        raise ConfigError(problem)


def problems(configs: Sequence[RunConfig], cache: Path, on_this_machine: bool = False) -> list[str]:
    """Returns, for each config, why its `trainer.*` or `model.attn_implementation` cannot work; empty if both
    can. Imports TRL once for all configs, and not at all for values that passed before.

    on_this_machine: whether the runs are to start on this machine; another one may have other GPUs.
    """
    reasons = [_static_problems(config) for config in configs]
    questions: dict[Path, dict[str, Any]] = {}
    # Each entry has the index of the config, the prefix of its message, and the file of its verdict.
    pending: list[tuple[int, str, Path]] = []
    machine = [on_this_machine, _installed_packages(), _gpus(), _rules_digest()]
    for index, config in enumerate(configs):
        for prefix, trainer in [] if reasons[index] else _trainers(config):
            if problem := "\n".join(argument_rules.problems(trainer)) or _group_problem(trainer):
                reasons[index] = prefix + problem
                break
            question = {
                "trainer": correction.complete(trainer, correction.correction_of(config)),
                "dtype": config.model.dtype,
                "attn_implementation": config.model.attn_implementation,
                "here": on_this_machine,
            }
            facts = json.dumps([question, machine, _referenced_files(trainer)], sort_keys=True)
            verdict = cache / "arguments" / hashlib.sha256(facts.encode()).hexdigest()[:24]
            if not verdict.exists():
                pending.append((index, prefix, verdict))
                questions[verdict] = question
    pending = [entry for entry in pending if not reasons[entry[0]]]
    if questions := {verdict: questions[verdict] for _, _, verdict in pending}:
        answers = dict(zip(questions, _request_verdicts(list(questions.values())), strict=True))
        for index, prefix, verdict in pending:
            if problem := answers[verdict]:
                reasons[index] = reasons[index] or prefix + problem
            else:
                # If the cache cannot be written, the next run requests the verdict again.
                with contextlib.suppress(OSError):
                    verdict.parent.mkdir(parents=True, exist_ok=True)
                    verdict.touch()
    return reasons


def _installed_packages() -> list[str]:
    """Returns the metadata directory's name, which has the version, of every package on Python's path."""
    places = [Path(place) for place in dict.fromkeys(sys.path) if place]
    return sorted(
        entry.name
        for place in places
        if place.is_dir()
        for entry in place.iterdir()
        if entry.suffix in (".dist-info", ".egg-info")
    )


def _gpus() -> list[str | None]:
    """Returns the driver's description of each GPU of this machine, and CUDA_VISIBLE_DEVICES last."""
    files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    return [*(path.read_text() for path in files), os.environ.get("CUDA_VISIBLE_DEVICES")]


def _referenced_files(trainer: dict[str, Any]) -> list[str]:
    """Returns the contents of the files that `deepspeed` and `fsdp_config` name, if they name files."""
    paths = [
        Path(file) for name in ("deepspeed", "fsdp_config") if isinstance(file := trainer.get(name), str)
    ]
    return [path.read_text() for path in paths if path.is_file()]


def _rules_digest() -> str:
    """Returns a digest of the modules that judge the values: if one changes, cached verdicts are void."""
    judges = (Path(__file__).with_name(name) for name in ("argument_trial.py", "arguments.py", "sharding.py"))
    return hashlib.sha256(b"".join(judge.read_bytes() for judge in judges)).hexdigest()


def _trainers(config: RunConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each `trainer.*` to check, with the prefix of its error message: the run's own, or those that a
    study may try. A study's values are the ends of ranges and all choices, in every combination unless there
    are more than `_MOST_COMBINATIONS`."""
    candidates = {
        key.removeprefix("trainer."): ends(space)
        for key, space in flat(config.search.params).items()
        if key.startswith("trainer.")
    }
    if config.search.trial is None or not candidates:
        yield "", config.trainer
    if not candidates:
        return
    pairs = [[(key, value) for value in values] for key, values in candidates.items()]
    combinations = (
        product(*pairs)
        if math.prod(map(len, pairs)) <= _MOST_COMBINATIONS
        else ([p] for ps in pairs for p in ps)
    )
    for combination in combinations:
        cfg = OmegaConf.create(config.trainer)
        for key, value in combination:
            OmegaConf.update(cfg, key, value)
        values = ", ".join(f"trainer.{key}={value}" for key, value in combination)
        trainer: Any = OmegaConf.to_container(cfg)
        yield f"search.params allow {values}: ", trainer


def _static_problems(config: RunConfig) -> str:
    """Returns the problems that need no import of TRL, one a line: unknown names, refused values, missing
    packages and files."""
    known = grpo_arguments.names()
    messages = []
    searched = dict.fromkeys(config.search.params.get("trainer", {}))
    for name in searched | config.trainer:
        if name not in known:
            messages.append(
                f"trainer.{name} is not an argument of trl.GRPOConfig"
                f"{suggestion(name, sorted(known), 'trainer.')}"
            )
    messages.extend(
        argument_rules.problems({n: None for n in searched if n in argument_rules.OWNED} | config.trainer)
    )
    for name in ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"):
        if config.trainer.get(name) is not None and config.tracker.kind != "trackio":
            messages.append(f"trainer.{name} is for tracker=trackio, got tracker.kind={config.tracker.kind}")
    if config.trainer.get("deepspeed") and not importlib.util.find_spec("deepspeed"):
        messages.append(
            "trainer.deepspeed needs a package that is not installed: pip install 'gymexp[deepspeed]'"
        )
    if isinstance(file := config.trainer.get("deepspeed"), str) and not Path(file).is_file():
        messages.append(
            "trainer.deepspeed must be DeepSpeed's configuration, as keys "
            f"(trainer.deepspeed.zero_optimization.stage=3) or in a JSON file, got {file!r}"
        )
    if (kind := config.tracker.kind) != "none" and not importlib.util.find_spec(kind):
        messages.append(f"tracker.kind={kind} needs a package that is not installed: pip install {kind}")
    else:
        messages.extend(tracker.problems(config.tracker))
    if config.search.trial is not None and not importlib.util.find_spec("optuna"):
        messages.append("search needs a package that is not installed: pip install 'gymexp[optuna]'")
    return "\n".join(messages)


def _request_verdicts(questions: list[dict[str, Any]]) -> list[str]:
    """Returns the answer of `argument_trial` to each question: a problem, or an empty text."""
    task = "trainer: trying out its values"
    return call_module(["gymexp.training.argument_trial"], task, _CHECK_TIMEOUT_S, stdin=questions)


def build(config: RunConfig, output_dir: Path) -> GRPOConfig:
    """Builds TRL's arguments for a run; imports torch.

    If the layers are compiled for packs (`compiled_layers`), transformers must not compile the model as well.
    """
    trainer = config.trainer
    if packing.compilation_of(config):
        trainer = {name: value for name, value in trainer.items() if name not in packing.COMPILE_KEYS}
    return construct(
        correction.complete(trainer, correction.correction_of(config)),
        config.model.dtype,
        output_dir=str(output_dir),
        seed=config.seed,
        report_to=[],  # transformers' integrations rename metrics, and their errors would end the run
    )


def construct(trainer: dict[str, Any], dtype: str, **more: Any) -> GRPOConfig:
    """Builds a GRPOConfig from `trainer.*`, `more` and the arguments that gymexp sets itself.

    Raises TypeError or ValueError if GRPOConfig refuses a name or a value.
    """
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
    """Returns how the batch breaks TRL's rule of whole groups, with the keys to change; empty if it does not.
    Counts the rollouts of one training process."""
    per_device = value_of(trainer, "per_device_train_batch_size")
    steps = value_of(trainer, "steps_per_generation") or value_of(trainer, "gradient_accumulation_steps")
    generations = value_of(trainer, "num_generations")
    batch = value_of(trainer, "generation_batch_size") or per_device * steps
    if not all(isinstance(n, int) and n > 0 for n in (batch, generations)):
        return ""  # TRL's constructor names the wrong value.
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
