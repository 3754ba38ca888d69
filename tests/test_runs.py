"""Whole runs as a user starts them: real NeMo Gym, real TRL, the tiny policy, and what may happen to them.

Two undisturbed runs at once are what most tests look at; the other runs are interrupted, attacked or killed.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from whole_run import BATCH, OVERRIDES, PATIENCE_S, ROOT, SIZES, STEPS, TINY, UNEVALUATED, Run

from gymexp.files import read_lines
from gymexp.rollout.outcome import outcome_from_json
from gymexp.rollout.rollout_files import read_index, read_outcome, read_train_index, read_trained
from gymexp.rollout.tokens import flatten
from gymexp.sweep.sweep_reader import read_sweep
from gymexp.training import checkpoints

SPANS = ("rollout", "sync", "logprobs", "update", "evaluation", "checkpoint", "save")

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]


@pytest.fixture(scope="module")
def pair(folder: Path, gym_python: Path) -> Iterator[tuple[Run, Run]]:
    """Two runs of the same configuration, started at the same moment, both ended."""
    kept = ("checkpoint.keep_last=1", "checkpoint.keep_best=1")
    runs = Run(folder / "one", *kept), Run(folder / "two", *kept)
    try:
        for run in runs:
            run.ended()
        yield runs
    finally:
        for run in runs:
            run.kill()


def test_two_runs_at_once_both_succeed_and_leave_no_process(pair):
    for run in pair:
        assert run.process.returncode == 0, run.said
        assert len(run.descendants) >= 10, "host, seven servers, gateway, trainer"
        assert run.left() == []


def test_a_run_prints_held_out_rewards_before_and_after_and_where_it_is(pair):
    run = pair[0]
    assert re.search(
        r"held-out reward +before +after +change\nsudoku +\d\.\d+ +\d\.\d+ +[+-]\d\.\d+\n", run.said
    )
    assert re.search(r"\nworkplace +\d\.\d+ +\d\.\d+ +[+-]\d\.\d+\n", run.said)
    assert run.said.rstrip().endswith(f"run directory: {run.directory}")
    assert "Traceback" not in run.said
    result = json.loads((run.directory / "result.json").read_text())
    assert (result["step"], result["stopped"]) == (STEPS, False)
    assert result["held_out"].keys() == {"sudoku", "workplace"}


def test_metrics_have_every_environment_where_the_time_went_and_no_drift(pair):
    run = pair[0]
    assert run.steps() == list(range(1, STEPS + 1))
    for entry in run.metrics():
        if "loss" in entry:
            assert {"sudoku/reward", "workplace/reward", "workplace/turns", "loss"} <= entry.keys()
            parts = sum(
                entry[f"time/{part}"]
                for part in ("rollout", "sync", "logprobs", "update", "evaluation", "other")
            )
            assert parts == pytest.approx(entry["time/step"])
            assert entry["sudoku/failed"] == entry["workplace/failed"] == 0
            assert entry["workplace/turns"] > 1, "several turns"
    drifts = [entry["drift"] for entry in run.metrics() if "drift" in entry]
    assert drifts and max(drifts) < 1e-3
    events = [json.loads(line) for line in (run.directory / "timeline.jsonl").read_text().splitlines()]
    seconds = {event["event"]: event["seconds"] for event in events if "event" in event}
    assert 0 < seconds["start"] < seconds["first rollout"] < seconds["end"]
    status = json.loads((run.directory / "status.json").read_text())
    assert (status["phase"], status["outcome"], status["step"]) == ("stop", "finished", STEPS)


def test_every_rollout_is_kept_with_its_tokens_and_reads_back(pair):
    run = pair[0]
    names = [f"step-{step:06d}" for step in range(1, STEPS + 1)]
    files = [p.name for p in (run.directory / "rollouts").glob("*.zst")]
    assert sorted(name.split(".")[0] for name in files if ".train." not in name) == [
        "eval-000000",
        "eval-000002",
        f"eval-{STEPS:06d}",
        *names,
    ]
    for name in names:
        records = run.rollouts(name)
        assert len(records) == BATCH
        assert {record["rollout"]["task"]["env"] for record in records} == {"sudoku", "workplace"}
        for record in records:
            assert record["outcome"] in ("completed", "truncated")
            for turn in record["rollout"]["turns"]:
                assert len(turn["completion_ids"]) == len(turn["logprobs"]) > 0
    assert len(run.rollouts("eval-000000")) == 8
    rows = read_index(run.directory / "rollouts")
    assert len(rows) == STEPS * BATCH + 3 * 8
    for row in rows:
        record = read_outcome(run.directory / "rollouts", row)
        assert record["rollout"]["reward"] == row["reward"] and record["rollout"]["seed"] == row["seed"]
        assert 0 < row["seconds"]["policy"] <= row["seconds"]["total"] and row["replica"] and row["began"]
        assert row["env"] == "workplace" or "extracted_answer" in record["rollout"]["verdict"]


def test_what_the_trainer_made_of_the_rollouts_agrees_with_them(pair):
    """The advantages follow from the rewards by GRPO's formula, and the trained tokens are those that the
    policy sampled, with its probabilities."""
    directory = pair[0].directory / "rollouts"
    rows = {(row["file"], row["number"]): row for row in read_index(directory)}
    groups: dict[tuple[str, int], list[tuple[dict, dict]]] = {}
    for trained in read_train_index(directory):
        row = rows[trained["file"], trained["number"]]
        groups.setdefault((row["file"], row["group"]), []).append((row, read_trained(directory, trained)))
        assert trained["ratio_max"] == pytest.approx(1, abs=1e-3)
    assert len(groups) == STEPS * BATCH // 4 and {len(group) for group in groups.values()} == {4}
    for group in groups.values():
        rewards = [row["reward"] for row, _ in group]
        deviation = stdev(rewards) + 1e-4
        expected = [(reward - fmean(rewards)) / deviation for reward in rewards]
        assert [trained["advantage"] for _, trained in group] == pytest.approx(expected, abs=1e-4)
        for row, trained in group:
            of_tokens = [value for value in trained["logprobs"] if value is not None]
            assert trained["trained"] == row["tokens"] == len(of_tokens) and max(of_tokens) <= 0
    assert any(abs(trained["advantage"]) > 0.1 for group in groups.values() for _, trained in group)
    calls = [row for row in rows.values() if row["tool_calls"]]
    assert calls and all(0 <= row["tool_errors"] <= row["tool_calls"] for row in calls)


def test_the_spans_of_each_step_cover_it_and_the_machine_was_watched(pair):
    run = pair[0]
    lines = read_lines(run.directory / "timeline.jsonl")
    spans = sorted((line for line in lines if "span" in line), key=lambda span: span["time"])
    for span, later in pairwise(spans):
        assert span["time"] + span["seconds"] <= later["time"] + 0.005, "one at a time"
    logs = [entry["time"] for entry in run.metrics() if "loss" in entry]
    for began, ended in pairwise(logs):  # from the log entry of a step to that of the next
        parts = [
            min(ended, span["time"] + span["seconds"]) - max(began, span["time"])
            for span in spans
            if span["time"] < ended and span["time"] + span["seconds"] > began
        ]
        assert 0.9 <= sum(parts) / (ended - began) <= 1.01
    of = {name: [span["step"] for span in spans if span["span"] == name] for name in SPANS}
    assert of["evaluation"] == [0, 2, STEPS] and of["checkpoint"] == [2, STEPS] and of["save"] == [STEPS]
    assert sorted(set(of["rollout"])) == [1, 2, 3, 4] == sorted(set(of["update"])) and not of["sync"]
    system = read_lines(run.directory / "system.jsonl")
    assert len(system) >= 2
    for line in system:
        assert {"controller", "gym-host"} <= line["processes"].keys() and line["gpus"] == []
        assert all(use["rss_mb"] > 0 <= use["cpu"] for use in line["processes"].values())
    assert max(line["processes"].get("trainer", {"cpu": 0})["cpu"] for line in system) > 0.1


def test_the_last_and_the_best_checkpoint_stay_and_the_final_weights_are_there(pair):
    for run in pair:
        rewards = {
            entry["step"]: entry["eval_sudoku/reward"] + entry["eval_workplace/reward"]
            for entry in run.metrics()
            if "eval_seconds" in entry and entry["step"]
        }
        best = max(rewards, key=lambda step: (rewards[step], step))
        directory = run.directory / "checkpoints"
        left = {path.name for path in directory.glob("[!R]*")}  # and TRL's README
        assert left == {"best", f"checkpoint-{best}", f"checkpoint-{STEPS}", "run_id"}
        assert os.readlink(directory / "best") == f"checkpoint-{best}"
        assert all(checkpoints.whole(path) for path in directory.glob("checkpoint-*"))
        assert (run.directory / "model" / "model.safetensors").exists()


def test_the_same_configuration_plays_the_same_tasks_and_samples_the_same_first_tokens(pair):
    one, two = pair
    for step in range(1, STEPS + 1):
        assert one.task_keys(step) == two.task_keys(step)
    for name in ("eval-000000", "step-000001"):  # before the first update
        played = [[record["rollout"]["turns"] for record in run.rollouts(name)] for run in pair]
        sampled = [[[turn["completion_ids"] for turn in turns] for turns in one] for one in played]
        assert sampled[0] == sampled[1]


def test_an_evaluation_of_a_run_plays_what_the_runs_own_last_evaluation_did(pair, folder):
    """Reward, tokens and log-probabilities of each rollout: the same tasks, seeds and weights."""
    directory = folder / "again"
    subprocess.run(
        [sys.executable, "-m", "gymexp.evaluate", f"run={pair[0].directory}", f"output_dir='{directory}'"],
        check=True,
        cwd=ROOT,
        timeout=PATIENCE_S,
    )

    def played(run: Path, name: str) -> dict:
        rows = [row for row in read_index(run / "rollouts") if row["file"] == name]
        return {
            row["key"]: tuple(row[k] for k in ("reward", "tokens", "nll", "seed", "text")) for row in rows
        }

    own = played(pair[0].directory, f"eval-{STEPS:06d}")
    assert len(own) == 8 and played(directory, f"eval-{STEPS:06d}") == own


def test_an_adapter_is_trained_goes_on_after_an_interruption_and_ends_in_the_weights(started, gym_python):
    changes = [
        "model.lora.r=4",
        "model.lora.lora_dropout=0.2",
        "trainer.learning_rate=5e-3",
        "trainer.beta=0.05",
    ]
    changes += ["trainer.warmup_steps=0", "trainer.save_steps=1", "rollout.drift_every=1"]
    run = started("lora", *changes, *UNEVALUATED)
    run.wait_for_step(1)
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.ended() == 128 + signal.SIGTERM, run.said
    middle = checkpoints.latest(run.directory / "checkpoints")
    assert middle is not None and (middle / "optimizer.pt").exists()
    assert (middle / "adapter_model.safetensors").exists() and not (middle / "model.safetensors").exists()

    again = started("lora", resume=True)
    assert again.ended() == 0, again.said
    assert run.steps() == list(range(1, STEPS + 1))
    drifts = [entry["drift"] for entry in run.metrics() if "drift" in entry]
    assert len(drifts) == STEPS and max(drifts) <= 1e-5, drifts
    distances = [entry["kl"] for entry in run.metrics() if "loss" in entry]
    assert distances[0] == pytest.approx(0, abs=1e-7) and min(distances[1:]) > 1e-7, (
        "from the model without adapter"
    )

    # Before the first update, the reference model is the policy; the trainer's numbers are the engine's.
    directory = run.directory / "rollouts"
    trained = read_train_index(directory)
    assert [row["number"] for row in trained] == list(range(BATCH)) * STEPS, "repeated steps replace theirs"
    for row, record in zip(trained, run.rollouts("step-000001"), strict=False):
        _, _, mask, logprobs = flatten(outcome_from_json(record).rollout.turns)
        own = read_trained(directory, row)["ref_logprobs"]
        assert [value is not None for value in own] == [bool(flag) for flag in mask]
        pairs = zip(own, logprobs, mask, strict=True)
        assert max(abs(a - b) for a, b, flag in pairs if flag) < 1e-3

    # The first rollouts after the interruption were sampled with the checkpoint's adapter.
    record = run.rollouts(f"step-{checkpoints.step_of(middle) + 1:06d}")[0]
    turn = record["rollout"]["turns"][0]
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    before = logprobs_of(base, turn)
    resumed = logprobs_of(PeftModel.from_pretrained(base, middle), turn)
    assert resumed == pytest.approx(turn["logprobs"], abs=1e-4)
    assert before != pytest.approx(turn["logprobs"], abs=1e-2)

    model = AutoModelForCausalLM.from_pretrained(run.directory / "model", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, run.directory / "adapter")
    last = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    last = PeftModel.from_pretrained(last, run.directory / "checkpoints" / f"checkpoint-{STEPS}")
    for one in (adapted, last):
        assert logprobs_of(model, turn) == pytest.approx(logprobs_of(one, turn), abs=1e-4)
    assert logprobs_of(model, turn) != pytest.approx(resumed, abs=1e-2), "trained on after the interruption"
    optimizer = torch.load(run.directory / "checkpoints" / f"checkpoint-{STEPS}" / "optimizer.pt")["state"]
    assert {int(state["step"]) for state in optimizer.values()} == {STEPS}, (
        "it went on, and did not begin again"
    )
    assert len(optimizer) == sum("lora_" in name for name, _ in last.named_parameters())


def logprobs_of(model, turn: dict) -> list[float]:
    """A model's log-probabilities of a turn's completion."""
    ids = torch.tensor([turn["prompt_ids"] + turn["completion_ids"]])
    with torch.no_grad():
        logits = model.eval()(ids).logits[0, len(turn["prompt_ids"]) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, ids[0, len(turn["prompt_ids"]) :, None])[:, 0].tolist()


def test_a_policy_that_answers_nonsense_trains_on_without_a_failure(started, folder):
    config = AutoConfig.from_pretrained(TINY)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "nonsense")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder / "nonsense")
    run = started("random", f"model.path='{folder / 'nonsense'}'", "trainer.max_steps=1", *UNEVALUATED)
    assert run.ended() == 0, run.said
    entry = next(entry for entry in run.metrics() if "loss" in entry)
    assert entry["sudoku/failed"] == entry["workplace/failed"] == 0
    assert entry["workplace/success"] == 0
    texts = [json.dumps(record["rollout"]["items"]) for record in run.rollouts("step-000001")]
    assert len(set(texts)) == BATCH, "noise, each another"


def test_a_cold_start_from_scratch_writes_a_policy_that_transformers_loads(gym_python, folder):
    output = folder / "cold"
    envs = ("sudoku", "workplace")
    data = [f"env.{env}.data.{split}={size}" for env in envs for split, size in SIZES.items()]
    changes = ["env=[sudoku,workplace]", "env.workplace.data.source=generate", "from_scratch=true"]
    changes += ["shape.hidden_size=64", "shape.num_hidden_layers=2", "sft.max_steps=2"]
    done = subprocess.run(
        [sys.executable, "-m", "gymexp.coldstart", *changes, *data, f"output='{output}'"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert model.config.hidden_size == 64 and model.config.vocab_size == len(tokenizer)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert "hello" in asked


def test_a_sweep_runs_its_points_one_after_the_other_and_goes_on_after_an_interruption(folder, gym_python):
    sweep = folder / "sweep"
    overrides = [f"hydra.sweep.dir='{sweep}'", *OVERRIDES, *UNEVALUATED, "seed=0,1", "trainer.max_steps=1"]
    command = [sys.executable, "-m", "gymexp.train", "-m", *overrides]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        until = time.monotonic() + PATIENCE_S
        while not (sweep / "0" / "services.json").exists() and time.monotonic() < until:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=PATIENCE_S)[1]
    assert process.returncode == 130, said
    assert "error: ended by SIGINT in job 0 (seed=0), 1 of 2; go on with: python -m gymexp.sweep" in said
    assert [job.run.state for job in read_sweep(sweep).jobs] == ["stopped", "stopped"]

    again = [sys.executable, "-m", "gymexp.sweep", "resubmit", str(sweep)]
    shown = subprocess.run(again, capture_output=True, text=True, cwd=folder, timeout=PATIENCE_S, check=False)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert [job.run.state for job in read_sweep(sweep).jobs] == ["finished", "finished"]
    for number in (0, 1):
        result = json.loads((sweep / str(number) / "result.json").read_text())
        assert (result["step"], result["stopped"]) == (1, False)
        assert f"seed: {number}\n" in (sweep / str(number) / "config.yaml").read_text()
        assert (sweep / str(number) / "code").resolve() == sweep / "code"


def test_a_mistake_in_one_point_of_a_sweep_is_answered_before_the_first_and_nothing_stays(tmp_path):
    command = [sys.executable, "-m", "gymexp.train", "-m", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    command.append("trainer.learning_rate=1e-4,fast")
    shown = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE_S, check=False)
    assert shown.returncode == 1
    assert shown.stderr.endswith(
        "error: nothing was started: 1 of 2 jobs are wrong\n"
        "job 1 (trainer.learning_rate=fast):\ntrainer.learning_rate must be of type float, got 'fast'\n"
    )
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("key", ["hydra.run.dir", "output_dir", "resume"])
def test_a_sweep_that_is_told_where_one_run_should_lie_says_what_to_say_instead(tmp_path, key):
    command = [sys.executable, "-m", "gymexp.train", "-m", f"{key}={tmp_path / 'run'}", "seed=0,1"]
    command.append(f"hydra.sweep.dir={tmp_path / 'sweep'}")
    shown = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE_S, check=False)
    assert shown.returncode == 1
    assert shown.stderr.count(f"error: {key} ") or f"{key} must not be set in a sweep" in shown.stderr
    assert "hydra.sweep.dir=… " in shown.stderr
    assert not list(tmp_path.iterdir())
