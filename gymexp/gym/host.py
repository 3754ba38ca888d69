"""Runs NeMo Gym's servers, one forked process each. A script for NeMo Gym's venv; of gymexp it imports
`server_code.py`, `judge_calls.py` and `run_key.py` alone, which lie beside it.

NeMo Gym's modules take six seconds or more to import. This process, the host, imports them once and then
forks a child for each server that the controller starts. So a start, or a restart after a failure, takes a
fraction of a second, and the servers share the memory of the imported code. NeMo Gym imports Ray, but nothing
starts it.

The user's own servers are found before NeMo Gym's. They lie in `own`, in folders named like NeMo Gym's. As
under NeMo Gym, a server runs in its own folder and imports that folder's modules by their plain names. A
server that cannot be imported fails when it starts, in its own log.

A server requires the run's key for NeMo Gym on every path, so that nobody else plays with the policy. The
servers send the key in their requests to each other.

Line protocol, JSON objects. First line in: {"config": NeMo Gym's global config, "servers": {name: {"module",
"fd", "asked": paths of the keys that the user sets}}, "own": folder, "key": text or null, "judges": {server
name: seconds}}. Then in: {"start": name, "log": path} or {"alive": true}. Out: {"loaded": seconds, "broken":
{name: the error of its import}}, {"started": name, "pid"}, {"exited": pid, "code"} (negative: the signal's
number), {"error": text}, and {"alive": true} in reply. The host ends when its input or its parent ends, and
its children end with it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import select
import signal
import socket
import sys
import time
import traceback
from contextvars import ContextVar
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # which PYTHONSAFEPATH leaves out, as in a job
from judge_calls import FAILED, Judges  # pyright: ignore[reportMissingImports]
from run_key import require_key, session_with_key  # pyright: ignore[reportMissingImports]
from server_code import Code, add_newer, check_asked  # pyright: ignore[reportMissingImports]

del sys.path[0]

PROTOCOL = os.dup(1)  # NeMo Gym prints while it is imported: from here on, stdout is the log
os.dup2(2, 1)


def die_with_parent() -> None:
    """Asks the kernel for SIGKILL when the parent ends. Exits at once if the parent has ended already."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def say(**message: object) -> None:
    """Sends a line of JSON to the controller."""
    os.write(PROTOCOL, (json.dumps(message) + "\n").encode())


def load(config: dict, servers: dict, own: str, key: str | None) -> dict[str, Code]:
    """Imports the servers' modules and returns each server's code by name.

    config: NeMo Gym's global config. servers: each server's module, by name. own: the directory of the user's
    own servers. key: the key that servers send to each other.
    """
    from nemo_gym import server_utils  # pyright: ignore[reportMissingImports]
    from nemo_gym.global_config import (  # pyright: ignore[reportMissingImports]
        GlobalConfigDictParserConfig,
        get_global_config_dict,
    )
    from omegaconf import OmegaConf

    get_global_config_dict(
        GlobalConfigDictParserConfig(
            initial_global_config_dict=OmegaConf.create(config),
            skip_load_from_cli=True,
            skip_load_from_dotenv=True,
        )
    )
    if key:
        server_utils.ClientSession = session_with_key(key, config)  # all requests of NeMo Gym go through it
    if any(os.path.isdir(os.path.join(own, server["module"].split(".")[0])) for server in servers.values()):
        sys.path.insert(0, own)
    modules = dict.fromkeys(server["module"] for server in servers.values())
    codes = {module: Code(module) for module in modules}
    return {name: codes[server["module"]] for name, server in servers.items()}


KINDS = {"resources_servers", "responses_api_agents", "responses_api_models", "environment_servers"}
# An agent calls these paths before the policy's first turn, so what a server refuses on them is the row.
BEFORE_POLICY = ("/seed_session", "/reset")
# The policy's responses so far in this rollout (a request to an agent's /run), as NeMo Gym's JSON.
RESPONSES: ContextVar[list[bytes] | None] = ContextVar("responses", default=None)
# {"failed": header, "said": the answer's text} if the policy's last call in this rollout failed. NeMo Gym's
# aviary_agent ends an episode there, and asks for a reward.
POLICY_CALL: ContextVar[dict[str, str] | None] = ContextVar("policy_call", default=None)


def url_of(error: Any) -> Any:
    """Returns the URL of the request that failed with an error of aiohttp's; None for any other error. NeMo
    Gym 0.7 keeps only its text."""
    from yarl import URL

    request = getattr(error, "request_info", None)
    return None if request is None else URL(str(request.url))


def refusal(error: Any, responses: list[bytes], resources_ports: set[int]) -> bytes | None:
    """Returns the body of the agent's answer to /run if a resources server refused the policy's words as a
    bad request (400, or 422 for the response in its body); None for any other error. NeMo Gym alone would
    answer 500.

    The body is {"refused": the server's answer, "responses": the policy's responses up to the refusal}.
    """
    text = getattr(error, "response_content", b"")
    url = url_of(error)
    status = getattr(error, "status", None)
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


async def note_policy_call(server: str, answer: Any) -> None:
    """Notes the policy's answer, or that it failed, for the rollout that this server plays."""
    responses, call = RESPONSES.get(), POLICY_CALL.get()
    if responses is None or call is None:
        return
    call.clear()
    if answer.status == 200:
        responses.append(await answer.read())
    elif answer.status >= 400:
        call["said"] = await answer.text(errors="replace")
        said = f"answered {answer.status}: {call['said'][:_MAX_REASON]}"
        call["failed"] = answer.headers.get(FAILURE_HEADER) or _header_value(server, said)


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


