"""Calls to the judges of environments (`env.<name>.judge`): one that fails must never become a reward.

A part of host.py, in NeMo Gym's venv; it imports nothing of gymexp. The judge's own server is NeMo Gym's
vllm_model. NeMo Gym would ask an endpoint that is down or overloaded for ever, and take some refusals for an
empty answer. Many resources servers take a judge that fails for a verdict against the policy. So the judge's
server raises, and a resources server whose call to it failed answers 500, whatever it made of it.
"""

from __future__ import annotations

import asyncio
import json
import time
from contextvars import ContextVar
from typing import Any

_MARGIN_S = 2.0  # of the rollout's time, in which the servers pass on that the judge has failed
_PATIENCE_S = 30.0  # for an endpoint that is down or broken; for one that is overloaded, the whole call's
_BROKEN, _OVERLOADED = 500, 429
# The failed calls to a judge, as values of host.py's FAILURE_HEADER, while a server answers one request.
FAILED: ContextVar[list[str] | None] = ContextVar("failed", default=None)


class JudgeFailed(RuntimeError):
    """The judge's endpoint gave no answer."""


class Judges:
    """What a server knows of the judges. judges: by server name the limit in seconds of a call."""

    def __init__(self, name: str, judges: dict[str, float], ports: dict[int, str]) -> None:
        """name: of the server that this process runs. ports: the names of all servers."""
        self._judges = judges
        self._ports = {port: server for port, server in ports.items() if server in judges}
        self._sessions: dict[str, str] = {}  # failures of sessions whose verdict is still to come
        if name in judges:
            _be_patient(judges[name])
        elif judges:
            self._watch_clients()

    def note(self, server: str, header: str | None, said: str) -> None:
        """Notes a failed call to a server, if that is a judge. header: of its answer, FAILURE_HEADER."""
        failed = FAILED.get()
        if server in self._judges and failed is not None:
            failed.append(header or json.dumps({"server": server, "said": said}))

    def failure(self, path: str, session: str | None, failed: list[str]) -> str | None:
        """Returns the failure for which an answer that looks good must not be given, or None. A tool's
        failure also spoils the verdict on its session."""
        if failed and session and path != "/verify":
            self._sessions[session] = failed[0]
        earlier = self._sessions.pop(session, None) if session and path == "/verify" else None
        return failed[0] if failed else earlier

    def _watch_clients(self) -> None:
        """Notes the failed calls of NeMo Gym's client of OpenAI, which knows the judge by its address."""
        from nemo_gym.openai_utils import NeMoGymAsyncOpenAI  # pyright: ignore[reportMissingImports]
        from yarl import URL  # pyright: ignore[reportMissingImports]

        request = NeMoGymAsyncOpenAI._request

        async def watched(client: Any, **arguments: Any) -> Any:
            server = self._ports.get(URL(arguments["url"]).port or 0, "")
            try:
                answer = await request(client, **arguments)
            except BaseException as error:
                header = (getattr(error, "headers", None) or {}).get("x-gymexp-failed")
                self.note(server, header, f"{type(error).__name__}: {error}")
                raise
            if answer.status >= 400:
                self.note(server, answer.headers.get("x-gymexp-failed"), f"answered {answer.status}")
            return answer

        NeMoGymAsyncOpenAI._request = watched


def _be_patient(limit_s: float) -> None:
    """Bounds the calls of NeMo Gym's client of OpenAI in this process, and has it raise JudgeFailed."""
    from nemo_gym.openai_utils import NeMoGymAsyncOpenAI  # pyright: ignore[reportMissingImports]
    from nemo_gym.server_utils import get_global_aiohttp_client  # pyright: ignore[reportMissingImports]
    from rollout_deadline import seconds_left  # pyright: ignore[reportMissingImports]

    async def request(client: Any, **arguments: Any) -> Any:
        arguments.pop("_internal", None)
        url, began, pause, said = arguments["url"], time.monotonic(), 0.5, ""
        left = seconds_left()
        time_s = limit_s if left is None else max(0.0, min(limit_s, left - _MARGIN_S))
        try:
            async with asyncio.timeout(time_s):
                while True:
                    patience, asked_pause, said = await _try(get_global_aiohttp_client(), limit_s, arguments)
                    if not isinstance(said, str):
                        return said
                    said = said.replace(client.api_key, "***")
                    if time.monotonic() - began > patience:
                        raise JudgeFailed(f"{url} {said}")
                    await asyncio.sleep(max(pause, asked_pause))
                    pause = min(2 * pause, 5.0)
        except TimeoutError:
            last = f"; the last time it {said}" if said else ""
            raise JudgeFailed(
                f"{url} gave no answer within {time_s:.0f} s, of the {limit_s:g} s that a rollout has "
                f"(env.<name>.timeout_s){last}"
            ) from None

    NeMoGymAsyncOpenAI._request_with_retry = request


async def _try(http: Any, limit_s: float, arguments: dict[str, Any]) -> tuple[float, float, Any]:
    """Returns the answer to a request, or why there is none as a text; before it the seconds to go on trying,
    and the least pause before the next try, as the endpoint asks for it."""
    from aiohttp import ClientError

    try:
        answer = await http.request(**arguments)
        if answer.status < 400:
            return 0.0, 0.0, answer
        said = f"answered {answer.status}: {' '.join((await answer.text(errors='replace')).split())[:300]}"
    except ClientError as error:
        return _PATIENCE_S, 0.0, f"cannot be reached: {type(error).__name__}: {error}"
    if answer.status != _OVERLOADED and answer.status < _BROKEN:
        return 0.0, 0.0, said
    pause = answer.headers.get("Retry-After", "")
    is_overloaded = answer.status == _OVERLOADED or bool(pause)
    return limit_s if is_overloaded else _PATIENCE_S, float(pause) if pause.isdecimal() else 0.0, said
