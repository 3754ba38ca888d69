"""A text is found wherever a rollout holds it, and a page that does not know everything yet says so."""

from __future__ import annotations

import csv
import io
import json
import re
import threading
import time
from pathlib import Path
from urllib.parse import quote

import pytest
from viewed_runs import ENVS, EVIL, LONG, played, said, served, write_run

from gymexp.rollout.outcome import Completed
from gymexp.rollout.rollout_files import RolloutWriter
from gymexp.view import text_search
from gymexp.view.filters import selection
from gymexp.view.text_search import excerpt, in_line
from gymexp.view.viewed_run import ViewedRun, runs_at

KEY = "sudoku/train/1"


def conversation(middle: str) -> list[dict]:
    """The last message, which the index has, says nothing of it."""
    return [
        {"type": "function_call", "name": "look_up", "arguments": f'{{"of": "{middle} called"}}'},
        {"type": "function_call_output", "output": f"{middle} answered"},
        {"type": "reasoning", "summary": [{"text": f"{middle} thought"}]},
        said("done"),
    ]


@pytest.fixture
def run(tmp_path):
    """Three steps of two groups. A word of its own is in each rollout's middle."""
    path = tmp_path / "run"
    (path / "data").mkdir(parents=True)
    (path / "config.yaml").write_text("name: tiny\n")
    writer = RolloutWriter(path / "rollouts", ENVS)
    for step in (1, 2, 3):
        outcomes = [
            Completed(
                played(
                    f"{env}/train/{step}",
                    float(number % 2),
                    items=conversation(f"Wort{step}{env}{number} Straße ÄRGER"),
                    verdict={"judge": f"verdict{number % 2}", "score": 0.25},
                )
            )
            for env in ENVS
            for number in range(4)
        ]
        writer.write(f"step-{step:06d}", outcomes, 4)
    asked = {"responses_create_params": {"input": [{"role": "user", "content": "Please be terse"}]}}
    (path / "data" / "train.jsonl").write_text(
        "".join(json.dumps({"key": f"sudoku/train/{step}", "row": asked}) + "\n" for step in (1, 2, 3))
    )
    return path


def shown(viewer, query: str) -> list[str]:
    page = viewer.get(f"{viewer.root}rollouts?{query}").text
    return re.findall(r'/rollout/((?:step|eval)-\d+/\d+)[^"]*" class="go"', page)


def status_of(viewer, page: str) -> str:
    found = re.search(r'role="status">(.*?)</p>', viewer.get(viewer.root + page).text)
    return re.sub("<[^>]+>", "", found[1]) if found else ""


@pytest.mark.parametrize(
    ("text", "num"),
    [
        ("Wort2office3", 1),
        ("wort2OFFICE3 straße", 1),
        ("WORT2OFFICE3 STRASSE", 1),  # ß is ss where case does not count
        ("ärger called", 24),
        ("ÄRGER THOUGHT", 24),
        ("be terse", 12),
        ("verdict1", 12),
        ("0.25", 24),
        ("sudoku/train/2", 4),
        ('"of": "wort1', 8),
        ("done", 24),
        ("%", 0),
        ("Wort_office", 0),
        ("2038", 0),  # a token's id, not a text
        ("nothing of it", 0),
    ],
)
def test_a_text_is_found_in_every_part_of_a_rollout_and_nowhere_else(run, text, num):
    with served(run) as viewer:
        assert len(shown(viewer, f"text={quote(text)}")) == num
        assert status_of(viewer, f"rollouts?text={quote(text)}") == "searched 24 of 24 rollouts"


def test_the_other_filters_narrow_a_search_first(run):
    with served(run) as viewer:
        query = "env=office&from=2&to=3&min=1&text=answered"
        assert shown(viewer, query) == ["step-000002/5", "step-000002/7", "step-000003/5", "step-000003/7"]
        assert status_of(viewer, f"rollouts?{query}") == "searched 4 of 4 rollouts"
        step = viewer.get(f"{viewer.root}step/step-000002?text=Wort2office1+").text
        assert re.findall(r'class="go">([^<]+)', step) == ["office/train/2"]
        assert status_of(viewer, "step/step-000002?text=Wort2office1+") == "searched 8 of 8 rollouts"


