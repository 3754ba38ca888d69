"""The calls that a server makes while it plays a rollout: whose doing it is when one fails.

A part of host.py, in NeMo Gym's venv; it imports nothing of gymexp. NeMo Gym answers 500 whatever failed, and
in a typed episode a failure without a status.
"""

from __future__ import annotations

import json
import traceback
from contextvars import ContextVar
from typing import Any

KINDS = {"resources_servers", "responses_api_agents", "responses_api_models", "environment_servers"}
# An agent calls these paths before the policy's first turn, so what a server refuses on them is the row.
BEFORE_POLICY = ("/seed_session", "/reset")
# The policy's responses so far in this rollout (a request to an agent's /run), as NeMo Gym's JSON.
RESPONSES: ContextVar[list[bytes] | None] = ContextVar("responses", default=None)
# What failed in this rollout: "policy" and "said" of the policy's last call, "server" of the last call that
# failed (values of FAILURE_HEADER, and an answer's text), "refused" of the last answer to /verify.
CALLS: ContextVar[dict[str, Any] | None] = ContextVar("calls", default=None)


def url_of(error: Any) -> Any:
    """Returns the URL of the request that failed with an error of aiohttp's; None for any other error. NeMo
    Gym 0.7 keeps only its text."""
    from yarl import URL

    request = getattr(error, "request_info", None)
    return None if request is None else URL(str(request.url))


def refusal(
    url: Any, status: int | None, text: bytes, responses: list[bytes], resources_ports: set[int]
) -> bytes | None:
    """Returns the body of the agent's answer to /run if a resources server refused the policy's words as a
    bad request (400, or 422 for the response in its body); None for any other answer. NeMo Gym alone would
    answer 500.

    The body is {"refused": the server's answer, "responses": the policy's responses up to the refusal}.
    """
    if not responses or url is None or status not in (400, 422):
        return None
    if url.port not in resources_ports or url.path in BEFORE_POLICY:
        return None
    if status == 422:
        try:
            detail = json.loads(text)["detail"]
            places = [problem["loc"][:2] for problem in detail] if isinstance(detail, list) else []
        except (ValueError, KeyError, TypeError):
            return None
        if any(list(place) != ["body", "response"] for place in places):
            return None  # the server refused other fields, which come from the row
    refused = f"{url} answered {status}: {text.decode(errors='replace')[:2000]}"
    return b'{"refused": %s, "responses": [%s]}' % (json.dumps(refused).encode(), b",".join(responses))


class Again:
    """The stream of an answer that was read already, for NeMo Gym, which reads the stream itself."""

    def __init__(self, stream: Any, content: bytes) -> None:
        self._stream, self._content = stream, content

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    async def read(self, _: int = -1) -> bytes:
        return self._content


async def note_call(server: str, path: str, answer: Any, resources_ports: set[int]) -> None:
    """Notes what a server answered in the rollout that this process plays."""
    from yarl import URL

    responses, calls = RESPONSES.get(), CALLS.get()
    if responses is None or calls is None:
        return
    is_policy = path.endswith("/v1/responses")
    for key in ("policy", "said") if is_policy else ("refused",) if path == "/verify" else ():
        calls.pop(key, None)
    if answer.status == 200 and is_policy:
        responses.append(await answer.read())
    elif answer.status >= 400:
        text = await answer.read()
        answer.content = Again(answer.content, text)
        said = f"{path} answered {answer.status}: {text.decode(errors='replace')[:_MAX_REASON]}"
        calls["server"] = answer.headers.get(FAILURE_HEADER) or _header_value(server, said)
        if is_policy:
            calls |= {"policy": calls["server"], "said": text}
        elif path == "/verify":
            calls["refused"] = refusal(URL(answer.url), answer.status, text, responses, resources_ports)


async def typed_answer(request: Any, response: Any, calls: dict[str, Any]) -> Any:
    """Returns an environment server's answer to /run. Its text does not have the status of a call that
    failed, which `calls` (of CALLS) has."""
    from starlette.responses import Response  # pyright: ignore[reportMissingImports]

    body = b"".join([chunk async for chunk in response.body_iterator])
    stage = _failed_stage(body)
    if stage == "verification" and calls.get("refused"):
        return Response(calls["refused"], status_code=400, media_type="application/json")
    if stage and "server" in calls:
        request.state.failed = calls["server"]
    return Response(body, headers=dict(response.headers))


def _failed_stage(body: bytes) -> str | None:
    """Returns the stage of the failure that an environment server's answer to /run tells; None if it tells
    none."""
    try:
        reply = json.loads(body)
        failure = reply.get("failure") or {}
        kind = failure or reply.get("_ng_failure_class")
        return str(failure.get("stage") or reply.get("_ng_failure_stage")) if kind else None
    except (ValueError, AttributeError):
        return None


# An error response names in this header the server that failed first, and why. An agent answers 500 whichever
# server it called failed. The body is NeMo Gym's, and an agent may pass it to the policy; nobody else uses
# this header.
FAILURE_HEADER = "x-gymexp-failed"
_MAX_REASON = 1000  # characters, of up to six bytes each in JSON; aiohttp takes headers of 8 KB


def failure_origin(error: Exception, name: str, names: dict[int, str]) -> str:
    """Returns the value of FAILURE_HEADER for an exception that server `name` raised: {"server": the server
    that failed first, "said": why} in JSON. names: the names of all servers, by port."""
    url = url_of(error)
    if url is None:
        frames = traceback.extract_tb(error.__traceback__)
        place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
        return _header_value(name, f"{type(error).__name__}: {str(error)[:_MAX_REASON]}{place}")
    if value := (getattr(error, "headers", None) or {}).get(FAILURE_HEADER):
        return value  # the server that answered has passed on the first failure
    text = getattr(error, "response_content", b"").decode(errors="replace")
    reason = f"{url.path} answered {getattr(error, 'status', '')}: {text[:_MAX_REASON]}"
    return _header_value(names.get(url.port, str(url.origin())), reason)


def _header_value(server: str, reason: str) -> str:
    return json.dumps({"server": server, "said": reason})


def ports_of(config: Any) -> tuple[dict[int, str], set[int]]:
    """Returns the names of all servers by port, and the ports of the resources servers."""
    names: dict[int, str] = {}
    resources_ports: set[int] = set()
    for name, entry in config.items():
        for kind in KINDS.intersection(entry) if isinstance(entry, dict) else ():
            for values in entry[kind].values():
                names[values.get("port")] = str(name)  # NeMo Gym's own relays have none
                if kind == "resources_servers":
                    resources_ports.add(values["port"])
    return names, resources_ports
