"""Whole evaluations as a user starts them: real NeMo Gym, the tiny policy, an endpoint on loopback."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from aiohttp import web
from loopback import serving
from sharded_ranks import ZERO_3, train, with_deepspeed
from whole_run import NO_WAY_OUT, PATIENCE_S, ROOT, TINY

from gymexp.config.load import from_yaml, to_yaml
from gymexp.rollout.rollout_files import read_index
from gymexp.training import checkpoints

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(600),
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]
KEY = "a-key-of-somebody-elses-7c1d"
BASE = [
    "env=[sudoku]",
    "model=tiny",
    "engine=hf",
    *(f"env.sudoku.data.{split}_size={size}" for split, size in (("train", 16), ("validation", 8))),
]
# One rollout at a time: in a batch of others its log-probabilities differ in their last digits, which may
# change a draw. It also leaves time to interrupt an evaluation.
ONE_BY_ONE = ["engine.max_batch_size=1", "env.sudoku.max_concurrency=1"]
GRID = "1 2 3 4\n3 4 1 2\n2 1 4 3\n4 3 2 1"


def command(*overrides: str) -> list[str]:
    return [sys.executable, "-m", "gymexp.evaluate", *overrides]


def evaluate(*overrides: str, code: int = 0, **env: str) -> str:
    """What the command printed."""
    done = subprocess.run(
        command(*overrides),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        cwd=ROOT,
        env=os.environ | NO_WAY_OUT | env,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def base(folder: Path, gym_python: Path) -> tuple[Path, str]:
    """An undisturbed evaluation of the tiny policy, eight samples of eight tasks, and what it printed."""
    directory = folder / "evaluated"
    return directory, evaluate(*BASE, *ONE_BY_ONE, "evaluation.samples=8", f"output_dir='{directory}'")


def results(directory: Path) -> dict:
    return json.loads((directory / "results.json").read_text())


def test_an_evaluation_prints_a_table_and_writes_its_results_and_a_line_a_task(base):
    directory, said = base
    assert re.search(r"environment +tasks +k +scored +failed +reward +95 % CI", said)
    assert re.search(r"\nsudoku +8 +8 +64/64 +0 +0\.\d{3} +\[", said)
    assert said.rstrip().endswith(f"evaluation directory: {directory}")
    found = results(directory)
    [policy] = found["policies"]
    rows = read_index(directory / "rollouts")
    assert policy["envs"]["sudoku"]["scored"] == len(rows) == 64
    mean = sum(row["reward"] for row in rows) / 64
    assert policy["envs"]["sudoku"]["reward"]["mean"] == pytest.approx(mean)
    lines = list(csv.DictReader((directory / "results.csv").open()))
    assert len(lines) == 8 and {line["n"] for line in lines} == {"8"}
    assert not (directory / "landing").exists()
    assert str(directory) not in (directory / "results.json").read_text()
    status = json.loads((directory / "status.json").read_text())
    assert (status["ended"], status["phase"]) == ("finished", "stop")


def killed_half_way(directory: Path) -> list[psutil.Process]:
    """Kills an evaluation like `base` once some of its rollouts are kept. Returns its processes. Begins again
    if it ended first: all are kept in two batches, which lie close together on a fast machine."""
    landed = directory / "landing" / "eval-000000.jsonl.zst"
    for _ in range(4):
        shutil.rmtree(directory, ignore_errors=True)
        began = subprocess.Popen(
            command(*BASE, *ONE_BY_ONE, "evaluation.samples=8", f"output_dir='{directory}'"),
            stdout=subprocess.DEVNULL,
            cwd=ROOT,
            env=os.environ | NO_WAY_OUT,
        )
        try:
            until = time.monotonic() + PATIENCE_S
            while began.poll() is None and time.monotonic() < until:
                if landed.exists() and landed.stat().st_size:
                    return psutil.Process(began.pid).children(recursive=True)
                time.sleep(0.002)
        finally:
            began.kill()
            began.wait()
    raise AssertionError("each evaluation ended before it could be killed")


def test_one_that_is_killed_half_way_and_resumed_writes_the_same_bytes(base, folder):
    directory = folder / "killed"
    children = killed_half_way(directory)
    landed = directory / "landing" / "eval-000000.jsonl.zst"
    assert landed.exists() and not (directory / "results.json").exists()
    psutil.wait_procs(children, timeout=30)
    said = evaluate(f"resume={directory}")
    log = (directory / "logs" / "evaluator.log").read_text()
    assert re.search(r"tiny: \d+ rollouts are scored already", log), said
    assert (directory / "results.json").read_bytes() == (base[0] / "results.json").read_bytes()
    assert (directory / "results.csv").read_bytes() == (base[0] / "results.csv").read_bytes()
    said = evaluate(f"resume={directory}", "seed=3", code=1)
    assert "resume stands alone, got also seed" in said


def test_a_checkpoint_that_changed_since_an_evaluation_began_is_not_mixed_into_it(base, folder):
    """Names what differs, before anything starts."""
    directory = folder / "changed"
    shutil.copytree(base[0], directory)
    plan = json.loads((directory / "evaluation.json").read_text())
    plan["fingerprint"]["policy tiny"] = "of other weights"
    (directory / "evaluation.json").write_text(json.dumps(plan))
    assert "policy tiny changed" in evaluate(f"resume={directory}", code=1)


@pytest.fixture(scope="module")
def trained(base, folder: Path) -> Path:
    """A run of the same tasks with a whole checkpoint, as training leaves it; its weights are the tiny
    policy's, with an output head that prefers other tokens."""
    from safetensors.torch import load_file, save_file

    run = folder / "trained"
    config = from_yaml(base[0] / "config.yaml")
    config.model.path, config.trainer = str(TINY), {"temperature": 0.7}
    config.evaluation.temperature = None  # as in training
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(config))
    shutil.copytree(base[0] / "data", run / "data")
    checkpoint = run / "checkpoints" / "checkpoint-2"
    shutil.copytree(TINY, checkpoint)
    weights = load_file(checkpoint / "model.safetensors")
    save_file(
        {k: v * 1.1 if "norm" in k else v for k, v in weights.items()}, checkpoint / "model.safetensors"
    )
    checkpoints.seal(checkpoint)
    return run


