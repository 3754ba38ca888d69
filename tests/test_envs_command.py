"""`python -m gymexp.envs`: the list, the search and one environment, as text and as JSON."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
from test_layers import ROOT

from gymexp import envs
from gymexp.config.schema import GymConfig
from gymexp.errors import ConfigError
from gymexp.gym.catalogue import Dataset, Entry

HUB = Dataset("train", "x/train.jsonl", repo_id="lab/chess", repo_file="train.jsonl", license="MIT")
CHESS = Entry(
    name="chess",
    config_path="resources_servers/chess/configs/chess.yaml",
    agent="chess_agent",
    harness="simple_agent",
    folders=["resources_servers/chess"],
    domain="games",
    description="Mate in two.",
    max_steps=None,
    datasets=[HUB],
    examples="x/example.jsonl",
    num_examples=5,
    tools=["move"],
    prompt_tokens=700,
)
ESSAY = Entry(
    name="essay",
    config_path="e.yaml",
    agent="essay_agent",
    harness="simple_agent",
    folders=[],
    domain="",
    description="",
    max_steps=1,
    datasets=[],
    examples=None,
    judge=True,
    network=["docker"],
    reasons=["essay refers to the server judge, which its file does not define"],
)


SEEN = {"rollouts": 5, "scored": 4, "turns": 3, "tokens": 80, "rewards": [0.0, 1.0], "failed": "a timeout"}


@pytest.fixture
def told(monkeypatch, capsys):
    """What the command prints with these words."""
    monkeypatch.setattr(envs, "load_catalogue", lambda *_: {"chess": CHESS, "essay": ESSAY})
    monkeypatch.setattr(envs, "load_tried", lambda _: {"chess": SEEN})

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["envs", *words])
        envs.main()
        return capsys.readouterr().out

    return run


def test_the_table_is_aligned_and_says_what_each_needs(told):
    lines = told().splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("name"))
    titles, chess, essay = lines[head : head + 3]
    for title, cell in {"domain": "games", "tools": "1", "turns": "10", "data": "lab/chess"}.items():
        assert chess[titles.index(title) :].startswith(cell)
    assert chess[titles.index("licence") :].startswith("MIT") and chess.split()[-4:] == [
        "700",
        "4",
        "of",
        "5",
    ]
    assert essay.startswith("essay !") and essay.endswith("-")
    assert [essay[titles.index(title) :][:3] for title in ("judge", "network")] == ["yes", "yes"]
    assert "sudoku, workplace" in lines[0] and "2 environments" in "\n".join(lines)


def test_a_search_looks_at_names_descriptions_and_tools(told):
    assert "chess" in told("--search", "MATE") and "essay" not in told("--search", "move")
    assert [entry["name"] for entry in json.loads(told("--search", "essay", "--json"))] == ["essay"]


def test_one_is_shown_with_its_data_its_licence_and_the_command_or_the_reason(told):
    shown = told("show", "chess")
    assert "lab/chess, licence: MIT" in shown and "python -m gymexp.train 'env=[chess]'" in shown
    assert "cannot be played: essay refers to the server judge" in told("show", "essay")
    assert "4 of 5 rollouts of the tiny policy had a reward, 0 to 1, with 3 turns at most" in shown
    assert "others: a timeout" in shown and "tried here no" in told("show", "essay")
    as_json = json.loads(told("show", "chess", "--json"))
    assert (as_json["tools"], as_json["tried"]) == (["move"], SEEN)


def test_one_that_needs_a_judge_is_shown_with_the_keys_that_name_it(told, monkeypatch):
    judged = dataclasses.replace(ESSAY, needs_judge=True)
    monkeypatch.setattr(envs, "load_catalogue", lambda *_: {"essay": judged})
    assert "cannot" not in (shown := told("show", "essay"))
    assert "python -m gymexp.train 'env=[essay]' env.essay.judge.url=… env.essay.judge.model=…" in shown
    [line] = [line for line in told().splitlines() if line.startswith("essay")]
    assert "needed" in line and "!" not in line


def test_an_unknown_name_is_answered_with_the_nearest(told):
    with pytest.raises(ConfigError, match="did you mean env=chess"):
        told("show", "ches")
    with pytest.raises(ConfigError, match=r"sudoku is a file of conf/env/"):
        told("show", "sudoku")


def test_a_word_alone_is_refused(told):
    with pytest.raises(SystemExit):
        told("show")


def test_the_page_of_tried_environments_is_what_its_command_writes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import try_environments

    tried = json.loads(try_environments.RESULTS.read_text())
    page = try_environments.PAGE.read_text()
    for name, seen in tried.items():
        line = next(line for line in page.splitlines() if line.startswith(f"| {name} |"))
        assert ("reason" in seen) or f"{seen['scored']} of {seen['rollouts']}" in line
    assert f"## Played: {sum('reason' not in seen for seen in tried.values())}" in page


def test_another_nemo_gym_is_named_as_for_a_run(told, monkeypatch):
    asked: list[GymConfig] = []

    def load(gym: GymConfig, *_: object) -> dict[str, Entry]:
        asked.append(gym)
        return {"chess": CHESS}

    monkeypatch.setattr(envs, "load_catalogue", load)
    monkeypatch.setattr(envs, "find_made_venv", lambda gym, cache: None)
    assert "1 environments of NeMo Gym 0.7.0" in told("gym.version=0.7.0")
    told("show", "chess", "gym.python=/a b/python")
    assert asked == [GymConfig(version="0.7.0"), GymConfig(python="/a b/python")]
    with pytest.raises(ConfigError, match=r"must be gym\.version=… or gym\.python=…, got gym\.checkout=x"):
        told("gym.checkout=x")
