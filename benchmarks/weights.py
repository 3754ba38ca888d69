"""Compares weight updates from trainer to vLLM by gymexp and by TRL's client, in seconds and GB/s.

    python benchmarks/weights.py                    one vLLM on the first GPU, the trainer on the second
    python benchmarks/weights.py --replicas 2       two vLLM, on the first two GPUs, the trainer on the third
    python benchmarks/weights.py --way ipc          both on one GPU
    python benchmarks/weights.py --way adapter      an adapter of all linear layers alone, of --rank 16

vLLM serves a model of benchmarks/make_model.py with dummy weights. The script sends it random weights from
the trainer's GPU as the trainer does, by `WeightSync.update`, and measures from the pause request to the
resume request. "phases" are the HTTP requests of an update. "pause" is the delay for a client that samples
token after token: its longest request during the update, less the median one. TRL's client
(`VLLMClient.update_model_params`) then sends the same tensors to the same server, without a pause. The first
update of each joins NCCL's group and is left out; the figures are medians of the other updates.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import facts
import torch
from aiohttp import web
from make_model import SIZES, make, make_tensors

from gymexp.config.schema import EngineConfig, LoraConfig, ModelConfig
from gymexp.engine import vllm
from gymexp.engine.adapter_transfer import AdapterTransfer
from gymexp.engine.admission import Admission
from gymexp.engine.replicas import Replicas
from gymexp.engine.weight_sync import WeightSync
from gymexp.engine.weight_transfer import DiskTransfer, IpcTransfer, NcclTransfer
from gymexp.errors import ServiceError
from gymexp.processes import parent_watch, ports

START_S = 600


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["0.5b", "4b"])
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--way", choices=("nccl", "ipc", "disk", "adapter"), default="nccl")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter, with --way adapter")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engine-python", default=sys.executable)
    parser.add_argument("--output", type=Path, default=facts.RESULTS / "weights.json")
    args = parser.parse_args()
    needed = args.replicas + (args.way == "nccl")
    if args.way in ("nccl", "ipc") and torch.cuda.device_count() < needed:
        parser.error(f"--way {args.way} with {args.replicas} replicas needs {needed} GPUs")
    results: dict[str, Any] = {
        "machine": facts.machine(),
        "versions": facts.versions(args.engine_python, ("vllm", "trl", "torch", "transformers")),
        "arguments": {name: getattr(args, name) for name in ("replicas", "way", "rank", "rounds")},
        "sizes": {},
    }
    for size in args.sizes:
        result = results["sizes"][size] = {}
        measure(size, args, result, lambda: facts.write(args.output, results))
    print(f"written to {args.output}")


def measure(size: str, args: argparse.Namespace, result: dict[str, Any], write: Callable[[], None]) -> None:
    """Adds the measurements of one size to `result`, and calls `write` after gymexp and after TRL."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", args.replicas if args.way == "nccl" else 0)
        torch.cuda.set_device(device)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if args.way == "disk":
            make(directory / "model", size)  # vLLM reloads only weights that it has loaded from files
        named = make_tensors(directory / "model", size, device=device)
        if args.way == "adapter":
            named = make_adapter(named, args.rank)
        num_bytes = sum(tensor.nbytes for tensor in named.values())
        print(f"{size}: {len(named)} tensors, {num_bytes / 1e9:.2f} GB", flush=True)
        urls = [serve(directory, index, args, stack) for index in range(args.replicas)]
        replicas = Timed(urls)
        replicas.wait_healthy(START_S, threading.Event())
        gateway_url = stack.enter_context(fake_gateway())
        transfer = open_transfer(args, device, directory)
        sync = WeightSync(replicas, transfer, Admission([gateway_url], None, START_S), directory / "again")
        specs = [(name, tensor.dtype, list(tensor.shape)) for name, tensor in named.items()]
        seconds, pauses, phases = [], [], {}
        for number in range(args.rounds + 1):
            replicas.phases.clear()
            with longest_wait(urls[0]) as pause:
                began = time.monotonic()
                sync.update(number, specs, iter(named.items()))
                seconds.append(time.monotonic() - began)
            pauses.append(pause())
            phases = {name: round(sum(took), 4) for name, took in replicas.phases.items()}
            print(f"  gymexp {rate(num_bytes, seconds[-1])}, pause {pauses[-1]:.3f} s, {phases}", flush=True)
        result |= {"bytes": num_bytes, "gymexp_s": seconds[1:], "pause_s": pauses[1:]}
        result |= {"phases_s": phases, "gymexp_GB_per_s": num_bytes / statistics.median(seconds[1:]) / 1e9}
        write()
        transfer.close()
        if args.way == "nccl" and args.replicas == 1:
            trl = time_trl(urls[0], device, named, args.rounds)
            result |= {"trl_s": trl, "trl_GB_per_s": num_bytes / statistics.median(trl) / 1e9}
            result["times_trl"] = statistics.median(trl) / statistics.median(seconds[1:])
            print(f"  {result['times_trl']:.2f} times as fast as TRL's client")
            write()


def rate(num_bytes: int, seconds: float) -> str:
    return f"{seconds:.3f} s, {num_bytes / seconds / 1e9:.1f} GB/s"


class Timed(Replicas):
    """Replicas that record the seconds of each request by path, in `phases`."""

    def __init__(self, urls: Any, timeout_s: float = 120.0) -> None:
        super().__init__(urls, timeout_s)
        self.phases: dict[str, list[float]] = defaultdict(list)

    def only(self, urls: Any) -> Replicas:
        replicas = Timed(urls, self.timeout_s)
        replicas.phases = self.phases
        return replicas

    def _request(self, url: str, path: str, body: bytes | None) -> Any:
        began = time.monotonic()
        try:
            return super()._request(url, path, body)
        finally:
            self.phases[path.split("?")[0].strip("/")].append(time.monotonic() - began)


