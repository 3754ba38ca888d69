"""A finished run of two environments with all its records, made by the code's own writers.

A reward drops, a task is never solved, a rollout fails, and a limit cuts one off.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gymexp.config.schema import EnvConfig
from gymexp.rollout.outcome import Completed, Failed, Outcome, Rollout, Task, Truncated, Turn
from gymexp.rollout.rollout_files import RolloutWriter
from gymexp.rollout.trained import Trained
from gymexp.training.metrics import group_metrics, rollout_metrics

ENVS = {name: EnvConfig("c", "a", success_reward=1.0) for name in ("sudoku", "workplace")}
STEPS, DROP, GROUP, HELD_OUT = 14, 12, 4, 8
_BEGAN = 1_795_000_000.0
_STEP_S = 10.0
_FAILED_AT, _CUT_AT = 5, 6


def write_asked_run(path: Path, seed: int, gain: float) -> Path:
    """A run of 14 steps. gain: the share of sudoku's held-out tasks that it learns."""
    rng = random.Random(seed)
    (path / "data").mkdir(parents=True)
    (path / "logs").mkdir()
    config = {"name": "asked", "seed": seed, "model": {"path": "gymexp/assets/tiny", "dtype": "float32"}}
    config |= {"trainer": {"learning_rate": 0.0002}, "engine": {"kind": "hf"}}
    config |= {"env": {env: {"success_reward": 1.0, "replicas": 2} for env in ENVS}}
    (path / "config.yaml").write_text(json.dumps(config))
    (path / "overrides.yaml").write_text(f"- seed={seed}\n")
    (path / "logs" / "workplace-1.log").write_text("ready\nERROR the calendar did not answer\n")
    tasks = {
        f"{env}/{split}/{n}"
        for env in ENVS
        for split, num in (("train", 4), ("validation", 8))
        for n in range(num)
    }
    rows = {
        key: {"responses_create_params": {"input": [{"role": "user", "content": f"Solve {key}."}]}}
        for key in tasks
    }
    for split, name in (("train", "train"), ("validation", "validation")):
        lines = [
            json.dumps({"key": key, "row": rows[key]}) + "\n" for key in sorted(rows) if f"/{split}/" in key
        ]
        (path / "data" / f"{name}.jsonl").write_text("".join(lines))
    writer = RolloutWriter(path / "rollouts", ENVS)
    metrics: list[dict[str, Any]] = []
    spans: list[dict[str, Any]] = [{"time": _BEGAN, "seconds": 1.0, "event": "start"}]
    for step in range(STEPS + 1):
        at = _BEGAN + _STEP_S * step
        if step:
            outcomes = _step(step, at, rng)
            writer.write(f"step-{step:06d}", outcomes, GROUP)
            writer.write_trained(f"step-{step:06d}", _trained(outcomes, rng), GROUP)
            metrics.append(_entry(step, at, outcomes, rng))
            spans += [
                {"time": at, "seconds": 7.0, "span": "rollout", "step": step},
                {"time": at + 7, "seconds": 2.5, "span": "update", "step": step},
            ]
        if step in (0, STEPS):
            held_out = _evaluation(step, at, gain, rng)
            writer.write(f"eval-{step:06d}", held_out, 1)
            of_env = {f"eval_{name}": value for name, value in rollout_metrics(held_out, ENVS).items()}
            metrics.append({"step": step, "time": at + 9.9} | of_env)
    spans.append({"time": _BEGAN + _STEP_S * (STEPS + 1), "seconds": 150.0, "event": "end"})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (path / "timeline.jsonl").write_text("".join(json.dumps(line) + "\n" for line in spans))
    (path / "result.json").write_text(json.dumps({"step": STEPS, "stopped": False, "held_out": {}}))
    status = {"ended": "finished", "outcome": "finished", "step": STEPS, "max_steps": STEPS, "pid": 1}
    (path / "status.json").write_text(json.dumps(status))
    return path


def _step(step: int, at: float, rng: random.Random) -> list[Outcome]:
    """Two groups of sudoku, which learns, and three of workplace. Its task 3 is never solved, and the others
    hardly any more from step 12 on."""
    outcomes: list[Outcome] = []
    for number in (step % 4, (step + 1) % 4):
        solved = min(4, step // 4 + rng.randint(0, 1))
        outcomes += [
            Completed(_sudoku(f"sudoku/train/{number}", float(i < solved), at, step, rng))
            for i in range(GROUP)
        ]
    for number in (step % 3, (step + 1) % 3, 3):
        solved = 0 if number == 3 else 3 if step < DROP else int(number == 0)
        key = f"workplace/train/{number}"
        rollouts = [_workplace(key, float(i < solved), at, step, rng) for i in range(GROUP)]
        outcomes += [Completed(rollout) for rollout in rollouts]
    if step == _FAILED_AT:
        task = _task("workplace/train/3")
        outcomes[-1] = Failed(
            task, "timeout", "no answer in 60 s", "logs/workplace-1.log", ["timeout", "timeout"]
        )
    if step == _CUT_AT:
        last = outcomes[-2]
        assert isinstance(last, Completed)
        outcomes[-2] = Truncated(last.rollout, "length")
    return outcomes


def _task(key: str) -> Task:
    return Task(key, key.split("/")[0], "a", {})


def _said(text: str) -> dict[str, Any]:
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}


