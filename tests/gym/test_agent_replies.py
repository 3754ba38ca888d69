"""Agents whose code shows that their replies have no token ids, and those that may pass them on."""

from __future__ import annotations

import pytest
import yaml

from gymexp.config.schema import EnvConfig, GymConfig
from gymexp.errors import ConfigError
from gymexp.gym.agent_replies import lack_token_ids
from gymexp.gym.catalogue import load_catalogue
from gymexp.gym.definitions import playable_servers, reasons_against
from gymexp.gym.install import find_made_venv, site_packages
from gymexp.gym.tried import load_tried
from gymexp.record.places import cache_dir

AGENT = "responses_api_agents/program_agent"
ANEW = """
class ProgramAgent(SimpleResponsesAPIAgent):
    async def responses(self, body):
        text = await self.run_program(self.server_client._build_server_base_url(self.config.model_server))
        return NeMoGymResponse(output=[NeMoGymResponseOutputMessage(content=[text])])
"""
ASKS = """
class AskingAgent(SimpleResponsesAPIAgent):
    async def responses(self, body):
        answer = await self.server_client.post(
            server_name=self.config.model_server.name, url_path="/v1/responses", json=body
        )
        return answer or NeMoGymResponseOutputMessage(content=[])
"""
SERVERS = """
room:
  resources_servers:
    room_kind: {entrypoint: app.py}
walker:
  responses_api_agents:
    program_agent:
      entrypoint: app.py
      resources_server: {type: resources_servers, name: room}
      model_server: {type: responses_api_models, name: policy_model}
"""
REASON = (
    "walker (program_agent) writes its replies anew from a transcript, so they have no token ids: "
    "take an environment whose agent asks its model_server itself, as simple_agent does"
)


def site_with(tmp_path, **files: str):
    for name, text in files.items():
        path = tmp_path / AGENT / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("files", "lacks"),
    [
        ({"app": ANEW}, True),
        ({"app": "from .program import ProgramAgent", "program": ANEW}, True),
        ({"app": ANEW + "\ncapture = self._token_id_capture_enabled()"}, True),
        ({"app": ANEW, "tests/test_app": "assert item.generation_token_ids"}, True),
        ({"app": ANEW + '\nids = item["generation_token_ids"]'}, False),
        ({"app": ANEW + "\nconverter = VLLMConverter(return_token_id_information=True)"}, False),
        ({"app": ANEW.replace("OutputMessage(", "OutputMessageForTraining(")}, False),
        ({"app": ASKS}, False),
        ({"app": ANEW, "other": ASKS}, False),
        ({"app": ASKS.replace("model_server", "policy_model_server")}, False),
        ({"app": "class ProgramAgent(SimpleAgent): pass"}, False),
        ({}, False),
    ],
)
def test_replies_lack_token_ids_if_the_agent_writes_them_anew_without(files, lacks, tmp_path):
    (tmp_path / AGENT / "tests").mkdir(parents=True)
    assert lack_token_ids(AGENT, [site_with(tmp_path, **files)]) == lacks


def test_such_an_agent_is_refused_in_training_and_not_for_a_policy_of_text(tmp_path):
    servers, own, site = yaml.safe_load(SERVERS), tmp_path / "own", site_with(tmp_path / "site", app=ANEW)
    for is_own in (False, True):  # the file; the agent's code is NeMo Gym's
        assert list(reasons_against(servers, "walker", "x", is_own, roots=[own, site])) == [REASON]
    assert not list(reasons_against(servers, "walker", "x", roots=[own, site], gives_tokens=False))
    site_with(own, app=ANEW)
    assert not list(reasons_against(servers, "walker", "x", roots=[own, site])), "one's own may carry them"


@pytest.mark.gym
def test_claude_code_is_refused_by_its_code_and_no_agent_that_was_played(gym_python):
    catalogue = load_catalogue(GymConfig(), cache_dir(), print)
    python = find_made_venv(GymConfig(), cache_dir())
    assert python is not None, "the catalogue has made it"
    site = site_packages(python)
    entry = catalogue["reasoning_gym_claude_code_agent_model_server"]
    assert len(entry.reasons) == 1 and "so they have no token ids" in entry.reasons[0]
    assert entry.network == ["npm"]
    env = EnvConfig(entry.config_path, entry.agent)
    with pytest.raises(ConfigError, match=r"env\.claude cannot be played: .* so they have no token ids"):
        playable_servers("claude", env, site, python)
    assert playable_servers("claude", env, site, python, gives_tokens=False)
    tried = load_tried(GymConfig.version)
    played = {catalogue[name].harness for name, seen in tried.items() if "reason" not in seen}
    played |= {"aviary_agent", "hermes_agent", "langgraph_agent", "tau2"}
    assert not [agent for agent in played if lack_token_ids(f"responses_api_agents/{agent}", [site])]
