"""Files of servers are read as NeMo Gym reads them, and the catalogue is made of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from gymexp.config.schema import EnvConfig, GymConfig
from gymexp.errors import ConfigError
from gymexp.gym import definitions
from gymexp.gym.catalogue import kept_catalogue, load_catalogue, options_of
from gymexp.gym.definitions import folders_of, playable_servers, read_servers, server_of
from gymexp.gym.install import site_packages
from gymexp.record.places import cache_dir

FILE = """
room:
  resources_servers:
    room_kind: {{entrypoint: app.py, {values}}}
walker:
  responses_api_agents:
    walker_kind:
      entrypoint: app.py
      server: {{type: resources_servers, name: room}}
      model: {{type: responses_api_models, name: policy_model}}
"""
ROOM = EnvConfig(config_path="resources_servers/room/configs/room.yaml", agent="walker")
MODEL = "judge: {type: responses_api_models, name: policy_model}"


def site_with(tmp_path: Path, values: str) -> Path:
    path = tmp_path / "site" / ROOM.config_path
    path.parent.mkdir(parents=True)
    path.write_text(FILE.format(values=values))
    return tmp_path / "site"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ("judge: {type: responses_api_models, name: judge}", "room refers to the server judge, which its"),
        ('key: "???"', r"room has a value \?\?\? that is for you to set"),
        (MODEL, "room would have the policy judge itself"),
    ],
)
def test_what_cannot_be_played_is_refused_with_the_reason(values, reason, tmp_path):
    with pytest.raises(ConfigError, match=f"env.room cannot be played: {reason}"):
        playable_servers("room", ROOM, site_with(tmp_path, values))


def test_a_judge_that_is_turned_off_is_none(tmp_path):
    site = site_with(tmp_path, f"{MODEL}, should_use_judge: false")
    servers = playable_servers("room", ROOM, site)
    assert folders_of(servers, "walker") == [
        "resources_servers/room_kind",
        "responses_api_agents/walker_kind",
    ]


def test_a_users_own_file_may_let_the_policy_judge_itself(tmp_path, monkeypatch):
    site = site_with(tmp_path, "port: 1")
    mine = tmp_path / "here" / ROOM.config_path
    mine.parent.mkdir(parents=True)
    mine.write_text(FILE.format(values=MODEL))
    monkeypatch.chdir(tmp_path / "here")
    assert "judge" in server_of(playable_servers("room", ROOM, site)["room"])[2]


@pytest.mark.gym
def test_a_benchmark_is_resolved_by_nemo_gym_itself_and_once(gym_python, tmp_path, monkeypatch):
    monkeypatch.setenv("GYMEXP_CACHE", str(tmp_path))
    site = site_packages(gym_python)
    env = EnvConfig(config_path="benchmarks/gpqa/config.yaml", agent="gpqa_mcqa_simple_agent")
    servers = read_servers("gpqa", env, site, gym_python)
    kind, implementation, values = server_of(servers["gpqa_mcqa_resources_server"])
    assert (kind, implementation) == ("resources_servers", "mcqa")
    assert values["grading_mode"] == "lenient_answer_colon_md", "the benchmark's own"
    assert values["entrypoint"] == "app.py", "inherited"
    _, _, agent = server_of(servers[env.agent])
    assert agent["resources_server"]["name"] == "gpqa_mcqa_resources_server"
    monkeypatch.setattr(definitions, "resolve", lambda *_: pytest.fail("the cache has it"))
    assert read_servers("gpqa", env, site, gym_python) == servers


@pytest.mark.gym
def test_the_catalogue_has_nemo_gyms_environments(gym_python):
    gym = GymConfig(python=str(gym_python))
    catalogue = load_catalogue(gym, cache_dir(), print)
    site = site_packages(gym_python)
    folders = [p.name for p in (site / "environments").iterdir() if (p / "config.yaml").exists()]
    # Of 0.7: an agent in Docker without any other server, and two agents of one environment server.
    others = {"biomnibench_da", "nemo_user_sim"}
    assert set(folders) - catalogue.keys() <= others and len(catalogue) > 200
    assert all(catalogue[name].reasons for name in catalogue if name.startswith("nemo_user_sim"))
    blackjack = catalogue["blackjack"]
    assert (blackjack.max_steps, blackjack.harness, blackjack.num_examples) == (5, "gymnasium_agent", 5)
    assert catalogue["xlam_fc"].tools and not catalogue["xlam_fc"].judge
    assert catalogue["equivalence_llm_judge"].judge and catalogue["circle_click"].images
    assert not catalogue["gpqa"].reasons and catalogue["verifif"].reasons
    assert options_of(blackjack) == {
        "config_path": "environments/blackjack/config.yaml",
        "agent": "blackjack_gymnasium_agent",
        "data": {"source": "nemo_gym"},
    }
    assert kept_catalogue(gym, cache_dir()) == catalogue