@pytest.mark.ranks
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "trainer", [{"fsdp": True}, pytest.param(ZERO_3, marks=with_deepspeed)], ids=["fsdp", "zero3"]
)
def test_shards_that_two_ranks_saved_are_played_with_the_weights_that_the_engine_would_get(
    base, folder, trainer
):
    from safetensors.torch import load_file

    run = folder / "shards" / next(iter(trainer))
    train(run, 1, trainer)
    checkpoint = run / "checkpoints" / "checkpoint-1"
    assert not (checkpoint / "model.safetensors").exists()
    config = from_yaml(base[0] / "config.yaml")
    config.model.path = str(TINY)
    (run / "config.yaml").write_text(to_yaml(config))
    shutil.copytree(base[0] / "data", run / "data")
    of_run, elsewhere = run / "evaluated", run / "elsewhere"
    said = evaluate(f"checkpoint={checkpoint}", f"output_dir='{of_run}'")
    assert "step 1: making a whole model of its checkpoint" in said
    assert re.search(r"\nsudoku +8 +1 +8/8 ", said)
    evaluate(f"checkpoint={checkpoint}", *BASE[:1], *BASE[3:], f"output_dir='{elsewhere}'")
    sent = load_file(run / "sent-1.safetensors")
    before = load_file(run / "sent-0.safetensors")
    assert any((sent[name] != before[name]).any() for name in sent), "a step changes the weights"
    for directory in (of_run, elsewhere):
        [policy] = json.loads((directory / "evaluation.json").read_text())["policies"]
        played = load_file(Path(policy["directory"]) / "model.safetensors")
        assert played.keys() <= sent.keys() and len(played) > 60
        assert all((played[name] == sent[name]).all() for name in played)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """An OpenAI-compatible server that wants a key, refuses the third request for a while, and repeats the
    key in its answers."""
    asked: list[web.Request] = []

    async def chat(request: web.Request) -> web.Response:
        asked.append(request)
        key = request.headers.get("Authorization", "")
        if key != f"Bearer {KEY}":
            return web.json_response({"error": {"message": f"no key but {key}"}}, status=401)
        if len(asked) == 3:
            error = {"error": {"message": f"slowly, {key}"}}
            return web.json_response(error, status=429, headers={"Retry-After": "1"})
        message = {"role": "assistant", "content": f"{GRID} {key}" if len(asked) % 2 else GRID}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        return web.json_response(
            {"choices": [choice], "usage": {"prompt_tokens": 70, "completion_tokens": 31}}
        )

    app = web.Application()
    app.add_routes([web.post("/v1/chat/completions", chat)])
    with serving(app) as url:
        yield f"{url}/v1"


