"""`fluent proxy` while engines are away: requests wait for a decode engine, within bounds; without prefill, decode computes."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

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


def test_a_kept_connection_that_ends_when_it_is_used_again(engines: tuple[Server, Server], expected: list[dict]) -> None:
    """As a server ends one that was idle for long. Prefill gets its half all the same, and decode does not wait in vain."""
    prefill, decode = engines
    before = told(decode), told(prefill)
    with network(prefill) as (url, ended):
        made = Router([SimpleNamespace(url=url)], [decode])  # type: ignore[list-item]
        try:
            for _ in range(2):
                answer = made.complete(**BODY)
                assert answer["choices"] == expected
                assert "kv_transfer" in answer["usage"]
        finally:
            made.close()
    assert ended.is_set()
    after = told(decode), told(prefill)
    for name in ("retries", "rerouted", "local_prefills", "deadline_request", "requests_told"):
        assert [now.get(name, 0) for now in after] == [then.get(name, 0) for then in before], name


def told(server: Server) -> dict[str, int]:
    counted: dict[str, int] = httpx.get(f"{server.url}/handoff", headers=HEADERS, timeout=30).json()["stats"]["handoff"]
    return counted


@contextmanager
def network(server: Server) -> Iterator[tuple[str, threading.Event]]:
    """A way to the server that ends one connection, at the second request on it → its URL, and whether it has."""
    loop, ended = asyncio.new_event_loop(), threading.Event()
    port = int(server.url.rpartition(":")[2])

    async def joined(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        answered = False

        async def back() -> None:
            nonlocal answered
            while data := await far_reader.read(65536):
                answered = True
                writer.write(data)
            writer.close()

        answers = asyncio.create_task(back())
        while data := await reader.read(65536):
            if answered and not ended.is_set():
                ended.set()
                writer.close()
                break
            far_writer.write(data)
        far_writer.close()
        await answers

    listening = loop.run_until_complete(asyncio.start_server(joined, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", ended
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        listening.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


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
