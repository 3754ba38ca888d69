"""Files of servers are read as NeMo Gym reads them, and the catalogue is made of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from gymexp.config.schema import EnvConfig, GymConfig
from gymexp.errors import ConfigError
from gymexp.gym import definitions
from gymexp.gym.catalogue import kept_catalogue, load_catalogue, options_of
from gymexp.gym.definitions import (
    folders_of,
    needs_judge,
    playable_servers,
    read_servers,
    reasons_against,
    server_of,
)
from gymexp.gym.install import nemo_gym_version, site_packages
from gymexp.gym.tried import load_tried
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
JUDGED = "judge: {type: responses_api_models, name: judge}"
MODEL = "judge: {type: responses_api_models, name: policy_model}"


def site_with(tmp_path: Path, values: str) -> Path:
    path = tmp_path / "site" / ROOM.config_path
    path.parent.mkdir(parents=True)
    path.write_text(FILE.format(values=values))
    return tmp_path / "site"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (JUDGED, "room refers to the server judge, which its"),
        (JUDGED, r".*: set env\.room\.judge\.url=… and env\.room\.judge\.model=…$"),
        ('key: "???"', r"room has no value for key \(\?\?\?\): set env\.room\.servers\.room\.key=…"),
        (MODEL, r"room would have the policy judge itself: set env\.room\.judge\.url=…"),
    ],
)
def test_what_cannot_be_played_is_refused_with_the_reason(values, reason, tmp_path):
    with pytest.raises(ConfigError, match=f"env.room cannot be played: {reason}"):
        playable_servers("room", ROOM, site_with(tmp_path, values))


MODEL_SERVER = """
judge:
  responses_api_models:
    {}
