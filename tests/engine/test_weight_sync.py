"""Weights on their way to replicas: in which order they are asked, what they find, and who is named when one
fails."""

from __future__ import annotations

import asyncio
import http.client
import threading
import time
import urllib.error
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web
from loopback import serving
from safetensors import safe_open
from safetensors.torch import load_file

from gymexp.config.schema import LoraConfig
from gymexp.engine.adapter_transfer import AdapterTransfer
from gymexp.engine.admission import Admission, Drain
from gymexp.engine.replicas import NamedTensors, Replicas, TensorSpecs, reload_weights, write_weights
from gymexp.engine.weight_sync import WeightSync
from gymexp.engine.weight_transfer import DiskTransfer
from gymexp.errors import ServiceError


class Server:
    """A vLLM as far as weights go: remembers what it was asked, and loads what it is told to."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answered: list[str] = []
        self.loaded: dict[str, torch.Tensor] = {}
        self.fails: str | None = None
        self.status = 500
        self.dies_at: str | None = None
        self.called: list[str] = []
        self.on_load: Callable[[Path], None] = lambda path: None

    def app(self) -> web.Application:
        app = web.Application()
        app.add_routes([web.post("/{phase}", self.answer), web.get("/health", self.health)])
        app.add_routes([web.post("/v1/{phase}", self.answer)])
        app.add_routes([web.get("/plain", self.plain)])
        return app

    async def health(self, request: web.Request) -> web.Response:
        return web.Response(status=503 if self.fails in ("health", "dead") else 200)

    async def plain(self, request: web.Request) -> web.Response:
        return web.Response()

    async def answer(self, request: web.Request) -> web.Response:
        phase = request.match_info["phase"]
        self.asked.append(f"{phase}?{request.query_string}" if request.query_string else phase)
        if phase == self.fails or self.fails == "dead":
            return web.Response(status=self.status, text="no such luck")
        if phase == self.dies_at:
            self.fails = "health"
        if self.fails == "health":  # a process that was killed breaks its connections
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        body = await request.json()
        if phase == "collective_rpc":
            self.called.append(body["method"])
            if body["method"] == "reload_weights":
                path = Path(body["kwargs"]["weights_path"])
                self.on_load(path)
                self.loaded = load_file(path / "model.safetensors")
        if phase == "slow":
            await asyncio.sleep(0.5)
        self.answered.append(phase)
        if phase == "echo":
            return web.json_response(body)
        return web.json_response({})


class Gateway:
    """The gateway's part: which replicas get no requests."""

    def __init__(self, urls: list[str]) -> None:
        self.on_hold = list(urls)
        self.versions: dict[str, int | None] = {}
        self.fenced: set[str] = set()
        self.left: list[int] = []  # how many requests it says are in flight, in turn; then none
        self.drained: list[bool] = []  # whether it was to cut those that are left

    def app(self) -> web.Application:
        app = web.Application()
        app.add_routes([web.get("/stats", self.stats), web.post("/engine", self.change)])
        app.add_routes([web.post("/drain", self.drain)])
        return app

    async def stats(self, request: web.Request) -> web.Response:
        return web.json_response({"on_hold": self.on_hold, "untold": []})

    async def change(self, request: web.Request) -> web.Response:
        body = await request.json()
        urls, state = body["urls"], body["state"]
        if state in ("open", "on_hold"):
            self.on_hold = [url for url in self.on_hold if url not in urls] + urls * (state == "on_hold")
        if state in ("open", "updated"):
            self.fenced -= set(urls)
        if state == "fenced":
            self.fenced |= set(urls)
        else:
            self.versions |= dict.fromkeys(urls, body["weights_version"])
        return web.json_response({})

    async def drain(self, request: web.Request) -> web.Response:
        body = await request.json()
        assert self.fenced >= set(body["urls"]), "else further requests would come"
        self.drained.append(body["cut"])
        left = self.left.pop(0) if self.left else 0
        return web.json_response({"in_flight": {body["urls"][0]: left} if left else {}})


