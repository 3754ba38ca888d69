"""The configuration: every option composes and loads, and every mistake is answered by key, rule, value and
fix."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from gymexp.config.explain import explain_key
from gymexp.config.group_options import CONF_DIR, options
from gymexp.config.hydra_schema import register
from gymexp.config.load import from_yaml, load, to_yaml
from gymexp.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent
GROUPS = [p.name for p in CONF_DIR.iterdir() if p.is_dir() and p.name != "machine"]

NODES = ("placement.rollout_nodes=1", "placement.train_nodes=2")


def composed(*overrides: str, name: str = "train"):
    register()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose(name, overrides=list(overrides))


@pytest.mark.parametrize(("group", "option"), [(g, o) for g in GROUPS for o in options(g)])
def test_every_option_composes_and_loads(group, option):
    value = f"[{option}]" if group == "env" else option
    config = load(composed(f"{group}={value}"))
    assert config.env
    if group == "env":
        assert list(config.env) == [option]


def floats(node: Any, at: str = "") -> Iterator[str]:
    """The keys below a configuration whose schema is a number with a fraction, and all of trainer's."""
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            yield from floats(value, f"{at}{field.name}.")
        elif field.name == "env":
            yield from floats(value["sudoku"], "env.sudoku.")
        elif "float" in str(field.type):
            yield f"{at}{field.name}"


def test_no_key_takes_a_number_that_is_not_finite():
    base = composed()
    keys = list(floats(load(base)))
    assert {"rollout.max_drift", "env.sudoku.timeout_s", "evaluation.top_p", "gym.start_timeout_s"} < set(
        keys
    )
    open_ = ["trainer.learning_rate", "trainer.fsdp_config.a.b", "engine.args.gpu_memory_utilization"]
    open_ += ["env.sudoku.data.options.difficulty", "search.params.trainer.beta.high"]
    for key in [*keys, *open_]:
        for value in ("nan", "inf", "-inf"):
            with pytest.raises(
                ConfigError, match=rf"^{re.escape(key)} must be a finite number, got {value}$"
            ):
                cfg = copy.deepcopy(base)
                OmegaConf.update(cfg, key, float(value), force_add=True)
                load(cfg)


def test_a_greedy_evaluation_and_the_widest_seeds_load():
    config = load(
        composed("evaluation.temperature=0", "evaluation.repetition_penalty=1.1", f"seed={2**32 - 1}")
    )
    assert (config.evaluation.temperature, config.seed) == (0, 2**32 - 1)


def test_dapo_masks_cut_rollouts_and_the_command_line_may_say_otherwise():
    assert load(composed("trainer=dapo")).rollout.truncated == "masked"
    assert load(composed("trainer=dapo", "rollout.truncated=scored")).rollout.truncated == "scored"
    assert load(composed("experiment=sudoku_qwen2_5_1_5b")).rollout.truncated == "masked"


def test_all_environments_together_and_every_trainer_with_every_model_that_has_settings_of_its_own():
    own = [m for m in options("model") if "trainer:" in (CONF_DIR / "model" / f"{m}.yaml").read_text()]
    assert "tiny" in own
    pairs = {*product(own, options("trainer")), *((model, "grpo") for model in options("model"))}
    for model, trainer in sorted(pairs):
        config = load(composed(f"env=[{','.join(options('env'))}]", f"model={model}", f"trainer={trainer}"))
        assert list(config.env) == options("env")
        assert config.model.name == model
        assert config.trainer["loss_type"]


def test_a_models_own_trainer_settings_give_way_to_the_command_line_alone():
    tiny = load(composed("model=tiny", "trainer=dapo")).trainer
    assert (tiny["learning_rate"], tiny["loss_type"]) == (2e-4, "dapo")
    assert load(composed("model=tiny", "trainer.learning_rate=1e-5")).trainer["learning_rate"] == 1e-5
    assert "learning_rate" not in load(composed("model=qwen3_4b")).trainer, "TRL's default"


def test_what_other_programs_take_needs_no_plus():
    config = load(
        composed("engine.args.gpu_memory_utilization=0.3", "model.chat_template_kwargs.enable_thinking=true")
    )
    assert config.engine.args == {"gpu_memory_utilization": 0.3}
    assert config.model.chat_template_kwargs == {"enable_thinking": True}


