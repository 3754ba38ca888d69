"""A server that cannot be imported is named with its environment, its log and a fix, and hurts no other; a
server runs in its own folder, as under NeMo Gym."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
from real_servers import Servers

from gymexp.config.schema import EnvConfig, GymConfig
from gymexp.errors import ServiceError
from gymexp.gym.install import site_packages
from gymexp.gym.server_plan import plan
from gymexp.processes import ports
from gymexp.processes.access_keys import Keys
from gymexp.processes.supervisor import Supervisor
from gymexp.record.directory import RunDirectory
from gymexp.run.services import gym_servers

GOOD = """
import os, subprocess
from nemo_gym.base_resources_server import SimpleResourcesServer
from sibling import WORD

AT_IMPORT = open("words.txt").read()

class Good(SimpleResourcesServer):
    def setup_webserver(self):
        app = super().setup_webserver()

        @app.get("/seen")
        async def seen():
            child = subprocess.run(
                ["python", "-c", "import sys, sibling; print(sibling.WORD, sys.prefix)"],
                capture_output=True, text=True,
            )
            return {
                "at import": AT_IMPORT, "now": open("words.txt").read(), "sibling": WORD,
                "child": child.stdout.split(), "folder": os.getcwd(),
            }

        return app

    async def verify(self, body):
        raise NotImplementedError
"""
BROKEN = "import a_package_that_nobody_has\n"
CONFIG = """
{0}:
  resources_servers:
    {0}: {{entrypoint: app.py, domain: other}}
{0}_agent:
  responses_api_agents:
    simple_agent:
      entrypoint: app.py
      resources_server: {{type: resources_servers, name: {0}}}
      model_server: {{type: responses_api_models, name: policy_model}}
"""


def put(root: Path, name: str, code: str) -> EnvConfig:
    folder = root / "resources_servers" / name
    folder.mkdir(parents=True)
    (folder / "app.py").write_text(code)
    (folder / "sibling.py").write_text("WORD = 'beside'\n")
    (folder / "words.txt").write_text("own")
    (root / f"{name}.yaml").write_text(CONFIG.format(name))
    return EnvConfig(config_path=f"{name}.yaml", agent=f"{name}_agent")


@pytest.mark.gym
def test_a_server_that_cannot_be_imported_is_named_and_the_others_run_each_in_its_own_folder(
    gym_python, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    envs = {"nice": put(tmp_path, "good", GOOD), "torn": put(tmp_path, "broken", BROKEN)}
    site = site_packages(gym_python)

    def get(url: str) -> bytes:
        with urllib.request.urlopen(url, timeout=20) as response:
            return response.read()

    async def story() -> tuple[dict, str]:
        with ExitStack() as stack:
            servers = Servers(
                lambda port: plan(envs, GymConfig(), site, ["http://127.0.0.1:9"], port),
                gym_python,
                tmp_path,
                stack,
            )
            supervisor = servers.supervisor
            try:
                with pytest.raises(ServiceError) as caught:
                    await asyncio.wait_for(supervisor.failed, 120)
                while supervisor.services["nice-good"].state != "ready":
                    await asyncio.sleep(0.1)
                url = supervisor.services["nice-good"].url
                return json.loads(await asyncio.to_thread(get, f"{url}/seen")), str(caught.value)
            finally:
                await supervisor.close()

    seen, said = asyncio.run(asyncio.wait_for(story(), 150))
    folder = tmp_path / "resources_servers" / "good"
    assert seen == {
        "at import": "own",
        "now": "own",
        "sibling": "beside",
        "child": ["beside", str(gym_python.parent.parent)],
        "folder": str(folder),
    }
    assert said.startswith(
        "env.torn cannot start: its server torn-broken cannot be imported: ModuleNotFoundError: No module "
        f"named 'a_package_that_nobody_has' (log: {tmp_path}/torn-broken.log). The requirements.txt in"
    )
    assert "app.py" in (tmp_path / "torn-broken.log").read_text()
    assert "nice" not in said


IN_CONSTRUCTOR = """
from nemo_gym.base_resources_server import SimpleResourcesServer

class Broken(SimpleResourcesServer):
    def model_post_init(self, context):
        raise FileNotFoundError("words.bin not found: run generate.py first")

    async def verify(self, body):
        raise NotImplementedError
"""
AT_STARTUP = """
from nemo_gym.base_resources_server import SimpleResourcesServer

class Broken(SimpleResourcesServer):
    def setup_webserver(self):
        app = super().setup_webserver()

        async def load():
            raise FileNotFoundError("words.bin not found: run generate.py first")

        app.router.on_startup.append(load)
        return app

    async def verify(self, body):
        raise NotImplementedError
"""


@pytest.mark.gym
@pytest.mark.parametrize("code", [IN_CONSTRUCTOR, AT_STARTUP], ids=["constructor", "startup"])
def test_a_server_that_cannot_start_ends_the_run_soon_with_its_environment_error_log_and_a_fix(
    code, gym_python, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    envs = {"torn": put(tmp_path, "broken", code)}
    directory = RunDirectory(tmp_path / "run")
    directory.logs.mkdir(parents=True)
    sockets = {}

    async def story() -> str:
        with ExitStack() as stack:

            def port(name: str) -> int:
                sockets[name] = stack.enter_context(ports.listen())
                return sockets[name].getsockname()[1]

            gym = GymConfig()
            layout = plan(envs, gym, site_packages(gym_python), ["http://127.0.0.1:9"], port)
            supervisor = Supervisor(
                health_interval_s=gym.health_interval_s,
                health_timeout_s=gym.health_timeout_s,
                start_timeout_s=gym.start_timeout_s,
                on_change=lambda: None,
            )
            config = SimpleNamespace(gym=gym)
            hosted = layout, {gym_python: sockets}, Keys.new(), supervisor.heard
            for service in gym_servers(config, directory, *hosted):  # pyright: ignore[reportArgumentType]
                supervisor.add(service)
            try:
                with pytest.raises(ServiceError) as caught:
                    await asyncio.wait_for(asyncio.shield(supervisor.failed), 120)
                assert supervisor.services["torn-broken"].failures == 2
                return str(caught.value)
            finally:
                await supervisor.close()

    said = asyncio.run(asyncio.wait_for(story(), 150))
    assert said.startswith("env.torn cannot start: its server torn-broken exited with code ")
    assert (
        " at its start, twice in the same way: mend what its exception names, e.g. by one of its keys, "
        "env.torn.servers.broken.<key>. FileNotFoundError: words.bin not found: run generate.py first ("
    ) in said
    assert said.endswith(f"Look into {directory.logs / 'torn-broken.log'}")
