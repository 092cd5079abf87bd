"""`fluent proxy` while engines are away: requests wait for a decode engine, within bounds; without prefill, decode computes."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import psutil
import pytest
from processes.server import START_TIMEOUT, Server

from .servers import API_KEY, Router, cluster

pytestmark = pytest.mark.transports
BODY = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
HEADERS = {"Authorization": f"Bearer {API_KEY}"}


@contextmanager
def away(server: Server) -> Iterator[None]:
    """Its engine is killed, and not started again before the end."""
    supervisor = psutil.Process(server.process.pid)
    supervisor.send_signal(signal.SIGSTOP)
    try:
        server.child("engine").kill()
        while server.health()[0] == 200:
            time.sleep(0.01)
        yield
    finally:
        supervisor.send_signal(signal.SIGCONT)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    with socket.socket() as probe:  # prefill must come back at the port that decode knows
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fixed = ("--set", f"plugins.kv_layerwise.port={port}")
    with cluster(tmp_path_factory.mktemp("router"), "nixl", *fixed) as (prefill, decode):
        yield prefill, decode


@contextmanager
def router(engines: tuple[Server, Server], *options: str) -> Iterator[Router]:
    prefill, decode = engines
    made = Router([prefill], [decode], *options)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def expected(engines: tuple[Server, Server]) -> list[dict]:
    return httpx.post(f"{engines[0].url}/v1/completions", json=BODY, headers=HEADERS, timeout=60).json()["choices"]


def test_decode_is_away(engines: tuple[Server, Server], expected: list[dict]) -> None:
    decode = engines[1]
    with (
        ThreadPoolExecutor(1) as pool,
        router(engines) as patient,
        router(engines, "--queue", "0") as proud,
        router(engines, "--timeout", "0.5") as hasty,
        router(engines, "--queue", "1") as narrow,
    ):
        with away(decode):
            held = pool.submit(patient.complete, **BODY)
            full = proud.client.post("/v1/completions", json=BODY)
            assert (full.status_code, full.json()["error"]["code"]) == (503, "proxy_queue_full")
            late = hasty.client.post("/v1/completions", json=BODY)
            assert (late.status_code, late.json()["error"]["code"]) == (504, "proxy_timeout")
            # A client that leaves makes room for the next, once the router has noticed.
            with pytest.raises(httpx.TimeoutException):
                narrow.client.post("/v1/completions", json=BODY, timeout=0.5)
            deadline = time.monotonic() + START_TIMEOUT
            while refused(narrow):
                assert time.monotonic() < deadline
            assert not held.done()
        assert held.result()["choices"] == expected
        decode.wait_healthy()


def test_prefill_is_away(engines: tuple[Server, Server], expected: list[dict]) -> None:
    """Decode computes until it is back."""
    prefill = engines[0]
    with router(engines) as push, router(engines, "--pull") as pull:
        with away(prefill):
            for _ in range(2):
                assert push.complete(**BODY)["choices"] == pull.complete(**BODY)["choices"] == expected
        prefill.wait_healthy()
        deadline = time.monotonic() + START_TIMEOUT
        for each in (push, pull):
            while "kv_transfer" not in each.complete(**BODY)["usage"]:  # the router has not noticed yet
                assert time.monotonic() < deadline


def refused(router: Router) -> bool:
    """At once; False if the request waits."""
    try:
        return router.client.post("/v1/completions", json=BODY, timeout=0.5).status_code == 503
    except httpx.TimeoutException:
        return False


def test_bodies_that_are_no_object(engines: tuple[Server, Server]) -> None:
    with router(engines) as patient:
        for body in (b"", b"[1]", b"{"):
            answer = patient.client.post("/v1/completions", content=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
