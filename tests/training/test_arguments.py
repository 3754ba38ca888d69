"""TRL's arguments: what is wrong is answered before anything starts, what is good is not checked twice."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from gymexp.config.group_options import CONF_DIR, options
from gymexp.config.hydra_schema import register
from gymexp.config.load import load
from gymexp.config.schema import EnvConfig, ModelConfig, RunConfig, SearchConfig
from gymexp.errors import ConfigError
from gymexp.training import arguments

ROOT = Path(__file__).parent.parent.parent


def config(**trainer) -> RunConfig:
    env = EnvConfig(config_path="c", agent="a")
    return RunConfig(model=ModelConfig("m", "p", dtype="float32"), env={"e": env}, trainer=trainer)


@pytest.fixture
def no_subprocess(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a subprocess was started")

    monkeypatch.setattr(subprocess, "run", refuse)


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        (
            {"learning_rat": 1e-6},
            r"\.learning_rat is not an argument of trl\.GRPOConfig; did you mean trainer\.learning_rate\?",
        ),
        ({"output_dir": "x"}, r"trainer\.output_dir is set by gymexp: use output_dir"),
        ({"use_vllm": True}, r"trainer\.use_vllm is set by gymexp: use engine instead"),
        ({"save_total_limit": 2}, r"trainer\.save_total_limit is set by gymexp: use checkpoint\.keep_last"),
        ({"report_to": "wandb"}, r"trainer\.report_to is set by gymexp: use tracker instead"),
        (
            {"num_generations": 6, "per_device_train_batch_size": 16},
            r"num_generations=6 must divide the generation batch of 16 .*, or a batch of 12 or 18",
        ),
        (
            {"num_generations": 8, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
            r"must divide the generation batch of 6 .*3 x steps_per_generation=2.*or a batch of 8",
        ),
        ({"num_generations": 1}, r"trainer\.num_generations must be >= 2 .*got 1"),
    ],
)
def test_names_and_groups_are_checked_without_importing_trl(trainer, said, tmp_path, no_subprocess):
    with pytest.raises(ConfigError, match=said):
        arguments.check(config(**trainer), tmp_path)


def test_what_a_study_may_try_is_checked_before_its_first_trial(tmp_path, no_subprocess):
    params = {"num_generations": [4, 8, 16], "learning_rate": {"low": 1e-6, "high": 1e-4}}
    search = SearchConfig(num_trials=4, trial=1, params={"trainer": params})
    trial = dataclasses.replace(config(per_device_train_batch_size=8), search=search)
    said = r"search\.params allow trainer\.num_generations=16, .*: trainer\.num_generations=16 must divide"
    with pytest.raises(ConfigError, match=said):
        arguments.check(trial, tmp_path)
    params["num_generatons"] = params.pop("num_generations")
    with pytest.raises(ConfigError, match=r"num_generatons is not .*did you mean trainer\.num_generations"):
        arguments.check(trial, tmp_path)


def test_all_wrong_names_come_in_one_message(tmp_path, no_subprocess):
    with pytest.raises(ConfigError) as caught:
        arguments.check(config(seed=1, learning_rat=1, epsilom=2), tmp_path)
    assert len(str(caught.value).splitlines()) == 3


@pytest.fixture
def constructed_by(monkeypatch):
    """Stands in for the process that constructs GRPOConfigs; says what it was asked each time."""
    requests: list[list[dict]] = []

    def make(code: int = 0, verdict: str = "", stderr: str = "") -> list[list[dict]]:
        def run(command, input, **_):
            requests.append(json.loads(input))
            stdout = "a library's own words\n" + json.dumps([verdict] * len(requests[-1]))
            return subprocess.CompletedProcess(command, code, "" if code else stdout, stderr)

        monkeypatch.setattr(subprocess, "run", run)
        return requests

    return make


def test_a_good_verdict_is_kept_for_the_same_values_and_versions(tmp_path, constructed_by):
    requests = constructed_by()
    for _ in range(2):
        arguments.check(config(learning_rate=1e-6), tmp_path)
    assert len(requests) == 1
    arguments.check(config(learning_rate=2e-6), tmp_path)
    assert len(requests) == 2


def test_a_bad_verdict_is_not_kept_and_says_what_trl_said(tmp_path, constructed_by):
    requests = constructed_by(verdict="trainer: trl.GRPOConfig refuses it: The loss type is none")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"^trainer: trl.GRPOConfig refuses it: The loss type is none$"):
            arguments.check(config(loss_type="none"), tmp_path)
    assert len(requests) == 2


def test_many_configurations_are_asked_about_at_once_and_the_same_values_once(tmp_path, constructed_by):
    requests = constructed_by(verdict="no")
    rates = [config(learning_rate=rate) for rate in (1e-6, 2e-6, 1e-6)]
    reasons = arguments.problems([*rates, config(seed=1)], tmp_path)
    assert reasons[:3] == ["no"] * 3 and "trainer.seed is set by gymexp" in reasons[3]
    assert [[one["trainer"]["learning_rate"] for one in some] for some in requests] == [[1e-6, 2e-6]]


def test_a_constructor_that_breaks_shows_the_end_of_what_it_said(tmp_path, constructed_by):
    constructed_by(1, stderr="x" * 5000 + "ImportError: no kernel")
    with pytest.raises(ConfigError, match=r"^trainer: trying out its values failed") as caught:
        arguments.check(config(), tmp_path)
    assert str(caught.value).endswith("ImportError: no kernel")
    assert len(str(caught.value)) < 2500


def test_a_verdict_holds_for_the_packages_gpus_files_and_place_that_it_looked_at(
    tmp_path, constructed_by, monkeypatch
):
    requests = constructed_by()
    site = tmp_path / "site"
    (site / "liger_kernel-0.6.dist-info").mkdir(parents=True)
    settings = tmp_path / "zero.json"
    settings.write_text("{}")
    one = config(fsdp_config=str(settings))

    def count() -> int:
        arguments.check(one, tmp_path)
        return len(requests)

    assert [count(), count()] == [1, 1]
    monkeypatch.syspath_prepend(str(site))
    assert [count(), count()] == [2, 2], "a package more"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert [count(), count()] == [3, 3], "another GPU"
    settings.write_text('{"a": 1}')
    assert [count(), count()] == [4, 4], "another file of the same name"
    one = dataclasses.replace(one, model=dataclasses.replace(one.model, attn_implementation="eager"))
    assert [count(), count()] == [5, 5]
    assert arguments.problems([one], tmp_path) == [""] and len(requests) == 6, "not of this machine"
    assert [some[0]["here"] for some in requests] == [True] * 5 + [False]


def test_a_check_that_takes_too_long_says_so(tmp_path, monkeypatch):
    def run(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ConfigError, match="trying out its values took more than 600 s"):
        arguments.check(config(), tmp_path)


BELOW_0: dict[str, Any] = {
    "lr_scheduler_type": "cosine_warmup_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1, "warmup_lr_rate": -2.0},
    "warmup_steps": 5,
}
GOOD: list[dict[str, Any]] = [
    {"learning_rate": 1e-6, "num_generations": 4, "scale_rewards": False, "beta": 0},
    {
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "lr_scheduler_type": "cosine",
        "warmup_steps": 9,
        "max_steps": 3,
    },
    {
        "optim": "adafactor",
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": 3},
    },
    {
        "loss_type": "vespo",
        "vllm_importance_sampling_mode": "token_truncate",
        "torch_compile_backend": "eager",
    },
    {
        "gradient_checkpointing_kwargs": {"use_reentrant": True, "every_n_layers": 2},
        "log_level": "info",
        "ddp_backend": "gloo",
    },
]
# TRL's constructor takes all but the first two as they are, and the run fails minutes later, or not at all.
BAD: list[tuple[str, dict[str, Any]]] = [
    ("cosinus is not a valid SchedulerType", {"lr_scheduler_type": "cosinus"}),
    ("'generation_batch_size' and 'steps_per_gen", {"steps_per_generation": 2, "generation_batch_size": 16}),
    ("trainer.loss_type must be one of bnpo, ", {"loss_type": "grop"}),
    ("trainer.scale_rewards must be one of batch, group, none, got 'gruop'", {"scale_rewards": "gruop"}),
    ("trainer.learning_rate must be of type float, got '1e-6x'", {"learning_rate": "1e-6x"}),
    ("trainer.max_steps must be of type int, got 'ten'", {"max_steps": "ten"}),
    ("trainer.num_generations must be of type int | None, got True", {"num_generations": True}),
    ("trainer.vllm_importance_sampling_mode must be one of", {"vllm_importance_sampling_mode": "token"}),
    (
        "sampling_mode must be token_truncate or token_mask with loss_type=vespo",
        {"loss_type": "vespo", "vllm_importance_sampling_mode": "sequence_mask"},
    ),
    ("got 'adamw_8bit': You need to install `bitsandbytes`", {"optim": "adamw_8bit"}),
    ("got 'galore_adamw': You need to install", {"optim": "galore_adamw", "optim_target_modules": ["q"]}),
    ("got 'adamw_torch_4bit': You need to have `torchao", {"optim": "adamw_torch_4bit"}),
    ("got 'adamw_anyprecision': ", {"optim": "adamw_anyprecision"}),
    ("got 'adamw_torch_fused': it does not read momentum", {"optim_args": "momentum=0.9"}),
    ("got 'adamw_torch_fused': Invalid beta parameter", {"adam_beta1": 1.5}),
    (
        "lr_scheduler_type=cosine_with_min_lr, got None: One of min_lr",
        {"lr_scheduler_type": "cosine_with_min_lr"},
    ),
    ("the learning rate of step 0 would be -", BELOW_0),
    ("lr_end (1e-07) must be smaller", {"lr_scheduler_type": "polynomial", "learning_rate": 1e-9}),
    ("trainer.use_liger_kernel needs a package that is not installed", {"use_liger_kernel": True}),
    ("trainer.torch_compile_backend must be one of", {"torch_compile_backend": "inductr"}),
    ("trainer.torch_compile_mode must be one of", {"torch_compile_mode": "max"}),
    ("trainer.log_level must be one of", {"log_level": "loud"}),
    ("trainer.ddp_backend must be one of", {"ddp_backend": "nckl"}),
    ("trainer.include_num_input_tokens_seen must be one of", {"include_num_input_tokens_seen": "some"}),
    ("trainer.gradient_checkpointing_kwargs must be", {"gradient_checkpointing_kwargs": {"reentrant": 1}}),
    ("must be auto or an integer >= 1, got 0", {"gradient_checkpointing_kwargs": {"every_n_layers": 0}}),
    ("--tf32 requires", {"tf32": True}),
]
# (model.attn_implementation, whether the run is this machine's, what is said)
ATTENTION = [
    ("eager", True, ""),
    ("flash_attention_2", True, "the package for FlashAttention2 doesn't seem to be installed"),
    ("flash_attention_3", False, "its package is not installed"),
    ("kernels-community/flash-attn2", True, "`kernels` is either not installed"),
    ("kernels-community/flash-attn2", False, "its package is not installed"),
    ("flex_attention", False, ""),
    ("spda", True, "got 'spda'"),
    ("spda", False, "got 'spda': transformers has "),
    ("paged|sdpa", False, "it generates, and does not train"),
]
MISSING = ("bitsandbytes", "galore_torch", "torchao", "torchdistx", "liger_kernel", "flash_attn", "kernels")


@pytest.mark.skipif(
    any(map(importlib.util.find_spec, MISSING)) or torch.cuda.is_available(),
    reason="what is said here of missing packages and GPUs is there",
)
def test_trl_itself_takes_the_good_and_every_experiment_and_refuses_the_bad(tmp_path, monkeypatch):
    register()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        composed = [compose("train", [f"experiment={name}"]) for name in options("experiment")]
        composed += [compose("train", [f"trainer={name}"]) for name in options("trainer")]
    configs = [load(cfg) for cfg in composed]
    same = {"dtype": "float32", "attn_implementation": "sdpa", "here": True}
    requests = [{"trainer": one} | same for one in (*GOOD, *(one.trainer for one in configs))]
    requests += [{"trainer": one} | same for _, one in BAD]
    requests += [
        {"trainer": {}} | same | {"attn_implementation": name, "here": here} for name, here, _ in ATTENTION
    ]
    requests.append({"trainer": {"tf32": True}} | same | {"here": False})
    reasons = arguments._request_verdicts(requests)
    assert reasons[: len(GOOD) + len(configs)] == [""] * (len(GOOD) + len(configs))
    expected = [said for said, _ in BAD] + [said for *_, said in ATTENTION] + [""]
    for line, said in zip(reasons[len(GOOD) + len(configs) :], expected, strict=True):
        assert said in line and bool(said) == bool(line)
    monkeypatch.setattr(arguments, "_request_verdicts", lambda some: [""] * len(some))
    assert arguments.problems(configs, tmp_path) == [""] * len(configs), "names, and whole groups"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's compiler is Triton")
def test_a_machine_that_cannot_compile_is_told_before_anything_starts(tmp_path):
    """In a process of its own, as torch reads the compiler's name when it is imported."""
    question = {"trainer": {"torch_compile": True}, "dtype": "float32", "attn_implementation": "sdpa"}
    code = f"from gymexp.training.argument_trial import judge; print(judge(**{question}, here=True))"
    missing = {"CXX": "/nowhere/g++", "PATH": "/nowhere", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | missing, capture_output=True, text=True, timeout=300
    )
    said = done.stdout.strip().splitlines()[-1]
    assert said.startswith("trainer.torch_compile must be false where torch cannot compile, got true: ")
    assert "compiler" in said