@dataclass
class Site:
    servers: tuple[Server, Server]
    replicas: Replicas
    gateway: Gateway
    gateway_url: str
    directory: Path

    def sync(self, **options: Any) -> WeightSync:
        transfer = DiskTransfer(self.directory / "weights")
        return WeightSync(self.replicas, transfer, self.admission, self.directory / "again", **options)

    @property
    def admission(self) -> Admission:
        return Admission([self.gateway_url], None, 5.0)


@pytest.fixture
def site(tmp_path):
    with ExitStack() as stack:
        servers = Server(), Server()
        urls = [stack.enter_context(serving(server.app())) for server in servers]
        gateway = Gateway(urls)
        url = stack.enter_context(serving(gateway.app()))
        yield Site(servers, Replicas(urls, timeout_s=5.0), gateway, url, tmp_path)


@pytest.fixture
def two(site):
    sync = site.sync()
    assert site.gateway.on_hold == [], "healthy, and with the weights that the run begins with"
    yield sync, site.servers, site.replicas
    sync.close()


def weights(value: float) -> tuple[TensorSpecs, NamedTensors]:
    transposed = torch.full((2, 3), value).T  # not contiguous, as a parameter may be
    named = [("a.weight", transposed), ("b.weight", torch.full((4,), value, requires_grad=True))]
    return [(name, tensor.dtype, list(tensor.shape)) for name, tensor in named], iter(named)


def test_every_replica_is_paused_given_the_weights_and_let_go_on(site, two):
    sync, servers, _ = two
    assert set(site.gateway.versions.values()) == {0}
    sync.update(3, *weights(1.5))
    assert set(site.gateway.versions.values()) == {3}
    for server in servers:
        assert server.asked == ["pause?mode=abort", "collective_rpc", "reset_prefix_cache", "resume"]
        assert server.loaded["a.weight"].shape == (3, 2)
        assert set(server.loaded["b.weight"].tolist()) == {1.5}


def test_what_is_being_read_is_not_written_over(two, tmp_path):
    sync, servers, _ = two
    for version in (1, 2, 3):
        sync.update(version, *weights(float(version)))
        assert set(servers[0].loaded["b.weight"].tolist()) == {version}
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == ["0", "1"]
    sync.close()
    assert not (tmp_path / "weights").exists()


def test_a_failing_replica_is_named_with_its_phase_and_the_others_go_on_sampling(two):
    sync, servers, replicas = two
    servers[1].fails = "collective_rpc"
    with pytest.raises(
        ServiceError, match=rf"{replicas.urls[1]} answered collective_rpc with 500: no such luck"
    ):
        sync.update(1, *weights(1.0))
    assert servers[0].asked[-1] == servers[1].asked[-1] == "resume"


def test_a_replica_that_is_away_is_left_out_and_has_the_policys_weights_before_it_is_asked_again(site):
    sync, (first, second) = site.sync(), site.servers
    sync.update(1, *weights(1.0))
    second.fails, second.asked = "health", []
    sync.update(2, *weights(2.0))
    assert second.asked == [] and site.gateway.on_hold == [site.replicas.urls[1]]
    assert set(first.loaded["b.weight"].tolist()) == {2.0}
    sync.tend(lambda: weights(2.0)[1])
    assert second.asked == [] and site.gateway.on_hold == [site.replicas.urls[1]], "it is not back yet"
    second.fails, first.asked = None, []
    sync.tend(lambda: pytest.fail("the file of the update is still there"))
    assert second.asked == ["collective_rpc", "reset_prefix_cache", "resume"] and first.asked == []
    assert set(second.loaded["b.weight"].tolist()) == {2.0}
    assert site.gateway.on_hold == [] and set(site.gateway.versions.values()) == {2}
    sync.tend(lambda: pytest.fail("all is well: no weights are asked for"))


@pytest.mark.parametrize("phase", ["pause", "collective_rpc", "reset_prefix_cache", "resume"])
def test_a_replica_that_is_killed_within_an_update_costs_the_others_nothing(site, phase):
    sync, (first, second) = site.sync(), site.servers
    sync.update(1, *weights(1.0))
    second.dies_at, first.asked = phase, []
    sync.update(2, *weights(2.0))
    assert first.asked == ["pause?mode=abort", "collective_rpc", "reset_prefix_cache", "resume"]
    assert set(first.loaded["b.weight"].tolist()) == {2.0}
    assert site.gateway.on_hold == [site.replicas.urls[1]], "it may come back with other weights"
    assert site.gateway.versions == {site.replicas.urls[0]: 2, site.replicas.urls[1]: None}
    second.dies_at = second.fails = None
    sync.tend(lambda: weights(2.0)[1])
    assert set(second.loaded["b.weight"].tolist()) == {2.0}
    assert site.gateway.on_hold == [] and set(site.gateway.versions.values()) == {2}


