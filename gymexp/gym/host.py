"""NeMo Gym's servers, one forked process each. Runs inside NeMo Gym's venv as a script; imports nothing of
gymexp.

NeMo Gym's modules take six seconds to import, and more. This process imports them once, then forks a child
for every server that it is told to start: a start, or a restart after a failure, takes a fraction of a second
and the servers share the imported code's memory. Ray is imported by NeMo Gym but never started.

A user's own servers, in folders of NeMo Gym's names in `own`, are found before NeMo Gym's.

Every path of a server takes the run's key for NeMo Gym, so that nobody else plays with the policy; what one
server asks of another says it.

Line protocol, JSON objects. First line in: {"config": NeMo Gym's global config, "servers": {name: {"module",
"fd"}}, "own": folder, "key": text or null}. Then in: {"start": name, "log": path}. Out: {"loaded": seconds},
{"started": name, "pid"}, {"exited": pid, "code"} (negative: the signal's number), {"error": text}. The host
ends with its input or its parent, and its children with it.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import hmac
import importlib
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

PROTOCOL = os.dup(1)  # NeMo Gym prints while it is imported; from here on, what is printed goes to the log
os.dup2(2, 1)


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL at the parent's end; end now if it is gone."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def say(**message: object) -> None:
    """A line of JSON to the controller."""
    os.write(PROTOCOL, (json.dumps(message) + "\n").encode())


def load(config: dict, servers: dict, own: str, key: str | None) -> dict:
    """Import what the servers are made of; returns each server's class by name. own: where the user's own
    folders of NeMo Gym's names lie. key: what they are to say to each other."""
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
        server_utils.ClientSession = telling(key, config)  # what all of NeMo Gym's requests go through
    if any(os.path.isdir(os.path.join(own, server["module"].split(".")[0])) for server in servers.values()):
        sys.path.insert(0, own)
    classes = {}
    for name, server in servers.items():
        module = importlib.import_module(server["module"])
        found = [
            value
            for value in vars(module).values()
            if isinstance(value, type)
            and issubclass(value, server_utils.SimpleServer)
            and value.__module__ == module.__name__
        ]
        if not found:
            raise ImportError(f"{server['module']} defines no NeMo Gym server")
        classes[name] = found[-1]
    return classes


def telling(key: str, config: dict) -> Any:
    """aiohttp's client session, which says the key to the servers of `config` and to nobody else."""
    from aiohttp import ClientSession

    servers = {
        (values["host"], values["port"])
        for entry in config.values()
        for kind in entry.values()
        if isinstance(kind, dict)
        for values in kind.values()
    }

    async def tell(request: Any, handler: Any) -> Any:
        if (request.url.host, request.url.port) in servers:
            request.headers["Authorization"] = f"Bearer {key}"
        return await handler(request)

    return functools.partial(ClientSession, middlewares=(tell,))


def demanding(key: str | None, app: Any) -> Any:
    """The ASGI application, for whoever has the key, and for other programs of this user's: some agents ask
    the model server by a client of their own, which says what it likes."""
    if not key:
        return app
    expected = f"Bearer {key}".encode()

    async def guarded(scope: dict, receive: Any, send: Any) -> None:
        given = b"".join(v for k, v in scope.get("headers", ()) if k == b"authorization")
        if scope["type"] == "lifespan" or hmac.compare_digest(given, expected) or is_of_this_user(scope):
            await app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b"the run's key is missing or another one\n"})

    return guarded


def is_of_this_user(scope: dict) -> bool:
    """Whether the other end of a connection is a socket that this user has opened on this machine; False
    where the kernel does not say so (proc_net(5) of Linux)."""
    try:
        ends = [
            f"{int.from_bytes(socket.inet_aton(host), sys.byteorder):08X}:{port:04X}"
            for host, port in (scope["client"], scope["server"])
        ]
        with open("/proc/net/tcp") as table:
            for line in table:
                _, local, remote, state, _, _, _, uid, _, inode, *_ = line.split()
                if [local, remote] == ends:  # established; one that is closed has no owner any more
                    return (state, int(uid)) == ("01", os.getuid()) and inode != "0"
    except (OSError, TypeError, ValueError, KeyError):
        pass
    return False


KINDS = {"resources_servers", "responses_api_agents", "responses_api_models"}
# Before the policy has spoken: what a server refuses there is the row.
BEFORE = ("/seed_session", "/reset")
# What the policy said so far in this rollout (an agent's /run), as NeMo Gym's responses.
HEARD: ContextVar[list[bytes] | None] = ContextVar("heard", default=None)


def refusal(error: Any, heard: list[bytes], resources_ports: set[int]) -> bytes | None:
    """The answer to /run where a resources server took the policy's words for a bad request (400, or 422 for
    the response in its body), which NeMo Gym would answer with 500; None for any other error.

    {"refused": what the server said, "responses": what the policy had said}
    """
    text = getattr(error, "response_content", b"")
    request = getattr(error, "request_info", None)
    status = getattr(error, "status", None)
    if not heard or request is None or status not in (400, 422):
        return None
    if request.url.port not in resources_ports or request.url.path in BEFORE:
        return None
    if status == 422:
        try:
            detail = json.loads(text)["detail"]
            places = [one["loc"][:2] for one in detail] if isinstance(detail, list) else []
        except (ValueError, KeyError, TypeError):
            return None
        if any(list(place) != ["body", "response"] for place in places):
            return None  # the row's other fields
    said = f"{request.url} answered {status}: {text.decode(errors='replace')[:2000]}"
    return b'{"refused": %s, "responses": [%s]}' % (json.dumps(said).encode(), b",".join(heard))


