"""Becomes another user and tries what can be tried with a run: `test_nobody_is_let_in.py` starts it.

Reads {"uid", "gid", "urls", "pids", "folder", "prefixes"} and prints {"answers": {request: status}, "found":
where a prefix was, "read": of /proc, "files": how many of the folder could be read, "signalled": pids}.
"""

from __future__ import annotations

import contextlib
import encodings.idna  # noqa: F401  # all imports before it is somebody else, who may not read Python
import http.client
import json
import os
import sys
from collections.abc import Iterator

PATHS = {
    "GET": "/ /health /v1/models /stats /watch /node /metrics /docs /openapi.json /server_info /nothing "
    "/global_config_dict_yaml /is_sleeping /get_world_size /version /ping",
    "POST": "/v1/chat/completions /v1/completions /v1/responses /inference/v1/generate /tokenize /attempts "
    "/engine /drain /restart/trainer /restart/gateway /progress /alive/trainer /run /verify /seed_session "
    "/pause /resume /sleep /wake_up /collective_rpc /update_weights /reset_prefix_cache /start_weight_update",
    "OPTIONS": "/v1/chat/completions /collective_rpc",
    "HEAD": "/health",
}
OFTEN = ("/v1/chat/completions", "/stats", "/run", "/collective_rpc", "/restart/trainer")
WRONG_KEYS = (None, "", "Bearer ", "Bearer none", "Bearer guess", "Basic Og==", "Bearer \xe9")
BODY = {
    "model": "policy",
    "messages": [{"role": "user", "content": "hello"}],
    "token_ids": [1, 2, 3],
    "sampling_params": {"max_tokens": 4},
    "prompt": "x",
    "input": "x",
    "responses_create_params": {"input": "x"},
    "method": "reload_weights",
}


def requests() -> Iterator[tuple[str, str, str | None]]:
    for method, paths in PATHS.items():
        for path in paths.split():
            for key in WRONG_KEYS if path in OFTEN else WRONG_KEYS[:1]:
                yield method, path, key


def ask(url: str, method: str, path: str, key: str | None) -> tuple[int, str]:
    host, _, port = url.removeprefix("http://").rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": key})
    connection.request(method, path, json.dumps(BODY) if method == "POST" else None, headers)
    answer = connection.getresponse()
    text = answer.read(100_000).decode(errors="replace")
    connection.close()
    return answer.status, text


def main() -> None:
    told = json.load(sys.stdin)
    os.setgroups([])
    os.setgid(told["gid"])
    os.setuid(told["uid"])
    prefixes = told["prefixes"]
    answers, found, read, signalled, num_files = {}, [], [], [], 0
    for url in told["urls"]:
        for method, path, key in requests():
            status, text = ask(url, method, path, key)
            answers[f"{method} {url}{path} {key!r}"] = status
            found += [f"{url}{path}" for prefix in prefixes if prefix in text]
    for pid in told["pids"]:
        for name in ("environ", "mem", "maps"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/{name}", "rb") as file:
                file.read(1)
                read.append(f"{pid} {name}")
        with contextlib.suppress(OSError):
            os.listdir(f"/proc/{pid}/fd")
            read.append(f"{pid} fd")
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline") as file:
            line = file.read()
            found += [f"{pid} cmdline" for prefix in prefixes if prefix in line]
        with contextlib.suppress(OSError):
            os.kill(pid, 0)
            signalled.append(pid)
    for folder, _, names in os.walk(told["folder"]):
        for path in (os.path.join(folder, name) for name in names):
            with contextlib.suppress(OSError), open(path, "rb") as file:
                held = file.read()
                num_files += 1
                found += [path for prefix in prefixes if prefix.encode() in held]
    said = {"answers": answers, "found": found, "read": read, "files": num_files, "signalled": signalled}
    print(json.dumps(said))


if __name__ == "__main__":
    main()
