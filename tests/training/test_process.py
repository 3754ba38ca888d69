"""The trainer's process: what it leaves behind when it cannot go on."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from whole_run import ROOT

FAILING = """
import sys
from gymexp.training import process

def work(*_):
    import torch
    raise {error}

process.work, process.from_yaml = work, lambda path: None
process.main()
"""


@pytest.fixture
def fail(tmp_path):
    """Run the process with work that raises; what it says, and result.json."""

    def run(error: str) -> tuple[str, dict]:
        code = FAILING.format(error=error)
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert done.returncode == 1
        result = tmp_path / "result.json"
        return done.stderr, json.loads(result.read_text()) if result.exists() else {}

    return run


def test_too_little_gpu_memory_says_which_keys_need_less_of_it(fail):
    said, result = fail("torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')")
    assert "trainer.per_device_train_batch_size" in result["error"]
    assert "Tried to allocate 2.00 GiB" in result["error"]
    assert "Traceback" in said, "where, is in the log"
    assert said.rstrip().endswith(result["error"])


def test_an_error_that_nobody_foresaw_leaves_its_traceback_and_no_result(fail):
    said, result = fail("RuntimeError('no such thing')")
    assert "Traceback" in said and said.rstrip().endswith("RuntimeError: no such thing")
    assert result == {}
