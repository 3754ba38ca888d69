"""Run directories for tests of the viewer: one with all that a policy could write, and a large one."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from gymexp.config.schema import EnvConfig
from gymexp.rollout.outcome import Completed, Failed, Outcome, Rollout, Task, Truncated, Turn
from gymexp.rollout.rollout_files import RolloutWriter
from gymexp.view.access import Access
from gymexp.view.links import server_link
from gymexp.view.server import serve
from gymexp.view.site import Site
from gymexp.view.viewed_run import ViewedRun, runs_at

ENVS = {name: EnvConfig("c", "a", success_reward=1.0) for name in ("sudoku", "office")}
EVIL = (
    "<script>alert(1)</script><img src=x onerror=alert(2)>\x1b]52;c;ZXZpbA==\x07\x1b[2J\x9b31m\u202egnp.exe"
    "\u2066\x00\r</textarea>\"'><a href=//evil.example>{{ 7*7 }}\U000e0041\u200b"
)
# What may not reach a page as it is: a browser, or who reads the page, would obey it.
OBEYED = {"\x1b", "\x07", "\x9b", "\u202e", "\u2066", "\x00", "\U000e0041", "\u200b"}
LONG = "x" * 5_000_000
CONFIG = (
    "name: tiny\nmodel:\n  name: tiny\n  path: gymexp/assets/tiny\n"
    "env:\n  sudoku:\n    success_reward: 1.0\n  office:\n    success_reward: 1.0\n"
    "tracker:\n  api_key: sk-0123456789abcdefghijklmnop\n"
)


def task(key: str) -> Task:
    return Task(key, key.split("/")[0], "a", {})


def said(text: str) -> dict[str, Any]:
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}


def played(key: str, reward: float, text: str = "hm", **fields: Any) -> Rollout:
    turns = fields.pop("turns", [Turn([1, 386], [2038, 207, 2], [-0.001, -0.7, -4.0])])
    return Rollout(task(key), turns, reward, fields.pop("items", [said(text)]), **fields)


def write_run(path: Path) -> Path:
    """Two steps and two evaluations of two environments. The group of office in step 2 is hostile."""
    (path / "data").mkdir(parents=True)
    (path / "logs").mkdir()
    (path / "config.yaml").write_text(CONFIG)
    (path / "logs" / "office.log").write_text(f"ready\nERROR {EVIL}\n")
    writer = RolloutWriter(path / "rollouts", ENVS)
    writer.write("eval-000000", [Completed(played(f"sudoku/validation/{i}", i % 2)) for i in range(8)], 1)
    writer.write("step-000001", [Completed(played("sudoku/train/1", 0.25 * i)) for i in range(4)], 4)
    call = {"type": "function_call", "name": EVIL, "arguments": json.dumps({"who": EVIL})}
    output = {"type": "function_call_output", "output": EVIL}
    evil = played(
        "office/train/7",
        1.0,
        items=[call, output, {"role": EVIL, "content": EVIL}, said(EVIL)],
        verdict={EVIL: {"judge": EVIL}, "judge_output": LONG},
        replica=EVIL,
        refused=EVIL,
        turns=[Turn([1], [3, 4], [-0.1, -0.2]), Turn([1, 3, 4, 5, 6], [2], [-1.0])],
    )
    office: list[Outcome] = [
        Completed(evil, ["engine"]),
        Failed(task("office/train/7"), "timeout", f"slow {EVIL}", "logs/office.log", ["timeout", "timeout"]),
        Truncated(played("office/train/7", 0.0, LONG), "length"),
        Completed(played("office/train/7", 0.5)),
    ]
    sudoku = [Completed(played("sudoku/train/1", 1.0)) for _ in range(4)]
    writer.write("step-000002", [*office, *sudoku], 4)
    writer.write("eval-000002", [Completed(played(f"sudoku/validation/{i}", 1.0)) for i in range(8)], 1)
    asked = [{"role": "system", "content": f"Be brief {EVIL}"}, {"role": "user", "content": [{"text": EVIL}]}]
    row = {"responses_create_params": {"input": asked}, "expected_answer": EVIL}
    (path / "data" / "train.jsonl").write_text(json.dumps({"key": "office/train/7", "row": row}) + "\n")
    (path / "metrics.jsonl").write_text("".join(json.dumps(entry(step)) + "\n" for step in (1, 2)))
    return path


def entry(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "time": 1.7e9 + step,
        "loss": 0.1,
        "time/step": 3.5,
        "sudoku/rollouts": 4,
        "sudoku/reward": 0.4,
    }


def write_large_run(path: Path, num: int) -> Path:
    """A run with `num` rollouts in its index, which point at the frames of one step."""
    (path / "data").mkdir(parents=True)
    (path / "config.yaml").write_text(CONFIG)
    writer = RolloutWriter(path / "rollouts", ENVS)
    outcomes = [
        Completed(played(f"{env}/train/{i // 8}", i % 5 / 4, seconds={"total": 1.5}, began=1.7e9 + i))
        for i in range(128)
        for env in [("sudoku", "office")[i // 8 % 2]]
    ]
    writer.write("step-000001", outcomes, 8)
    index = path / "rollouts" / "index.jsonl"
    rows = [json.loads(line) for line in index.read_text().splitlines()]
    with index.open("w") as file:
        for step in range(1, num // len(rows) + 2):
            for row in rows:
                file.write(json.dumps({**row, "file": f"step-{step:06d}"}) + "\n")
            name = path / "rollouts" / f"step-{step:06d}.jsonl.zst"
            if step > 1:
                name.hardlink_to(path / "rollouts" / "step-000001.jsonl.zst")
    with (path / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(entry(step)) + "\n" for step in range(1, num // len(rows) + 2))
    return path


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    text: str


@dataclass
class Served:
    """A viewer that serves in a thread."""

    access: Access
    site: Site = field(repr=False)

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.access.port}"

    @property
    def run(self) -> ViewedRun:
        """The first run."""
        return next(iter(self.site.runs.values()))

    @property
    def root(self) -> str:
        """The path of the first run's page."""
        return f"/r/{self.run.slug}/"

    def get(self, path: str, method: str = "GET", **headers: str) -> Answer:
        """The answer to one request; the headers replace those that a browser would send."""
        connection = http.client.HTTPConnection("127.0.0.1", self.access.port, timeout=60)
        sent = {
            "Host": f"127.0.0.1:{self.access.port}",
            "Cookie": f"{self.access.cookie}={self.access.token}",
        }
        connection.putrequest(method, path, skip_host=True)
        for name, value in (
            sent | {name.replace("_", "-"): value for name, value in headers.items()}
        ).items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        text = answer.read().decode("utf-8")
        connection.close()
        return Answer(answer.status, dict(answer.getheaders()), text)


@contextlib.contextmanager
def served(*paths: Path) -> Iterator[Served]:
    """A viewer of these runs."""
    site = Site(
        runs_at(paths, None), lambda run: partial(server_link, run.slug), lambda name: f"/static/{name}", "/"
    )
    started, found, loop = threading.Event(), list[Access](), asyncio.new_event_loop()

    def ready(access: Access) -> None:
        found.append(access)
        started.set()

    task_ = loop.create_task(serve(site, 0, ready))
    thread = threading.Thread(target=lambda: loop.run_until_complete(asyncio.wait([task_])))
    thread.start()
    assert started.wait(30)
    try:
        yield Served(found[0], site)
    finally:
        loop.call_soon_threadsafe(task_.cancel)
        thread.join(30)
        loop.close()
