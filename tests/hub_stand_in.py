"""A Hugging Face hub on loopback, as far as `hf_hub_download` and `snapshot_download` see one, that can also
misbehave."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c0ffee" + 34 * "0"


@dataclass
class Hub:
    """`files` by "<repo>/<file>", of the commit COMMIT; `commits`: those of other commits. `refs`: branches
    and tags.

    `mood`: well, private, gated, broken, stalled (in the body), hanging (before any answer) or
    nameless (it names no commit).
    """

    files: dict[str, bytes]
    mood: str = "well"
    token: str = "hf_right"  # what a private dataset asks for
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Authorization
    url: str = ""
    refs: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
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
            path = self.path.partition("?")[0].removeprefix("/datasets/").removeprefix("/")
            if path.startswith("api/models/"):
                return self.describe(path.removeprefix("api/models/"))
            repo, _, rest = path.partition("/resolve/")
            revision, _, file = rest.partition("/")
            if not any(name.startswith(f"{repo}/") for files in self.commits() for name in files):
                return self.refuse(404, "RepoNotFound")
            commit = hub.refs.get(revision, revision)
            if (files := self.files(commit)) is None:
                return self.refuse(404, "RevisionNotFound")
            if (content := files.get(f"{repo}/{file}")) is None:
                return self.refuse(404, "EntryNotFound")
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "" if hub.mood == "nameless" else commit)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body and hub.mood == "stalled":
                self.wfile.write(content[:10])
                self.wfile.flush()
                hub.closing.wait(60)
            elif body:
                self.wfile.write(content)

        def files(self, commit: str) -> dict[str, bytes] | None:
            return hub.files if commit == COMMIT else hub.commits.get(commit)

        def commits(self) -> list[dict[str, bytes]]:
            return [hub.files, *hub.commits.values()]

        def describe(self, path: str) -> None:
            """<repo>/revision/<revision> or <repo>/tree/<revision>, as huggingface.co's API has them."""
            repo, kind, revision = path.rsplit("/", 2)
            commit = hub.refs.get(revision, revision)
            if not any(name.startswith(f"{repo}/") for files in self.commits() for name in files):
                return self.refuse(404, "RepoNotFound")
            if (files := self.files(commit)) is None:
                return self.refuse(404, "RevisionNotFound")
            mine = {
                name.removeprefix(f"{repo}/"): c for name, c in files.items() if name.startswith(f"{repo}/")
            }
            ids = {name: hashlib.sha1(content).hexdigest() for name, content in mine.items()}
            said: Any = [
                {"type": "file", "path": name, "size": len(content), "oid": ids[name]}
                for name, content in mine.items()
            ]
            if kind == "revision":
                siblings = [{"rfilename": f["path"], "size": f["size"], "blobId": f["oid"]} for f in said]
                said = {"id": repo, "sha": None if hub.mood == "nameless" else commit, "siblings": siblings}
            body = json.dumps(said).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

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


def put_into_cache(cache: Path, repo: str, ref: str, commit: str, files: dict[str, bytes]) -> Path:
    """A model's snapshot as huggingface_hub lays it out; its directory."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / ref).write_text(commit)
    directory = folder / "snapshots" / commit
    (folder / "blobs").mkdir(exist_ok=True)
    directory.mkdir(parents=True)
    for name, content in files.items():
        blob = folder / "blobs" / f"{commit[:4]}-{name}"
        blob.write_bytes(content)
        (directory / name).symlink_to(os.path.relpath(blob, directory))
    return directory
