"""The client of somebody's OpenAI-compatible chat completions, which an evaluation plays as a baseline.

A request goes on as OpenAI's, without the fields that only gymexp's engines know. What passes by itself (429,
5xx, a broken connection) is tried again until the deadline of the reply. The key appears in the header of the
requests and nowhere else: it is taken out of every answer.
"""

from __future__ import annotations

import asyncio
import email.utils
import ipaddress
import logging
import random
import re
import time
import urllib.parse
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
import orjson
from aiohttp import web

from gymexp.gateway import chat
from gymexp.gateway.reply_check import checked_calls
from gymexp.gateway.text_policy import Answer
from gymexp.processes.access_keys import header
from gymexp.rollout.generation import EngineError, start_of

log = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 10.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
_HOPELESS = {401, 403, 404, 405}
# Fields of a request that go on. `seed` is replaced by each call's own.
_CARRIED = ("temperature", "top_p", "tools", "tool_choice", "parallel_tool_calls", "stop", "seed")
_CARRIED += ("top_k", "min_p", "repetition_penalty")  # vLLM's; present only if the evaluation sets them
_MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id")
_TOO_LONG = re.compile(r"context.?length|context.?window|maximum.{0,20}context|prompt is too long", re.I)


class _Refused(Exception):
    """The endpoint answered that it will not take this request. status: HTTP's."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"it answered {status}: {text}")
        self.status = status
        self.text = text


class _Passing(Exception):
    """A failure that may pass. pause_s: how long the endpoint asks to wait; None if it does not say.
    is_unreachable: whether no connection was made, or it broke."""

    def __init__(self, text: str, pause_s: float | None = None, is_unreachable: bool = False) -> None:
        super().__init__(text)
        self.pause_s = pause_s
        self.is_unreachable = is_unreachable


class Endpoint:
    """An OpenAI-compatible endpoint at `url` (…/v1), asked for `model` with `key` (None: without one).

    timeout_s: for one reply, with all of its attempts and pauses. An endpoint that could not be reached for
    so long is tried once by each request, until it answers again. One that took requests and has answered
    none for so long gets one request at a time, and the others fail at once, until it answers. After a 429
    every request waits as long as the endpoint asks for (Retry-After), and not only the one that was refused.
    """

    def __init__(self, url: str, model: str, key: str | None, timeout_s: float) -> None:
        self._url = url.rstrip("/")
        self._model = model
        self._key = key
        self._timeout_s = timeout_s
        self._limit_name = "max_tokens"  # OpenAI's newer models take max_completion_tokens alone
        self._closed_until = 0.0  # by time.monotonic(): until when the endpoint takes no requests
        self._unreachable_since: float | None = None  # by time.monotonic(); None: it answered the last time
        self._answered_at = 0.0  # by time.monotonic()
        self._silent_since: float | None = None  # by time.monotonic(); None: it answers
        self._num_waiting = 0  # requests that the endpoint has not answered yet
        self._session: aiohttp.ClientSession | None = None

    async def connect(self, app: web.Application) -> AsyncIterator[None]:
        """Opens the HTTP session before the app starts, and closes it at the end (for `app.cleanup_ctx`)."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0)
        # Proxies of the environment are for other machines than this one.
        proxies = not _is_loopback(urllib.parse.urlsplit(self._url).hostname or "")
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, headers=header(self._key), trust_env=proxies
        ) as self._session:
            yield

    async def answer(self, body: Mapping[str, Any]) -> Answer:
        try:
            reply = await self._ask_within_context(self._request_of(body))
        except _Refused as refusal:
            if _is_too_long(refusal):
                # NeMo Gym ends a rollout as truncated if a 400 has these words.
                raise chat.BadRequest(f"context length exceeded: {refusal.text}") from None
            raise EngineError(f"endpoint.url={self._url}: {_for_nemo_gym(str(refusal))}") from None
        except EngineError as error:
            raise EngineError(f"endpoint.url={self._url}: {error}") from None
        try:
            return _read_reply(reply, body)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise EngineError(f"endpoint.url={self._url} answered no chat completion: {error!r}") from None

    async def _ask_within_context(self, request: dict[str, Any]) -> Any:
        """Returns the answer as `_ask` does, also where the prompt and `max_tokens` together are longer than
        the endpoint's context. Without a limit the reply may then take the rest of the context, which is
        less than `max_tokens`."""
        try:
            return await self._ask(request)
        except _Refused as refusal:
            if not _is_too_long(refusal) or "max_tokens" not in request:
                raise
            return await self._ask({name: value for name, value in request.items() if name != "max_tokens"})

    async def problem(self) -> str:
        """Sends a request of one word. Other refusals than those of the key, the model and the path leave the
        judgement to the real requests."""
        hello = {"messages": [{"role": "user", "content": "Say yes."}], "max_tokens": 16}
        at = f"endpoint.url={self._url}, endpoint.model={self._model}"
        try:
            await self._ask(self._request_of(hello), patient=False)
        except _Refused as refusal:
            if refusal.status in _HOPELESS:
                key = "without a key" if self._key is None else "with the key of endpoint.key_env"
                return f"{at}: {refusal}\nThe request was sent {key} to {self._url}/chat/completions"
        except EngineError as error:
            return f"{at}: {error}. Is it the address of a running server, up to and with its /v1?"
        return ""

    def _request_of(self, body: Mapping[str, Any]) -> dict[str, Any]:
        request = {name: body[name] for name in _CARRIED if body.get(name) is not None}
        messages = [{k: m[k] for k in _MESSAGE_FIELDS if k in m} for m in body["messages"]]
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        return {"model": self._model, "messages": messages, **request} | (
            {"max_tokens": limit} if limit is not None else {}
        )

    async def _ask(self, request: dict[str, Any], patient: bool = True) -> Any:
        """Returns the endpoint's JSON answer. Raises _Refused, or EngineError at the deadline.

        patient: whether to try again after a connection failed.
        """
        pause_s, last = _FIRST_PAUSE_S, "no attempt"
        began = time.monotonic()
        deadline = began + self._timeout_s
        if self._silent_since is not None and self._num_waiting:
            silent_s = began - self._silent_since
            raise EngineError(
                f"no request was answered for {silent_s:.0f} s, and one still waits for its reply"
            )
        while (now := time.monotonic()) < deadline:
            wait_s = self._closed_until - now
            if wait_s > deadline - now:
                last += f", and asks to wait {wait_s:.0f} s more"
                break
            if wait_s > 0:
                await asyncio.sleep(wait_s)
                continue
            try:
                async with asyncio.timeout(deadline - now):
                    return await self._post(request)
            except TimeoutError:
                last = "the request was not answered"
                if self._answered_at < began:
                    self._silent_since = self._silent_since or began
            except _Passing as failure:
                last = str(failure)
                if failure.is_unreachable and (not patient or self._is_gone()):
                    raise EngineError(last) from None
                log.info("%s; trying again", last)
                if failure.pause_s is not None:
                    self._closed_until = max(self._closed_until, time.monotonic() + failure.pause_s)
                    continue
                await asyncio.sleep(pause_s * random.uniform(0.5, 1))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        raise EngineError(f"no reply within endpoint.timeout_s={self._timeout_s:g}: {last}")

    def _is_gone(self) -> bool:
        """Returns whether no request has reached the endpoint for as long as a reply may take."""
        since = self._unreachable_since
        return since is not None and time.monotonic() - since > self._timeout_s

    async def _post(self, request: dict[str, Any]) -> Any:
        """Returns the JSON answer to one attempt. Raises _Refused, _Passing."""
        body = dict(request)
        if "max_tokens" in body:
            body[self._limit_name] = body.pop("max_tokens")
        status, headers, data = await self._exchange(orjson.dumps(body))
        text = start_of(data)
        if status == 400 and "max_completion_tokens" in text and "max_tokens" in body:
            self._limit_name = "max_completion_tokens"
            raise _Passing(f"it answered 400: {text}", pause_s=0.0)
        if status in _PASSING and "insufficient_quota" not in text:
            raise _Passing(f"it answered {status}: {text}", _retry_after(headers))
        if status != 200:
            raise _Refused(status, text)
        try:
            return orjson.loads(data)
        except orjson.JSONDecodeError:
            raise _Passing(f"it answered no JSON: {text}") from None

    async def _exchange(self, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        """Returns status, headers and body of the answer to a request, without the key. Raises _Passing."""
        assert self._session is not None, "connect first"
        self._num_waiting += 1
        try:
            async with self._session.post(
                f"{self._url}/chat/completions",
                data=body,
                headers={"Content-Type": "application/json"},
                allow_redirects=False,  # another host must not get the key
            ) as response:
                data = await response.read()
        except (aiohttp.ClientError, OSError) as error:
            self._unreachable_since = self._unreachable_since or time.monotonic()
            raise _Passing(f"{type(error).__name__}: {error}", is_unreachable=True) from None
        finally:
            self._num_waiting -= 1
        self._unreachable_since = self._silent_since = None
        self._answered_at = time.monotonic()
        if self._key:
            data = data.replace(self._key.encode(), b"***")
        return response.status, response.headers, data


def _is_too_long(refusal: _Refused) -> bool:
    return refusal.status in (400, 413, 422) and _TOO_LONG.search(refusal.text) is not None


def _read_reply(reply: Any, body: Mapping[str, Any]) -> Answer:
    """Returns the answer in an endpoint's JSON. body: the request."""
    choice = reply["choices"][0]
    given = choice["message"]
    content, calls = given.get("content"), given.get("tool_calls") or []
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content)
    content = content if content is not None else given.get("refusal") or ""
    if not isinstance(content, str):
        raise TypeError("its message must have text")
    tools = [] if body.get("tool_choice") == "none" else body.get("tools") or []
    checked = checked_calls(calls, tools, body.get("parallel_tool_calls") is not False)
    if calls and not checked:
        content += orjson.dumps(calls).decode()  # a malformed call is plain text, as with gymexp's engines
    message: dict[str, Any] = {"role": "assistant", "content": content or (None if checked else "")}
    if checked:
        message["tool_calls"] = checked
    reasoning = given.get("reasoning_content") or given.get("reasoning")
    if isinstance(reasoning, str) and reasoning:
        message["reasoning_content"] = reasoning
    counts = reply.get("usage") or {}
    usage = {
        name: counts[name] for name in ("prompt_tokens", "completion_tokens") if type(counts.get(name)) is int
    }
    return Answer(message, str(choice.get("finish_reason") or "stop"), usage)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Returns the seconds that the headers ask to wait: a number, or a date (RFC 9110, 10.2.3)."""
    if (text := headers.get("Retry-After")) is None:
        return None
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def _for_nemo_gym(text: str) -> str:
    """Returns the text without the words by which NeMo Gym takes an error for a prompt that is too long."""
    return text.replace("max_tokens", "max-tokens").replace("context length", "context-length")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