def test_the_place_that_was_found_is_shown_and_the_next_hit_is_the_next_rollout(run):
    with served(run) as viewer:
        page = viewer.get(f"{viewer.root}rollouts?text=answered&from=1&to=1&env=office").text
        assert "tool: Wort1office0 Straße ÄRGER answered" in page
        rollout = viewer.get(f"{viewer.root}rollout/step-000001/5?text=verdict1&env=office").text
        before, after = (re.search(rf'data-key="{key}" href="([^"]+)"', rollout) for key in "kj")
        assert before is None and "/rollout/step-000001/7?" in after[1], "6 has another verdict"


def test_the_csv_has_every_rollout_of_a_search(run):
    with served(run) as viewer:
        text = viewer.get(f"{viewer.root}rollouts.csv?text=verdict1&env=sudoku").text
        rows = list(csv.DictReader(io.StringIO(text)))
        assert [(row["file"], row["number"]) for row in rows] == [
            (f"step-00000{step}", number) for step in (1, 2, 3) for number in "13"
        ]


class SlowFiles:
    """Files of a run of which a frame is read only when the test lets it."""

    def __init__(self, run: ViewedRun) -> None:
        self.run, self.allowed = run, threading.Semaphore(0)
        self._read = run.files.read_frame
        run.files.read_frame = self.read_frame  # type: ignore[method-assign]

    def read_frame(self, name: str, offset: int, length: int) -> list[bytes]:
        assert self.allowed.acquire(timeout=30)
        return self._read(name, offset, length)


def test_a_page_says_how_far_a_search_is_and_the_newest_rollouts_come_first(run):
    with served(run) as viewer:
        slow = SlowFiles(viewer.run)
        slow.allowed.release()
        began = time.monotonic()
        page = viewer.get(f"{viewer.root}rollouts?text=answered").text
        assert time.monotonic() - began < 5
        assert "searched 4 of 24 rollouts; what is found is added here" in page and "rollouts.csv" not in page
        found = re.findall(r'/rollout/((?:step|eval)-\d+/\d+)[^"]*" class="go"', page)
        assert found == [f"step-000003/{number}" for number in range(4)]
        version = viewer.run.search.version
        slow.allowed.release(5)
        until = time.monotonic() + 20
        while status_of(viewer, "rollouts?text=answered") != "searched 24 of 24 rollouts":
            assert time.monotonic() < until
        assert viewer.run.search.version == version + 5, "a page that is open learns of each frame"
        assert len(shown(viewer, "text=answered")) == 24


def test_a_newer_question_is_answered_before_an_older_one(run):
    with served(run) as viewer:
        slow = SlowFiles(viewer.run)
        assert status_of(viewer, "rollouts?text=answered").startswith("searched 0 of 24")
        threading.Timer(0.2, slow.allowed.release, (2,)).start()
        assert shown(viewer, "text=Wort1office2&from=1&to=1&env=office") == ["step-000001/6"]
        slow.allowed.release(5)
        viewer.get(f"{viewer.root}rollouts?text=answered")
        assert len(shown(viewer, "text=answered")) == 24


def test_rollouts_that_a_live_run_adds_or_takes_back_are_searched(run):
    with served(run) as viewer:
        assert len(shown(viewer, "text=called")) == 24
        writer = RolloutWriter(run / "rollouts", ENVS, last_step=2)
        writer.write("step-000003", [Completed(played(KEY, 1.0, items=conversation("new")))], 1)
        writer.write("step-000004", [Completed(played(KEY, 1.0, "nothing"))], 1)
        time.sleep(0.6)  # a page looks for news twice a second
        found = shown(viewer, "text=called")
        assert len(found) == 17 and found[-1] == "step-000003/0"
        assert status_of(viewer, "rollouts?text=called") == "searched 18 of 18 rollouts"


def test_a_rollout_that_cannot_be_read_is_counted(run):
    (run / "rollouts" / "step-000001.jsonl.zst").unlink()
    with served(run) as viewer:
        assert len(shown(viewer, "text=answered")) == 16
        assert status_of(viewer, "rollouts?text=answered") == (
            "searched 24 of 24 rollouts; 8 could not be read"
        )