def test_a_replica_that_is_back_by_the_next_update_gets_its_weights_with_the_others(site):
    sync, (first, second) = site.sync(), site.servers
    sync.update(1, *weights(1.0))
    site.gateway.on_hold, first.asked, second.asked = [site.replicas.urls[1]], [], []
    sync.update(2, *weights(2.0))
    assert first.asked == second.asked and set(second.loaded["b.weight"].tolist()) == {2.0}
    assert site.gateway.on_hold == [] and set(site.gateway.versions.values()) == {2}
    assert site.gateway.fenced == set()


class Forgetful(DiskTransfer):
    """A way of the weights that keeps nothing of an update, as NCCL does."""

    def again(self, replicas: Replicas, version: int) -> bool:
        return False


def test_without_whole_weights_a_replica_that_is_back_waits_for_the_next_update_while_another_samples(site):
    transfer = Forgetful(site.directory / "weights")
    sync = WeightSync(site.replicas, transfer, site.admission, site.directory / "again")
    sync.update(1, *weights(1.0))
    one, other = site.replicas.urls
    site.gateway.on_hold = [other]
    sync.tend(lambda: None)
    assert site.gateway.on_hold == [other]
    sync.update(2, *weights(2.0))
    assert site.gateway.on_hold == [] and site.gateway.versions == {one: 2, other: 2}
    site.gateway.on_hold = [one, other]
    with pytest.raises(ServiceError, match=r"all engines were lost, .* sharded, .*: resume the run"):
        sync.tend(lambda: None)
    sync.tend(lambda: weights(2.0)[1])
    assert site.gateway.on_hold == []


def test_one_that_goes_away_while_it_falls_asleep_or_is_brought_back_is_left_out(site):
    sync, second = site.sync(sleeps=True), site.servers[1]
    sync.update(1, *weights(1.0))
    second.dies_at = "sleep"
    sync.sleep()
    assert site.gateway.on_hold == [site.replicas.urls[1]]
    second.fails, second.dies_at = None, "collective_rpc"
    sync.tend(lambda: weights(1.0)[1])
    assert site.gateway.on_hold == [site.replicas.urls[1]], "it was there, and went away again"
    sync.sleep()
    assert second.asked[-1] == "collective_rpc", "who is away is not sent to sleep"


@pytest.mark.parametrize(("status", "is_lost"), [(400, False), (499, False), (500, True), (503, True)])
def test_a_500_of_one_that_is_going_down_is_its_loss_and_a_refusal_is_none(site, status, is_lost):
    site.servers[1].fails, site.servers[1].status = "dead", status
    replicas = Replicas(site.replicas.urls, timeout_s=5.0)
    with nullcontext() if is_lost else pytest.raises(ServiceError, match=f"{status}: no such luck"):
        replicas.reach("/pause")
    assert replicas.urls == site.replicas.urls[: 1 if is_lost else 2]
    assert [f"{status}: no such luck" in reason for reason in replicas.lost.values()] == [True] * is_lost


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (TimeoutError("timed out"), False),
        (urllib.error.URLError(TimeoutError("timed out")), False),
        (urllib.error.URLError(ConnectionRefusedError("refused")), True),
        (ConnectionResetError("reset"), True),
        (http.client.RemoteDisconnected("closed"), True),
    ],
)
def test_one_that_answers_too_late_may_still_be_at_it_and_is_not_left_out(monkeypatch, error, is_lost):
    def open_url(request, timeout_s):
        assert timeout_s == 7.0
        raise error

    monkeypatch.setattr("gymexp.processes.http_client.open_url", open_url)
    replicas = Replicas(["http://one"], timeout_s=7.0)
    with (
        nullcontext() if is_lost else pytest.raises(ServiceError, match=r"did not answer pause: .*timed out")
    ):
        replicas.reach("/pause")
    assert (replicas.urls, list(replicas.lost)) == (([], ["http://one"]) if is_lost else (["http://one"], []))