def _sudoku(key: str, reward: float, at: float, step: int, rng: random.Random) -> Rollout:
    answer = "the solution" if reward else f"answer {rng.randint(0, 2)}"
    turn = Turn([1, 386], [849, 30, 2], [round(-rng.random(), 4) for _ in range(3)])
    return Rollout(
        _task(key), [turn], reward, [_said(answer)], step - 1, {"total": 1.0, "policy": 0.8, "queue": 0.1},
        verdict={"extracted_answer": answer, "score": reward}, began=at + 0.1, seed=rng.randrange(1 << 30),
        replica="sudoku-0",
    )  # fmt: skip


def _workplace(key: str, reward: float, at: float, step: int, rng: random.Random) -> Rollout:
    calls = [
        {"type": "function_call", "name": "calendar", "arguments": '{"day": 3}'},
        {"type": "function_call_output", "output": f"meeting number {rng.randint(100, 999)}"},
        _said("Done." if reward else f"I give up {rng.randint(0, 9)}."),
    ]
    first = Turn([1, 5], [7, 2], [round(-rng.random(), 4) for _ in range(2)])
    second = Turn([1, 5, 7, 2, 30, 31], [9, 8, 2], [round(-rng.random(), 4) for _ in range(3)])
    return Rollout(
        _task(key), [first, second], reward, calls, step - 1, {"total": 6.5, "policy": 1.5, "queue": 0.2},
        verdict={"calls_matched": int(reward), "expected": "meeting"}, began=at + 0.2,
        seed=rng.randrange(1 << 30), replica=f"workplace-{rng.randint(0, 1)}",
    )  # fmt: skip


def _trained(outcomes: Sequence[Outcome], rng: random.Random) -> list[Trained]:
    """Advantages as GRPO's: the reward's distance from its group's mean, in standard deviations."""
    found: list[Trained] = []
    for start in range(0, len(outcomes), GROUP):
        rewards = [
            None if isinstance(o, Failed) else o.rollout.reward for o in outcomes[start : start + GROUP]
        ]
        known = [reward for reward in rewards if reward is not None]
        mean, spread = np.mean(known), np.std(known)
        for outcome, reward in zip(outcomes[start : start + GROUP], rewards, strict=True):
            if isinstance(outcome, Failed):
                found.append(Trained(None, 0))
                continue
            values: list[float] = []
            for number, turn in enumerate(outcome.rollout.turns):
                values += [np.nan, np.nan] if number else []  # what the environment wrote between
                values += [value + rng.uniform(-0.2, 0.2) for value in turn.logprobs]
            engine = [
                v for n, t in enumerate(outcome.rollout.turns) for v in [*[np.nan] * 2 * (n > 0), *t.logprobs]
            ]
            logprobs = np.round(np.array(values, dtype=np.float32), 4)
            ratio = float(np.nanmax(np.exp(logprobs - np.array(engine))))
            advantage = float((reward - mean) / (spread + 1e-4))
            num = sum(len(turn.completion_ids) for turn in outcome.rollout.turns)
            found.append(Trained(advantage, num, ratio, logprobs))
    return found


def _evaluation(step: int, at: float, gain: float, rng: random.Random) -> list[Outcome]:
    outcomes: list[Outcome] = []
    for env, make in (("sudoku", _sudoku), ("workplace", _workplace)):
        for number in range(HELD_OUT):
            solved = number % 4 == 0 or (env == "sudoku" and step > 0 and number < gain * HELD_OUT)
            outcomes.append(Completed(make(f"{env}/validation/{number}", float(solved), at, step + 1, rng)))
    return outcomes


def _entry(step: int, at: float, outcomes: Sequence[Outcome], rng: random.Random) -> dict[str, Any]:
    rewards = [o.rollout.reward for o in outcomes if not isinstance(o, Failed)]
    entry: dict[str, Any] = {"step": step, "time": at + 9.9, "loss": 1e-8, "grad_norm": 0.5}
    entry |= {
        "learning_rate": 2e-4,
        "reward": float(np.mean(rewards)),
        "entropy": round(0.9 - 0.05 * step, 3),
    }
    entry |= {"time/step": 9.9, "time/rollout": 7.0, "time/update": 2.5, "time/sync": 0.1, "time/other": 0.3}
    entry |= {"sampling/ratio_max": round(1.1 + 0.1 * rng.random(), 4)}
    entry |= {"drift": 2e-6, "sudoku/drift": 1e-6, "workplace/drift": round(2e-6 + 1e-7 * step, 9)}
    return entry | rollout_metrics(outcomes, ENVS) | group_metrics(outcomes, GROUP, ENVS)
