"""`trainer.*` and TRL's GRPOConfig: checked before anything starts, and built in the trainer.

TRL's constructor is the schema. Unknown names are found without importing TRL, by reading its source; the
values are checked by constructing the object in a process of its own, whose good verdict is kept for the same
values and versions. Run as a program (`python -m gymexp.training.arguments`), it reads a JSON object and
constructs.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import subprocess
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from gymexp.config import RunConfig, nearest
from gymexp.errors import ConfigError
from gymexp.run.environment import without_launchers
from gymexp.search.space import ends, flat
from gymexp.training import sharding

if TYPE_CHECKING:
    from trl.trainer.grpo_config import GRPOConfig

_SOURCES = (
    ("trl", "trainer/grpo_config.py", "GRPOConfig"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("transformers", "training_args.py", "TrainingArguments"),
)
# What gymexp sets itself, and where its users say it.
_OWNED = {
    "output_dir": "output_dir (of the run)",
    "seed": "seed",
    "report_to": "tracker",
    "run_name": "name",
    "project": "tracker.project",
    "use_vllm": "engine",
    "vllm_mode": "engine",
    "model_init_kwargs": "model",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "use_transformers_continuous_batching": "engine",
    "resume_from_checkpoint": "resume",
    "save_total_limit": "checkpoint.keep_last",
    "load_best_model_at_end": "checkpoint.keep_best",
    "do_eval": "evaluation",
    "eval_strategy": "evaluation",
    "eval_steps": "evaluation.every_steps",
    "chat_template_kwargs": "model.chat_template_kwargs",
    "shuffle_dataset": "dataset.order",
}
# Words that TRL compares only in the middle of a step; which ones it knows is read from its source.
_WORDS = ("loss_type", "scale_rewards", "importance_sampling_level", "multi_objective_aggregation")
_CHECK_TIMEOUT_S = 120
_MOST_COMBINATIONS = 64


def check(config: RunConfig, cache: Path) -> None:
    """Raises ConfigError if TRL would not take `trainer.*`. Under a second if these values passed before."""
    (problem,) = problems([config], cache)
    if problem:
        raise ConfigError(problem)


def problems(configs: Sequence[RunConfig], cache: Path) -> list[str]:
    """Why TRL would not take each config's `trainer.*`, empty where it would. TRL is imported once for all,
    and not at all for values that passed before."""
    told = [_named_problems(config) for config in configs]
    asked: dict[Path, dict[str, Any]] = {}
    verdicts: list[tuple[int, str, Path]] = []
    versions = [importlib.metadata.version(package) for package in ("trl", "transformers", "torch")]
    for index, config in enumerate(configs):
        for tried, trainer in [] if told[index] else _trainers(config):
            if wrong := _group_problem(trainer):
                told[index] = tried + wrong
                break
            facts = json.dumps([trainer, config.model.dtype, versions], sort_keys=True)
            verdict = cache / "arguments" / hashlib.sha256(facts.encode()).hexdigest()[:24]
            if not verdict.exists():
                verdicts.append((index, tried, verdict))
                asked[verdict] = {"trainer": trainer, "dtype": config.model.dtype}
    verdicts = [one for one in verdicts if not told[one[0]]]
    if asked := {verdict: asked[verdict] for _, _, verdict in verdicts}:
        answers = dict(zip(asked, _construct_elsewhere(list(asked.values())), strict=True))
        for index, tried, verdict in verdicts:
            if wrong := answers[verdict]:
                told[index] = told[index] or tried + wrong
            else:
                verdict.parent.mkdir(parents=True, exist_ok=True)
                verdict.touch()
    return told


def _trainers(config: RunConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """`trainer.*` as it is; of a trial as its study may make it, with what to say of each: ranges' ends and
    choices, in every combination where they are few."""
    tried = {
        key.removeprefix("trainer."): ends(space)
        for key, space in flat(config.search.params).items()
        if key.startswith("trainer.")
    }
    if config.search.trial is None or not tried:
        yield "", config.trainer
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
    known = _known_names()
    found = []
    for name in dict.fromkeys((*config.trainer, *config.search.params.get("trainer", {}))):
        if name in _OWNED:
            found.append(f"trainer.{name} is set by gymexp: use {_OWNED[name]} instead")
        elif name not in known:
            found.append(
                f"trainer.{name} is not an argument of trl.GRPOConfig"
                f"{nearest(name, sorted(known), 'trainer.')}"
            )
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
    if config.search.trial is not None and not importlib.util.find_spec("optuna"):
        found.append("search needs a package that is not installed: pip install 'gymexp[optuna]'")
    return "\n".join(found)


def _construct_elsewhere(asked: list[dict[str, Any]]) -> list[str]:
    """What GRPOConfig says of each, in a process of its own."""
    shown = subprocess.run(
        [sys.executable, "-m", "gymexp.training.arguments"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=_CHECK_TIMEOUT_S,
        env=without_launchers() | {"TRL_EXPERIMENTAL_SILENCE": "1"},
        check=False,
    )
    if shown.returncode:
        raise ConfigError(
            f"trainer: trl.GRPOConfig could not be constructed:\n{shown.stderr.strip()[-2000:]}"
        )
    return json.loads(shown.stdout.splitlines()[-1])


def build(config: RunConfig, output_dir: Path, run_name: str) -> GRPOConfig:
    """TRL's arguments for this run (imports torch). run_name: what trackers call it."""
    tracker = config.tracker
    return _construct(
        config.trainer,
        config.model.dtype,
        output_dir=str(output_dir),
        seed=config.seed,
        report_to=[] if tracker.kind == "none" else [tracker.kind],
        project=tracker.project,
        run_name=run_name,
    )


