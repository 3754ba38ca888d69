"""A Hugging Face hub on loopback, as far as `hf_hub_download`, `snapshot_download` and an upload without Xet
see one, that can also misbehave."""

from __future__ import annotations

import base64
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

    `mood`: well, private, gated, broken, stalled (in the body), hanging (before any answer), nameless (it
    names no commit) or full (it refuses commits of more than one file).

    `repos`: the repositories that were created, and whether they are private. `large`: content by SHA-256.
    """

    files: dict[str, bytes]
    mood: str = "well"
    token: str = "hf_right"  # what a private dataset asks for
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Authorization
    url: str = ""
    refs: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    repos: dict[str, bool] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    closing: threading.Event = field(default_factory=threading.Event)


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def do_PUT(self) -> None:
            hub.large[self.path.removeprefix("/large/")] = self.read()
            self.reply({})

        def do_POST(self) -> None:
            hub.asked.append((self.command, self.path, self.headers.get("Authorization")))
            content = self.read()
            path = self.path.partition("?")[0].strip("/")
            if self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self.refuse(401)
            if path.endswith("/commit/main"):
                return self.commit(path.removeprefix("api/models/").removesuffix("/commit/main"), content)
            asked = json.loads(content)
            if path == "api/repos/create":
                repo = f"{asked['organization']}/{asked['name']}"
                if repo in hub.repos:
                    return self.refuse(409)
                hub.repos[repo] = asked["visibility"] == "private"
                return self.reply({"url": f"{hub.url}/{repo}"})
            if path.endswith("/preupload/main"):
                modes = {
                    f["path"]: "lfs" if f["path"].endswith(".safetensors") else "regular"
                    for f in asked["files"]
                }
                return self.reply(
                    {
                        "files": [
                            {"path": p, "uploadMode": mode, "shouldIgnore": False}
                            for p, mode in modes.items()
                        ]
                    }
                )
            if path.endswith(".git/info/lfs/objects/batch"):
                known = [
                    o | {} if o["oid"] in hub.large else o | self.upload(o["oid"]) for o in asked["objects"]
                ]
                return self.reply({"transfer": "basic", "objects": known})
            self.reply({})  # api/validate-yaml

        def upload(self, oid: str) -> dict[str, Any]:
            return {"actions": {"upload": {"href": f"{hub.url}/large/{oid}"}}}

        def commit(self, repo: str, content: bytes) -> None:
            lines = [json.loads(line) for line in content.splitlines()]
            if hub.mood == "full" and len(lines) > 2:
                return self.refuse(403)
            for line in lines:
                name = f"{repo}/{line['value'].get('path')}"
                if line["key"] == "file":
                    hub.files[name] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    hub.files[name] = hub.large[line["value"]["oid"]]
                elif line["key"] == "deletedFile":
                    del hub.files[name]
            self.reply({"commitUrl": f"{hub.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})

        def read(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def reply(self, value: Any) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

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
            """<repo>, <repo>/revision/<revision> or <repo>/tree/<revision>, as huggingface.co has them."""
            repo, kind, revision = path.rsplit("/", 2) if path.count("/") > 1 else (path, "revision", "main")
            commit = hub.refs.get(revision, revision)
            if repo not in hub.repos and not any(
                name.startswith(f"{repo}/") for files in self.commits() for name in files
            ):
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
                said["private"] = hub.repos.get(repo, False)
            self.reply(said)

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