def serve(directory: Path, index: int, args: argparse.Namespace, stack: ExitStack) -> str:
    """Starts a vLLM replica with dummy weights on its own GPU; returns its URL. `stack` ends it."""
    sock = stack.enter_context(ports.reserve())
    shared = args.way == "ipc"
    lora = LoraConfig(r=args.rank) if args.way == "adapter" else LoraConfig()
    model = ModelConfig(name="dummy", path=str(directory / "model"), max_model_len=4096, lora=lora)
    flags: dict[str, Any] = {"enforce_eager": True, "max_num_seqs": 64}
    flags |= {"load_format": "dummy"} if args.way != "disk" else {}
    flags |= {"gpu_memory_utilization": 0.4} if torch.cuda.is_available() else {}
    engine = EngineConfig(python=args.engine_python, args=flags)
    version = vllm.read_version(engine)
    command = vllm.serve_command(model, engine, sock.getsockname()[1], version, args.way, shared)
    index_of_flag = command.index("--middleware")
    del command[
        index_of_flag : index_of_flag + 2
    ]  # the middleware requires a key, and TRL's client sends none
    log = directory / f"vllm-{index}.log"
    reaper = [sys.executable, "-S", parent_watch.__file__, str(os.getpid()), "--reap"]
    env = os.environ | vllm.environment(args.way)
    if torch.cuda.is_available():
        env |= {"CUDA_VISIBLE_DEVICES": str(index)}
    with log.open("w") as out:
        process = subprocess.Popen([*reaper, *command], stdout=out, stderr=out, env=env)

    def end() -> None:
        process.terminate()
        process.wait(60)

    stack.callback(end)
    threading.Thread(target=lambda: process.wait() and print(log.read_text()[-3000:]), daemon=True).start()
    return ports.url_of(sock)


def make_adapter(named: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """Returns a random adapter of all linear layers, under the names of peft's files."""
    adapter = {}
    for name, weight in named.items():
        if name.endswith("_proj.weight"):
            layer = f"base_model.model.{name.removesuffix('.weight')}"
            adapter[f"{layer}.lora_A.weight"] = torch.randn_like(weight[:1]).repeat(rank, 1)
            adapter[f"{layer}.lora_B.weight"] = torch.randn_like(weight[:, :1]).repeat(1, rank) * 1e-3
    return adapter


def open_transfer(args: argparse.Namespace, device: torch.device, directory: Path) -> Any:
    def give_up(error: ServiceError) -> None:
        print(f"error: {error}", flush=True)
        os._exit(1)

    if args.way == "nccl":
        return NcclTransfer(device, give_up)
    if args.way == "ipc":
        return IpcTransfer(lambda value: [value], is_first_rank=True)
    if args.way == "adapter":
        return AdapterTransfer(directory / "weights", LoraConfig(r=args.rank))
    return DiskTransfer(directory / "weights")


@contextmanager
def fake_gateway() -> Iterator[str]:
    """Serves the gateway's routes that an update uses, and yields the URL. No replica is held back."""

    async def stats(_: web.Request) -> web.Response:
        return web.json_response({"on_hold": [], "untold": [], "in_flight": {}})

    loop = asyncio.new_event_loop()
    app = web.Application()
    app.add_routes([web.get("/stats", stats), web.post("/engine", stats), web.post("/drain", stats)])
    runner = web.AppRunner(app)
    sock = ports.listen()
    loop.run_until_complete(runner.setup())
    loop.run_until_complete(web.SockSite(runner, sock).start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield ports.url_of(sock)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


@contextmanager
def longest_wait(url: str) -> Iterator[Callable[[], float]]:
    """Samples one token per request during the block. Yields a function that returns the longest request's
    seconds less the median."""
    params = {"max_tokens": 1, "temperature": 1.0, "logprobs": 0}
    body = json.dumps({"token_ids": [5, 6, 7], "sampling_params": params}).encode()
    waits: list[float] = []
    ended = threading.Event()

    def sample() -> None:
        while not ended.is_set():
            began = time.monotonic()
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{url}/inference/v1/generate", body, headers)
            urllib.request.urlopen(request, timeout=120).close()
            waits.append(time.monotonic() - began)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    while len(waits) < 10:
        time.sleep(0.01)
    yield lambda: max(waits) - statistics.median(waits)
    time.sleep(0.2)
    ended.set()
    thread.join()


def time_trl(url: str, device: torch.device, named: dict[str, torch.Tensor], rounds: int) -> list[float]:
    from trl.generation.vllm_client import VLLMClient

    class Model(torch.nn.Module):
        def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, Any]]:
            return iter(named.items())

    with ports.listen() as free:  # the NCCL group of the last size may still use TRL's default port
        port = free.getsockname()[1]
    client = VLLMClient(base_url=url, group_port=port, connection_timeout=60.0)
    client.init_communicator(device)
    seconds = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize(device)
        began = time.monotonic()
        client.update_model_params(Model())
        torch.cuda.synchronize(device)
        seconds.append(time.monotonic() - began)
        num_bytes = sum(tensor.nbytes for tensor in named.values())
        print(f"  TRL    {rate(num_bytes, seconds[-1])}", flush=True)
    return seconds[1:]


if __name__ == "__main__":
    main()