# Of an answer with an error: the server that failed first, and why. Agents answer 500 for each server that
# they ask, and NeMo Gym's body may become the policy's: a header is nobody's else.
FAILED = "x-gymexp-failed"
_MOST_SAID = 1000  # characters, of up to six bytes each in JSON; aiohttp takes headers of 8 KB


def origin(error: Exception, name: str, names: dict[int, str]) -> str:
    """The header's value, where a server called `name` raised: {"server", "said"} in JSON. names: of all
    servers, by port."""
    request = getattr(error, "request_info", None)
    if request is None:
        frames = traceback.extract_tb(error.__traceback__)
        place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
        return _told(name, f"{type(error).__name__}: {str(error)[:_MOST_SAID]}{place}")
    if told := (getattr(error, "headers", None) or {}).get(FAILED):
        return told
    text = getattr(error, "response_content", b"").decode(errors="replace")
    said = f"{request.url.path} answered {getattr(error, 'status', '')}: {text[:_MOST_SAID]}"
    return _told(names.get(request.url.port, str(request.url.origin())), said)


def _told(server: str, said: str) -> str:
    return json.dumps({"server": server, "said": said})


def build_app(name: str, cls: Any):
    """The server's web application, put together as NeMo Gym's own run_webserver does, without Ray."""
    from nemo_gym.config_types import BaseServerConfig  # pyright: ignore[reportMissingImports]
    from nemo_gym.global_config import (  # pyright: ignore[reportMissingImports]
        get_first_server_config_dict,
        get_global_config_dict,
    )
    from nemo_gym.server_utils import ServerClient  # pyright: ignore[reportMissingImports]
    from omegaconf import OmegaConf
    from starlette.responses import Response  # pyright: ignore[reportMissingImports]

    class Listening(ServerClient):
        async def request(self, server_name: str, url_path: str, method: str, **kwargs: Any) -> Any:
            answer = await super().request(server_name, url_path, method, **kwargs)
            heard = HEARD.get()
            if heard is not None and url_path == "/v1/responses" and answer.status == 200:
                heard.append(await answer.read())
            return answer

    everything = get_global_config_dict()
    values = OmegaConf.to_container(get_first_server_config_dict(everything, name), resolve=True)
    assert isinstance(values, dict)
    config = cls.model_fields["config"].annotation.model_validate(values | {"name": name})
    client = Listening(
        head_server_config=BaseServerConfig.model_validate(everything["head_server"]),
        global_config_dict=everything,
    )
    server = cls(config=config, server_client=client)
    app = server.setup_webserver()
    server.setup_liveness(app)
    names: dict[int, str] = {}
    resources_ports: set[int] = set()
    for one, entry in OmegaConf.to_container(everything).items():  # pyright: ignore
        for kind in KINDS.intersection(entry) if isinstance(entry, dict) else ():
            for values in entry[kind].values():
                names[values["port"]] = str(one)
                if kind == "resources_servers":
                    resources_ports.add(values["port"])

    @app.middleware("http")
    async def look_at_errors(request: Any, call_next: Any) -> Any:
        heard: list[bytes] | None = [] if request.url.path == "/run" else None
        token = HEARD.set(heard)
        try:
            return await call_next(request)
        except Exception as error:
            if heard and (body := refusal(error, heard, resources_ports)):
                return Response(body, status_code=400, media_type="application/json")
            request.state.failed = origin(error, name, names)
            raise
        finally:
            HEARD.reset(token)

    server.setup_exception_middleware(app)

    @app.middleware("http")
    async def tell_errors(request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        if told := getattr(request.state, "failed", None):
            response.headers[FAILED] = told
        return response

    return app


def serve(name: str, cls: type, sock: socket.socket, key: str | None) -> None:
    """Run one server on a socket that is open already; key: what it demands of requests."""
    import uvicorn  # pyright: ignore[reportMissingImports]

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(65535, hard), hard))
    config = uvicorn.Config(
        demanding(key, build_app(name, cls)),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=1,
        timeout_keep_alive=30,
    )
    uvicorn.Server(config).run(sockets=[sock])


def start(name: str, log: str, cls: type, sock: socket.socket, key: str | None) -> int:
    """Fork a child that serves `name`; returns its pid."""
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
        serve(name, cls, sock, key)
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
        classes = load(**first)
    except BaseException as error:
        traceback.print_exc()
        say(error=f"{type(error).__name__}: {error}")
        sys.exit(1)
    sockets = {name: socket.socket(fileno=server["fd"]) for name, server in first["servers"].items()}
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    # What was imported is never garbage: the servers' collectors need not look through it.
    gc.collect()
    gc.freeze()
    say(loaded=round(time.monotonic() - began, 2))

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
                server = classes[name], sockets[name], first["key"]
                say(started=name, pid=start(name, message["log"], *server))


if __name__ == "__main__":
    main()
