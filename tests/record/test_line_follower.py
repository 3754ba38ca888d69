"""A JSONL file is followed as it grows, is replaced, is written anew in place, and is cut."""

from __future__ import annotations

import json

from gymexp.record import line_follower
from gymexp.report.run_records import LineFile


def lines(*numbers: int) -> str:
    return "".join(json.dumps({"n": number}) + "\n" for number in numbers)


def test_only_whole_lines_are_read_and_each_one_once(tmp_path, monkeypatch):
    monkeypatch.setattr(line_follower, "_BATCH", 2)
    file, path = LineFile(tmp_path, "m.jsonl"), tmp_path / "m.jsonl"
    assert not file.refresh() and file.records == []
    path.write_text(lines(1, 2, 3, 4, 5) + '{"n": 6')
    assert file.refresh() and [one["n"] for one in file.records] == [1, 2, 3, 4, 5]
    assert not file.refresh()
    with path.open("a") as end:
        end.write("}\nno json\n[7]\n" + lines(8))
    assert file.refresh() and [one["n"] for one in file.records] == [1, 2, 3, 4, 5, 6, 8]


def test_a_file_that_is_replaced_cut_or_written_anew_is_read_from_its_start(tmp_path):
    file, path = LineFile(tmp_path, "m.jsonl"), tmp_path / "m.jsonl"
    path.write_text(lines(1, 2, 3))
    file.refresh()
    (tmp_path / "new").write_text(lines(1, 2, 3, 4))
    (tmp_path / "new").replace(path)
    assert file.refresh() and [one["n"] for one in file.records] == [1, 2, 3, 4]
    path.write_text(lines(1))
    assert file.refresh() and [one["n"] for one in file.records] == [1]
    path.write_text(lines(5, 6, 7, 8, 9))  # in place, and longer
    assert file.refresh() and [one["n"] for one in file.records] == [5, 6, 7, 8, 9]
    path.unlink()
    assert file.refresh() and file.records == []