"""
OPENAI = "openai_model: {{entrypoint: app.py, openai_base_url: {}, openai_api_key: {}, openai_model: wise}}"


def test_the_endpoint_of_a_file_of_nemo_gyms_is_asked_once_its_variables_are_set():
    file = OPENAI.format("'${oc.env:THEIR_URL,MISSING}'", "'${oc.env:THEIR_KEY,null}'")
    servers = yaml.safe_load(FILE.format(values=JUDGED) + MODEL_SERVER.format(file))

    def said(**environ: str) -> list[str]:
        return list(reasons_against(servers, "walker", "x", environ=environ))

    assert [line.split(" (")[0] for line in said()] == [
        "judge has no value for openai_base_url",
        "judge has no value for openai_api_key",
    ]
    assert len(said(THEIR_URL="http://127.0.0.1:9/v1")) == len(said(THEIR_KEY="a-key")) == 1
    assert said(THEIR_URL="http://127.0.0.1:9/v1", THEIR_KEY="a-key") == []


def test_keys_that_the_user_gives_a_model_server_are_not_missed(tmp_path):
    site = site_with(tmp_path, JUDGED)
    with (site / ROOM.config_path).open("a") as file:
        file.write(MODEL_SERVER.format(OPENAI.format("null", "null")))
    keys = {"openai_base_url": "http://127.0.0.1:8/v1", "openai_api_key": {"key_env": "NOT_SET_YET"}}
    env = dataclasses.replace(ROOM, servers={"judge": keys})
    _, _, values = server_of(playable_servers("room", env, site)["judge"])  # check_variables asks for it
    assert values["openai_api_key"] == "${oc.env:NOT_SET_YET}"


@pytest.mark.parametrize(
    ("server", "said"),
    [
        (OPENAI.format("null", "x"), "has no value for openai_base_url (null)"),
        (OPENAI.format("http://h/v1", "null"), "has no value for openai_api_key (null)"),
        (OPENAI.format("http://h/v1", "YOUR_KEY"), "has no value for openai_api_key (YOUR_KEY)"),
        (OPENAI.format("http://h/v1", "'??'"), "has no value for openai_api_key (??)"),
        (
            OPENAI.format("'${oc.env:NOT_SET,MISSING}'", "x"),
            "has no value for openai_base_url (${oc.env:NOT_S",
        ),
        (
            OPENAI.format("'${oc.select:a,http://unset.local/v1}'", "x"),
            "has no value for openai_base_url (${",
        ),
        (OPENAI.format("'${oc.env:NOT_SET}'", "x"), "has no value for openai_base_url (${oc.env:NOT_SET})"),
        (
            OPENAI.format("https://h/v1", "'${oc.env:NOT_SET,dummy}'"),
            "has no value for openai_api_key (${oc.e",
        ),
        ("vllm_model: {entrypoint: app.py, model: wise, api_key: x}", "has no value for base_url (null)"),
        (
            "vllm_model: {entrypoint: app.py, model: m, base_url: [], api_key: x}",
            "has no value for base_url (",
        ),
        ("local_vllm_model: {entrypoint: app.py, model: m}", "would start a vLLM of its own with Ray"),
        ("genrm_model: {entrypoint: app.py, model: m}", "would start a vLLM of its own with Ray"),
    ],
)
def test_a_judge_that_no_endpoint_is_named_for_is_refused_with_the_key_that_names_one(server, said):
    servers = yaml.safe_load(FILE.format(values=JUDGED) + MODEL_SERVER.format(server))
    reasons = list(reasons_against(servers, "walker", "x"))
    assert len(reasons) == 1 and reasons[0].startswith(f"judge {said}")
    if "genrm" not in server:  # whose messages no other model takes
        assert reasons[0].endswith(": set env.x.judge.url=… and env.x.judge.model=…")
        assert needs_judge(servers, "walker")
    # The same model as a simulated user, which the agent asks, is no judge.
    servers["walker"]["responses_api_agents"]["walker_kind"]["user"] = servers["room"]["resources_servers"][
        "room_kind"
    ].pop("judge")
    [reason] = reasons_against(servers, "walker", "x")
    assert reason.startswith(f"judge {said}") and not needs_judge(servers, "walker")
    fix = (
        "set env.x.servers.judge." if "no value" in said else "serve the model by a vLLM that you start, and "
    )
    assert f": {fix}" in reason


def test_a_key_that_a_file_leaves_open_is_named_and_one_that_it_leaves_out_is_not():
    values = "api_key: '${oc.select:a,MISSING}', other_key: '${oc.env:A,null}', image: '', state: missing"
    servers = yaml.safe_load(FILE.format(values=values))
    [reason] = reasons_against(servers, "walker", "x")
    assert reason == (
        "room has no value for api_key (${oc.select:a,MISSING}): set "
        "env.x.servers.room.api_key.key_env=…, the variable that has it"
    )


CODE = """
from pydantic import BaseModel

class SimpleServer(BaseModel):
    pass

class Config(BaseModel):
    api_key: str
    level: int = 3
    note: str | None = None

class Room(SimpleServer):
    config: Config
