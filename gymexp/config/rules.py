"""The rules of a configuration beyond its types. They need no heavy import and no request to a server."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from gymexp.config.correction import problems_of_correction
from gymexp.config.env_rules import problems_of_environment
from gymexp.config.group_options import options
from gymexp.config.grpo_arguments import value_of
from gymexp.config.lora_rules import problems_of_lora
from gymexp.config.mix_rules import problems_of_mix, problems_of_replicas
from gymexp.config.overlap_rules import problems_of_overlap
from gymexp.config.packing import problems_of_packing
from gymexp.config.redaction import secrets_at
from gymexp.config.schema import (
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    LauncherConfig,
    RunConfig,
    TrackerConfig,
)
from gymexp.config.search_space import problems_of_space
from gymexp.config.value_rules import at_least, not_finite, one_of, positive


def problems_of(config: RunConfig) -> Iterator[str]:
    """Yields a line for each rule that the configuration breaks, with key, rule and value."""
    if problems := list(not_finite("", dataclasses.asdict(config))):
        yield from problems
        return  # the other rules compare these numbers
    if secrets := list(secrets_at("", dataclasses.asdict(config))):
        for key in secrets:
            yield (
                f"{key} must hold no secret, as run directories keep the configuration: leave it out, and "
                "set the variable of the environment that the program reads (HF_TOKEN, WANDB_API_KEY, …); "
                "env.<name>.servers.<server>.<key>.key_env=… names a variable for a server"
            )
        return  # the messages of the other rules show values, and so might show a secret
    yield from _seed_problems(config)
    if not config.env:
        known = ", ".join(options("env"))
        yield f"env must name at least one environment, got []: say e.g. env=[sudoku]. Known: {known}"
    for name, env in config.env.items():
        at = f"env.{name}"
        if not env.weight >= 0:
            yield f"{at}.weight must be a number >= 0, got {env.weight!r}"
        yield from problems_of_replicas(at, env.replicas, config.gym.runtime)
        for key in ("max_concurrency", "max_output_tokens"):
            yield from at_least(f"{at}.{key}", getattr(env, key), 1)
        yield from at_least(f"{at}.max_steps", env.max_steps, 1)
        yield from positive(f"{at}.timeout_s", env.timeout_s)
        yield from positive(f"{at}.memory_budget_mb", env.memory_budget_mb)
        if abs(env.refused_reward) > 1e16:
            yield f"{at}.refused_reward must be within ±1e16, as every reward, got {env.refused_reward!r}"
        if env.refused_reward and config.gym.runtime != "managed":
            yield (
                f"{at}.refused_reward must be left out with gym.runtime={config.gym.runtime}, whose servers "
                f"do not say which status they answered with, got {env.refused_reward!r}"
            )
        yield from problems_of_environment(at, env, config.gym.runtime)
        yield from _data_problems(f"{at}.data", env.data)
    if config.env and all(env.weight == 0 for env in config.env.values()):
        yield "env.<name>.weight must be > 0 for at least one environment, got 0 for all: " + ", ".join(
            config.env
        )
    yield from one_of("dataset.order", config.dataset.order, ("interleave", "shuffle"))
    yield from problems_of_mix(config)
    yield from problems_of_overlap(config)
    yield from at_least("dataset.train_size", config.dataset.train_size, 1)
    yield from at_least("dataset.validation_size", config.dataset.validation_size, 1)
    yield from _engine_problems(config.engine)
    yield from _placement_problems(config)
    yield from one_of("model.dtype", config.model.dtype, ("float32", "bfloat16", "float16"))
    yield from problems_of_packing(config)
    yield from at_least("model.max_model_len", config.model.max_model_len, 8)
    yield from problems_of_lora(config)
    yield from _launcher_problems(config.launcher)
    yield from _sharding_problems(config.trainer)
    yield from _gym_problems(config)
    yield from at_least("rollout.max_retries", config.rollout.max_retries, 0)
    if not 0 <= config.rollout.max_failed_share <= 1:
        yield f"rollout.max_failed_share must be between 0 and 1, got {config.rollout.max_failed_share!r}"
    yield from one_of("rollout.truncated", config.rollout.truncated, ("scored", "masked"))
    yield from problems_of_correction(config)
    yield from at_least("rollout.drift_every", config.rollout.drift_every, 1)
    yield from positive("rollout.max_drift", config.rollout.max_drift)
    yield from at_least("evaluation.every_steps", config.evaluation.every_steps, 0)
    yield from at_least("evaluation.num_tasks", config.evaluation.num_tasks, 1)
    yield from _distribution_problems(config.evaluation)
    yield from _checkpoint_problems(config)
    yield from _search_problems(config)
    yield from _tracker_problems(config.tracker)


def _gym_problems(config: RunConfig) -> Iterator[str]:
    gym = config.gym
    yield from one_of("gym.runtime", gym.runtime, ("managed", "cli", "attach"))
    if gym.runtime == "cli" and not gym.checkout:
        yield "gym.checkout must name your NeMo Gym checkout when gym.runtime=cli, got None"
    if gym.runtime == "attach" and gym.policy_port is None:
        yield (
            "gym.policy_port must be the port of the running servers' policy_base_url "
            "when gym.runtime=attach, got None"
        )
    yield from at_least("gym.model_servers", gym.model_servers, 1)
    if gym.model_servers != 1 and gym.runtime != "managed":
        yield (
            f"gym.model_servers must be left out with gym.runtime={gym.runtime}, whose servers gymexp does "
            f"not plan, got {gym.model_servers!r}"
        )
    replicas = [env.replicas for env in config.env.values()]
    if all(isinstance(number, int) and number >= 1 for number in replicas):
        most = max(1, sum(replicas))  # pyright: ignore[reportCallIssue, reportArgumentType]
        if gym.model_servers > most:
            yield (
                f"gym.model_servers must be at most {most}, the replicas of all environments together "
                f"(env.<name>.replicas), as each uses one model server, got {gym.model_servers}"
            )
    for key in ("start_timeout_s", "health_interval_s", "health_timeout_s"):
        yield from positive(f"gym.{key}", getattr(gym, key))
    yield from at_least("gym.max_restarts", gym.max_restarts, 0)


def _tracker_problems(tracker: TrackerConfig) -> Iterator[str]:
    trackers = ("none", "wandb", "trackio", "mlflow", "tensorboard")
    yield from one_of("tracker.kind", tracker.kind, trackers)
    yield from one_of("tracker.mode", tracker.mode, (None, "online", "offline", "disabled"))
    if not 0 <= tracker.rollouts <= 200:
        yield (
            f"tracker.rollouts must be between 0 and 200, got {tracker.rollouts}: trackers are slow "
            "with more; `python -m gymexp.rollouts` shows all"
        )


def _seed_problems(config: RunConfig) -> Iterator[str]:
    """Checks the seeds. transformers and Optuna seed numpy, which takes 32 bits.

    A trial adds its number to search.seed.
    """
    if not 0 <= config.seed < 2**32:
        yield f"seed must be between 0 and 2**32 - 1, got {config.seed!r}"
    if not 0 <= config.search.seed <= 2**32 - max(1, config.search.num_trials):
        yield (
            "search.seed must be between 0 and 2**32 - 1, also with search.num_trials added, got "
            f"{config.search.seed!r}"
        )


def _distribution_problems(evaluation: EvaluationConfig) -> Iterator[str]:
    """Allows only values that vLLM obeys.

    vLLM samples at a temperature of 0.01 for a lower one (0 is greedy), and refuses a temperature above 2.
    """
    temperature = evaluation.temperature
    if temperature is not None and temperature != 0 and not 0.01 <= temperature <= 2:
        yield (
            "evaluation.temperature must be between 0.01 and 2, or 0 for the likeliest token every time, got "
            f"{temperature!r}"
        )
    if not 0 < evaluation.top_p <= 1:
        yield f"evaluation.top_p must be > 0 and <= 1, got {evaluation.top_p!r}"
    yield from at_least("evaluation.top_k", evaluation.top_k, 0)
    if not 0 <= evaluation.min_p <= 1:
        yield f"evaluation.min_p must be between 0 and 1, got {evaluation.min_p!r}"
    yield from positive("evaluation.repetition_penalty", evaluation.repetition_penalty)
    if temperature == 0:
        for key, neutral in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
            if (value := getattr(evaluation, key)) != neutral:
                yield (
                    f"evaluation.{key} must be {neutral} with evaluation.temperature=0, which takes the "
                    f"likeliest token, got {value!r}"
                )


def _placement_problems(config: RunConfig) -> Iterator[str]:
    placement, engine = config.placement, config.engine
    for key in ("rollout_gpus", "train_gpus", "rollout_nodes", "train_nodes"):
        yield from at_least(f"placement.{key}", getattr(placement, key), 1)
    if placement.rollout_nodes is None:
        if placement.train_nodes > 1:
            yield (
                "placement.rollout_nodes must say how many nodes sample where several train, got None and "
                f"placement.train_nodes={placement.train_nodes}"
            )
        return
    several = f"placement.rollout_nodes={placement.rollout_nodes}"
    for key in ("rollout_gpus", "train_gpus"):
        if (count := getattr(placement, key)) is not None:
            yield (
                f"placement.{key} must be left out with {several}, where a node samples or trains with all "
                f"its GPUs, got {count}: ask Slurm for fewer"
            )
    if engine.urls:
        yield f"engine.urls must be left out with {several}, whose nodes sample, got {engine.urls}"
    if engine.colocate:
        yield f"engine.colocate must be false with {several}: a node samples or trains"
    if engine.weights == "ipc":
        yield f"engine.weights must be auto, nccl or disk with {several} (IPC serves a single GPU), got 'ipc'"
    if config.gym.runtime != "managed":
        yield (
            f"gym.runtime must be managed with {several}, so that other nodes reach its servers, got "
            f"{config.gym.runtime!r}"
        )


def _launcher_problems(launcher: LauncherConfig) -> Iterator[str]:
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", launcher.time):
        yield (
            "launcher.time must be minutes, or hours:minutes:seconds, or days-hours:minutes:seconds, "
            f"got {launcher.time!r}"
        )
    if launcher.mem is not None and not re.fullmatch(r"\d+[KMGT]?", launcher.mem):
        yield f"launcher.mem must be a number with K, M, G or T, as in 200G, got {launcher.mem!r}"
    yield from at_least("launcher.signal_s", launcher.signal_s, 1)
    yield from at_least("launcher.gpus", launcher.gpus, 0)
    yield from at_least("launcher.cpus", launcher.cpus, 1)
    yield from at_least("launcher.array_parallelism", launcher.array_parallelism, 1)


def _checkpoint_problems(config: RunConfig) -> Iterator[str]:
    checkpoint = config.checkpoint
    yield from at_least("checkpoint.keep_last", checkpoint.keep_last, 1)
    yield from at_least("checkpoint.keep_best", checkpoint.keep_best, 0)
    yield from at_least("checkpoint.keep_every", checkpoint.keep_every, 1)
    for key in ("keep_best", "keep_every"):
        if getattr(checkpoint, key) and checkpoint.keep_last is None:
            yield f"checkpoint.keep_last must be set with checkpoint.{key}, got None, which keeps all"
    if checkpoint.keep_best < 1:
        return
    every, save = config.evaluation.every_steps, value_of(config.trainer, "save_steps")
    strategy = value_of(config.trainer, "save_strategy")
    if strategy != "steps":
        yield f"trainer.save_strategy must be steps with checkpoint.keep_best, got {strategy!r}"
    elif not isinstance(save, int) or every < 1 or (save % every and every % save):
        yield (
            "checkpoint.keep_best compares checkpoints of steps that were evaluated: evaluation.every_steps "
            f"must divide trainer.save_steps, or be a multiple of it, got {every} and {save!r}"
        )


def _search_problems(config: RunConfig) -> Iterator[str]:
    search = config.search
    yield from at_least("search.num_trials", search.num_trials, 0)
    yield from one_of("search.direction", search.direction, ("maximize", "minimize"))
    yield from at_least("search.startup_trials", search.startup_trials, 1)
    yield from at_least("search.warmup_steps", search.warmup_steps, 0)
    yield from problems_of_space(search.params)
    if search.num_trials and search.trial is None:
        yield (
            "search.trial must be swept with search.num_trials: set it in a sweep file, as "
            "sweeps/search_lr.yaml does (hydra.sweeper.params), got None"
        )
    if search.trial is None:
        return
    if not search.params:
        yield "search.params must name the keys to search, with choices or {low, high}, got {}"
    if not config.evaluation.after:
        yield "evaluation.after must be true with a search, which compares what it measures, got False"
    if search.prune and not config.evaluation.every_steps:
        yield "evaluation.every_steps must be >= 1 with search.prune=true, which judges by it, got 0"
    env = search.metric.rpartition("/")[0]
    if env and env not in config.env:
        known = ", ".join(config.env)
        yield f"search.metric must be of a selected environment ({known}), got {search.metric!r}"


def _sharding_problems(trainer: dict[str, Any]) -> Iterator[str]:
    if trainer.get("fsdp") and trainer.get("deepspeed"):
        yield "trainer.fsdp and trainer.deepspeed do the same work: leave one of them out"
    if isinstance(deepspeed := trainer.get("deepspeed"), dict):
        zero = deepspeed.get("zero_optimization")
        stage = zero.get("stage") if isinstance(zero, dict) else zero
        if stage not in (1, 2, 3):
            yield f"trainer.deepspeed.zero_optimization.stage must be 1, 2 or 3, got {stage!r}"
    fsdp = trainer.get("fsdp_config")
    if not trainer.get("fsdp") or not isinstance(fsdp, dict):
        return
    version = fsdp.get("version", fsdp.get("fsdp_version", 2))
    if str(version) != "2":
        yield f"trainer.fsdp_config.version must be 2, got {version!r}: transformers drops version 1"
    checkpointing = value_of(trainer, "gradient_checkpointing")
    if fsdp.get("activation_checkpointing") and checkpointing:
        yield (
            "trainer.gradient_checkpointing must be false with trainer.fsdp_config.activation_checkpointing, "
            f"which does the same, got {checkpointing!r}"
        )


# Flags of `vllm serve` that other keys set (the value names the key), or that token exactness depends on.
_VLLM_OWNED = {
    "model": "model.path",
    "revision": "model.revision",
    "dtype": "model.dtype",
    "max_model_len": "model.max_model_len",
    "tensor_parallel_size": "engine.tensor_parallel_size",
    "weight_transfer_config": "engine.weights",
    "enable_sleep_mode": "engine.colocate",
    **dict.fromkeys(
        ("enable_lora", "lora_modules", "lora_dtype", "max_lora_rank", "max_loras", "max_cpu_loras"),
        "model.lora.sync",
    ),
    "lora_target_modules": "model.lora.target_modules",
} | dict.fromkeys(
    (
        *("host", "port", "uds", "api_key", "middleware"),
        *("served_model_name", "logprobs_mode", "generation_config", "enable_scale_out"),
    )
)


def _engine_problems(engine: EngineConfig) -> Iterator[str]:
    yield from one_of("engine.kind", engine.kind, ("auto", "hf", "vllm"))
    yield from one_of("engine.weights", engine.weights, ("auto", "nccl", "ipc", "disk"))
    yield from at_least("engine.max_batch_size", engine.max_batch_size, 1)
    yield from at_least("engine.tensor_parallel_size", engine.tensor_parallel_size, 1)
    yield from positive("engine.start_timeout_s", engine.start_timeout_s)
    for name in engine.args:
        plain = str(name).lstrip("-").replace("-", "_")
        if plain in _VLLM_OWNED:
            instead = _VLLM_OWNED[plain]
            yield f"engine.args.{name} is set by gymexp" + (f": use {instead} instead" if instead else "")
    for url in engine.urls:
        if not url.startswith(("http://", "https://")):
            yield f"engine.urls must be addresses like http://127.0.0.1:8000, got {url!r}"
    if engine.urls and engine.kind == "hf":
        yield f"engine.urls is for engine=vllm, got engine.kind='hf' and {engine.urls}"
    colocate = engine.colocate
    if not (isinstance(colocate, bool) or colocate == "auto"):
        yield f"engine.colocate must be true, false or auto, got {colocate!r}"
        return
    said = f"engine.colocate={str(colocate).lower()}"
    if colocate and (engine.urls or engine.kind == "hf"):
        yield f"{said} is for vLLM that gymexp starts: leave out engine.urls and engine=hf"
    if colocate and engine.weights == "nccl":
        yield f"engine.weights must be auto, ipc or disk with {said} (NCCL allows one rank a GPU), got 'nccl'"
    if colocate == "auto" and engine.weights == "ipc":
        yield f"engine.weights must be auto or disk with {said} (IPC serves a single GPU), got 'ipc'"


def _data_problems(at: str, data: DataConfig) -> Iterator[str]:
    if data.source not in ("generate", "huggingface", "jsonl", "nemo_gym"):
        yield f"{at}.source must be one of generate, huggingface, jsonl, nemo_gym, got {data.source!r}"
    elif data.source == "generate":
        if data.generator not in ("reasoning_gym", "workplace"):
            yield (
                f"{at}.generator must be reasoning_gym or workplace for source=generate, "
                f"got {data.generator!r}"
            )
        for key in ("train_size", "validation_size"):
            if getattr(data, key) is None:
                yield f"{at}.{key} must be set for source=generate"
    elif data.source == "huggingface" and not data.repo_id:
        yield f"{at}.repo_id must name a Hugging Face dataset for source=huggingface, got None"
    if data.source in ("huggingface", "jsonl"):
        for key in ("train_file", "validation_file"):
            if not getattr(data, key) and (key == "train_file" or data.validation_share is None):
                yield f"{at}.{key} must be set for source={data.source}, got {getattr(data, key)!r}"
    for key in ("train_size", "validation_size"):
        value = getattr(data, key)
        if value is not None and value < 1:
            yield f"{at}.{key} must be >= 1, got {value!r}"
    for key in ("train_seed", "validation_seed"):  # Python's Random draws the same for seed and -seed
        yield from at_least(f"{at}.{key}", getattr(data, key), 0)
