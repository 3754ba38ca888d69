"""NeMo Gym's servers of a layout, really started, and a policy that always says the same."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from aiohttp import web

from gymexp.gym.host_client import GymHost
from gymexp.gym.server_plan import Layout
from gymexp.processes import ports
from gymexp.processes.supervisor import Service, Supervisor


class Servers:
    def __init__(
        self, layout_of: Callable[..., Layout], gym_python: Path, logs: Path, stack: ExitStack
    ) -> None:
        sockets = {}

        def port(name: str) -> int:
            sockets[name] = stack.enter_context(ports.listen())
            return sockets[name].getsockname()[1]

        self.layout = layout_of(port)
        self.supervisor = Supervisor(
            health_interval_s=0.2, health_timeout_s=30.0, start_timeout_s=120.0, on_change=lambda: None
        )
        host = GymHost(gym_python, self.layout, sockets, logs / "gym-host.log")
        self.supervisor.add(Service("gym-host", host.start, host.log))
        for name, sock in sockets.items():
            log = logs / f"{name}.log"
            self.supervisor.add(
                Service(
                    name,
                    lambda name=name, log=log: host.start_server(name, log),
                    log,
                    ports.url_of(sock),
                    max_restarts=0 if "broken" in name else 1,
                )
            )
        self.names = list(sockets)


def policy_that_says(text: str, **message: object) -> web.Application:
    """An endpoint as the gateway's, with ids of its own choice."""

    async def complete(request: web.Request) -> web.Response:
        ids = {
            "prompt_token_ids": [1, 2],
            "generation_token_ids": [3, 4],
            "generation_log_probs": [-0.5, -0.25],
        }
        said = {"role": "assistant", "content": text} | ids | message
        choice = {"index": 0, "message": said, "finish_reason": "stop", "logprobs": None}
        about = {"id": "c", "object": "chat.completion", "created": 1, "model": "policy"}
        return web.json_response(about | {"choices": [choice]})

    app = web.Application()
    app.add_routes([web.post("/v1/chat/completions", complete)])
    return app