def test_lora_is_switched_on_by_its_rank_and_off_by_none(tmp_path):
    config = load(composed("model.lora.r=8", "model.lora.target_modules=[q_proj]"))
    assert (config.model.lora.r, config.model.lora.target_modules) == (8, ["q_proj"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert from_yaml(tmp_path / "config.yaml") == config
    assert load(composed()).model.lora.r is None
    recipe = "experiment=sudoku_qwen2_5_1_5b_lora"
    assert load(composed(recipe)).model.lora.r == 32
    assert load(composed(recipe, "model.lora.r=null")).model.lora.r is None


def test_lora_and_a_reference_that_follows_the_policy_exclude_each_other():
    with pytest.raises(ConfigError, match=r"trainer\.sync_ref_model must be false with model\.lora"):
        load(composed("model.lora.r=8", "trainer.beta=0.1", "trainer.sync_ref_model=true"))
    assert load(composed("trainer.beta=0.1", "trainer.sync_ref_model=true"))


def test_a_lora_recipe_is_the_full_one_but_for_what_its_file_says():
    for name in ("sudoku_qwen2_5_1_5b", "workplace_sudoku_qwen3_4b"):
        full, lora = (load(composed(f"experiment={name}{end}")) for end in ("", "_lora"))
        assert (lora.name, lora.model.lora.r, lora.trainer["learning_rate"]) == (f"{name}_lora", 32, 1e-4)
        lora.name, lora.model.lora, lora.engine.args = full.name, full.model.lora, full.engine.args
        lora.trainer["learning_rate"] = full.trainer["learning_rate"]
        assert lora == full


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("engine=vlm", "engine=vlm is not known; did you mean engine=vllm"),
        ("engine.kind=sglang", "engine.kind must be one of auto, hf, vllm, got 'sglang'"),
        ("engine.args.port=80", "engine.args.port is set by gymexp"),
        ("engine.args.max-model-len=80", "use model.max_model_len instead"),
        ("engine.urls=[localhost]", "engine.urls must be addresses like http"),
        ("engine.weights=carrier_pigeon", "engine.weights must be one of auto, nccl, ipc, disk"),
        ("engine.colocate=true engine=hf", "engine.colocate=true is for vLLM that gymexp starts"),
        ("engine.colocate=true engine.weights=nccl", "engine.weights must be auto, ipc or disk"),
        ("engine.colocate=auto engine.weights=nccl", "engine.weights must be auto, ipc or disk"),
        (
            "engine.colocate=auto engine.weights=ipc",
            "engine.weights must be auto or disk with engine.colocate=auto",
        ),
        ("engine.colocate=auto engine=hf", "engine.colocate=auto is for vLLM that gymexp starts"),
        ("engine.colocate=both", "engine.colocate must be true, false or auto, got 'both'"),
        ("placement.rollout_gpus=0", "placement.rollout_gpus must be >= 1, got 0"),
    ],
)
def test_a_mistake_about_vllm_is_answered_before_anything_starts(override, said):
    shown = subprocess.run(
        [sys.executable, "-m", "gymexp.train", *override.split()],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert shown.returncode == 1
    assert said in shown.stderr and "Traceback" not in shown.stderr


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("model=qwen3_1", "qwen3_1_7b"),
        ("env=[sudoku] model=qwen3_1", "qwen3_1_7b"),
        ("env.sudoku.max_st", "env.sudoku.max_steps="),
        ("engine.tensor_par", "engine.tensor_parallel_size="),
        ("model.lora.lora_a", "model.lora.lora_alpha="),
    ],
)
def test_tab_completes_options_and_keys_after_the_readmes_command(typed, completed):
    script = f"""
        eval "$(python -m gymexp.train -sc install=bash)"
        COMP_LINE="python -m gymexp.train {typed}" COMP_POINT=1000 COMP_WORDBREAKS=" ="
        _gymexp_complete
        echo "${{COMPREPLY[*]}}"
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shown = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | {"PATH": path},
    )
    assert shown.stdout.split() == [completed], shown.stderr


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "sweeps").glob("*.yaml")))
def test_every_sweep_composes_and_every_point_of_it_loads(name):
    register()
    with initialize_config_dir(str(ROOT / "sweeps"), version_base="1.3"):
        search = [f"hydra.searchpath=[file://{CONF_DIR}]"]
        cfg = compose(name, overrides=search, return_hydra_config=True)
        params = {key: cfg.hydra.sweeper.params[key] for key in cfg.hydra.sweeper.params}
        assert str(cfg.hydra.mode).endswith("MULTIRUN")
        keys = list(params)
        parser = OverridesParser.create()
        swept = [parser.parse_override(f"{key}={params[key]}").sweep_string_iterator() for key in keys]
        for point in product(*swept):
            config = load(
                compose(name, overrides=search + [f"{k}={v}" for k, v in zip(keys, point, strict=True)])
            )
            assert config.env


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("env=[]", r"env must name at least one environment, got \[\].*sudoku.*workplace"),
        ("env.sudoku.weight=-1", r"env\.sudoku\.weight must be a number >= 0, got -1\.0"),
        ("env.sudoku.weight=nan", r"env\.sudoku\.weight must be a finite number, got nan"),
        ("env.sudoku.weight=0", r"weight must be > 0 for at least one environment, got 0 for all: sudoku"),
        ("env.sudoku.replicas=0", r"env\.sudoku\.replicas must be >= 1, got 0"),
        (
            "+env.sudoku.wieght=2",
            r"env\.sudoku\.wieght is not a known key; did you mean env\.sudoku\.weight\?",
        ),
        ("dataset.order=random", r"dataset\.order must be one of interleave, shuffle, got 'random'"),
        ("tracker.rollouts=201", r"tracker\.rollouts must be between 0 and 200, got 201: trackers are slow"),
        ("tracker.kind=comet", r"tracker\.kind must be .*mlflow"),
        ("rollout.max_failed_share=2", r"rollout\.max_failed_share must be between 0 and 1, got 2\.0"),
        ("env.sudoku.data.source=s3", r"env\.sudoku\.data\.source must be one of .*got 's3'"),
        ("gym.runtime=cli", r"gym\.checkout must name"),
        ("checkpoint.keep_last=0", r"checkpoint\.keep_last must be >= 1, got 0"),
        ("checkpoint.keep_every=100", r"checkpoint\.keep_last must be set with checkpoint\.keep_every"),
        (
            "checkpoint={keep_last:1,keep_best:1}",
            r"evaluation\.every_steps must divide trainer\.save_steps, or be .*, got 0 and 500",
        ),
        ("model.lora.r=0", r"model\.lora\.r must be >= 1, got 0"),
        ("model.lora.lora_dropout=1", r"model\.lora\.lora_dropout must be >= 0 and below 1, got 1\.0"),
        (
            "model.lora.target_modules='q_proj('",
            r"model\.lora\.target_modules must be all-linear.*got 'q_proj\('",
        ),
        ("model.lora.target_modules=[]", r"model\.lora\.target_modules must be all-linear.*got \[\]"),
        ("model.lora.lora_alpha=64", r"model\.lora\.r must be the adapter's rank .* got None"),
        ("+model.lora.alpha=64", r"did you mean model\.lora\.lora_alpha\?"),
        ("gym.runtime=attach", r"gym\.policy_port must be"),
        (
            "gym={runtime:cli,model_servers:2}",
            r"gym\.model_servers must be left out with gym\.runtime=cli, .*, got 2",
        ),
        ("gym.model_servers=3", r"gym\.model_servers must be at most 1, .*env\.<name>\.replicas.*got 3"),
        ("seed=-1", r"^seed must be between 0 and 2\*\*32 - 1, got -1"),
        (f"seed={2**32}", r"^seed must be between 0 and 2\*\*32 - 1, got 4294967296"),
        ("search.seed=-1", r"search\.seed must be between 0 and"),
        ("env.sudoku.data.train_seed=-1", r"env\.sudoku\.data\.train_seed must be >= 0, got -1"),
        (
            "evaluation.temperature=-1",
            r"evaluation\.temperature must be between 0\.01 and 2, or 0 .*got -1\.0",
        ),
        ("evaluation.temperature=0.001", r"evaluation\.temperature must be between .*got 0\.001"),
        ("evaluation.temperature=3", r"evaluation\.temperature must be between .*got 3\.0"),
        ("evaluation.top_p=0", r"evaluation\.top_p must be > 0 and <= 1, got 0\.0"),
        ("evaluation.top_p=1.5", r"evaluation\.top_p must be > 0 and <= 1, got 1\.5"),
        ("evaluation.top_k=-1", r"evaluation\.top_k must be >= 0, got -1"),
        ("evaluation.min_p=1.1", r"evaluation\.min_p must be between 0 and 1, got 1\.1"),
        ("evaluation.repetition_penalty=0", r"evaluation\.repetition_penalty must be > 0, got 0\.0"),
        (
            "evaluation={temperature:0,top_p:0.9}",
            r"evaluation\.top_p must be 1\.0 with evaluation\.temperature=0, .*got 0\.9",
        ),
    ],
)
def test_a_broken_rule_is_named_with_key_and_value(override, said):
    with pytest.raises(ConfigError, match=said):
        load(composed(override))


@pytest.mark.parametrize(("save", "evaluate", "fits"), [(20, 10, True), (10, 20, True), (20, 15, False)])
def test_the_best_checkpoint_needs_evaluations_at_steps_with_one(save, evaluate, fits):
    said = [f"trainer.save_steps={save}", f"evaluation.every_steps={evaluate}"]
    said += ["checkpoint.keep_last=1", "checkpoint.keep_best=1"]
    if fits:
        assert load(composed(*said)).checkpoint.keep_best == 1
    else:
        with pytest.raises(
            ConfigError, match=rf"must divide trainer\.save_steps.* got {evaluate} and {save}"
        ):
            load(composed(*said))


def test_all_broken_rules_come_in_one_message():
    with pytest.raises(ConfigError) as caught:
        load(composed("env.sudoku.weight=-1", "env.sudoku.replicas=0", "rollout.truncated=x"))
    assert len(str(caught.value).splitlines()) == 3


def test_settings_of_an_environment_that_is_not_selected_are_left_out():
    config = load(composed("experiment=quickstart", "env=[sudoku]"))
    assert list(config.env) == ["sudoku"]


def test_a_config_written_to_a_run_directory_reads_back_equal(tmp_path):
    config = load(composed("experiment=quickstart"))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert from_yaml(tmp_path / "config.yaml") == config


def test_an_unknown_key_is_explained_and_a_known_one_is_not():
    assert "did you mean dataset?" in (explain_key("datset") or "")
    assert explain_key("env.sudoku.data.train_size") is not None  # known, but sudoku is not selected there
    assert explain_key("rollout.max_drift") is None


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "gymexp.train", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )


def said_of(result: subprocess.CompletedProcess[str]) -> str:
    return "\n".join(line for line in result.stderr.splitlines() if not line.startswith("import time:"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["env=[sudko]"], r"env=sudko is not known; did you mean env=sudoku\?.*Known: .*sudoku.*workplace"),
        (["model=qwen3_4"], r"model=qwen3_4 is not known; did you mean model=qwen3_4b\?"),
        (
            ["env.sudoku.wieght=2"],
            r"env\.sudoku\.wieght is not a known key; did you mean env\.sudoku\.weight\?",
        ),
        (
            ["model.lora.alpha=64"],
            r"model\.lora\.alpha is not a known key; did you mean model\.lora\.lora_alpha\?",
        ),
        (["env=[]"], r"env must name at least one environment"),
        (["trainr.learning_rate=1"], r"did you mean trainer\?"),
        (["env.sudoku.replicas=two"], r"env\.sudoku\.replicas.*two"),
        (["launcher.dry_run=true"], r"launcher\.dry_run shows what launcher=slurm would submit"),
    ],
)
def test_the_command_answers_a_mistake_without_a_traceback_or_torch(arguments, said, tmp_path):
    began = time.monotonic()
    result = command(*arguments, f"hydra.run.dir={tmp_path / 'run'}")
    assert result.returncode == 1
    assert re.search(said, said_of(result)), said_of(result)
    assert "Traceback" not in result.stderr
    imported = {
        line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines() if "import time:" in line
    }
    assert "omegaconf" in imported
    assert not imported & {"torch", "transformers", "trl", "vllm"}
    assert time.monotonic() - began < 20  # 1 s on a free machine; the bound only catches a hang
    assert not (tmp_path / "run").exists(), "a mistake leaves no run directory"


def test_cfg_job_and_defaults_tree_show_the_configuration():
    assert "reasoning_gym_simple_agent" in command("--cfg", "job").stdout
    assert "env/sudoku" in command("--info", "defaults-tree").stdout


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["placement.rollout_nodes=0"], r"placement\.rollout_nodes must be >= 1, got 0"),
        (["placement.train_nodes=2"], r"rollout_nodes must say how many nodes sample .*train_nodes=2"),
        (
            [*NODES, "placement.train_gpus=2"],
            r"train_gpus must be left out with placement\.rollout_nodes=1.*2",
        ),
        (
            [*NODES, "engine.urls=[http://a:1]"],
            r"engine\.urls must be left out with placement\.rollout_nodes=1",
        ),
        ([*NODES, "engine.colocate=true"], r"engine\.colocate must be false with placement\.rollout_nodes=1"),
        ([*NODES, "engine.weights=ipc"], r"engine\.weights must be auto, nccl or disk .* got 'ipc'"),
        (
            [*NODES, "gym.runtime=attach", "gym.policy_port=8000"],
            r"gym\.runtime must be managed .* got 'attach'",
        ),
    ],
)
def test_what_several_nodes_cannot_have_is_said_before_anything_is_submitted(overrides, said):
    with pytest.raises(ConfigError, match=said):
        load(composed(*overrides))


SEARCH = ("search.trial=0", "search.params.trainer.learning_rate={low:1e-6,high:1e-4,log:true}")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["search.trial=0"], r"search\.params must name the keys to search, .*got \{\}"),
        (["search.num_trials=4"], r"search\.trial must be swept with search\.num_trials: .*got None"),
        ([*SEARCH, "evaluation.after=false"], r"evaluation\.after must be true with a search"),
        ([*SEARCH, "search.prune=true"], r"evaluation\.every_steps must be >= 1 with search\.prune=true"),
        ([*SEARCH, "search.direction=up"], r"search\.direction must be one of maximize, minimize, got 'up'"),
        (
            [*SEARCH, "search.metric=workplace/reward"],
            r"search\.metric must be of a selected environment \(sudoku\), got 'workplace/reward'",
        ),
        (
            [*SEARCH, "search.params.trainer.learning_rate.low=0"],
            r"search\.params\.trainer\.learning_rate\.low must be > 0 with log=true, got 0",
        ),
        (
            [*SEARCH, "search.params.trainer.learning_rate.high=1e-7"],
            r"learning_rate must be a range of two numbers with low < high, got low=1e-06, high=1e-07",
        ),
        (
            [*SEARCH, "+search.params.trainer.learning_rate.base=10"],
            r"learning_rate has keys that no range has: base\. A range has low, high, log, step",
        ),
        (
            [*SEARCH, "search.params.rollout.max_failed_share=[0.1,2]"],
            r"search\.params\.rollout\.max_failed_share: rollout\.max_failed_share must be between 0 and 1",
        ),
        (
            [*SEARCH, "search.params.rollout.max_faild_share=[0.1]"],
            r"search\.params\.rollout\.max_faild_share: .*did you mean rollout\.max_failed_share\?",
        ),
    ],
)
def test_a_search_that_cannot_be_made_is_answered_before_its_first_trial(overrides, said):
    with pytest.raises(ConfigError, match=said):
        load(composed(*overrides))


def test_a_search_of_ranges_and_choices_loads():
    params = load(composed(*SEARCH, "search.params.trainer.num_generations=[4,8]")).search.params
    assert params == {
        "trainer": {"learning_rate": {"low": 1e-6, "high": 1e-4, "log": True}, "num_generations": [4, 8]}
    }


def test_several_nodes_are_a_matter_of_two_keys():
    placement = load(composed(*NODES)).placement
    assert (placement.rollout_nodes, placement.train_nodes) == (1, 2)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["env.sudoku.refused_reward=nan"], "env.sudoku.refused_reward must be a finite number, got nan"),
        (["env.sudoku.refused_reward=1e17"], "env.sudoku.refused_reward must be within ±1e16"),
        (
            ["env.sudoku.refused_reward=-1", "gym.runtime=attach", "gym.policy_port=5000"],
            "env.sudoku.refused_reward must be left out with gym.runtime=attach",
        ),
    ],
)
def test_the_reward_of_what_is_refused_is_a_reward_that_can_be_given(overrides, said):
    with pytest.raises(ConfigError) as caught:
        load(composed(*overrides))
    assert said in str(caught.value)
