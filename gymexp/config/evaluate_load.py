"""Makes a checked EvaluateConfig from Hydra's composed config, and the RunConfig that an evaluation carries
out.

Nothing on the command line is ignored: a key that has no effect on the evaluation is refused by name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gymexp.config import load as loading
from gymexp.config.evaluate_schema import EvaluateConfig
from gymexp.config.explain import explain_error
from gymexp.config.grpo_arguments import value_of
from gymexp.config.schema import (
    CheckpointConfig,
    EvaluationConfig,
    LoraConfig,
    PlacementConfig,
    RunConfig,
    SearchConfig,
    TrackerConfig,
)
from gymexp.errors import ConfigError

_TRAINING = "is of training, and an evaluation has none"
# Keys that a run has and that no evaluation obeys, as patterns, with the reason.
_WITHOUT_EFFECT = {
    r"trainer(\.|$)": _TRAINING,
    r"model\.lora(\.|$)": "is of training: checkpoint=… takes a checkpoint of an adapter as it is",
    r"model\.packing$": _TRAINING,
    r"engine\.(weights|colocate)$": _TRAINING,
    r"engine\.urls$": "is of training: say endpoint.url=…/v1 for a server that runs already",
    r"rollout\.(truncated|correction|dynamic_sampling|max_resampled|drift_every|max_drift)$": _TRAINING,
    r"evaluation\.(every_steps|before|after)$": "is of a run: this command is the evaluation",
    r"dataset\.(order|schedule|sampling)(\.|$)": (
        "is of training: the tasks are played in the order of their keys"
    ),
}
# Keys that the run decides whose tasks are played.
_OF_THE_RUN = (
    r"(model(?!\.(dtype|max_model_len|attn_implementation)$)|dataset|env\.\w+\."
    r"(data|config_path|agent|like|system_prompt))(\.|$)"
)
_OPEN = ("model.chat_template_kwargs", "engine.args", "trainer", "env")
_SOURCES = "model=…, checkpoint=…, run=…, endpoint.url=… or policy=probe"


def register() -> None:
    """Registers the schema with Hydra, under the name that comes first in `conf/evaluate.yaml`."""
    node = OmegaConf.structured(EvaluateConfig)
    for key in _OPEN:
        OmegaConf.set_struct(OmegaConf.select(node, key), False)
    ConfigStore.instance().store(name="evaluate_schema", node=node)


def load_evaluation(cfg: DictConfig, overrides: Sequence[str]) -> EvaluateConfig:
    """Returns the checked configuration. overrides: those of the command line. Raises ConfigError with every
    broken rule."""
    plain = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))
    try:
        config = OmegaConf.merge(OmegaConf.structured(EvaluateConfig), plain)
        for key in ("name", "path"):  # no option of the group `model` is chosen
            if OmegaConf.is_missing(config.model, key):
                config.model[key] = ""
        made = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(explain_error(error)) from None
    assert isinstance(made, EvaluateConfig)
    if problems := list(_problems(made, keys_of(overrides))):
        raise ConfigError("\n".join(problems))
    return made


def refuse_launcher_keys(overrides: Sequence[str]) -> None:
    """Raises ConfigError for a key of `launcher.*` in an evaluation that is no Slurm job. overrides: those of
    the command line."""
    for key in keys_of(overrides):
        if key.startswith("launcher."):
            raise ConfigError(
                f"{key} is of a Slurm job, got launcher=local: say launcher=slurm as well, or leave it out"
            )


def keys_of(overrides: Sequence[str]) -> list[str]:
    """Returns the keys, or groups, that the command line sets."""
    return [override.lstrip("+~").partition("=")[0].partition("@")[0] for override in overrides]


def _problems(config: EvaluateConfig, keys: Sequence[str]) -> Iterator[str]:
    for key in keys:
        for pattern, why in _WITHOUT_EFFECT.items():
            if re.match(pattern, key):
                yield f"{key} must be left out of gymexp.evaluate: it {why}"
        if key.startswith("env.") and key.endswith(".weight"):
            yield f"{key} must be left out of gymexp.evaluate: it {_TRAINING}"
    for alone in ("compare", "resume"):
        if getattr(config, alone):
            if others := [key for key in keys if key != alone]:
                yield f"{alone} stands alone, got also {', '.join(others)}: leave out what is not {alone}"
            return
    endpoint = config.endpoint
    sources = {
        "model": bool(config.model.path),
        "checkpoint": bool(config.checkpoint),
        "run": bool(config.run),
        "endpoint.url": bool(endpoint.url),
        "policy": bool(config.policy),
    }
    if config.checkpoint:
        sources["model"] = "model" in keys or "model.path" in keys
    named = [name for name, is_set in sources.items() if is_set]
    if len(named) != 1:
        got = " and ".join(named) or "none"
        yield f"exactly one policy must be named ({_SOURCES}), got {got}"
        return
    if config.split not in ("validation", "train"):
        yield f"split must be validation or train, got {config.split!r}"
    yield from _policy_problems(config, named[0], keys)
    play = config.evaluation
    if play.samples < 1:
        yield f"evaluation.samples must be >= 1, got {play.samples}"
    if play.tasks and play.num_tasks is not None:
        yield "evaluation.tasks and evaluation.num_tasks both choose the tasks: leave one of them out"


def _policy_problems(config: EvaluateConfig, source: str, keys: Sequence[str]) -> Iterator[str]:
    endpoint = config.endpoint
    if "checkpoints" in keys and source != "run":
        yield f"checkpoints chooses among those of run=…, got it with {source}: leave it out"
    steps = config.checkpoints
    are_steps = isinstance(steps, list) and steps and all(type(s) is int and s >= 0 for s in steps)
    if steps not in ("final", "last", "best", "all") and not are_steps:
        yield f"checkpoints must be final, last, best, all, or steps as in [16,32], got {steps!r}"
    if source == "endpoint.url":
        if not re.fullmatch(r"https?://[^\s@?#/]+(/[^\s@?#]*)?", endpoint.url or ""):
            yield f"endpoint.url must be an address like http://127.0.0.1:8000/v1, got {endpoint.url!r}"
        if not endpoint.model:
            yield "endpoint.model must be the server's name of the model, got None"
        if endpoint.key_env and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", endpoint.key_env):
            yield "endpoint.key_env must be the name of an environment variable, not the key itself"
        if not endpoint.timeout_s > 0:
            yield f"endpoint.timeout_s must be > 0, got {endpoint.timeout_s!r}"
    else:
        yield from (
            f"{key} is for endpoint.url=…: leave it out" for key in keys if key.startswith("endpoint.")
        )
    if source == "policy" and config.policy != "probe":
        yield f"policy must be probe, got {config.policy!r}"
    if source in ("endpoint.url", "policy"):
        for key in keys:
            if re.match(r"(model|engine)(\.|$)", key):
                yield f"{key} must be left out with {source}, which has no engine of gymexp's"
            if source == "policy" and re.match(r"evaluation\.(?!num_tasks|tasks)|seed$", key):
                yield f"{key} must be left out with policy=probe, whose replies are always the same"
        if config.gym.runtime != "managed":
            yield f"gym.runtime must be managed with {source}, got {config.gym.runtime!r}"


def of_model(config: EvaluateConfig) -> RunConfig:
    """Returns the run configuration of an evaluation that names its own environments. Raises ConfigError."""
    for name, env in config.env.items():
        if not env.get("config_path"):
            raise ConfigError(f"env.{name} is not among the selected environments: add it to env=[…]")
    plain = dataclasses.asdict(config)
    shared = {key: plain[key] for key in ("env", "dataset", "engine", "gym", "rollout", "launcher")}
    name = config.name or config.model.name or "probe"
    model = plain["model"]
    if not model["path"]:  # a policy without a model
        model |= {"name": name, "path": "none"}
    evaluation = {f.name: plain["evaluation"][f.name] for f in dataclasses.fields(EvaluationConfig)}
    if evaluation["temperature"] is None:
        evaluation["temperature"] = float(value_of({}, "temperature"))
    cfg = OmegaConf.create(
        shared | {"name": name, "seed": config.seed or 0, "model": model, "evaluation": evaluation}
    )
    assert isinstance(cfg, DictConfig)
    return loading.load(cfg)


def of_run(run: RunConfig, cfg: DictConfig, overrides: Sequence[str], data_of_run: bool) -> RunConfig:
    """Returns the run's configuration for an evaluation of its policy: with what the command line changes,
    and without what is of training alone.

    cfg: Hydra's composed config. data_of_run: whether the run's own tasks are played. Raises ConfigError for
    a key that the run decides.
    """
    base = OmegaConf.create(dataclasses.asdict(run))
    OmegaConf.update(base, "launcher", cfg.launcher, merge=False)  # the run may have been another kind of job
    # The run's schedule may name environments that the evaluation leaves out.
    OmegaConf.update(base, "dataset.schedule", {}, merge=False)
    for key in keys_of(overrides):
        if key in ("run", "checkpoint", "checkpoints", "split", "output_dir", "name"):
            continue
        if key in ("evaluation.samples", "evaluation.tasks") or key.startswith("hydra."):
            continue
        if key == "launcher" or key.startswith("launcher."):
            continue
        if (data_of_run and re.match(_OF_THE_RUN, key)) or re.match(r"model(\.(name|path|revision)|$)", key):
            raise ConfigError(f"{key} must be left out with run=… and checkpoint=…, where the run decides it")
        if data_of_run and key.startswith("env.") and (name := key.split(".")[1]) not in run.env:
            raise ConfigError(f"{key}: the run has no environment {name}, but {', '.join(run.env)}")
        OmegaConf.update(base, key, OmegaConf.select(cfg, key), merge=key != "env", force_add=True)
    loaded = loading.load(base)
    evaluation = dataclasses.replace(loaded.evaluation, every_steps=0, before=False, after=False)
    if evaluation.temperature is None:
        evaluation = dataclasses.replace(evaluation, temperature=float(value_of(run.trainer, "temperature")))
    if not any(re.match(r"evaluation\.num_tasks", key) for key in keys_of(overrides)) and not data_of_run:
        evaluation = dataclasses.replace(evaluation, num_tasks=None)
    return dataclasses.replace(
        loaded,
        resume=None,
        output_dir=None,
        evaluation=evaluation,
        trainer={},
        engine=dataclasses.replace(loaded.engine, urls=[], colocate=False, weights="auto"),
        model=dataclasses.replace(loaded.model, lora=LoraConfig()),
        placement=PlacementConfig(),
        checkpoint=CheckpointConfig(),
        tracker=TrackerConfig(),
        search=SearchConfig(),
    )
