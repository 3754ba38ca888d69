"""The exported folder loads with transformers, its card says what the run's files say, and secrets stay."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exported_run import write_run
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from whole_run import ROOT, TINY

from gymexp.config.schema import LoraConfig, ModelConfig
from gymexp.errors import GymexpError
from gymexp.export import folder
from gymexp.export.__main__ import main
from gymexp.export.chosen import choose
from gymexp.export.folder import check_target, files_in, write_folder
from gymexp.statistics import paired_change


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("outputs") / "demo")


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    to = tmp_path_factory.mktemp("out") / "policy"
    write_folder(choose(run, "last"), to, adapter=False, name=None)
    return to


def test_the_folder_is_a_model_with_a_card_and_the_runs_records(exported):
    records = {
        f"gymexp/{n}" for n in ("config.yaml", "overrides.yaml", "versions.txt", "metrics.csv", "result.json")
    }
    model = {p.name for p in TINY.iterdir()} - {"README.md"}
    assert set(files_in(exported)) == model | records | {
        "README.md",
        "gymexp/curves.svg",
        "gymexp/export.json",
    }


def test_transformers_loads_it_with_the_sampling_of_training(exported):
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (exported, TINY))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert AutoTokenizer.from_pretrained(exported).chat_template
    sampling = GenerationConfig.from_pretrained(exported)
    assert (sampling.do_sample, sampling.temperature, sampling.top_k) == (True, 0.7, 9)
    assert sampling.eos_token_id == GenerationConfig.from_pretrained(TINY).eos_token_id


def test_the_cards_data_is_valid_and_names_only_what_is_known(exported):
    data = ModelCard.load(exported / "README.md").data
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation"
    assert {"dr_grpo", "nemo-gym", "gymexp"} <= set(data.tags) and data.datasets == ["lab/office"]
    assert data.base_model is None and data.license is None, "a directory has no hub id, and none is guessed"
    [result] = data.eval_results
    assert (result.dataset_type, result.dataset_revision) == ("lab/office", "v2")
    assert result.metric_value == pytest.approx((6 * 1.0 + 5 * 0.5) / 11, abs=1e-4)


def test_the_table_has_the_paired_change_over_the_scored_tasks(exported):
    text = (exported / "README.md").read_text()
    [line] = [line for line in text.splitlines() if line.startswith("| office | 12 |")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    after = {str(n): 1.0 if n % 2 else 0.5 for n in range(1, 12)}
    change = paired_change(dict.fromkeys(map(str, range(12)), 0.25), after)
    assert change and cells[2:6] == ["11 of 12", "0.250", f"{8.5 / 11:.3f}", f"{change.mean:+.3f}"]
    assert cells[6] == f"[{change.low:+.3f}, {change.high:+.3f}] (n = 11)"


def test_the_card_says_how_it_was_trained_and_what_went_wrong(exported):
    text = (exported / "README.md").read_text()
    for part in (
        "python -m gymexp.train 'env=[office]' 'env.office.config_path=<machine>/office.yaml'",
        "of 16 training rollouts 0.0 % failed and 12.5 % were cut off",
        "`dr_grpo`",
        "CPU only, 5 minutes",
        "`abababababababab`",
        "vllm serve policy --dtype float32\n",
        "torch | 2.13.0+cpu",
        "dataset lab/office, revision v2",
    ):
        assert part in text
    assert "{{" not in text and "None" not in text and "\n\n\n" not in text


def test_the_metrics_are_a_table(exported):
    with (exported / "gymexp" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "4"]
    assert (
        rows[3]["office/reward"] == "1.0"
        and rows[4]["office/reward"] == ""
        and rows[4]["eval_office/reward"] == "0.7"
    )


def test_nothing_names_the_machine_the_user_or_a_secret(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")
    secret = "hf_" + "a1" * 15
    monkeypatch.setenv("OTHER_API_KEY", "sesame-open-sesame")
    error = (
        f"cannot reach http://node17:80 with {secret} or sesame-open-sesame, ann@lab.org, /home/ann/x/y.py"
    )
    (run / "result.json").write_text(json.dumps({"step": 4, "stopped": False, "error": error}))
    write_folder(choose(run, "last"), tmp_path / "policy", adapter=False, name=None)
    files = [tmp_path / "policy" / name for name in files_in(tmp_path / "policy")]
    text = "".join(p.read_text() for p in files if p.suffix not in (".safetensors", ".svg"))
    assert not [
        word
        for word in (secret, "sesame", "/home/ann", "node17", "ann@lab", str(run), str(ROOT))
        if word in text
    ]
    assert "<machine>/y.py" in text and "http://<host>:80" in text


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_export_leaves_what_was_there(run, tmp_path, monkeypatch, error):
    def fail(*_: object) -> None:
        raise error

    write_folder(choose(run, "last"), tmp_path / "policy", adapter=False, name=None)
    before = files_in(tmp_path / "policy")
    monkeypatch.setattr(folder, "build_card", fail)
    for name in ("policy", "another"):
        with pytest.raises(error):
            write_folder(choose(run, "last"), tmp_path / name, adapter=False, name=None)
    assert [p.name for p in tmp_path.iterdir()] == ["policy"] and files_in(tmp_path / "policy") == before


def test_an_earlier_export_of_the_run_is_replaced_and_nothing_else(run, exported, tmp_path):
    again = tmp_path / exported.name
    shutil.copytree(exported, again)
    (again / "stale.json").write_text("{}")
    write_folder(choose(run, "last"), again, adapter=False, name=None)
    assert files_in(again) == files_in(exported) and [p.name for p in tmp_path.iterdir()] == [again.name]
    (tmp_path / "mine").mkdir()
    check_target(choose(run, "last"), tmp_path / "mine")
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(GymexpError, match="mine has other files"):
        write_folder(choose(run, "last"), tmp_path / "mine", adapter=False, name=None)
    (again / "gymexp" / "export.json").write_text('{"run": "another"}')
    with pytest.raises(GymexpError, match="policy has an export of another run"):
        check_target(choose(run, "last"), again)


def test_a_step_without_an_evaluation_says_so(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "result.json").write_text(json.dumps({"step": 3, "stopped": False}))
    write_folder(choose(run, "last"), tmp_path / "policy", adapter=False, name=None)
    assert "No evaluation was played after step 3." in (tmp_path / "policy" / "README.md").read_text()


def test_an_adapter_names_its_base_as_others_find_it(tmp_path):
    from peft import get_peft_model

    from gymexp.policy.lora import build_peft_config

    run = write_run(tmp_path / "run", model=ModelConfig("tiny", str(TINY), lora=LoraConfig(r=4)))
    base = AutoModelForCausalLM.from_pretrained(TINY)
    get_peft_model(base, build_peft_config(LoraConfig(r=4), base)).save_pretrained(run / "adapter")
    write_folder(choose(run, "last"), tmp_path / "policy", adapter=True, name="ann/policy")
    config = json.loads((tmp_path / "policy" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny" and config["r"] == 4
    assert load_file(tmp_path / "policy" / "adapter_model.safetensors").keys()
    assert not (tmp_path / "policy" / "model.safetensors").exists()
    text = (tmp_path / "policy" / "README.md").read_text()
    assert (
        "library_name: peft" in text
        and "--lora-modules trained=ann/policy" in text
        and "has the adapter alone" in text
    )


@pytest.mark.parametrize(
    ("wanted", "message"),
    [("7", r"whole checkpoint \(4\), got '7'"), ("newest", "must be last, best, or the step")],
)
def test_a_checkpoint_that_is_not_there_is_named_with_what_there_is(run, wanted, message):
    assert choose(run, "best").step == 4
    with pytest.raises(GymexpError, match=message):
        choose(run, wanted)


def test_a_run_without_weights_and_a_folder_that_is_no_run_are_named(tmp_path):
    run = write_run(tmp_path / "run")
    shutil.rmtree(run / "model")
    with pytest.raises(GymexpError, match="neither a whole checkpoint nor a final model yet"):
        choose(run, "last")
    with pytest.raises(GymexpError, match=r"has no config\.yaml"):
        choose(tmp_path, "last")


def command(*arguments: object, code: int = 0, **environ: str) -> str:
    words = [sys.executable, "-m", "gymexp.export", *map(str, arguments)]
    env = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_TOKEN_PATH")} | environ
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=env, timeout=120, check=False)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def test_the_command_lists_the_files_and_their_sizes(run, tmp_path):
    text = command(run, "--to", tmp_path / "policy")
    assert re.search(r"\d\.\d{3} MB  model\.safetensors", text) and "step 4, in" in text
    assert (tmp_path / "policy" / "README.md").exists()


def test_a_push_without_a_login_is_refused_before_anything_is_written(run, tmp_path):
    text = command(
        run, "--to", tmp_path / "policy", "--push", "ann/policy", code=1, HF_HOME=str(tmp_path / "hf")
    )
    assert text.startswith("error: --push needs a token that may write to the hub, and none was found: ")
    assert text.count("\n") == 1
    assert not (tmp_path / "policy").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "say what to export"),
        (["--to", "x", "--public"], "--public needs --push"),
        (["--inspect", "x.eval", "--adapter"], "need --to DIR"),
        (["--to", "x", "--limit", "3"], "need --inspect"),
        (["--inspect", "x.json"], "ends in .eval"),
    ],
)
def test_an_argument_without_an_effect_is_refused(arguments, text, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["export", "run", *arguments])
    with pytest.raises(SystemExit):
        main()
    assert text in capsys.readouterr().err
