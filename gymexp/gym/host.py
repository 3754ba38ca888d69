"""Runs NeMo Gym's servers, one forked process each. A script for NeMo Gym's venv; of gymexp it imports the
modules alone that lie beside it and say that they are a part of it.

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
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # which PYTHONSAFEPATH leaves out, as in a job
from judge_calls import FAILED, Judges  # pyright: ignore[reportMissingImports]
from rollout_calls import (  # pyright: ignore[reportMissingImports]
    CALLS,
    FAILURE_HEADER,
    RESPONSES,
    failure_origin,
    note_call,
    ports_of,
    refusal,
    typed_answer,
    url_of,
)
from rollout_deadline import with_deadline  # pyright: ignore[reportMissingImports]
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


def read_config(cls: Any, entry: Any, name: str, asked: list[list[str]]) -> Any:
    """Returns the server's configuration. entry: its part of NeMo Gym's config, an OmegaConf. asked: as for
    `check_asked`."""
    from omegaconf import OmegaConf

    values: Any = OmegaConf.to_container(entry, resolve=True)
    config = cls.model_fields["config"].annotation.model_validate(values | {"name": name})
    check_asked(config, asked)
    return config


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
            await note_call(server_name, url_path, answer, resources_ports)
            return answer

    global_config = get_global_config_dict()
    config = read_config(cls, get_first_server_config_dict(global_config, name), name, asked)
    client = RecordingClient(
        head_server_config=BaseServerConfig.model_validate(global_config["head_server"]),
        global_config_dict=global_config,
    )
    server = cls(config=config, server_client=client)
    app = server.setup_webserver()
    server.setup_liveness(app)
    names, resources_ports = ports_of(OmegaConf.to_container(global_config))
    watched = Judges(name, judges, names)
    is_typed = "environment_servers" in global_config[name]

    @app.middleware("http")
    async def classify_error(request: Any, call_next: Any) -> Any:
        responses: list[bytes] | None = [] if request.url.path == "/run" else None
        token = RESPONSES.set(responses)
        failed: list[str] = []
        failed_token = FAILED.set(failed)
        calls: dict[str, Any] = {}
        calls_token = CALLS.set(calls)
        try:
            response = await call_next(request)
            session = (request.scope.get("session") or {}).get(SESSION_ID_KEY)
            if failure := watched.failure(request.url.path, session, failed):
                request.state.failed = failure
                return Response("the judge failed", status_code=500)
            if responses is None or response.status_code != 200:
                return response
            if "policy" in calls:
                request.state.failed = calls["policy"]
                return Response(calls["said"], status_code=500)
            return await typed_answer(request, response, calls) if is_typed and calls else response
        except Exception as error:
            text = getattr(error, "response_content", b"")
            status = getattr(error, "status", None)
            if responses and (body := refusal(url_of(error), status, text, responses, resources_ports)):
                return Response(body, status_code=400, media_type="application/json")
            request.state.failed = failed[0] if failed else failure_origin(error, name, names)
            raise
        finally:
            RESPONSES.reset(token)
            FAILED.reset(failed_token)
            CALLS.reset(calls_token)

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
        require_key(key, with_deadline(app)),
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