def test_only_the_results_of_the_last_questions_are_kept(run):
    [viewed] = runs_at([run], None).values()
    viewed.refresh()
    for number in range(12):
        found = viewed.search.find(selection({"text": f"question {number}"}), 30)
        assert found is not None and found.is_done
    kept = viewed.index.query("SELECT DISTINCT needle FROM searched")
    assert {row["needle"] for row in kept} == {f"question {number}" for number in range(4, 12)}


def test_hostile_texts_are_found_and_shown_as_text(tmp_path):
    with served(write_run(tmp_path / "run")) as viewer:
        for text in (EVIL[:40], "\x1b]52", "\u202egnp", "'; DROP TABLE rollouts; --", '" OR 1=1', "\x00"):
            answer = viewer.get(f"{viewer.root}rollouts?text={quote(text)}")
            assert answer.status == 200 and "<script>alert" not in answer.text
            assert not {"\x1b", "\u202e", "\x00"} & set(answer.text)
        assert len(shown(viewer, f"text={quote(EVIL[:40])}&split=train")) == 4, "the task says it to each"
        assert len(shown(viewer, "")) == 28
        until = time.monotonic() + 20  # for two texts of 5 MB
        while "28 of 28" not in status_of(viewer, f"rollouts?text={'x' * 300}"):
            assert time.monotonic() < until
        assert shown(viewer, f"text={'x' * 300}") == ["step-000002/0", "step-000002/2"]
        page = viewer.get(f"{viewer.root}rollouts?text={'x' * 300}").text
        assert len(page) < 100_000 and "judge_output: " in page
        assert LONG not in page


def test_a_line_without_the_texts_letters_is_not_parsed(monkeypatch):
    line = b'{"rollout":{"task":{"key":"a"},"items":[{"role":"assistant","content":"Gr\xc3\xbc\xc3\x9fe"}]}}'
    escaped = rb'{"rollout":{"task":{"key":"a"},"items":[{"role":"assistant","content":"Gr\u00fc\u00dfe"}]}}'
    for one in (line, escaped):
        assert in_line(one, "a", "grüsse") == "policy: Grüße"
        assert in_line(one, "b", "grüsse") is None, "of another task"
    monkeypatch.setattr(text_search, "parsed", lambda line: pytest.fail("it was parsed"))
    assert in_line(line, "a", "gruss 1") is None


def test_an_excerpt_begins_before_what_was_found_even_where_letters_change_their_number():
    text = "ß" * 500 + "needle" + "y" * 500
    assert excerpt([("user", "no"), ("tool", text)], "needle") == f"tool: …{'ß' * 40}needle{'y' * 94}…"
    assert excerpt([("tool", "a\n needle\tb")], "needle") == "tool: a needle b"
    assert excerpt([("tool", "İneedle")], "needle") == "tool: İneedle"
    assert excerpt([("tool", "nee")], "needle") is None


def test_an_export_says_that_its_filter_is_over_its_table(run, tmp_path: Path):
    from gymexp.view.export import export

    export(runs_at([run], None), tmp_path / "page", None, None, None)
    text = (tmp_path / "page" / "rollouts.html").read_text()
    assert "the viewer of the run itself searches whole conversations" in text
    assert 'name="text"' not in text and "searched" not in text


def test_a_search_rests_while_a_page_is_made(run, monkeypatch):
    [viewed] = runs_at([run], None).values()
    viewed.refresh()
    wait_for, page = viewed.search._changed.wait_for, threading.current_thread()

    def wait_longer(holds, patience_s=None):
        """As on a busy machine, where a page goes on late."""
        is_page = threading.current_thread() is page
        return wait_for(holds, max(patience_s, 0.3) if is_page else patience_s)

    monkeypatch.setattr(viewed.search._changed, "wait_for", wait_longer)
    read = []
    read_frame = viewed.files.read_frame
    viewed.files.read_frame = lambda *of: read.append(of) or read_frame(*of)  # type: ignore[method-assign]
    question = selection({"text": "answered"})
    with viewed.search.resting():
        viewed.search.find(question, 0)
        time.sleep(0.3)
        assert len(read) <= 1, "a frame is begun, and none of its rollouts looked at"
        found = viewed.search.find(question, 30)
        assert found is not None and found.is_done, "while the page waits for it, it goes on"
