"""report.html: one file, whose policy names its own scripts, in which everything of a run is text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from made_runs import make_run, write_lines

from gymexp.report.page import PANELS, in_script, plotly_script, run_page, write_report
from gymexp.report.run_records import RunReader, read_records

HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)</script>\x1b]52;c;eA==\x07\u202e"


class Page(HTMLParser):
    """What a browser would take for elements, attributes, scripts and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.styles: list[str] = []
        self.texts: list[str] = []
        self._in = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in = tag
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag == "style":
            self.styles.append("")

    def handle_endtag(self, tag):
        self._in = ""

    def handle_data(self, data):
        if self._in == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
        elif self._in == "style":
            self.styles[-1] += data
        else:
            self.texts.append(data)

    @property
    def policy(self) -> str:
        return next(a["content"] for t, a in self.tags if a.get("http-equiv") == "Content-Security-Policy")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def page(run) -> Page:
    return Page(run_page(read_records(run)))


def test_every_panel_of_a_whole_run_shows_something_but_what_it_did_not_measure(run):
    empty = [panel.id for build in PANELS if (panel := build(read_records(run))).is_empty]
    assert empty == ["kl"]
    assert len(PANELS) == 23


def test_the_policy_names_the_hashes_of_the_scripts_and_of_the_style_and_nothing_else(page):
    def of(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    rules = dict(rule.split(" ", 1) for rule in page.policy.split("; "))
    run_scripts = [text for attributes, text in page.scripts if "type" not in attributes]
    assert set(rules["script-src"].split()) == {of(text) for text in run_scripts}
    assert set(rules["style-src"].split()) == {*map(of, page.styles), of("")}
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    assert "unsafe" not in page.policy and "http" not in page.policy


def test_nothing_is_loaded_from_elsewhere_and_no_element_has_a_handler(page):
    for tag, attributes in page.tags:
        assert tag not in ("iframe", "object", "embed", "link", "base", "form", "img")
        assert not {"src", "style"} & attributes.keys(), tag
        assert not [name for name in attributes if name.startswith("on")]
        assert (attributes.get("href") or "#").startswith("#")


def test_each_link_leads_to_a_panel_and_each_chart_to_a_figure(page):
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for t, a in page.tags if t == "a"} <= set(ids)
    [(_, figures)] = [one for one in page.scripts if one[0].get("id") == "figures"]
    numbers = [int(a["data-figure"]) for _, a in page.tags if a.get("data-figure")]
    assert len(json.loads(figures)) > max(numbers) > 20


def test_what_a_run_wrote_is_text(tmp_path):
    """In the name of an environment, in errors, in settings, events, versions and processes."""
    env = HOSTILE.replace("/", "∕")
    run = make_run(tmp_path / "run", steps=4, envs=(env, "sudoku"))
    (run / "result.json").write_text(json.dumps({"error": HOSTILE}))
    (run / "status.json").write_text(json.dumps({"ended": "failed", "outcome": HOSTILE, "host": HOSTILE}))
    (run / "versions.txt").write_text(f"{HOSTILE} {HOSTILE}\n")
    (run / "overrides.yaml").write_text(json.dumps([f"name={HOSTILE}"]))
    write_lines(run / "timeline.jsonl", [{"time": 1.0, "event": HOSTILE, "why": HOSTILE}])
    process = {"time": 1.0, "processes": {HOSTILE: {"rss_mb": 1.0, "cpu": 1.0}}, "gpus": []}
    write_lines(run / "system.jsonl", [process])
    text = run_page(read_records(run))
    page = Page(text)
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert len(page.scripts) == 3
    assert "\x1b" not in text and "\u202e" not in text and "\\x1b]52" in text
    [(_, figures)] = [one for one in page.scripts if one[0].get("id") == "figures"]
    assert "<" not in figures
    for figure in json.loads(figures):  # plotly.js reads a few HTML tags in its texts
        assert "<img" not in json.dumps(figure)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("verdict", value) for value in ("x", {"a": [1]}, {"a": None})),
        *(
            (name, value)
            for name in ("tokens", "reward", "group", "turns", "began")
            for value in ("x", [1], None)
        ),
        *(("seconds", value) for value in ("x", {"total": "x"}, {"total": 1, "policy": []}, None)),
        ("file", "step-x"),
        *((name, [1]) for name in ("key", "env", "file", "text", "tool_calls", "success", "outcome")),
    ],
)
def test_a_line_of_the_index_that_gymexp_would_not_write_breaks_no_panel(tmp_path, name, value):
    """In a training step and in an evaluation. The others are shown."""
    run = make_run(tmp_path / "run", steps=3)
    index = run / "rollouts" / "index.jsonl"
    rows = [json.loads(line) for line in index.read_text().splitlines()]
    for place in (3, 50, -3):
        rows[place][name] = value
    write_lines(index, rows)
    assert "rollouts of steps 1 to 3" in run_page(read_records(run))


