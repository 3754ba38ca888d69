"""The directory of a finished run with a real policy and real rollout files, without the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from whole_run import TINY

from gymexp.config.load import to_yaml
from gymexp.config.schema import DataConfig, EnvConfig, ModelConfig, RunConfig
from gymexp.rollout.outcome import Completed, Failed, Rollout, Task, Truncated, Turn
from gymexp.rollout.rollout_files import RolloutWriter

EVIL = "\x1b]52;c;ZXZpbA==\x07\u202e<script>alert(1)</script>\x00\\href{javascript:alert(1)}"
TASKS = 12
CALL = {"type": "function_call", "call_id": "c1", "name": "look_up", "arguments": '{"who": "Ann"}'}
BROKEN = {"type": "function_call", "call_id": "c2", "name": "look_up", "arguments": "{who"}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": f"no such person {EVIL}"}
DONE = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": f"Done. {EVIL}"}]}


def task(split: str, number: int) -> Task:
    return Task(f"office/{split}/{number}", "office", "office_agent", {})


def played(split: str, number: int, reward: float) -> Rollout:
    items = [{"type": "reasoning", "summary": [{"text": "hm"}]}, CALL, BROKEN, OUTPUT, DONE]
    turns = [Turn([1, 2, 3], [4, 5], [-0.5, -1.5])]
    verdict = {"judge": {"ok": reward == 1.0}, "note": EVIL}
    return Rollout(task(split, number), turns, reward, items, verdict=verdict, began=1.8e9)


def write_run(run: Path, **changes: object) -> Path:
    """Held-out rewards: 0.25 before training; after step 4 0.5 or 1 in turn, but task 0 failed."""
    (run / "data").mkdir(parents=True)
    data = DataConfig("huggingface", repo_id="lab/office", train_file="t", validation_file="v", revision="v2")
    env = EnvConfig("/home/ann/gym/office.yaml", "office_agent", max_output_tokens=77, data=data)
    trainer = {"loss_type": "dr_grpo", "temperature": 0.7, "top_k": 9}
    config = RunConfig(
        "demo", model=ModelConfig("tiny", str(TINY), dtype="float32"), env={"office": env}, trainer=trainer
    )
    for name, value in changes.items():
        setattr(config, name, value)
    (run / "config.yaml").write_text(to_yaml(config))
    overrides = [
        "env=[office]",
        "env.office.config_path=/home/ann/gym/office.yaml",
        "output_dir=/home/ann/out",
    ]
    (run / "overrides.yaml").write_text("".join(f"- {o}\n" for o in overrides))
    (run / "versions.txt").write_text("gymexp 0.1.0\ntorch 2.13.0+cpu\n")
    shutil.copytree(TINY, run / "model")
    (run / "model" / "README.md").write_text("not of the model")
    (run / "result.json").write_text(json.dumps({"step": 4, "stopped": False}))
    (run / "status.json").write_text(json.dumps({"host": "node17", "ended": "finished"}))
    (run / "timeline.jsonl").write_text(json.dumps({"time": 1.8e9, "event": "start"}) + "\n")
    metrics = [
        {"step": s, "time": 1.8e9 + 60 * s, "office/reward": s / 4, "office/rollouts": 8} for s in range(1, 5)
    ]
    metrics.append({"step": 4, "time": 1.8e9 + 300, "eval_office/reward": 0.7, "eval_office/rollouts": 12})
    (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in metrics))
    rows = [
        {"key": f"office/{split}/{n}", "row": {"responses_create_params": {"input": f"Look {n} up {EVIL}"}}}
        for split in ("train", "validation")
        for n in range(TASKS)
    ]
    for split in ("train", "validation"):
        lines = (json.dumps(row) + "\n" for row in rows if f"/{split}/" in row["key"])
        (run / "data" / f"{split}.jsonl").write_text("".join(lines))
    mix = {"envs": {"office": {"in_epoch": 12, "validation_tasks": 12, "train_sha256": "ab" * 32}}}
    (run / "data" / "mix.json").write_text(json.dumps(mix))
    writer = RolloutWriter(run / "rollouts", config.env)
    writer.write("eval-000000", [Completed(played("validation", n, 0.25)) for n in range(TASKS)], 4)
    for step in (3, 4):
        outcomes = [Completed(played("train", n // 4, 1.0)) for n in range(7)]
        writer.write(f"step-{step:06d}", [*outcomes, Truncated(played("train", 1, 0.0), "length")], 4)
    after = [Completed(played("validation", n, 1.0 if n % 2 else 0.5)) for n in range(1, TASKS)]
    writer.write("eval-000004", [Failed(task("validation", 0), "timeout", f"slow {EVIL}"), *after], 4)
    return run