def test_a_post_that_fails_at_one_has_ended_at_all(site):
    first, second = site.servers
    first.fails = "slow"
    with pytest.raises(ServiceError, match="answered slow with 500"):
        site.replicas.post("/slow")
    assert second.answered == ["slow"]


def test_the_threads_that_ask_end_with_their_answers(site):
    before = set(threading.enumerate())
    site.replicas.post("/echo")
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before:
        assert time.monotonic() < deadline, "a thread is left"
        time.sleep(0.01)


def test_one_that_comes_back_before_any_weights_were_sent_has_the_right_ones(site):
    sync = site.sync()
    site.gateway.on_hold = [site.replicas.urls[0]]
    sync.tend(lambda: pytest.fail("no weights are needed"))
    assert site.gateway.on_hold == [] and site.servers[0].asked == []
    assert set(site.gateway.versions.values()) == {0}


def test_of_servers_that_gymexp_did_not_start_nobody_knows_what_they_hold_until_it_is_sent(site):
    sync = site.sync(first_version=None)
    assert set(site.gateway.versions.values()) == {None}
    sync.update(0, *weights(1.0))
    assert set(site.gateway.versions.values()) == {0}


def test_with_nobody_there_an_update_still_walks_over_the_weights_which_is_every_ranks(site):
    sync = site.sync()
    for server in site.servers:
        server.fails = "health"
    specs, named = weights(1.0)
    sync.update(1, specs, named)
    assert list(named) == [] and len(site.gateway.on_hold) == 2


def test_replicas_on_the_trainers_gpus_sleep_until_their_next_weights(site):
    sync = site.sync(sleeps=True)
    sync.update(0, *weights(0.0))
    sync.sleep()
    sync.update(1, *weights(1.0))
    loading = ["collective_rpc", "reset_prefix_cache"]
    asleep = ["sleep?level=2", "wake_up?tags=weights", *loading, "wake_up?tags=kv_cache"]
    assert site.servers[0].asked == ["pause?mode=abort", *loading, "resume", *asleep]


def test_replicas_that_get_an_adapter_alone_keep_their_weights_asleep(site):
    """At vLLM's level 2 they would drop them, and nothing would send them again."""
    transfer = AdapterTransfer(site.directory / "weights", LoraConfig(r=2))
    again = site.directory / "again"
    sync = WeightSync(site.replicas, transfer, site.admission, again, sleeps=True, first_version=None)
    assert site.gateway.versions == dict.fromkeys(site.replicas.urls)
    for version in (0, 1):
        sync.update(version, [], iter([("w.lora_A.weight", torch.ones(2))]))
        sync.sleep()
    first = ["load_lora_adapter", "reset_prefix_cache"]
    asleep = ["sleep?level=1", "wake_up?tags=weights", "unload_lora_adapter", *first, "wake_up?tags=kv_cache"]
    assert site.servers[0].asked == ["pause?mode=abort", *first, "resume", *asleep, "sleep?level=1"]


@pytest.mark.parametrize("kind", ["disk", "adapter"])
def test_a_transfer_that_has_sent_nothing_can_be_closed(kind, tmp_path):
    where = tmp_path / "weights"
    (DiskTransfer(where) if kind == "disk" else AdapterTransfer(where, LoraConfig(r=2))).close()
    assert not where.exists()


def test_waiting_for_health_ends_with_health_a_deadline_or_the_runs_end(two):
    _, servers, replicas = two
    servers[1].fails = "health"
    asked = threading.Event()
    with pytest.raises(ServiceError, match=r"did not become healthy within 1 s \(engine\.start_timeout_s\)"):
        replicas.wait_healthy(1.0, asked)
    threading.Timer(0.3, lambda: setattr(servers[1], "fails", None)).start()
    replicas.wait_healthy(10.0, asked)
    servers[1].fails = "health"
    threading.Timer(0.3, asked.set).start()
    began = time.monotonic()
    replicas.wait_healthy(30.0, asked)
    assert time.monotonic() - began < 5


