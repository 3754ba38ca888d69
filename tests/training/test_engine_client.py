"""The engine as the trainer sees it: when it samples, when it sleeps, and by which way its weights come."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from aiohttp import web
from loopback import serving

from gymexp.config.schema import EngineConfig, EnvConfig, ModelConfig, RunConfig
from gymexp.engine import weight_transfer
from gymexp.engine.adapter_transfer import AdapterTransfer
from gymexp.engine.weight_sync import WeightSync
from gymexp.errors import ServiceError
from gymexp.processes import access_keys
from gymexp.record.services_file import Services
from gymexp.training.engine_client import HFSampling, ServerSampling, join_servers


class HFEngine:
    """Whether it rests, and what was done to it."""

    def __init__(self) -> None:
        self.happened: list[str] = []
        self.weights_version: int | None = None

    def pause(self) -> None:
        self.happened.append("pause")

    def resume(self) -> None:
        self.happened.append(f"resume with {self.weights_version}")


def test_the_hf_engine_samples_within_the_block_alone_with_the_version_that_it_was_told():
    engine = HFEngine()
    sampling = HFSampling(engine)  # type: ignore[arg-type]
    assert engine.happened == ["pause"], "the trainer has the model first"
    with sampling.sampling(3):
        assert engine.happened == ["pause", "resume with 3"]
        sampling.tend()
    with pytest.raises(KeyError), sampling.sampling(4):
        raise KeyError
    assert engine.happened == ["pause", "resume with 3", "pause", "resume with 4", "pause"]


class Sync(WeightSync):
    def __init__(self) -> None:
        self.happened: list[Any] = []

    def sleep(self) -> None:
        self.happened.append("sleep")

    def tend(self, weights: Any) -> None:
        self.happened.append(weights)


@pytest.mark.parametrize("shared", [True, False])
def test_servers_sleep_after_sampling_where_they_share_the_trainers_gpus_and_nowhere_else(shared):
    sync = Sync()
    sampling = ServerSampling(sync, shared)
    with sampling.sampling(1):
        assert sync.happened == []
    assert sync.happened == ["sleep"] * shared


def test_servers_that_are_back_are_given_the_trainers_own_weights():
    sync = Sync()
    sampling = ServerSampling(sync, shared=False)
    sampling.named_weights = lambda: iter([])
    sampling.tend()
    assert sync.happened == [sampling.named_weights]


def test_only_the_first_rank_plays():
    with pytest.raises(AssertionError, match="first rank"), ServerSampling(None, shared=True).sampling(1):
        pass


class Site:
    """An engine that is healthy, and the gateway in front of it, in one app."""

    def __init__(self) -> None:
        self.changes: list[dict] = []

    def app(self) -> web.Application:
        app = web.Application()
        app.add_routes([web.get("/health", self.health), web.post("/engine", self.engine)])
        return app

    async def health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def engine(self, request: web.Request) -> web.Response:
        self.changes.append(await request.json())
        return web.json_response({})


class Nccl(weight_transfer.DiskTransfer):
    """NCCL takes GPUs: what it was made with."""

    def __init__(self, device: torch.device, give_up: Any, address: str) -> None:
        super().__init__(Path("nowhere"))
        self.made_with = device, give_up, address


@pytest.fixture
def join(tmp_path, monkeypatch):
    """`join_servers` of a rank, with the services that the controller started; returns what it made and
    what the gateway was told."""
    monkeypatch.setattr(weight_transfer, "NcclTransfer", Nccl)
    monkeypatch.setenv(access_keys.RUN, "the-run")
    with ExitStack() as stack:
        site = Site()
        url = stack.enter_context(serving(site.app()))

        def run(kind: str, rank: int = 0, shared: bool = False, config: Any = None, **more: Any):
            engine_facts: dict[str, Any] = {"engine": "vllm", "engine_urls": [url]} | more
            services = Services(
                control_url="nowhere",
                gateway_urls=[url],
                replicas={},
                checkpoint=None,
                transfer=kind,
                shared=shared,
                trainer_address="10.0.0.7",
                **engine_facts,
            )
            engine = config or EngineConfig()
            config = RunConfig(ModelConfig("m", "p"), {"e": EnvConfig("c", "a")}, engine=engine)
            device = torch.device("cpu")
            stop_requested = threading.Event()
            directory: Any = SimpleNamespace(path=tmp_path)
            return join_servers(
                config, directory, services, rank, device, stop_requested, stack
            ), site.changes

        yield run


@pytest.mark.parametrize(
    ("kind", "kind_of_transfer"),
    [("disk", weight_transfer.DiskTransfer), ("nccl", Nccl), ("ipc", weight_transfer.IpcTransfer)],
)
def test_weights_go_the_way_that_the_placement_says(join, kind, kind_of_transfer):
    made, changes = join(kind, shared=kind == "ipc")
    assert type(made.sync._transfer) is kind_of_transfer
    assert (made.shared, made.sync._sleeps) == (kind == "ipc", kind == "ipc")
    [opened] = changes
    assert opened["state"] == "open" and opened["weights_version"] == 0, "what the run begins with"
    if kind == "nccl":
        device, _, address = made.sync._transfer.made_with
        assert (device, address) == (torch.device("cpu"), "10.0.0.7")


def test_an_engine_that_samples_with_an_adapter_needs_one_before_its_first_request(join):
    made, [opened] = join("adapter", shared=True)
    assert type(made.sync._transfer) is AdapterTransfer and made.shared
    assert opened["weights_version"] is None and made.first_version is None
    other, _ = join("adapter", rank=1)
    assert other.sync is None and other.first_version is None, "it takes part in the first gathering too"
    assert join("nccl")[0].first_version == join("ipc", rank=1)[0].first_version == 0


def test_other_ranks_have_a_part_in_cuda_ipc_alone(join):
    made, changes = join("ipc", rank=1, shared=True)
    assert isinstance(made.sync, weight_transfer.IpcPeer) and made.shared
    made, changes = join("disk", rank=1)
    assert made.sync is None and not made.shared
    assert changes == [], "the first rank alone speaks to the gateway"


def test_of_servers_of_the_users_own_nobody_knows_the_weights_or_where_they_run(join):
    made, changes = join("disk", config=EngineConfig(urls=["http://elsewhere"]))
    assert changes[0]["weights_version"] is None and not made.sync._replicas.on_cpu
    made, _ = join("disk")
    assert made.sync._replicas.on_cpu, "where this process sees no GPU, a vLLM that gymexp starts sees none"
    made, _ = join("disk", engine="hf")
    assert not made.sync._replicas.on_cpu


def test_engines_that_do_not_get_healthy_end_the_run_with_their_name(join):
    with pytest.raises(ServiceError, match=r"http://127\.0\.0\.1:9 did not become healthy"):
        join("disk", config=EngineConfig(start_timeout_s=0.2), engine_urls=["http://127.0.0.1:9"])
