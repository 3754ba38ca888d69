"""Cold start: supervised training on demonstrations, so that a policy earns some reward before reinforcement
learning.

TRL's SFTTrainer does the training. The loss covers only the assistant's tokens; the rest of a conversation is
context.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gymexp.coldstart.tiny import Shape
from gymexp.config import load as loading
from gymexp.config.schema import EnvConfig, GymConfig, ModelConfig
from gymexp.config.value_rules import not_finite
from gymexp.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

log = logging.getLogger(__name__)

IGNORED = -100  # the label of a token that is not in the loss


@dataclass
class SFTOptions:
    """Options of the supervised training. The defaults suit a pretrained model; a model from scratch needs a
    higher learning rate."""

    max_steps: int = 200
    per_device_train_batch_size: int = 16
    learning_rate: float = 2e-5
    warmup_steps: int = 20
    weight_decay: float = 0.01
    lr_scheduler_type: str = "cosine"
    label_smoothing: float = 0.0  # above 0, the policy stays less certain and explores more in later training
    max_length: int = 4096  # tokens; longer demonstrations are left out
    save_steps: int | None = None  # save a policy every this many steps; None: save only the last
    logging_steps: int = 10
    seed: int = 0


@dataclass
class ColdstartConfig:
    """Configuration of one cold start. `model` and `env` are the groups of `gymexp.train`, and
    `env.<name>.weight` is an environment's share of the demonstrations."""

    output: str = MISSING  # directory of the trained policy; policies of `save_steps` are <output>-step<N>
    from_scratch: bool = False  # make a new tokenizer and new weights, from the demonstrations
    shape: Shape = field(default_factory=Shape)  # of a model from scratch; default: the tiny policy's shape
    num_demonstrations: int | None = None  # in total; None: as many as the weights allow without repetition
    sft: SFTOptions = field(default_factory=SFTOptions)
    model: ModelConfig = field(default_factory=ModelConfig)
    env: dict[str, EnvConfig] = field(default_factory=dict)
    gym: GymConfig = field(default_factory=GymConfig)
    trainer: dict[str, Any] = field(default_factory=dict)  # GRPO's options from a model's file; not used


class Example(TypedDict):
    """A tokenized demonstration, with one label per token: IGNORED unless the assistant wrote the token."""

    input_ids: list[int]
    labels: list[int]


def register() -> None:
    """Registers the schema with Hydra, under the name that comes first in `conf/coldstart.yaml`."""
    ConfigStore.instance().store(name="coldstart_schema", node=ColdstartConfig)