def test_json_in_a_script_element_cannot_end_it():
    text = in_script({"</script><!--": ["&", ">"]})
    assert not re.search("[<>&]", text)
    assert json.loads(text) == {"</script><!--": ["&", ">"]}


def test_an_older_run_has_a_page_that_says_what_is_missing(tmp_path):
    run = make_run(tmp_path / "run")
    for name in ("rollouts/index.jsonl", "rollouts/train_index.jsonl", "system.jsonl", "timeline.jsonl"):
        (run / name).unlink()
    texts = " ".join(Page(run_page(read_records(run))).texts)
    assert "before gymexp kept spans" in texts
    assert "before gymexp kept an index of rollouts" in texts
    assert "KL to the reference: not measured, trainer.beta=0" in texts


def test_a_run_that_has_not_trained_yet_has_a_page(tmp_path):
    (tmp_path / "config.yaml").write_text("name: tiny\nenv: {sudoku: {}}\n")
    assert "No optimizer step has ended yet" in run_page(read_records(tmp_path))


def test_a_page_reloads_itself_only_while_the_run_goes_on(run, tmp_path):
    import os
    import shutil
    import socket
    import time

    refresh = 'http-equiv="refresh"'
    assert refresh not in run_page(read_records(run))
    going = shutil.copytree(run, tmp_path / "run")
    (going / "result.json").unlink()
    status = {
        "pid": os.getpid(),
        "began": time.time(),
        "host": socket.gethostname(),
        "step": 3,
        "max_steps": 9,
    }
    (going / "status.json").write_text(json.dumps(status))
    assert refresh in run_page(read_records(going))


def test_secrets_of_the_configuration_are_hidden(tmp_path):
    run = make_run(tmp_path / "run", steps=2, tracker={"project": "hf_" + "a" * 30})
    assert "hf_aaa" not in run_page(read_records(run))


def test_the_command_writes_the_file_and_names_it(run, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "gymexp.report", run], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(run / "report.html")
    other = subprocess.run(
        [sys.executable, "-m", "gymexp.report", tmp_path],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert other.returncode == 1 and "must be the directory of a run" in other.stderr
    assert "Traceback" not in other.stderr


def test_plotlys_python_is_not_imported(run):
    code = "import sys; from pathlib import Path; from gymexp.report.page import write_report; "
    code += (
        f"write_report(Path({str(run)!r})); assert 'plotly' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_long_run_has_a_small_page(tmp_path):
    """More than 2,000 steps are shown as buckets."""
    run = make_run(tmp_path / "run", steps=3_000, rollouts=2)
    text = run_page(read_records(run))
    assert len(text) - len(plotly_script()) < 1_500_000


def test_a_reader_follows_a_run_and_takes_lines_back(tmp_path):
    run = make_run(tmp_path / "run", steps=5)
    reader = RunReader(run)
    assert reader.read().step_numbers == [1, 2, 3, 4, 5]
    assert reader.read() is reader.read()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "time": 1.0, "time/step": 2.0}\n{"step": 7, "ti')
    assert reader.read().step_numbers == [1, 2, 3, 4, 5, 6]
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = run / "metrics.part"
    kept.write_text("".join(lines[:4]))
    kept.replace(run / "metrics.jsonl")
    assert reader.read().step_numbers == [json.loads(x)["step"] for x in lines[:4] if "loss" in x]


def test_the_report_replaces_the_one_before(run):
    first = write_report(run)
    inode = first.stat().st_ino
    assert write_report(run).stat().st_ino != inode
