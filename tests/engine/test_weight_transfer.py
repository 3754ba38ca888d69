"""The watch over NCCL: whoever waits there for a replica that has failed is told of it."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import pytest

from gymexp.engine.weight_transfer import watched
from gymexp.errors import ServiceError


def answered(value: object = None) -> Future:
    future: Future = Future()
    future.set_exception(value) if isinstance(value, Exception) else future.set_result(value)
    return future


def test_a_block_that_ends_is_left_alone():
    given_up: list[ServiceError] = []
    with watched([answered(), answered()], 0.2, "update_weights", given_up.append, grace_s=0.2):
        pass
    threading.Event().wait(0.5)
    assert given_up == []


def test_a_replica_that_fails_ends_a_block_that_waits_for_it_for_ever():
    given_up: list[ServiceError] = []
    ended = threading.Event()

    def give_up(error: ServiceError) -> None:
        given_up.append(error)
        ended.set()

    failed = answered(ServiceError("vLLM at http://a:1 answered update_weights with 500"))
    with (
        pytest.raises(ServiceError, match="answered update_weights with 500"),
        watched([Future(), failed], 30.0, "update_weights", give_up, grace_s=0.1),
    ):
        assert ended.wait(10), "in the place of NCCL's broadcast"
        failed.result()
    assert "http://a:1" in str(given_up[0])


def test_a_replica_that_says_nothing_is_waited_for_so_long_and_no_longer():
    given_up: list[ServiceError] = []
    ended = threading.Event()

    def give_up(error: ServiceError) -> None:
        given_up.append(error)
        ended.set()

    silent: Future = Future()
    with watched([silent], 0.2, "init_weight_transfer_engine", give_up, grace_s=0.1):
        assert ended.wait(10)
        silent.set_result(None)
    assert "init_weight_transfer_engine did not end within 0 s" in str(given_up[0])


def test_a_broadcast_that_hangs_after_all_have_answered_has_its_deadline_too():
    ended = threading.Event()
    with watched([answered()], 0.2, "update_weights", lambda _: ended.set(), grace_s=60.0):
        assert ended.wait(10)
