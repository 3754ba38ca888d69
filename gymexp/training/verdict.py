"""Whether TRL, transformers and torch do what a configuration asks for, tried in a process of its own.

`python -m gymexp.training.verdict` reads a JSON list of questions (`trainer`, `dtype`,
`attn_implementation`, `here`) and prints a list of answers, each empty or what is wrong. Every check asks the
libraries themselves: it constructs, on a model of a few weights, what the run would construct minutes later.
"""

from __future__ import annotations

import ast
import copy
import json
import math
import os
import sys
import types
import typing
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gymexp.config.grpo_arguments import read_source
from gymexp.config.names import nearest
from gymexp.training.arguments import construct

if TYPE_CHECKING:
    from trl.trainer.grpo_config import GRPOConfig

# Words that TRL compares only in the middle of a step; which ones it knows is read from its source.
_WORDS = (
    "loss_type",
    "scale_rewards",
    "importance_sampling_level",
    "multi_objective_aggregation",
    "vllm_importance_sampling_mode",
)
_TINY: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def judge(trainer: dict[str, Any], dtype: str, attn_implementation: str, here: bool) -> str:
    """What is wrong, or nothing. here: the run is this machine's; elsewhere there may be other GPUs."""
    import torch

    apart = {"ddp_backend"}  # it needs other ranks
    if not (here or torch.cuda.is_available()):
        apart.add("tf32")  # it needs a GPU
    try:
        _check_values(trainer)
        alone = {name: value for name, value in trainer.items() if name not in apart}
        args = construct(alone, dtype, output_dir="unused", report_to=[])
        _check_objective(args)
        _check_names(args, trainer.get("ddp_backend"))
        _check_kernels(args)
    except (TypeError, ValueError, ImportError) as error:
        said = str(error)
        return said if said.startswith("trainer.") else f"trainer: trl.GRPOConfig refuses it: {said}"
    return _optimizer_problem(args) or _attention_problem(attn_implementation, dtype, here)


def _known_words() -> dict[str, set[str]]:
    """Option -> the strings that TRL's trainer compares it with."""
    words: dict[str, set[str]] = {name: set() for name in _WORDS}
    for node in ast.walk(read_source("trl", "trainer/grpo_trainer.py")):
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


def _check_objective(args: GRPOConfig) -> None:
    """TRL's own rule, which it does not apply where use_vllm is switched on after its constructor."""
    mode = args.vllm_importance_sampling_mode
    if args.loss_type == "vespo" and args.vllm_importance_sampling_correction and "token" not in mode:
        raise ValueError(
            "trainer.vllm_importance_sampling_mode must be token_truncate or token_mask with "
            f"loss_type=vespo, whose weights are a token's, got {mode!r}"
        )


def _check_names(args: GRPOConfig, ddp_backend: str | None) -> None:
    """Words that are looked up late, or compared with nothing."""
    import torch
    from transformers.training_args import trainer_log_levels

    known: dict[str, Sequence[str]] = {
        "log_level": list(trainer_log_levels),
        "log_level_replica": list(trainer_log_levels),
        "include_num_input_tokens_seen": ("all", "non_padding", "no"),
    }
    if args.torch_compile:
        known["torch_compile_backend"] = torch._dynamo.list_backends(exclude_tags=())
    if args.torch_compile_mode is not None:
        known["torch_compile_mode"] = list(torch._inductor.list_mode_options())
    given = {name: getattr(args, name) for name in known}
    if ddp_backend is not None:
        known["ddp_backend"], given["ddp_backend"] = torch.distributed.Backend.backend_list, ddp_backend
    for name, words in known.items():
        if (value := given[name]) not in words:
            near = nearest(str(value), list(words))
            raise ValueError(f"trainer.{name} must be one of {', '.join(words)}, got {value!r}{near}")


def _check_kernels(args: GRPOConfig) -> None:
    from transformers.utils.import_utils import is_liger_kernel_available

    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ValueError(
            "trainer.use_liger_kernel needs a package that is not installed, got True: "
            "pip install liger-kernel"
        )
    if args.gradient_checkpointing and args.gradient_checkpointing_kwargs:
        try:
            _try_checkpointing(args.gradient_checkpointing_kwargs)
        except (TypeError, ValueError) as error:
            raise ValueError(
                "trainer.gradient_checkpointing_kwargs must be arguments of torch.utils.checkpoint, "
                f"got {args.gradient_checkpointing_kwargs!r}: {_told(error)}"
            ) from None