def load(cfg: DictConfig) -> ColdstartConfig:
    """Returns a checked ColdstartConfig. `model`, `env` and `gym` are checked as those of a run.

    Raises ConfigError with all problems found.
    """
    plain = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))
    assert isinstance(plain, DictConfig)
    shared = OmegaConf.create({key: plain[key] for key in ("model", "env", "gym") if key in plain})
    assert isinstance(shared, DictConfig)
    run = loading.load(shared)
    if OmegaConf.is_missing(plain, "output"):
        raise ConfigError("output has no value: say output=… with the directory to write the policy to")
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ColdstartConfig), plain))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    assert isinstance(config, ColdstartConfig)
    config.model, config.env, config.gym = run.model, run.env, run.gym
    problems = [
        f"{key} must be >= 1, got {value}"
        for key, value in (
            ("num_demonstrations", config.num_demonstrations),
            ("sft.max_steps", config.sft.max_steps),
            ("sft.per_device_train_batch_size", config.sft.per_device_train_batch_size),
            ("sft.save_steps", config.sft.save_steps),
        )
        if value is not None and value < 1
    ]
    if config.model.lora.r is not None:
        problems.append(
            f"model.lora.r must be null, got {config.model.lora.r}: a cold start trains all weights; "
            "LoRA is gymexp.train's"
        )
    sizes = dataclasses.asdict(config.shape)
    problems += [f"shape.{key} must be >= 1, got {value}" for key, value in sizes.items() if value < 1]
    if config.shape != Shape() and not config.from_scratch:
        problems.append("shape.* needs from_scratch=true: an existing model has its own shape")
    problems += not_finite("sft", dataclasses.asdict(config.sft))
    if not 0 <= config.sft.seed < 2**32:
        problems.append(f"sft.seed must be between 0 and 2**32 - 1, got {config.sft.seed}")
    if config.sft.learning_rate <= 0:
        problems.append(f"sft.learning_rate must be > 0, got {config.sft.learning_rate}")
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def tokenize(
    demonstrations: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Example]:
    """Returns demonstrations ({messages, tools}) as examples, without those longer than max_length tokens.

    Raises ConfigError if the chat template does not mark what the assistant writes, and DataError if no
    example is left. A warning says how many demonstrations were left out.
    """
    templates: dict[str, str] = {}
    examples: list[Example] = []
    left_out = 0
    for demonstration in demonstrations:
        tools = demonstration.get("tools") or None
        template = tokenizer.get_chat_template(tools=tools)
        if template not in templates:
            templates[template] = _training_template(tokenizer, template)
        encoded: Any = tokenizer.apply_chat_template(
            demonstration["messages"],
            tools=tools,
            chat_template=templates[template],
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        if len(ids) > max_length:
            left_out += 1
            continue
        labels = [token if in_loss else IGNORED for token, in_loss in zip(ids, mask, strict=True)]
        examples.append({"input_ids": ids, "labels": labels})
    if left_out:
        log.warning("left out %d demonstrations of more than %d tokens", left_out, max_length)
    if not examples:
        raise DataError(
            f"no demonstration to train on: {left_out} are longer than sft.max_length={max_length} tokens"
        )
    return examples


def _training_template(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """Returns `template`, one of the tokenizer's chat templates, with marks around the assistant's text."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if has_generation_markers(template):
        return template
    single = copy.copy(tokenizer)
    single.chat_template = template
    try:
        patched = get_training_chat_template(single)
    except ValueError as error:
        raise ConfigError(
            "model.path: the chat template does not mark what the assistant writes, and TRL has no version "
            "of it that does: put {% generation %} … {% endgeneration %} around the assistant's text in it"
        ) from error
    return patched or template


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example] | Dataset,
    options: SFTOptions,
    output: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[dict[str, float]]:
    """Trains `model` in place and saves it to `output`; returns TRL's log, one entry per `logging_steps`.

    The weights stay float32; on a GPU the arithmetic is bfloat16. Every `save_steps` the policy is saved to
    `<output>-step<N>`.
    """
    import torch
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    gpu = torch.cuda.is_available()
    arguments = SFTConfig(
        output_dir=str(output.with_name(output.name + "-trainer")),
        max_steps=options.max_steps,
        per_device_train_batch_size=options.per_device_train_batch_size,
        learning_rate=options.learning_rate,
        warmup_steps=options.warmup_steps,
        weight_decay=options.weight_decay,
        lr_scheduler_type=options.lr_scheduler_type,
        label_smoothing_factor=options.label_smoothing,
        logging_steps=options.logging_steps,
        seed=options.seed,
        bf16=gpu,
        use_cpu=not gpu,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=gpu,
        dataloader_num_workers=4 if gpu else 0,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = SFTTrainer(
        model=model.float(),
        args=arguments,
        train_dataset=(
            examples if isinstance(examples, Dataset) else Dataset.from_list([dict(e) for e in examples])
        ),
        processing_class=tokenizer,
        callbacks=[*callbacks, *_saving(options.save_steps, output, tokenizer)],
    )
    trainer.train()
    save(model, tokenizer, output)
    shutil.rmtree(str(arguments.output_dir), ignore_errors=True)
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def _saving(every: int | None, output: Path, tokenizer: PreTrainedTokenizerBase) -> list[TrainerCallback]:
    from transformers import TrainerCallback

    class SavePolicy(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if every and state.global_step % every == 0 and state.is_world_process_zero:
                save(kwargs["model"], tokenizer, output.with_name(f"{output.name}-step{state.global_step}"))

    return [SavePolicy()]


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """Saves weights, tokenizer and chat template to `output`.

    The weights are float16: half the bytes of float32, and three more bits of precision than bfloat16.
    """
    import torch

    from gymexp.policy.model import save_policy

    weights = {name: tensor.detach().to("cpu", torch.float16) for name, tensor in model.named_parameters()}
    save_policy(model, weights, tokenizer, output)
