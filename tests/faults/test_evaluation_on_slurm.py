"""An evaluation as a job of a real Slurm: submitted from a login node, interrupted, and gone on with."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from slurm_sweeps import said_by
from whole_run import NO_WAY_OUT, PATIENCE_S, ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
PLAYED = [
    "env=[sudoku]",
    "model=tiny",
    "engine=hf",
    *(f"env.sudoku.data.{split}_size={size}" for split, size in (("train", 16), ("validation", 8))),
    "evaluation.samples=12",
    # One rollout at a time: in a batch of others a draw may change.
    "engine.max_batch_size=1",
    "env.sudoku.max_concurrency=1",
]


def test_an_evaluation_whose_job_is_preempted_writes_what_an_undisturbed_one_writes(
    submitted, gym_python, folder, fault
):
    job = submitted(*PLAYED, "launcher.mem=4G", "launcher.time=30", command="evaluate", multirun=False)
    directory = job.sweep / "0"
    landed = directory / "landing" / "eval-000000.jsonl.zst"
    job.wait_for(lambda: landed.exists() and landed.stat().st_size, "the first rollouts")
    blow = fault("An evaluation's job is preempted")
    said_by("scancel", "--signal=USR2", *job.ids())  # what Slurm sends before a time limit
    job.wait_for(lambda: job.read(0, "status.json").get("ended") == "requeued", "its requeueing")
    assert not (directory / "results.json").exists() and landed.stat().st_size
    alone = folder / "undisturbed"
    subprocess.run(
        [sys.executable, "-m", "gymexp.evaluate", *PLAYED, f"output_dir='{alone}'"],
        check=True,
        cwd=ROOT,
        env=os.environ | NO_WAY_OUT,
        timeout=PATIENCE_S,
        stdout=subprocess.DEVNULL,
    )
    job.wait_for(lambda: job.read(0, "status.json").get("restarts") == 1, "its second start")
    blow.over()
    assert job.ended() == 0, job.said
    assert "Traceback" not in job.said + job.log(0)
    assert re.search(r"\nsudoku +8 +12 +96/96 +0 +0\.\d{3} +\[", job.said), "the table, at the login node"
    assert job.said.rstrip().endswith(f"evaluation directory: {directory}")
    assert re.search(
        r"tiny: \d+ rollouts are scored already", (directory / "logs" / "evaluator.log").read_text()
    )
    for name in ("results.json", "results.csv", "results.txt"):
        assert (directory / name).read_bytes() == (alone / name).read_bytes()
    said = said_by(sys.executable, "-m", "gymexp.status", str(job.sweep))
    assert re.search(r"\n0 +finished ", said), said
    said = said_by(sys.executable, "-m", "gymexp.sweep", "resubmit", str(job.sweep))
    assert "nothing to submit again" in said
