"""Whole evaluations whose process is killed, and whose endpoint goes away."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from whole_run import NO_WAY_OUT, ROOT, Run

from gymexp.rollout.rollout_files import read_index

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
SUDOKU = ["env=[sudoku]", "env.sudoku.data.train_size=16", "env.sudoku.data.validation_size=8"]
ONE_BY_ONE = ["engine=hf", "engine.max_batch_size=1", "env.sudoku.max_concurrency=1"]
TINY = [*SUDOKU, "model=tiny", *ONE_BY_ONE, "evaluation.samples=8"]


class Evaluation(Run):
    """An evaluation in a process of its own."""

    def __init__(self, directory: Path, *overrides: str) -> None:
        self.directory = directory
        directory.parent.mkdir(parents=True, exist_ok=True)
        self.output = directory.parent / f"{directory.name}.{time.monotonic_ns()}.txt"
        with self.output.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gymexp.evaluate", *overrides],
                stdout=out,
                stderr=out,
                cwd=ROOT,
                env=os.environ | NO_WAY_OUT,
                start_new_session=True,
            )
        self.watch()

    def landed(self) -> int:
        """The bytes of what it has scored and not written yet."""
        path = self.directory / "landing" / "eval-000000.jsonl.zst"
        return path.stat().st_size if path.exists() else 0

    def num_scored(self) -> int:
        return sum(row["reward"] is not None for row in read_index(self.directory / "rollouts"))


@pytest.fixture
def evaluated() -> Iterator[Callable[..., Evaluation]]:
    """Starts or resumes an evaluation; what a failed test leaves of it is ended."""
    made: list[Evaluation] = []

    def start(directory: Path, *overrides: str) -> Evaluation:
        words = [*overrides, f"output_dir='{directory}'"] if overrides else [f"resume='{directory}'"]
        made.append(Evaluation(directory, *words))
        return made[-1]

    yield start
    for one in made:
        one.kill()


def test_an_evaluation_whose_process_is_killed_names_it_and_plays_the_rest(
    evaluated, folder, gym_python, fault
):
    directory = folder / "killed"
    one = evaluated(directory, *TINY)
    one.wait_for(one.landed)
    blow = fault("An evaluation's evaluator is killed")
    one.server("evaluator").send_signal(signal.SIGKILL)
    assert one.ended_cleanly() == 1, one.said
    blow.over()
    assert "error: evaluator was ended by SIGKILL" in one.said, one.said
    assert not (directory / "results.json").exists() and one.landed()
    again = evaluated(directory)
    assert again.ended_cleanly() == 0, again.said
    assert "rollouts are scored already" in again.log("evaluator") and again.num_scored() == 64


EIGHT_AT_ONCE = ("env.sudoku.max_concurrency=8", "evaluation.samples=16", "endpoint.model=big/one")


class SomebodysServer:
    """An OpenAI-compatible endpoint, which goes away and comes back at the same address."""

    def __init__(self) -> None:
        self.num_answered = 0
        self.answers = threading.Event()
        self.answers.set()
        self._port = 0
        self.come()

    def come(self) -> None:
        endpoint = self

        class Chat(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                time.sleep(0.1)
                endpoint.answers.wait()
                choice = {"index": 0, "finish_reason": "stop", "message": {"content": "1 2 3 4"}}
                answer = json.dumps({"choices": [choice]}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
                    self.wfile.write(answer)
                endpoint.num_answered += 1

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Chat)
        self._port = self._server.server_port
        self.url = f"http://127.0.0.1:{self._port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def leave(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def endpoint() -> Iterator[SomebodysServer]:
    server = SomebodysServer()
    yield server
    server.leave()


def test_an_evaluation_waits_for_its_endpoint_then_ends_with_its_name_and_goes_on_later(
    evaluated, endpoint, folder, gym_python, fault
):
    directory = folder / "endpoint"
    one = evaluated(
        directory, *SUDOKU, *EIGHT_AT_ONCE, f"endpoint.url={endpoint.url}", "endpoint.timeout_s=6"
    )
    one.wait_for(lambda: endpoint.num_answered > 4)
    blow = fault("The endpoint of an evaluation restarts")
    endpoint.leave()
    time.sleep(3)
    endpoint.come()
    before = endpoint.num_answered
    one.wait_for(lambda: endpoint.num_answered > before)
    blow.over()
    one.wait_for(one.landed)
    blow = fault("The endpoint of an evaluation goes away")
    endpoint.leave()
    assert one.ended_cleanly() == 1, one.said
    assert blow.over() < 90
    assert "rollouts failed, more than rollout.max_failed_share" in one.said
    assert "engine in env.sudoku" in one.said and f"endpoint.url={endpoint.url}: " in one.said, one.said
    assert "logs/gateway.log" in one.said
    assert one.said.count("error: ") == 1, one.said
    assert not (directory / "results.json").exists() and one.landed()
    endpoint.come()
    again = evaluated(directory)
    assert again.ended_cleanly() == 0, again.said
    assert "rollouts are scored already" in again.log("evaluator") and again.num_scored() == 128


def test_an_evaluation_whose_endpoint_takes_requests_and_answers_none_ends_and_goes_on_later(
    evaluated, endpoint, folder, gym_python, fault
):
    directory = folder / "silent_endpoint"
    one = evaluated(
        directory, *SUDOKU, *EIGHT_AT_ONCE, f"endpoint.url={endpoint.url}", "endpoint.timeout_s=15"
    )
    one.wait_for(one.landed)
    blow = fault("The endpoint of an evaluation hangs")
    endpoint.answers.clear()
    assert one.ended_cleanly() == 1, one.said
    assert blow.over() < 90
    assert "rollouts failed, more than rollout.max_failed_share" in one.said
    assert f"endpoint.url={endpoint.url}: no request was answered for" in one.log("gateway")
    endpoint.answers.set()
    again = evaluated(directory)
    assert again.ended_cleanly() == 0, again.said
    assert again.num_scored() == 128
