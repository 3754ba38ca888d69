"""Measures the gateway's cost in front of an engine without delay: CPU ms per request, requests per second.

    python benchmarks/gateway.py [--tokenizer PATH] [--rollouts 200] [--concurrency 16] [--gateways 1]
                                 [--profile FILE]

Engine, load and each gateway are one process each. With several gateways the rollouts of a group are spread
over them, and the CPU time is also given for the busiest one: what bounds a run is a single process.
"sudoku": one turn, 16 rollouts per group. "workplace": three turns (call, call, message) with 27 tools.
Without --tokenizer the script trains a small byte-level BPE on the text of the conversations.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import psutil
from aiohttp import web

from gymexp.processes.access_keys import RUN, Keys, header_of
from gymexp.processes.ports import listen, url_of

os.environ |= Keys.new().environ()  # for this process and for all processes that it starts
GROUP = 16
ROOT = Path(__file__).resolve().parent.parent
ARGUMENTS = '{"query": "Carlos", "date_min": "2026-01-01"}'
CALL = '<tool_call>\n{"name": "mail_search_3", "arguments": ' + ARGUMENTS + "}\n</tool_call>"
GRID = "<think>\nThe first row lacks a 3, so the cell is 3.\n</think>\n\n" + "1 2 3 4\n" * 4
MAIL = {"sender": "carlos@atlas.com", "subject": "Status of the plan"}
FOUND = json.dumps([{"email_id": f"{number:08}", **MAIL} for number in range(9)])


def tool(number: int) -> dict[str, Any]:
    properties = {
        name: {"type": "string", "description": f"The {name} that the result must have, as text. Optional."}
        for name in ("query", "date_min", "date_max", "recipient")
    }
    description = (
        "Searches the mails, events, tasks or customers of the workplace and returns those that match."
    )
    function = {"name": f"mail_search_{number}", "description": description}
    return {
        "type": "function",
        "function": function
        | {"parameters": {"type": "object", "properties": properties, "required": ["query"]}},
    }


TOOLS = [tool(number) for number in range(27)]


def first_messages(kind: str, task: int) -> list[dict[str, Any]]:
    if kind == "sudoku":
        grid = "\n".join(f"{task % 5} _ {row} _" for row in range(4))
        return [
            {
                "role": "user",
                "content": f"Solve this 4x4 sudoku and answer with the grid alone.\n{grid}\n" * 2,
            }
        ]
    system = "Today is Thursday. You help with mails, calendar and customers. " * 6
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": f"Reply to Carlos about plan {task}."},
    ]


async def play(http: aiohttp.ClientSession, kind: str, rollout: int, seconds: dict[str, list[float]]) -> None:
    messages = first_messages(kind, rollout // GROUP)
    fields: dict[str, Any] = {"tools": TOOLS, "parallel_tool_calls": False} if kind == "workplace" else {}
    for turn in ("first turn", "tool turn", "tool turn")[: 3 if fields else 1]:
        body = {"model": "policy", "messages": messages, "max_tokens": 512, "seed": rollout, "logprobs": True}
        body |= {"return_tokens_as_token_ids": True, **fields}
        started = time.perf_counter()
        async with http.post("/v1/chat/completions", data=orjson.dumps(body)) as response:
            answer = orjson.loads(await response.read())
        seconds.setdefault(turn, []).append(time.perf_counter() - started)
        message = answer["choices"][0]["message"]
        for call in message.get("tool_calls", []):
            messages = [*messages, message, {"role": "tool", "tool_call_id": call["id"], "content": FOUND}]


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


async def load(urls: list[str], pids: list[int], args: argparse.Namespace) -> None:
    gateways = [psutil.Process(pid) for pid in pids]
    async with AsyncExitStack() as stack:
        https = [
            await stack.enter_async_context(
                aiohttp.ClientSession(
                    url, connector=aiohttp.TCPConnector(limit=args.concurrency), headers=header_of(RUN)
                )
            )
            for url in urls
        ]
        for kind in ("sudoku", "workplace"):
            await asyncio.gather(*(play(https[n % len(https)], kind, n, {}) for n in range(4 * len(https))))
            seconds: dict[str, list[float]] = {}
            limit = asyncio.Semaphore(args.concurrency)

            async def limited(
                rollout: int, kind: str = kind, seconds: Any = seconds, limit: Any = limit
            ) -> None:
                async with limit:
                    await play(https[rollout % len(https)], kind, rollout, seconds)

            before, started = list(map(cpu_seconds, gateways)), time.perf_counter()
            await asyncio.gather(*map(limited, range(args.rollouts)))
            wall = time.perf_counter() - started
            cpu = [now - then for now, then in zip(map(cpu_seconds, gateways), before, strict=True)]
            num = sum(map(len, seconds.values()))
            print(f"{kind}: {num} requests, {num / wall:.0f}/s, {1e3 * sum(cpu) / num:.2f} CPU ms a request")
            if len(cpu) > 1:
                print(f"  the busiest gateway: {1e3 * max(cpu) / num:.2f} CPU ms for each of all requests")
            alone: dict[str, list[float]] = {}  # seconds of requests without other requests in flight
            for rollout in range(20):
                await play(https[0], kind, rollout, alone)
            for turn, times in alone.items():
                print(
                    f"  alone, {turn}: {1e3 * sorted(times)[len(times) // 2]:.2f} ms (median of {len(times)})"
                )
        print(f"  memory {gateways[0].memory_info().rss / 1e6:.0f} MB")


def build_tokenizer(path: str) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from gymexp.coldstart.tiny import RESPONSE_TEMPLATE, chat_template

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    texts = [
        json.dumps(TOOLS),
        FOUND,
        CALL,
        GRID,
        str(first_messages("sudoku", 0) + first_messages("workplace", 0)),
    ]
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=4000, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.add_tokens(["<tool_call>", "</tool_call>", "<think>", "</think>"])
    tokenizer.chat_template = chat_template()
    tokenizer.response_template = RESPONSE_TEMPLATE
    tokenizer.save_pretrained(path)


def serve_engine(fd: int, tokenizer_path: str) -> None:
    """Serves the fake engine. It replies to a prompt with tools by two tool calls and then a text, and to
    other prompts by a text."""
    from gymexp.gateway.server import load_tokenizer
    from gymexp.processes.parent_watch import die_with_parent
    from gymexp.processes.ports import adopt

    die_with_parent()
    tokenizer = load_tokenizer(tokenizer_path)
    opening = tokenizer.convert_tokens_to_ids("<tool_call>")

    def answer(text: str) -> bytes:
        ids = tokenizer.encode(text + "<|im_end|>", add_special_tokens=False)
        content = [{"token_id": i, "logprob": -0.1234567} for i in ids]
        choice = {"token_ids": ids, "logprobs": {"content": content}, "finish_reason": "stop"}
        return orjson.dumps({"choices": [choice]})

    call, grid = answer(CALL), answer(GRID)

    async def generate(request: web.Request) -> web.Response:
        ids = orjson.loads(await request.read())["token_ids"]
        calls = ids[-2000:].count(opening)  # the tools block further up has two more
        is_workplace = len(ids) > 1000
        return web.Response(
            body=call if is_workplace and calls < 3 else grid, content_type="application/json"
        )

    async def health(request: web.Request) -> web.Response:
        return web.Response()

    app = web.Application(client_max_size=1 << 28)
    app.add_routes([web.post("/inference/v1/generate", generate), web.get("/health", health)])
    web.run_app(app, sock=adopt(fd), access_log=None, print=lambda *_: None)


async def started_within(url: str, timeout_s: float = 120.0) -> float:
    started = time.perf_counter()
    async with aiohttp.ClientSession(headers=header_of(RUN)) as http:
        while time.perf_counter() - started < timeout_s:
            async with http.get(f"{url}/health") as response:
                if response.status == 200:
                    return time.perf_counter() - started
            await asyncio.sleep(0.05)
    raise SystemExit(f"{url} was not healthy within {timeout_s} s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer")
    parser.add_argument("--rollouts", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--profile", help="the file to write a cProfile of the gateway to")
    parser.add_argument("--serve-engine", type=int, metavar="FD", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve_engine is not None:
        return serve_engine(args.serve_engine, args.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        if not args.tokenizer:
            args.tokenizer = folder
            build_tokenizer(folder)
        sockets = [listen() for _ in range(1 + args.gateways)]
        engine_fd = str(sockets[0].fileno())
        fds = [sock.fileno() for sock in sockets]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        engine = [sys.executable, __file__, "--serve-engine", engine_fd, "--tokenizer", args.tokenizer]
        profile = ["-m", "cProfile", "-o", args.profile] if args.profile else []
        gateway = [sys.executable, *profile, "-m", "gymexp.gateway.server"]
        gateway += [
            "--engine-url",
            url_of(sockets[0]),
            "--tokenizer",
            args.tokenizer,
            "--max-model-len",
            "32768",
        ]
        processes = [subprocess.Popen(engine, pass_fds=fds, env=environment)]
        try:
            asyncio.run(started_within(url_of(sockets[0])))
            for fd in fds[1:]:
                own = [*gateway, "--fd", str(fd)] + ["--one-of-several"] * (args.gateways > 1)
                processes.append(subprocess.Popen(own, pass_fds=fds, env=environment))
            urls = [url_of(sock) for sock in sockets[1:]]
            waited = [asyncio.run(started_within(url)) for url in urls]
            print(f"gateway healthy after {waited[0]:.1f} s")
            asyncio.run(load(urls, [process.pid for process in processes[1:]], args))
        finally:
            for process in reversed(processes):
                process.terminate()
                process.wait()


if __name__ == "__main__":
    main()