"""


@pytest.mark.parametrize(
    ("values", "lacks"),
    [
        ("api_key: null", ["api_key (null)"]),
        ("port: 1", ["api_key (null)"]),
        ("api_key: '${oc.select:their_key,null}'", ["api_key (${oc.select:their_key,null})"]),
        ("api_key: '${oc.env:NO,${oc.env:NO_2,null}}'", ["api_key (${oc.env:NO,${oc.env:NO_2,null}})"]),
        ("api_key: MISSING", ["api_key (MISSING)"]),
        ("api_key: x, level: null", ["level (null)"]),
        ("level: null", ["api_key (null)", "level (null)"]),
        ("api_key: x, note: '${oc.env:NO,MISSING}'", ["note (${oc.env:NO,MISSING})"]),
        ("api_key: '', note: '${oc.env:NO,null}'", []),
        ("api_key: 'a${oc.env:NO,null}'", []),
        ("api_key: '${oc.env:SET,null}', note: MISSING", []),
        ("api_key: \"${oc.env:NO,''}\"", []),
    ],
)
def test_a_null_is_named_where_the_servers_own_class_does_not_allow_it(values, lacks, tmp_path):
    servers = yaml.safe_load(FILE.format(values=values))
    roots = [site_with(tmp_path, values)]
    put_code(roots[0])
    reasons = list(reasons_against(servers, "walker", "x", environ={"SET": "a-value"}, roots=roots))
    secret = ".key_env=…, the variable that has it"
    assert reasons == [
        f"room has no value for {lack}: set env.x.servers.room.{key}{secret if key == 'api_key' else '=…'}"
        for lack in lacks
        for key in [lack.split()[0]]
    ]


def put_code(site: Path) -> None:
    code = site / "resources_servers" / "room_kind" / "app.py"
    code.parent.mkdir()
    code.write_text(CODE)


def test_a_key_that_the_user_sets_is_no_longer_missed_and_a_null_of_the_users_is(tmp_path):
    site = site_with(tmp_path, "api_key: null")
    put_code(site)
    mine = dataclasses.replace(ROOM, servers={"room": {"api_key": {"key_env": "NOT_SET_YET"}}})
    assert "room" in playable_servers("room", mine, site)
    nothing = dataclasses.replace(ROOM, servers={"room": {"api_key": "x", "level": None}})
    with pytest.raises(ConfigError, match=r"room has no value for level \(null\)"):
        playable_servers("room", nothing, site)


PROGRAM = """
room:
  resources_servers:
    room_kind: {{entrypoint: app.py}}
walker:
  responses_api_agents:
    program_agent:
      entrypoint: app.py
      resources_server: {{type: resources_servers, name: room}}
      {asks}
"""
PAST = (
    "walker (program_agent) asks the policy without NeMo Gym's model server, so its replies have no token ids"
)
NEVER = "walker (program_agent) asks no model server, so the policy would never be asked"
FIX = ": take an environment whose agent has a model_server"


@pytest.mark.parametrize(
    ("asks", "reasons", "of_text"),
    [
        ("options: {url: '${policy_base_url}', model: '${policy_model_name}'}", [PAST + FIX], []),
        ("model: claude-sonnet", [NEVER + FIX], [NEVER + FIX]),
        ("model: '${policy_model_name}'", [NEVER + FIX], [NEVER + FIX]),
        ("model_server: {type: responses_api_models, name: policy_model}", [], []),
        ("inner: {type: responses_api_agents, name: other}", [], []),
    ],
)
def test_an_agent_of_nemo_gyms_without_a_model_server_is_refused_by_name(asks, reasons, of_text, tmp_path):
    servers = yaml.safe_load(PROGRAM.format(asks=asks))
    servers["other"] = yaml.safe_load(PROGRAM.format(asks=MODEL))["walker"]
    assert list(reasons_against(servers, "walker", "x")) == reasons
    assert list(reasons_against(servers, "walker", "x", gives_tokens=False)) == of_text
    assert not list(reasons_against(servers, "walker", "x", is_own=True)), "one's own may carry them"


def test_a_server_without_an_entrypoint_is_named():
    servers = yaml.safe_load(FILE.format(values="domain: games").replace("entrypoint: app.py, ", ""))
    assert list(reasons_against(servers, "walker", "x")) == [
        "room has no entrypoint: write entrypoint: app.py, its Python file, into its definition"
    ]


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


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ("key: {sub: '${here}'}", "has no value for key.sub (${here}): set env.x.servers.room.key.sub=…"),
        (
            "api_key: '${mine}'",
            "has no value for api_key (${mine}): set env.x.servers.room.api_key.key_env=…, ",
        ),
        ("judge_url: '${mine}'", "has no value for judge_url (${mine}): set env.x.judge.url=… and "),
        ("url: '${policy_base_url}'", "would have the policy judge itself: name another model in a copy"),
    ],
)
def test_a_value_that_the_file_leaves_open_is_named_with_the_key_that_sets_it(values, reason):
    [said] = reasons_against(yaml.safe_load(FILE.format(values=values)), "walker", "x")
    assert said.startswith(f"room {reason}")


def test_what_the_user_sets_about_a_server_is_merged_into_its_definition(tmp_path):
    site = site_with(tmp_path, "key: '???', api_key: x, limits: {turns: 2, words: 9}")
    mine = {"key": [1], "api_key": {"key_env": "MY_KEY"}, "limits": {"turns": 3}, "new": {}}
    env = dataclasses.replace(ROOM, servers={"room": mine, "walker": {"max_steps": 7}})
    servers = playable_servers("room", env, site)
    assert server_of(servers["room"])[2] == {
        "entrypoint": "app.py",
        "key": [1],
        "api_key": "${oc.env:MY_KEY}",
        "limits": {"turns": 3, "words": 9},
        "new": {},
    }
    assert server_of(servers["walker"])[2]["max_steps"] == 7
    with pytest.raises(ConfigError, match=r"servers\.romo is no server of walker; did you mean room"):
        playable_servers("room", dataclasses.replace(ROOM, servers={"romo": {"key": 1}}), site)


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
    assert catalogue["verifif"].needs_judge and not catalogue["ns_tools"].needs_judge
    [reason] = catalogue["critpt"].reasons
    assert (
        "api_key" in reason and "set env.critpt.servers.critpt_resources_server.api_key.key_env=…" in reason
    )
    if "math_with_judge_opencode_agent" in catalogue:  # of 0.4
        [reason] = catalogue["math_with_judge_opencode_agent"].reasons
        assert reason.startswith("math_with_judge_opencode_agent (opencode_agent) asks the policy without")
    tried = load_tried(nemo_gym_version(site))
    assert not [name for name, seen in tried.items() if "reason" not in seen and catalogue[name].reasons]
    assert sum(entry.needs_judge for entry in catalogue.values()) >= 50
    assert options_of(blackjack) == {
        "config_path": "environments/blackjack/config.yaml",
        "agent": "blackjack_gymnasium_agent",
        "data": {"source": "nemo_gym"},
    }
    assert kept_catalogue(gym, cache_dir()) == catalogue


OWN = """
mcqa:
  resources_servers:
    mcqa: {entrypoint: app.py, domain: games}