def _try_checkpointing(options: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    model = AutoModelForCausalLM.from_config(LlamaConfig(**_TINY)).train()
    options = {name: value for name, value in options.items() if name not in ("every_n_layers", "offload")}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options or None)
    ids = torch.arange(4)[None]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def _optimizer_problem(args: GRPOConfig) -> str:
    """Optimizer and schedule, built as transformers builds them, for a single layer."""
    import torch
    from transformers import Trainer
    from transformers.optimization import get_scheduler

    layer = torch.nn.Sequential(torch.nn.Linear(2, 2))
    args = copy.copy(args)
    if args.optim_target_modules:
        args.optim_target_modules = "all-linear"  # the policy's own names are not this layer's
    try:
        _check_optim_args(args)
        cls, options = Trainer.get_optimizer_cls_and_kwargs(args, layer)  # pyright: ignore[reportArgumentType]
        parameters = options.pop("params", None) or layer.parameters()
        optimizer = cls(parameters, **options)
    except Exception as error:  # whatever a package of its own raises
        return (
            "trainer.optim must be an optimizer that works here, with what it is given, "
            f"got {str(args.optim.value)!r}: {_told(error)}"  # pyright: ignore[reportAttributeAccessIssue]
        )
    schedule_type: str = args.lr_scheduler_type.value  # pyright: ignore[reportAttributeAccessIssue]
    steps = args.max_steps if args.max_steps > 0 else 1000
    try:
        schedule: Any = get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            args.get_warmup_steps(steps),
            steps,
            args.lr_scheduler_kwargs,  # pyright: ignore[reportArgumentType]
        )
        for step in (*range(0, steps, max(1, steps // 100)), steps):
            factor = schedule.lr_lambdas[0](step)
            if not (math.isfinite(factor) and factor >= 0):
                raise ValueError(f"the learning rate of step {step} would be {factor} times the given one")
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        return (
            f"trainer.lr_scheduler_kwargs must suit lr_scheduler_type={schedule_type}, "
            f"got {args.lr_scheduler_kwargs!r}: {_told(error)}"
        )
    return ""


class _Read(dict[str, str]):
    """Remembers which keys were asked for."""

    def __init__(self, given: dict[str, str]) -> None:
        super().__init__(given)
        self.asked: set[str] = set()

    def get(self, key: str, *default: Any) -> Any:
        self.asked.add(key)
        return super().get(key, *default)

    def pop(self, key: str, *default: Any) -> Any:
        self.asked.add(key)
        return super().pop(key, *default)

    def __getitem__(self, key: str) -> str:
        self.asked.add(key)
        return super().__getitem__(key)


def _check_optim_args(args: GRPOConfig) -> None:
    """Raises ValueError for keys of `optim_args` that the optimizer does not read."""
    import torch
    import transformers.trainer

    if not args.optim_args:
        return
    trainer: Any = transformers.trainer
    parse = trainer._parse_optim_args
    read = _Read(parse(args.optim_args))
    trainer._parse_optim_args = lambda _: read
    try:
        trainer.Trainer.get_optimizer_cls_and_kwargs(args, torch.nn.Sequential(torch.nn.Linear(2, 2)))
    finally:
        trainer._parse_optim_args = parse
    given = set(parse(args.optim_args))
    if unread := sorted(given - read.asked):
        raise ValueError(f"it does not read {', '.join(unread)} of trainer.optim_args={args.optim_args!r}")


def _attention_problem(name: str, dtype: str, here: bool) -> str:
    """A pass forwards and backwards through a model of one layer; where the run's GPUs are elsewhere, whether
    its package is installed here."""
    import torch

    if name in ("eager", "sdpa"):
        return ""
    try:
        if name.startswith("paged|"):
            raise ValueError("it generates, and does not train")
        if here or torch.cuda.is_available():
            _try_attention(name, dtype)
        else:
            _find_attention(name)
    except Exception as error:  # whatever a kernel, its compiler or the hub raises
        return (
            f"model.attn_implementation must be one that trains here, got {name!r}: {_told(error)} "
            "(model.attn_implementation=sdpa works everywhere)"
        )
    return ""


def _try_attention(name: str, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_config(LlamaConfig(**_TINY), attn_implementation=name).to(device)
    ids = torch.arange(16, device=device)[None]
    arithmetic = getattr(torch, dtype)
    with torch.autocast(device, arithmetic, enabled=arithmetic is not torch.float32):
        model(input_ids=ids, labels=ids).loss.backward()


def _find_attention(name: str) -> None:
    from transformers.integrations.hub_kernels import is_kernel
    from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.utils.import_utils import is_kernels_available

    flash = {
        f"flash_attention_{version}": facts for version, facts in FLASH_ATTENTION_COMPATIBILITY_MATRIX.items()
    }
    if name in flash:
        installed = flash[name]["pkg_availability_check"]() or is_kernels_available()
    elif is_kernel(name):
        installed = is_kernels_available()
    elif name in ALL_ATTENTION_FUNCTIONS.valid_keys():
        installed = True
    else:
        raise ValueError(
            f"transformers has {', '.join(sorted({*ALL_ATTENTION_FUNCTIONS.valid_keys(), *flash}))}"
        )
    if not installed:
        raise ImportError("its package is not installed: pip install flash-attn, or kernels")


def _told(error: Exception) -> str:
    """The first line of what an exception says."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


if __name__ == "__main__":
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    print("\n" + json.dumps([judge(**one) for one in json.load(sys.stdin)]))
