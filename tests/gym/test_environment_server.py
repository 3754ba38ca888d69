"""Environment servers of NeMo Gym 0.7: which of them plays an agent's rows, and which cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gymexp.config.schema import EnvConfig, GymConfig
from gymexp.errors import ConfigError
from gymexp.gym.attached import replicas_of
from gymexp.gym.definitions import servers_of_agent
from gymexp.gym.environment_server import front_of, warning_of
from gymexp.gym.server_plan import plan

GAME: dict[str, Any] = {
    "game": {"resources_servers": {"game": {"entrypoint": "app.py"}}},
    "player": {
        "responses_api_agents": {
            "simple_agent": {
                "entrypoint": "app.py",
                "max_steps": 3,
                "resources_server": {"type": "resources_servers", "name": "game"},
                "model_server": {"type": "responses_api_models", "name": "policy_model"},
            }
        }
    },
}
ENV = EnvConfig(config_path="game.yaml", agent="player")


def in_front(implementation: str, *agents: str, **more: Any) -> dict[str, Any]:
    """An environment server of these agents. The type of `agent_server` may be left out."""
    values: dict[str, Any] = {"entrypoint": "app.py"} | more
    for number, agent in enumerate(agents):
        key = "agent_server" if number == 0 else f"agent_{number}"
        values[key] = {"name": agent} | ({"type": "responses_api_agents"} if number else {})
    return {"environment_servers": {implementation: values}}


def laid_out(tmp_path: Path, servers: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    import yaml

    (tmp_path / "game.yaml").write_text(yaml.safe_dump(GAME | servers, sort_keys=False))
    monkeypatch.chdir(tmp_path)
    ports = {"game-player": 1, "game-game": 2, "game-room": 3, "policy_model": 4}
    return plan({"game": ENV}, GymConfig(), tmp_path / "site", ["http://p"], lambda name: ports[name])


def test_a_relay_is_passed_by_as_it_changes_nothing(tmp_path, monkeypatch):
    layout = laid_out(tmp_path, {"room": in_front("legacy_agent", "player")}, monkeypatch)
    [replica] = layout.replicas["game"]
    assert (replica.url, replica.takes_episodes, replica.max_steps) == ("http://127.0.0.1:1", False, 3)
    assert set(layout.modules) == {"policy_model", "game-player", "game-game"}


def test_another_environment_server_runs_and_plays_the_rows(tmp_path, monkeypatch):
    resources = {"type": "resources_servers", "name": "game"}
    room = in_front("single_agent_turn", "player", resources_server=resources)
    layout = laid_out(tmp_path, {"room": room}, monkeypatch)
    [replica] = layout.replicas["game"]
    assert (replica.url, replica.takes_episodes, replica.max_steps) == ("http://127.0.0.1:3", True, 3)
    assert (replica.agent, replica.name) == ("player", "game-player")
    assert "game-room" in replica.services
    assert layout.modules["game-room"] == "environment_servers.single_agent_turn.app"
    [values] = layout.config["game-room"]["environment_servers"].values()
    assert values["agent_server"]["name"] == "game-player"
    assert values["resources_server"]["name"] == "game-game"


@pytest.mark.parametrize(
    ("servers", "reason"),
    [
        (
            {"room": in_front("x", "player"), "hall": in_front("legacy_agent", "player")},
            r"player has several environment servers \(room, hall\), and its rows cannot say which",
        ),
        (
            {"room": in_front("x", "player", "user"), "user": GAME["player"]},
            r"its environment server room plays several agents \(player, user\)",
        ),
    ],
)
def test_what_cannot_say_whose_episode_it_plays_is_refused(servers, reason, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=rf"env\.game cannot be played: {reason}"):
        laid_out(tmp_path, servers, monkeypatch)


def test_an_agent_without_one_gets_a_warning_where_nemo_gym_has_them(tmp_path):
    assert warning_of(GAME, "player", tmp_path) == "", "NeMo Gym 0.4"
    (tmp_path / "environment_servers").mkdir()
    warning = warning_of(GAME, "player", tmp_path)
    assert warning.startswith("player has no environment server.") and "legacy_agent" in warning
    relayed = GAME | {"room": in_front("legacy_agent", "player")}
    assert warning_of(relayed, "player", tmp_path) == "" and front_of(relayed, "player") is None
    assert servers_of_agent(relayed, "player") == ["game", "player"]


def test_servers_that_run_already_are_reached_at_the_same_places():
    at = {"host": "h", "port": 5}
    agent = {"player": {"responses_api_agents": {"simple_agent": at | {"max_steps": 2}}}}
    for implementation, port, typed in (("legacy_agent", 5, False), ("single_agent_turn", 6, True)):
        head = agent | {"room": in_front(implementation, "player", host="h", port=6)}
        [replica] = replicas_of(head, {"game": ENV})["game"]
        assert (replica.url, replica.takes_episodes) == (f"http://h:{port}", typed)