def test_a_replica_that_was_woken_is_awake_and_is_paused_the_next_time(site):
    sync = site.sync(sleeps=True)
    sync.sleep()
    sync.update(1, *weights(1.0))
    for server in site.servers:
        server.asked.clear()
    sync.update(2, *weights(2.0))
    loading = ["collective_rpc", "reset_prefix_cache"]
    assert site.servers[1].asked == ["pause?mode=abort", *loading, "resume"]


def test_a_failed_update_lets_replicas_that_slept_go_on_and_leaves_the_version_as_it_was(site):
    sync = site.sync(sleeps=True)
    sync.update(1, *weights(1.0))
    sync.sleep()
    site.servers[0].fails = "reset_prefix_cache"
    with pytest.raises(ServiceError, match="answered reset_prefix_cache with 500"):
        sync.update(2, *weights(2.0))
    assert site.servers[0].asked[-1] == site.servers[1].asked[-1] == "wake_up?tags=kv_cache"
    assert set(site.gateway.versions.values()) == {1}
    site.servers[0].fails, site.gateway.on_hold = None, [site.replicas.urls[0]]
    sync.tend(lambda: weights(1.0)[1])
    assert site.gateway.versions[site.replicas.urls[0]] == 1, "the last one that was sent"


def test_replicas_with_gpus_of_their_own_never_sleep(site):
    sync = site.sync()
    sync.sleep()
    assert site.servers[0].asked == []


