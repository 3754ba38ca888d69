"""What the trainer reports is in timeline.jsonl once, whatever is sent again."""

from __future__ import annotations

from gymexp.files import read_lines
from gymexp.record.directory import RunDirectory
from gymexp.run.timeline import Timeline


def span(number: int) -> dict:
    return {"time": 5.0 + number, "seconds": 0.5, "span": "update", "step": number}


def test_spans_and_phases_are_noted_once_and_log_entries_are_passed_on_once(tmp_path):
    timeline = Timeline(RunDirectory(tmp_path))
    timeline.note(event="start")
    entries = [{"number": 1, "span": span(1)}, {"number": 2, "step": 1, "logs": {"loss": 0.5}}]
    first = {"phase": "train", "done": 0, "entries": entries}
    assert timeline.follow({"phase": "start"}, first) == [entries[1]]
    assert first == {"phase": "train", "done": 0}, "the facts that are left"
    again = [*entries, {"number": 3, "span": span(2)}]  # as if the first reply was lost
    assert timeline.follow(first, {"phase": "train", "done": 4, "entries": again}) == []
    assert timeline.follow({"phase": "train"}, {"phase": "train", "done": 5}) == []
    start, phase, one, played, two = read_lines(tmp_path / "timeline.jsonl")
    assert (start["event"], phase["phase"], played["event"]) == ("start", "train", "first rollout")
    assert [one, two] == [span(1), span(2)]
    assert start["seconds"] <= phase["seconds"] <= played["seconds"], "since the process began"


def test_a_remark_is_shown_and_noted_once(tmp_path):
    shown: list[str] = []
    timeline = Timeline(RunDirectory(tmp_path), shown.append)
    for _ in range(2):  # as if the first reply was lost
        assert timeline.follow({}, {"entries": [{"number": 1, "remark": "the tracker is lost"}]}) == []
    assert shown == ["the tracker is lost"]
    [line] = read_lines(tmp_path / "timeline.jsonl")
    assert (line["event"], line["text"]) == ("remark", "the tracker is lost")
