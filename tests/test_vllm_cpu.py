"""The venv of the tests' vLLM outlives the clone that made it."""

import sysconfig

from vllm_cpu import see_project


def test_a_project_that_is_gone_gives_way_to_this_one_and_one_that_is_there_does_not(tmp_path):
    here = sysconfig.get_path("purelib") + "\n"
    pth = tmp_path / "project.pth"
    see_project(tmp_path)
    assert pth.read_text() == here
    pth.write_text(f"{tmp_path / 'deleted clone'}\n")
    see_project(tmp_path)
    assert pth.read_text() == here
    pth.write_text(f"{tmp_path}\n")
    see_project(tmp_path)
    assert pth.read_text() == f"{tmp_path}\n", "another clone may be testing with it"