def _construct(trainer: dict[str, Any], dtype: str, **more: Any) -> GRPOConfig:
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
    per_device = trainer.get("per_device_train_batch_size", 8)
    steps = trainer.get("steps_per_generation") or trainer.get("gradient_accumulation_steps", 1)
    generations = trainer.get("num_generations", 8)
    batch = trainer.get("generation_batch_size") or per_device * steps
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


def _known_names() -> set[str]:
    names: set[str] = set()
    for package, file, cls in _SOURCES:
        tree = _source(package, file)
        body = next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == cls)
        names.update(
            n.target.id for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
        )
    return {n for n in names if not n.startswith("_")}


def _source(package: str, file: str) -> ast.Module:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return ast.parse((Path(spec.submodule_search_locations[0]) / file).read_text())


def _known_words() -> dict[str, set[str]]:
    """Option -> the strings that TRL's trainer compares it with."""
    words: dict[str, set[str]] = {name: set() for name in _WORDS}
    for node in ast.walk(_source("trl", "trainer/grpo_trainer.py")):
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute) and node.left.attr in words:
            found = [c.value for c in ast.walk(node.comparators[0]) if isinstance(c, ast.Constant)]
            words[node.left.attr].update(value for value in found if isinstance(value, str))
    return words


def _check_values(trainer: dict[str, Any]) -> None:
    """What the constructor takes and the trainer would fail on later. Raises ValueError."""
    from trl.trainer.grpo_config import GRPOConfig

    hints, words = typing.get_type_hints(GRPOConfig), _known_words()
    for name, value in trainer.items():
        if not _fits(value, hints[name]):
            wanted = getattr(hints[name], "__name__", hints[name])
            raise ValueError(f"trainer.{name} must be of type {wanted}, got {value!r}")
        if isinstance(value, str) and words.get(name) and value not in words[name]:
            known = sorted(words[name])
            raise ValueError(
                f"trainer.{name} must be one of {', '.join(known)}, got {value!r}{nearest(value, known)}"
            )


def _fits(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(hint))
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str | bool)  # TRL itself takes scale_rewards: false
    if hint in (bool, types.NoneType):
        return isinstance(value, hint)
    return True  # lists, dicts and enums are the constructor's to judge


def _verdict(trainer: dict[str, Any], dtype: str) -> str:
    try:
        _check_values(trainer)
        _construct(trainer, dtype, output_dir="unused", report_to=[])
    except (TypeError, ValueError) as error:
        said = str(error)
        return said if said.startswith("trainer.") else f"trainer: trl.GRPOConfig refuses it: {said}"
    return ""


if __name__ == "__main__":
    print("\n" + json.dumps([_verdict(**one) for one in json.load(sys.stdin)]))