mcqa_agent:
  responses_api_agents:
    simple_agent:
      entrypoint: app.py
      resources_server: {type: resources_servers, name: mcqa}
      model_server: {type: responses_api_models, name: policy_model}
"""


@pytest.mark.gym
def test_environments_of_the_working_directory_come_before_nemo_gyms(gym_python, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {"mcqa": OWN, "mine": OWN.replace("mcqa", "mine"), "broken": f"{OWN}\nbroken:\n  - ]["}
    for name, text in files.items():
        path = tmp_path / "resources_servers" / name / "configs" / f"{name}.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    (tmp_path / "resources_servers" / "mine" / "data").mkdir()
    (tmp_path / "resources_servers" / "mine" / "data" / "example.jsonl").write_text("not JSON\n")
    said, gym = [], GymConfig(python=str(gym_python))
    catalogue = load_catalogue(gym, cache_dir(), said.append)
    assert [name for name, entry in catalogue.items() if entry.is_own] == ["mcqa", "mine"]
    mine = catalogue["mine"]
    assert (mine.agent, mine.config_path) == ("mine_agent", "resources_servers/mine/configs/mine.yaml")
    assert (mine.examples, mine.num_examples) == ("resources_servers/mine/data/example.jsonl", 0)
    assert catalogue["mcqa"].domain == "games" and not catalogue["blackjack"].is_own
    [warning] = [text for text in said if "warning" in text]
    assert "broken.yaml defines no environment, as NeMo Gym refuses it" in warning
    assert kept_catalogue(gym, cache_dir()) == catalogue
    monkeypatch.chdir("/")
    assert not any(entry.is_own for entry in load_catalogue(gym, cache_dir(), print).values())
