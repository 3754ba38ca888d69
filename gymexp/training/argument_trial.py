"""The check of whether TRL, transformers and torch can do what a configuration requests, in its own process.

`python -m gymexp.training.argument_trial` reads a JSON list of questions (the arguments of `judge`) and
prints a JSON list of answers: the problem, or an empty text. The checks use the libraries themselves: on a
tiny model, they construct what the run would construct minutes later.
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
from gymexp.config.suggestions import nearest
from gymexp.training import recomputed_layers
from gymexp.training.arguments import construct

if TYPE_CHECKING:
    from trl.trainer.grpo_config import GRPOConfig

# Options that TRL compares with words only in the middle of a step. The words are read from TRL's source.
_WORD_OPTIONS = (
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
    """Returns the first problem of a configuration; empty if there is none.

    here: whether the run will start on this machine; another machine may have other GPUs.
    """
    import torch

    left_out = {"ddp_backend"}  # The argument needs other ranks.
    if not (here or torch.cuda.is_available()):
        left_out.add("tf32")  # The argument needs a GPU.
    try:
        _check_values(trainer)
        testable = {name: value for name, value in trainer.items() if name not in left_out}
        args = construct(testable, dtype, output_dir="unused", report_to=[])
        _check_objective(args)
        _check_words(args, trainer.get("ddp_backend"))
        _check_kernels(args, not here or torch.cuda.is_available())
        if here and args.torch_compile:
            _try_compiling(args)
    except (TypeError, ValueError, ImportError) as error:
        message = str(error)
        return message if message.startswith("trainer.") else f"trainer: trl.GRPOConfig refuses it: {message}"
    return _optimizer_problem(args) or _attention_problem(attn_implementation, dtype, here)


def _known_words() -> dict[str, set[str]]:
    """Returns, for each of `_WORD_OPTIONS`, the strings with which TRL's trainer compares it."""
    words: dict[str, set[str]] = {name: set() for name in _WORD_OPTIONS}
    for node in ast.walk(read_source("trl", "trainer/grpo_trainer.py")):
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute) and node.left.attr in words:
            constants = [c.value for c in ast.walk(node.comparators[0]) if isinstance(c, ast.Constant)]
            words[node.left.attr].update(value for value in constants if isinstance(value, str))
    return words


