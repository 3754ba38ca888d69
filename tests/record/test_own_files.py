"""Which links of a run directory are followed. A stranger's links: tests/test_hostile_runs.py."""

from __future__ import annotations

import pytest

from gymexp.errors import RunDirectoryError
from gymexp.record.own_files import check_own


def test_the_code_of_a_sweeps_job_is_its_sweeps_and_no_other_file_may_be(tmp_path):
    job = tmp_path / "sweep" / "0"
    job.mkdir(parents=True)
    (tmp_path / "sweep" / "code").mkdir()
    (tmp_path / "sweep" / "code" / "git-commit.txt").write_text("c0ffee\n")
    (job / "code").symlink_to("../code")
    check_own(job)
    (job / "status.json").symlink_to("../code/git-commit.txt")
    with pytest.raises(RunDirectoryError, match=r"status\.json must be a file of the run directory"):
        check_own(job)
    (job / "status.json").unlink()
    (job / "code").unlink()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "git-commit.txt").write_text("secret\n")
    (job / "code").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunDirectoryError, match=r"git-commit\.txt must be a file of the run directory"):
        check_own(job)
