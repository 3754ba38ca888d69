"""A secret is refused where a run would write it down, and blackened in a text of others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gymexp.config.redaction import in_override, redacted, secrets_at, without_secrets
from gymexp.config.rules import problems_of
from gymexp.config.schema import EngineConfig, EnvConfig, LauncherConfig, ModelConfig, RunConfig

ROOT = Path(__file__).parent.parent.parent
TOKEN = "hf_" + "aB3" * 10


def test_a_configuration_for_others_has_no_secret(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_KEY", "canary-0123")
    config = {
        "api_key": "x",
        "setup": ["module load cuda", "export WANDB_API_KEY=0123456789abcdef"],
        "url": "https://me:hunter2@example.org/x",
        "note": "see canary-0123",
        "max_steps": 3,
        "path": None,
    }
    assert redacted(config) == {
        "api_key": "***",
        "setup": ["module load cuda", "***"],
        "url": "***",
        "note": "see ***",
        "max_steps": 3,
        "path": None,
    }


@pytest.mark.parametrize(
    "held",
    [
        {"hub_token": "abc"},
        {"api_key": "x"},
        {"env": [{"OPENAI_API_KEY": "x"}]},
        {"db_password": "x"},
        {"url": "https://me:hunter2@example.org/x"},
        {"setup": ["export WANDB_API_KEY=0123456789abcdef"]},
        {"headers": "Authorization: Bearer abcdefghijklmnop1234"},
        {"anything": f"--x {TOKEN}"},
        {"a": "sk-proj-" + "x" * 24},
        {"a": "AKIAABCDEFGHIJKLMNOP"},
    ],
    ids=str,
)
def test_names_and_looks_of_secrets_are_known(held):
    assert list(secrets_at("", held)) != []
    [(key, value)] = held.items()
    if isinstance(value, str):
        assert in_override(f"++{key}={value}") == key


@pytest.mark.parametrize(
    "held",
    [
        {"eos_token": "<|im_end|>", "pad_token_id": 0, "max_tokens": 5, "num_input_tokens": "12"},
        {"return_token_id_information": True, "token_truncate": "token_truncate", "tokenizer": "x"},
        {"setup": ["module load cuda", "export WANDB_API_KEY=$(cat ~/.key)", "export HF_TOKEN=$MINE"]},
        {"url": "http://127.0.0.1:8000/v1", "key": "trainer.seed", "path": "/a:b@c", "api_key": ""},
    ],
    ids=str,
)
def test_other_words_are_no_secrets(held):
    assert list(secrets_at("", held)) == []


def test_a_configuration_with_a_secret_is_refused_by_its_key_and_the_secret_is_not_shown():
    engine = EngineConfig(args={"api_key": "abcd1234"})
    launcher = LauncherConfig(setup=[f"export HF_TOKEN={TOKEN}"])
    config = RunConfig(
        "n", model=ModelConfig("m", "p"), env={"e": EnvConfig("c", "a")}, engine=engine, launcher=launcher
    )
    said = list(problems_of(config))
    assert [text.split(" must hold no secret")[0] for text in said] == [
        "engine.args.api_key",
        "launcher.setup[0]",
    ]
    assert not any("abcd1234" in text or TOKEN in text for text in said)


def test_no_option_that_ships_looks_like_a_secret():
    from omegaconf import OmegaConf

    for path in [*(ROOT / "conf").rglob("*.yaml"), *(ROOT / "sweeps").rglob("*.yaml")]:
        assert list(secrets_at("", OmegaConf.to_container(OmegaConf.load(path), resolve=False))) == [], path


def test_a_command_line_with_a_secret_starts_nothing_and_writes_nothing(tmp_path):
    for override in (
        f"+trainer.hub_token={TOKEN}",
        f"hydra.job.env_set.HF_TOKEN={TOKEN}",
        f"hydra.launcher.setup=['export X_API_KEY={TOKEN}']",
        "engine.urls=['http://me:hunter2@127.0.0.1:1']",
    ):
        done = subprocess.run(
            [sys.executable, "-m", "gymexp.train", "-m", "seed=1,2", override],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        )
        assert done.returncode == 1
        assert f"error: {override.lstrip('+').partition('=')[0].split('[')[0]}" in done.stderr
        assert "must hold no secret" in done.stderr and "Traceback" not in done.stderr
        assert TOKEN not in done.stdout + done.stderr and "hunter2" not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


DIFF = f"""\
+WANDB = "CANARY-wandb-value"
+key = "sk-{"y" * 30}"
+os.environ["HF_TOKEN"] = "{TOKEN}"
+remote = https://me:hunter2@example.org/repo.git
+password: 'correct horse'
+api_key = os.environ["KEY"]
 max_tokens = 512
"""


def test_a_diff_keeps_its_lines_without_their_secrets():
    said = without_secrets(
        DIFF, {"WANDB_API_KEY": "CANARY-wandb-value", "SHORT_KEY": "max", "HOME": "remote"}
    )
    assert (
        said
        == """\
+WANDB = "***"
+key = "***"
+os.environ["HF_TOKEN"] = "***"
+remote = https://me:***@example.org/repo.git
+password: '***
+api_key = os.environ["KEY"]
 max_tokens = 512
"""
    )