def _check_values(trainer: dict[str, Any]) -> None:
    """Raises ValueError for a value that GRPOConfig accepts but on which the trainer would fail later."""
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
    """Returns whether a value has the type of a hint. Accepts any value of types that GRPOConfig checks."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, member) for member in typing.get_args(hint))
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str | bool)  # TRL accepts scale_rewards: false.
    if hint in (bool, types.NoneType):
        return isinstance(value, hint)
    return True  # The constructor checks lists, dicts and enums.


def _check_objective(args: GRPOConfig) -> None:
    """Raises ValueError for a combination that TRL forbids with use_vllm. TRL does not apply its rule,
    because gymexp switches use_vllm on after the constructor."""
    mode = args.vllm_importance_sampling_mode
    if args.loss_type == "vespo" and args.vllm_importance_sampling_correction and "token" not in mode:
        raise ValueError(
            "trainer.vllm_importance_sampling_mode must be token_truncate or token_mask with "
            f"loss_type=vespo, whose weights are a token's, got {mode!r}"
        )


def _check_words(args: GRPOConfig, ddp_backend: str | None) -> None:
    """Raises ValueError for an unknown word in an option that libraries look up late, or never check."""
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
    values = {name: getattr(args, name) for name in known}
    if ddp_backend is not None:
        known["ddp_backend"], values["ddp_backend"] = torch.distributed.Backend.backend_list, ddp_backend
    for name, words in known.items():
        if (value := values[name]) not in words:
            near = nearest(str(value), list(words))
            raise ValueError(f"trainer.{name} must be one of {', '.join(words)}, got {value!r}{near}")


def _check_kernels(args: GRPOConfig, has_gpu: bool) -> None:
    """Raises ValueError if liger-kernel is requested but not installed, or if torch refuses the arguments of
    gradient checkpointing."""
    from transformers.utils.import_utils import is_liger_kernel_available

    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ValueError(
            "trainer.use_liger_kernel needs a package that is not installed, got True: "
            "pip install liger-kernel"
        )
    if args.gradient_checkpointing and args.gradient_checkpointing_kwargs:
        kwargs: Any = args.gradient_checkpointing_kwargs
        recomputed_layers.check(args, has_gpu)
        try:
            _try_checkpointing(kwargs)
        except (TypeError, ValueError) as error:
            raise ValueError(
                "trainer.gradient_checkpointing_kwargs must be every_n_layers, offload, or arguments of "
                "torch.utils.checkpoint, "
                f"got {kwargs!r}: {_first_line(error)}"
            ) from None


def _try_checkpointing(options: Any) -> None:
    """Runs a forward and a backward pass with gradient checkpointing. Raises torch's errors."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    model = AutoModelForCausalLM.from_config(LlamaConfig(**_TINY)).train()
    _, kwargs = recomputed_layers.split(options)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs or None)
    ids = torch.arange(4)[None]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def _try_compiling(args: GRPOConfig) -> None:
    """Compiles a function as the run will. Raises ValueError if torch cannot, as without a compiler."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    compiled = torch.compile(
        lambda x: x.sin() + 1, backend=args.torch_compile_backend or "inductor", mode=args.torch_compile_mode
    )
    try:
        compiled(torch.ones(64, device=device))
    except Exception as error:  # A compiler may fail with anything.
        raise ValueError(
            f"trainer.torch_compile must be false where torch cannot compile, got true: {_first_line(error)} "
            "(a C++ compiler is needed, and Triton on a GPU; torch must not lie in a path with a space)"
        ) from None


def _optimizer_problem(args: GRPOConfig) -> str:
    """Builds optimizer and learning-rate schedule for a single layer, as transformers does. Returns the
    problem; empty if there is none."""
    import torch
    from transformers import Trainer
    from transformers.optimization import get_scheduler

    layer = torch.nn.Sequential(torch.nn.Linear(2, 2))
    args = copy.copy(args)
    if args.optim_target_modules:
        args.optim_target_modules = "all-linear"  # This layer does not have the policy's module names.
    try:
        _check_optim_args(args)
        cls, options = Trainer.get_optimizer_cls_and_kwargs(args, layer)  # pyright: ignore[reportArgumentType]
        parameters = options.pop("params", None) or layer.parameters()
        optimizer = cls(parameters, **options)
    except Exception as error:  # The optimizer's package may raise anything.
        return (
            "trainer.optim must be an optimizer that works here, with what it is given, "
            f"got {str(args.optim.value)!r}: {_first_line(error)}"  # pyright: ignore[reportAttributeAccessIssue]
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
            f"got {args.lr_scheduler_kwargs!r}: {_first_line(error)}"
        )
    return ""


class _RecordingDict(dict[str, str]):
    """A dict that records in `read_keys` which of its keys were read."""

    def __init__(self, values: dict[str, str]) -> None:
        super().__init__(values)
        self.read_keys: set[str] = set()

    def get(self, key: str, *default: Any) -> Any:
        self.read_keys.add(key)
        return super().get(key, *default)

    def pop(self, key: str, *default: Any) -> Any:
        self.read_keys.add(key)
        return super().pop(key, *default)

    def __getitem__(self, key: str) -> str:
        self.read_keys.add(key)
        return super().__getitem__(key)


def _check_optim_args(args: GRPOConfig) -> None:
    """Raises ValueError for keys of `optim_args` that the optimizer does not read."""
    import torch
    import transformers.trainer

    if not args.optim_args:
        return
    trainer: Any = transformers.trainer
    parse = trainer._parse_optim_args
    recorder = _RecordingDict(parse(args.optim_args))
    trainer._parse_optim_args = lambda _: recorder
    try:
        trainer.Trainer.get_optimizer_cls_and_kwargs(args, torch.nn.Sequential(torch.nn.Linear(2, 2)))
    finally:
        trainer._parse_optim_args = parse
    if unread := sorted(set(parse(args.optim_args)) - recorder.read_keys):
        raise ValueError(f"it does not read {', '.join(unread)} of trainer.optim_args={args.optim_args!r}")


def _attention_problem(name: str, dtype: str, on_this_machine: bool) -> str:
    """Tries an attention implementation with a forward and a backward pass of a one-layer model. If the run's
    GPUs are on another machine, only checks that the package is installed. Returns the problem; empty if
    there is none."""
    import torch

    if name in ("eager", "sdpa"):
        return ""
    try:
        if name.startswith("paged|"):
            raise ValueError("it generates, and does not train")
        if on_this_machine or torch.cuda.is_available():
            _try_attention(name, dtype)
        else:
            _find_attention(name)
    except Exception as error:  # A kernel, its compiler or the hub may raise anything.
        return (
            f"model.attn_implementation must be one that trains here, got {name!r}: {_first_line(error)} "
            "(model.attn_implementation=sdpa works everywhere)"
        )
    return ""


def _try_attention(name: str, dtype: str) -> None:
    """Runs a forward and a backward pass with an attention implementation. Raises the libraries' errors."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_config(LlamaConfig(**_TINY), attn_implementation=name).to(device)
    ids = torch.arange(16, device=device)[None]
    arithmetic = getattr(torch, dtype)
    with torch.autocast(device, arithmetic, enabled=arithmetic is not torch.float32):
        model(input_ids=ids, labels=ids).loss.backward()


def _find_attention(name: str) -> None:
    """Raises ValueError if transformers does not know an attention implementation, ImportError if its package
    is not installed."""
    from transformers.integrations.hub_kernels import is_kernel
    from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.utils.import_utils import is_kernels_available

    flash = {
        f"flash_attention_{version}": entry for version, entry in FLASH_ATTENTION_COMPATIBILITY_MATRIX.items()
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


def _first_line(error: Exception) -> str:
    """Returns the first line of an exception's message, or its class if it has no message."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


if __name__ == "__main__":
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    print("\n" + json.dumps([judge(**question) for question in json.load(sys.stdin)]))