class Remembering(Forgetful):
    """A way of the weights that has agreed on something with the replicas, as NCCL has."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.happened: list[str] = []

    def forget(self) -> None:
        self.happened.append("forget")

    def close(self) -> None:
        self.happened.append("close")
        super().close()


def test_what_was_agreed_on_is_forgotten_when_a_replica_is_back_and_nothing_is_left_in_the_end(site):
    transfer = Remembering(site.directory / "weights")
    sync = WeightSync(site.replicas, transfer, site.admission, site.directory / "again")
    sync.update(3, *weights(1.0))
    site.gateway.on_hold = [site.replicas.urls[1]]
    read: list[dict] = []
    site.servers[1].on_load = lambda path: read.append(metadata_of(path))
    sync.tend(lambda: weights(3.0)[1])
    assert transfer.happened == ["forget"] and read == [{"format": "pt", "weights_version": "3"}]
    assert not (site.directory / "again").exists(), "read, and gone"
    (site.directory / "again").mkdir()
    sync.close()
    assert transfer.happened == ["forget", "close"] and list(site.directory.iterdir()) == []


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path / "model.safetensors", "pt") as file:
        return file.metadata()


def test_only_a_vllm_on_a_cpu_packs_its_tied_head_again(site):
    for on_cpu, methods in ((True, ["reload_weights", "pack_tied_head"]), (False, ["reload_weights"])):
        server = site.servers[0]
        server.called = []
        write_weights(site.directory / "w", weights(1.0)[1], 1)
        reload_weights(Replicas(site.replicas.urls[:1], on_cpu=on_cpu), site.directory / "w")
        assert server.called == methods
    assert Replicas([], on_cpu=True).only(["x"]).on_cpu and Replicas([], 7.0).only([]).timeout_s == 7.0


def test_replicas_are_asked_all_at_once_each_with_its_own_or_all_with_one_body(site):
    replicas = Replicas([f"{url}/" for url in site.replicas.urls], timeout_s=5.0)
    assert replicas.post("/echo", [{"a": 1}, {"a": 2}]) == [{"a": 1}, {"a": 2}]
    assert replicas.post("/echo", {"a": 3}) == [{"a": 3}] * 2
    assert replicas.post("/echo") == [{}] * 2
    assert replicas.get("/plain") == [None] * 2, "an empty answer is none"
    with pytest.raises(ValueError):
        replicas.post("/echo", [{}])
    began = time.monotonic()
    assert replicas.post("/slow", {}) == [{}] * 2
    assert time.monotonic() - began < 0.9, "0.5 s each, both at once"
    started = replicas.start("/slow", {})
    assert time.monotonic() - began < 1.4 and [future.result() for future in started] == [{}] * 2


def test_a_replica_that_does_not_answer_or_answers_too_late_is_named_with_the_phase(site):
    gone = Replicas(["http://127.0.0.1:9"], timeout_s=1.0)
    with pytest.raises(
        ServiceError, match=r"^weights: the engine at http://127\.0\.0\.1:9 did not answer pause: "
    ):
        gone.post("/pause?mode=abort")
    slow = Replicas(site.replicas.urls[:1], timeout_s=0.1)
    with pytest.raises(ServiceError, match="did not answer slow"):
        slow.post("/slow")
    assert list(gone.ill()) == ["http://127.0.0.1:9"] and "refused" in gone.ill()["http://127.0.0.1:9"]
    assert slow.ill() == {}


def test_before_the_weights_are_sent_nothing_is_in_flight_and_the_pause_is_repeated_until_then(site):
    sync = site.sync()
    site.gateway.left = [3, 1]
    sync.update(1, *weights(1.0))
    loading = ["collective_rpc", "reset_prefix_cache", "resume"]
    assert site.servers[0].asked == ["pause?mode=abort"] * 3 + loading
    assert site.gateway.drained == [False] * 3 and site.gateway.fenced == set()


def test_requests_that_no_pause_ends_are_given_up_in_the_end_and_if_even_that_fails_the_update_does(site):
    sync = site.sync()
    site.gateway.left = [1] * 4
    sync.update(1, *weights(1.0))
    assert site.gateway.drained == [False] * 4 + [True]
    site.gateway.left = [1] * 5
    with pytest.raises(ServiceError, match=r"requests were in flight at http://.* after all cuts"):
        sync.update(2, *weights(2.0))
    assert site.servers[0].asked[-1] == "resume"
    assert set(site.gateway.versions.values()) == {1}
    assert len(site.gateway.fenced) == 2, "nothing is sampled with weights that may be half sent"


def test_without_cuts_requests_end_by_themselves_before_the_pause_but_not_for_ever(site, monkeypatch):
    sync = site.sync(cuts=False)
    site.gateway.left = [5, 4, 1]
    sync.update(1, *weights(1.0))
    assert site.servers[0].asked == ["pause?mode=abort", "collective_rpc", "reset_prefix_cache", "resume"]
    assert site.gateway.drained == [False] * 5, (
        "three times some were left, then none before and after the pause"
    )
    monkeypatch.setattr("gymexp.engine.weight_sync._LONGEST_GENERATION_S", 0.0)
    site.gateway.left = [5, 4, 1]
    with pytest.raises(ServiceError, match=r"5 requests were in flight at .*overlap\.update=abort"):
        sync.update(2, *weights(2.0))


def test_a_gateway_that_breaks_a_connection_off_is_asked_again_and_one_that_refuses_is_not():
    """A gateway that is restarted keeps its socket: its connections break, and the next one waits."""
    asked = []

    async def change(request: web.Request) -> web.Response:
        asked.append(await request.json())
        if len(asked) < 3:
            assert request.transport is not None
            request.transport.abort()
        return web.json_response({}, status=200 if len(asked) == 3 else 400)

    app = web.Application()
    app.add_routes([web.post("/engine", change)])
    with serving(app) as url:
        admission = Admission([url], None, 5.0)
        admission.hold("http://one")
        assert asked == [{"urls": ["http://one"], "state": "on_hold", "weights_version": None}] * 3
        with pytest.raises(ServiceError, match=r"did not answer /engine: HTTP Error 400"):
            admission.hold("http://one")
    assert len(asked) == 4


def test_a_gateway_that_does_not_answer_is_named(site, tmp_path):
    away = Admission(["http://127.0.0.1:9"], None, 5.0)
    with pytest.raises(ServiceError, match=r"^the gateway did not answer /engine: "):
        WeightSync(site.replicas, DiskTransfer(tmp_path), away, tmp_path)


@pytest.mark.parametrize("timeout_s", [True, None, "1", -0.1])
def test_a_drain_without_a_time_is_refused(timeout_s):
    with pytest.raises(ValueError, match="timeout_s must be a number >= 0"):
        Drain.read({"urls": ["http://127.0.0.1:1"], "timeout_s": timeout_s, "cut": False})


def test_a_drain_may_take_no_time():
    assert Drain.read({"urls": ["http://127.0.0.1:1"], "timeout_s": 0, "cut": True}).timeout_s == 0