def test_a_model_a_checkpoint_and_an_endpoint_are_compared_in_one_table(base, trained, endpoint, folder):
    url = endpoint
    checkpoint = trained / "checkpoints" / "checkpoint-2"
    of_run, of_endpoint = folder / "of_checkpoint", folder / "of_endpoint"
    evaluate(f"checkpoint={checkpoint}", f"output_dir='{of_run}'", "evaluation.samples=8")
    found = results(of_run)
    assert found["policies"][0]["label"] == "step 2" and found["sampling"]["temperature"] == 0.7

    there = [
        *BASE[:1],
        *BASE[3:],
        f"endpoint.url={url}",
        "endpoint.model=big/one",
        "endpoint.key_env=THEIR_KEY",
    ]
    said = evaluate(*there, f"output_dir='{of_endpoint}'", code=1)
    assert "endpoint.key_env=THEIR_KEY must name an environment variable that is set" in said
    process = subprocess.Popen(
        command(*there, f"output_dir='{of_endpoint}'"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | NO_WAY_OUT | {"THEIR_KEY": KEY},
    )
    seen = ""
    while process.poll() is None:  # every command line that it has while it goes on
        for child in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            try:
                seen += " ".join(child.cmdline())
            except psutil.Error:
                continue
        time.sleep(0.2)
    said = process.stdout.read() if process.stdout else ""
    assert process.returncode == 0, said
    assert "gymexp.gateway.text_gateway" in seen and KEY not in seen and KEY not in said
    for path in (p for p in of_endpoint.rglob("*") if p.is_file()):
        assert KEY.encode() not in path.read_bytes(), path
    assert not [row for row in read_index(of_endpoint / "rollouts") if row["tokens"] != 31]

    said = evaluate(f"compare=['{base[0]}','{of_run}','{of_endpoint}']")
    assert re.search(r"with a space/of_checkpoint +sudoku +8 +0\.\d{3} +0\.\d{3} +[+-]0\.\d{3} +\[", said)
    assert re.search(r"with a space/of_endpoint +sudoku +8 ", said)


def test_the_probe_names_what_the_grader_pays_for_each_reply(folder, gym_python):
    directory = folder / "probed"
    said = evaluate(BASE[0], *BASE[3:], "policy=probe", "evaluation.num_tasks=2", f"output_dir='{directory}'")
    rows = re.findall(r"\nprobe: (\w+) +sudoku +2 +1 +2/2 +0 +(\d\.\d{3})", said)
    assert [name for name, _ in rows] == ["empty", "prompt", "yes", "refusal", "digits"]
    assert all(float(reward) < 0.1 for _, reward in rows) and "finding" not in said, "a strict grader"


def test_several_evaluations_are_made_by_one_command(folder, gym_python):
    sweep = folder / "several"
    probes = [*BASE[3:], "policy=probe", "env=[sudoku]", f"hydra.sweep.dir='{sweep}'"]
    said = evaluate("-m", *probes, "evaluation.num_tasks=1,2")
    assert (
        "job 0 (evaluation.num_tasks=1), 1 of 2" in said and "job 1 (evaluation.num_tasks=2), 2 of 2" in said
    )
    for job, num_tasks in (("0", 1), ("1", 2)):
        assert (
            len(re.findall(rf"\nprobe: \w+ +sudoku +{num_tasks} +1 +{num_tasks}/{num_tasks} +0 ", said)) == 5
        )
        assert f"evaluation directory: {sweep / job}" in said
        assert results(sweep / job)["tasks"] == num_tasks
    status = subprocess.run(
        [sys.executable, "-m", "gymexp.status", sweep], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert len(re.findall(r"\n[01] +finished ", status)) == 2, status


def test_ctrl_c_keeps_what_was_scored_and_says_how_to_go_on(folder, gym_python):
    directory = folder / "interrupted"
    slow = [*BASE, "evaluation.samples=40", "engine.max_batch_size=1", f"output_dir='{directory}'"]
    with (folder / "interrupted.txt").open("w+") as out:
        process = subprocess.Popen(
            command(*slow),
            stdout=out,
            stderr=out,
            cwd=ROOT,
            env=os.environ | NO_WAY_OUT,
            start_new_session=True,
        )
        landed, until = directory / "landing" / "eval-000000.jsonl.zst", time.monotonic() + PATIENCE_S
        while not landed.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 128 + signal.SIGINT
        out.seek(0)
        said = out.read()
    assert "ending: keeping what has been scored" in said
    assert f"go on with: python -m gymexp.evaluate 'resume={directory}'" in said
    assert json.loads((directory / "status.json").read_text())["ended"] == "stopped"