def build_app(name: str, cls: Any, asked: list[list[str]], judges: dict[str, float]):
    """Returns the server's web application, built as in NeMo Gym's own run_webserver, but without Ray. asked:
    as for `check_asked`. judges: as for `Judges`."""
    from nemo_gym.config_types import BaseServerConfig  # pyright: ignore[reportMissingImports]
    from nemo_gym.global_config import (  # pyright: ignore[reportMissingImports]
        get_first_server_config_dict,
        get_global_config_dict,
    )
    from nemo_gym.server_utils import SESSION_ID_KEY, ServerClient  # pyright: ignore[reportMissingImports]
    from omegaconf import OmegaConf
    from starlette.responses import Response  # pyright: ignore[reportMissingImports]

    class RecordingClient(ServerClient):
        async def request(self, server_name: str, url_path: str, method: str, **kwargs: Any) -> Any:
            try:
                answer = await super().request(server_name, url_path, method, **kwargs)
            except BaseException as error:  # also that the server's own patience ended
                watched.note(server_name, None, f"{type(error).__name__}: {error}")
                raise
            if answer.status >= 400:
                watched.note(server_name, answer.headers.get(FAILURE_HEADER), f"answered {answer.status}")
            if url_path.endswith("/v1/responses"):
                await note_policy_call(server_name, answer)
            return answer

    global_config = get_global_config_dict()
    values = OmegaConf.to_container(get_first_server_config_dict(global_config, name), resolve=True)
    assert isinstance(values, dict)
    config = cls.model_fields["config"].annotation.model_validate(values | {"name": name})
    check_asked(config, asked)
    client = RecordingClient(
        head_server_config=BaseServerConfig.model_validate(global_config["head_server"]),
        global_config_dict=global_config,
    )
    server = cls(config=config, server_client=client)
    app = server.setup_webserver()
    server.setup_liveness(app)
    names, resources_ports = ports_of(OmegaConf.to_container(global_config))
    watched = Judges(name, judges, names)

    @app.middleware("http")
    async def classify_error(request: Any, call_next: Any) -> Any:
        responses: list[bytes] | None = [] if request.url.path == "/run" else None
        token = RESPONSES.set(responses)
        failed: list[str] = []
        failed_token = FAILED.set(failed)
        call: dict[str, str] = {}
        call_token = POLICY_CALL.set(call)
        try:
            response = await call_next(request)
            session = (request.scope.get("session") or {}).get(SESSION_ID_KEY)
            if failure := watched.failure(request.url.path, session, failed):
                request.state.failed = failure
                return Response("the judge failed", status_code=500)
            if responses is not None and response.status_code == 200 and "failed" in call:
                request.state.failed = call["failed"]
                return Response(call["said"], status_code=500)
            return response
        except Exception as error:
            if responses and (body := refusal(error, responses, resources_ports)):
                return Response(body, status_code=400, media_type="application/json")
            request.state.failed = failed[0] if failed else failure_origin(error, name, names)
            raise
        finally:
            RESPONSES.reset(token)
            FAILED.reset(failed_token)
            POLICY_CALL.reset(call_token)

    server.setup_exception_middleware(app)

    @app.middleware("http")
    async def add_failure_header(request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        if value := getattr(request.state, "failed", None):
            response.headers[FAILURE_HEADER] = value
        return response

    add_newer(server, app)
    return app


def serve(app: Any, sock: socket.socket, key: str | None) -> None:
    """Runs a server's application on `sock`, which is open already. key: what it requires of requests."""
    import uvicorn  # pyright: ignore[reportMissingImports]

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(65535, hard), hard))
    config = uvicorn.Config(
        require_key(key, app),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=1,
        timeout_keep_alive=30,
    )
    try:
        uvicorn.Server(config).run(sockets=[sock])
    except SystemExit as end:  # a start that fails, whose exception uvicorn has written to the log
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)


def start(name: str, log: str, server: Code, sock: socket.socket, first: dict) -> int:
    """Forks a child that runs the server `name` and writes its output to `log`. Returns the child's pid.
    first: the first message."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        die_with_parent()
        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        os.close(PROTOCOL)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(out, 2)
        asked = first["servers"][name]["asked"]
        app = build_app(name, server.enter(), asked, first["judges"])
        serve(app, sock, first["key"])
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGUSR2):  # the controller decides when servers end
        signal.signal(number, signal.SIG_IGN)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)
    first = json.loads(sys.stdin.buffer.readline())
    began = time.monotonic()
    try:
        codes = load(*(first[part] for part in ("config", "servers", "own", "key")))
    except BaseException as error:
        traceback.print_exc()
        say(error=f"{type(error).__name__}: {error}")
        sys.exit(1)
    sockets = {name: socket.socket(fileno=server["fd"]) for name, server in first["servers"].items()}
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    # Imported code is never garbage, so the garbage collectors of the servers need not search it.
    gc.collect()
    gc.freeze()
    broken = {n: f"{type(c.error).__name__}: {c.error}" for n, c in codes.items() if c.error}
    say(loaded=round(time.monotonic() - began, 2), broken=broken)

    pending = b""
    while True:
        readable, _, _ = select.select([0, woken], [], [])
        if woken in readable:
            os.read(woken, 4096)
            while True:
                try:
                    pid, status = os.waitpid(-1, os.WNOHANG)
                except ChildProcessError:
                    break
                if pid == 0:
                    break
                say(exited=pid, code=os.waitstatus_to_exitcode(status))
        if 0 in readable:
            chunk = os.read(0, 65536)
            if not chunk:
                return
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                message = json.loads(line)
                if "alive" in message:
                    say(alive=True)
                    continue
                name = message["start"]
                say(started=name, pid=start(name, message["log"], codes[name], sockets[name], first))


if __name__ == "__main__":
    main()
