"""A Hugging Face hub on loopback, as far as `hf_hub_download` sees one, that can also misbehave."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c0ffee" + 34 * "0"


@dataclass
class Hub:
    """`files` by "<repo>/<file>".

    `mood`: well, private, gated, broken, stalled (in the body) or hanging (before any answer).
    """

    files: dict[str, bytes]
    mood: str = "well"
    token: str = "hf_right"  # what a private dataset asks for
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Authorization
    url: str = ""
    closing: threading.Event = field(default_factory=threading.Event)


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            hub.asked.append((self.command, self.path, self.headers.get("Authorization")))
            if hub.mood == "hanging":
                hub.closing.wait(60)
                return
            if hub.mood == "broken":
                return self.refuse(500)
            if hub.mood == "gated":
                return self.refuse(403, "GatedRepo")
            if hub.mood == "private" and self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self.refuse(401)
            repo, _, rest = self.path.removeprefix("/datasets/").partition("/resolve/")
            revision, _, file = rest.partition("/")
            if not any(name.startswith(f"{repo}/") for name in hub.files):
                return self.refuse(404, "RepoNotFound")
            if revision not in ("main", COMMIT):
                return self.refuse(404, "RevisionNotFound")
            if (content := hub.files.get(f"{repo}/{file}")) is None:
                return self.refuse(404, "EntryNotFound")
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body and hub.mood == "stalled":
                self.wfile.write(content[:10])
                self.wfile.flush()
                hub.closing.wait(60)
            elif body:
                self.wfile.write(content)

        def refuse(self, status: int, code: str | None = None) -> None:
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()
