"""What `launcher=slurm` submits to a real Slurm, and what it refuses to."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slurm


def test_a_mistake_in_one_job_submits_none_and_leaves_nothing(submitted):
    sweep = submitted("trainer.learning_rate=1e-4,fast,2e-4", "trainer.num_generations=2,3")
    assert sweep.ended() == 1
    assert "error: nothing was started: 4 of 6 jobs are wrong\n" in sweep.said
    wrong = "trainer.num_generations=3 must divide the generation batch of 8 rollouts"
    assert (
        f"job 3 (trainer.num_generations=3 trainer.learning_rate=0.0001) and 2 more:\n{wrong}" in sweep.said
    )
    wrong = "trainer.learning_rate must be of type float, got 'fast'"
    assert f"job 1 (trainer.num_generations=2 trainer.learning_rate=fast):\n{wrong}" in sweep.said
    assert not sweep.sweep.exists()


def test_a_partition_that_is_not_there_is_sbatchs_to_say(submitted):
    sweep = submitted("launcher.partition=none_such")
    assert sweep.ended() == 1
    assert "error: sbatch did not take the jobs: " in sweep.said and "invalid partition" in sweep.said
    assert not sweep.sweep.exists()


def test_a_dry_run_prints_the_script_and_leaves_nothing(submitted):
    sweep = submitted("launcher.dry_run=true", "launcher.gpus=2", "launcher.time='1-12'", "seed=0,1")
    assert sweep.ended() == 0
    for line in (
        "--array=0-1%2",
        "--gpus-per-node=2",
        "--mem=4G",
        "--time=1-12",
        "--signal=USR2@120",
        "--requeue",
    ):
        assert f"#SBATCH {line}\n" in sweep.said
    assert sweep.entries() == [] and not sweep.sweep.exists()
