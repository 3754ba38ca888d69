"""nvidia-smi is believed where it answers, and its silence is a finding."""

from __future__ import annotations

from functools import partial

from commands import put

from gymexp.config.schema import EngineConfig, RunConfig
from gymexp.doctor import finding, gpus
from gymexp.doctor.finding import Subject

TWO = """case "$*" in
*query-gpu*) echo '0, NVIDIA H200, 143771, 90000, 570.1'; echo '1, NVIDIA H200, 143771, 4, 570.1';;
*query-compute-apps*) echo '4321, python';;
esac"""


def look(engine: str = "auto", launcher: str = "local") -> list[finding.Finding]:
    return list(gpus.look(Subject(RunConfig(engine=EngineConfig(kind=engine)), launcher)))


def test_a_gpu_that_is_in_use_is_told_with_who_holds_it(monkeypatch, tmp_path):
    put(monkeypatch, tmp_path / "bin", nvidia_smi=TWO)
    found = look()[0]
    assert found.level == "warn"
    assert found.text == "2 × NVIDIA H200, 140 GiB, driver 570.1; memory in use: GPU 0: 88 GiB"
    assert "4321, python" in found.fix


def test_a_torch_without_cuda_beside_a_gpu_is_a_failure(monkeypatch, tmp_path):
    put(monkeypatch, tmp_path / "bin", nvidia_smi=TWO)
    monkeypatch.setattr(gpus, "_TORCH", "print('[\"2.13.0\", null, 0]')")
    assert [(one.level, one.text) for one in look()[1:]] == [("fail", "torch 2.13.0 is built without CUDA")]


def test_a_driver_too_old_for_torch_is_told_with_both_versions(monkeypatch, tmp_path):
    put(monkeypatch, tmp_path / "bin", nvidia_smi=TWO + "\ntest $# != 0 || echo 'CUDA Version: 12.4'")
    monkeypatch.setattr(gpus, "_TORCH", 'print(\'["2.13.0", "13.0", 0]\')')
    found = look()[1]
    assert found.level == "fail" and "CUDA 13.0" in found.text and "up to CUDA 12.4" in found.text


def test_a_driver_that_fails_or_hangs_is_a_failure_with_its_words(monkeypatch, tmp_path):
    put(monkeypatch, tmp_path / "bin", nvidia_smi="echo 'Driver/library version mismatch' >&2; exit 18")
    assert [(one.level, one.text) for one in look()] == [
        ("fail", "nvidia-smi: Driver/library version mismatch")
    ]
    put(monkeypatch, tmp_path / "bin", nvidia_smi="sleep 60")
    monkeypatch.setattr(gpus, "run_command", partial(finding.run_command, timeout_s=0.5))
    assert look()[0].text == "nvidia-smi: nvidia-smi gave no answer within 0.5 s"


def test_no_gpu_is_well_unless_the_run_is_to_sample_with_vllm_here(monkeypatch, tmp_path):
    put(monkeypatch, tmp_path / "bin")
    levels = [look(*asked)[0].level for asked in (("auto",), ("hf",), ("vllm",), ("vllm", "slurm"))]
    assert levels == ["ok", "ok", "warn", "ok"]
