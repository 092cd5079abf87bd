"""Chaos: engines are killed, the transport drops, delays, repeats and spoils, clients leave; the answers stay right.

    python benchmarks/disaggregation/chaos.py [--requests 1000] [--kill-every 6] [--json FILE] [--logs FOLDER]

Two prefill and two decode engines, processes of their own over NIXL, behind `fluent proxy`. While requests run, the engine
process of one after another is killed with SIGKILL; its supervisor starts it again. A tenth of the clients leave in the
middle. At least 99 % of the others must get the answer of one engine, and none may wait longer than its deadline. Afterwards
all engines must be idle, with free + cached pages = total, no page in quarantine, nothing open, no zombie; and no process, the
engines' own and the proxy included, may have more file descriptors or memory than before. Before and after are the same
requests without kills, so that all engines are connected and their pools are in use.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from cluster import API_KEY, HEADERS, SMALL, Cluster, Engine, machine

FAULTS = {
    "drop": 0.01,
    "delay": 0.05,
    "duplicate": 0.03,
    "reorder": 0.05,
    "corrupt": 0.02,
    "corrupt_note": 0.01,
    "disconnect": 0.01,
}
SETTINGS: dict[str, Any] = {
    "model": SMALL,
    "kv.memory": "32MiB",
    "engine.deterministic": True,
    "engine.max_restarts": 10_000,
    "plugins.kv_layerwise.transfer_timeout": 10.0,
    "plugins.kv_layerwise.wait_timeout": 10.0,
    "plugins.kv_layerwise.handoff_timeout": 20.0,
    "plugins.kv_layerwise.keep_timeout": 10.0,
    "plugins.kv_layerwise.drain_timeout": 2.0,
    "plugins.kv_layerwise.breaker_seconds": 2.0,
}
PROXY_TIMEOUT = 120.0
"""Seconds that a request may take, with all that is tried for it."""
DEADLINE = PROXY_TIMEOUT + 10
"""Seconds after which a request counts as hung."""
CALM = 200
"""Requests before and after, while nobody is killed."""
MORE_FDS, MORE_MEGABYTES = 4, 32
"""What a process may have more than before."""


def jobs(count: int) -> list[dict[str, Any]]:
    draw = random.Random(0)
    shared = [draw.randrange(3, 500) for _ in range(64)]
    return [
        {
            "prompt": shared[: draw.randrange(0, 64)] + [draw.randrange(3, 500) for _ in range(draw.randrange(1, 200))],
            "max_tokens": draw.randrange(1, 24),
            "temperature": draw.choice([0, 0.9]),
            "seed": number,
            "ignore_eos": True,
        }
        for number in range(count)
    ]


async def references(engines: list[Engine], bodies: list[dict[str, Any]]) -> list[str]:
    """By engines alone, in turns: so all of them have computed prompts before anything is measured."""
    gate = asyncio.Semaphore(4 * len(engines))
    # The engines keep an idle connection for 5 s, as httpx does: which of them is first is chance.
    limits = httpx.Limits(max_connections=None, keepalive_expiry=2.0)
    async with httpx.AsyncClient(headers=HEADERS, timeout=300, limits=limits) as client:

        async def one(number: int) -> str:
            async with gate:
                url = engines[number % len(engines)].url
                answer = await client.post(f"{url}/v1/completions", json=bodies[number])
                answer.raise_for_status()
                return str(answer.json()["choices"][0]["text"])

        return list(await asyncio.gather(*map(one, range(len(bodies)))))


@dataclass(frozen=True)
class Held:
    """By one process."""

    fds: int
    megabytes: int

    @classmethod
    def of(cls, process: psutil.Process) -> Held:
        return cls(process.num_fds(), process.memory_info().rss // 2**20)


class Run:
    """All requests through the proxy."""

    def __init__(self, url: str, bodies: list[dict[str, Any]], expected: list[str], parallel: int) -> None:
        self.url, self.bodies, self.expected = url, bodies, expected
        self.gate = asyncio.Semaphore(parallel)
        self.right = self.wrong = self.failed = self.hung = self.left = 0
        self.errors: list[str] = []
        self.times: list[tuple[float, float, int]] = []
        """Seconds, when it began, number."""

    async def all(self) -> None:
        async with httpx.AsyncClient(
            timeout=DEADLINE, limits=httpx.Limits(max_connections=None, keepalive_expiry=2.0)
        ) as client:
            await asyncio.gather(*(self._one(client, number) for number in range(len(self.bodies))))

    async def _one(self, client: httpx.AsyncClient, number: int) -> None:
        async with self.gate:
            if number % 10 == 9:
                await self._leave(client, self.bodies[number])
                return
            started = time.time()
            try:
                answer = await client.post(f"{self.url}/v1/completions", json=self.bodies[number])
            except httpx.TimeoutException:
                self.hung += 1
            except httpx.HTTPError as error:
                self.failed += 1
                self.errors.append(f"{type(error).__name__}: {error}")
            else:
                self._judge(number, answer)
            self.times.append((time.time() - started, started, number))

    def _judge(self, number: int, answer: httpx.Response) -> None:
        if answer.status_code != 200:
            self.failed += 1
            self.errors.append(f"{answer.status_code} {answer.text[:300]}")
        elif answer.json()["choices"][0]["text"] == self.expected[number]:
            self.right += 1
        else:
            self.wrong += 1

    async def _leave(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        self.left += 1
        with contextlib.suppress(httpx.HTTPError, TimeoutError):
            async with (
                asyncio.timeout(random.random() * 0.3),
                client.stream("POST", f"{self.url}/v1/completions", json={**body, "stream": True}) as answer,
            ):
                async for _ in answer.aiter_bytes():
                    pass


async def kill(engines: list[Engine], every: float, kills: list[str], counted: Counter[str]) -> None:
    """One engine process after another, for as long as it is let. What it has counted is kept."""
    while every:
        for engine in engines:
            await asyncio.sleep(every)
            process = engine.engine_process()
            if process is not None:
                stats = await asyncio.to_thread(state, engine)
                counted.update({} if stats is None else plain(stats["handoff"]))
                process.kill()
                kills.append(engine.url)


def plain(counters: dict[str, int]) -> dict[str, int]:
    """Without those that say how things are now."""
    return {name: count for name, count in counters.items() if count and name not in ("open", "quarantined_pages")}


def start_proxy(prefill: list[Engine], decode: list[Engine], log: Path) -> tuple[subprocess.Popen[str], str]:
    words = [w for e in prefill for w in ("--prefill", e.url)] + [w for e in decode for w in ("--decode", e.url)]
    options = ["--port", "0", "--api-key", API_KEY, "--timeout", str(PROXY_TIMEOUT)]
    command = [sys.executable, "-m", "fluentllm.cli", "proxy", *words, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    out = process.stdout
    assert out is not None
    for line in out:
        found = re.search(r"http://[\d.]+:\d+", line)
        if found:
            threading.Thread(target=lambda: log.write_text(out.read()), daemon=True).start()
            return process, found[0]
    raise RuntimeError("the proxy did not start")


def state(engine: Engine) -> dict[str, Any] | None:
    with contextlib.suppress(httpx.HTTPError):
        return engine.state()["stats"]
    return None


def settle(engine: Engine, seconds: float = 60) -> dict[str, Any]:
    """Its statistics once it is idle, or as they are when the time is up."""
    deadline = time.monotonic() + seconds
    while True:
        stats = state(engine)
        if stats is not None:
            handoff = stats["handoff"]
            if not (stats["waiting"] or stats["running"] or handoff["open"] or handoff.get("quarantined_pages")):
                return stats
        if time.monotonic() > deadline:
            return stats or {}
        time.sleep(0.2)


def hang_up(engine: Engine, seconds: float = 60) -> None:
    """Until its front end has closed the connections that clients keep open without using them."""
    deadline = time.monotonic() + seconds
    front = engine.processes()["frontend"]
    while any(each.status == psutil.CONN_ESTABLISHED for each in front.net_connections("tcp")):
        if time.monotonic() > deadline:
            raise RuntimeError(f"{engine.name}: connections to the front end stay open")
        time.sleep(0.2)


def held(cluster: Cluster) -> dict[str, dict[str, Held]]:
    """By engine and process."""
    return {engine.name: {name: Held.of(process) for name, process in engine.processes().items()} for engine in cluster.engines}


def leaks(engine: Engine) -> list[str]:
    """What is not as it should be, after everything."""
    stats = settle(engine)
    if not stats:
        return ["it does not answer"]
    found = []
    handoff = stats["handoff"]
    if stats["pages_free"] + stats["pages_cached"] != stats["pages_total"]:
        found.append(f"{stats['pages_free']} pages free and {stats['pages_cached']} cached, of {stats['pages_total']}")
    if stats["waiting"] or stats["running"] or handoff["open"] or handoff.get("quarantined_pages"):
        found.append(f"not idle: {stats}")
    children = psutil.Process(engine.process.pid).children(recursive=True)
    zombies = [child.pid for child in children if child.status() == psutil.STATUS_ZOMBIE]
    if zombies:
        found.append(f"zombies: {zombies}")
    return found


def growth(before: dict[str, dict[str, Held]], after: dict[str, dict[str, Held]]) -> list[str]:
    found = []
    for engine, processes in after.items():
        for name, now in processes.items():
            then = before[engine][name]
            if now.fds > then.fds + MORE_FDS:
                found.append(f"{engine}, {name}: {now.fds} file descriptors, {then.fds} before")
            if now.megabytes > then.megabytes + MORE_MEGABYTES:
                found.append(f"{engine}, {name}: {now.megabytes} MB resident, {then.megabytes} before")
    return found


async def calm(url: str, bodies: list[dict[str, Any]], expected: list[str], cluster: Cluster, proxy: int) -> dict[str, Any]:
    """Requests while nobody is killed; then what each process holds."""
    run = Run(url, bodies, expected, parallel=8)
    await run.all()
    if run.wrong or run.failed or run.hung:
        raise RuntimeError(f"nobody was killed, and {run.wrong} wrong, {run.failed} failed, {run.hung} hung: {run.errors[:3]}")
    await asyncio.gather(*(asyncio.to_thread(settle, engine) for engine in cluster.engines))
    await asyncio.gather(*(asyncio.to_thread(hang_up, engine) for engine in cluster.engines))
    return {**held(cluster), "proxy": {"proxy": Held.of(psutil.Process(proxy))}}


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--parallel", type=int, default=12)
    parser.add_argument("--kill-every", type=float, default=6.0, help="Seconds between two kills; 0 kills nobody.")
    parser.add_argument("--engines", type=int, default=2, help="Of each role.")
    parser.add_argument("--logs", type=Path, help="Folder that keeps the logs of the engines and the proxy.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bodies = jobs(options.requests)
    with Cluster(options.logs) as cluster:
        prefill = [
            cluster.start("prefill", **SETTINGS, **{"plugins.kv_layerwise.faults": {"seed": number, **FAULTS}})
            for number in range(options.engines)
        ]
        peers = [engine.control for engine in prefill]
        decode = [
            cluster.start("decode", peers=peers, **SETTINGS, **{"plugins.kv_layerwise.checksums": True})
            for _ in range(options.engines)
        ]
        expected = await references(cluster.engines, bodies)
        proxy, url = start_proxy(prefill, decode, cluster.path / "proxy.log")
        try:
            few = bodies[:CALM], expected[:CALM]
            before = await calm(url, *few, cluster, proxy.pid)
            run, kills, counted = Run(url, bodies, expected, options.parallel), [], Counter()
            killer = asyncio.create_task(kill([*prefill, *decode], options.kill_every, kills, counted))
            started = time.monotonic()
            try:
                await run.all()
            finally:
                killer.cancel()
            seconds = time.monotonic() - started
            after = await calm(url, *few, cluster, proxy.pid)
        finally:
            proxy.terminate()
        problems = {engine.name: found for engine in cluster.engines if (found := await asyncio.to_thread(leaks, engine))}
        grown = growth(before, after)
        for engine in cluster.engines:
            counted.update(plain(engine.state()["stats"]["handoff"]))
    asked = len(bodies) - run.left
    share = run.right / asked
    print(
        f"{run.right} of {asked} right ({share:.2%}), {run.wrong} wrong, {run.failed} failed, {run.hung} hung; {run.left} left"
    )
    print(f"{len(kills)} kills in {seconds:.0f} s; leaks: {problems or 'none'}; grown: {grown or 'none'}")
    for engine, processes in after.items():
        for name, now in processes.items():
            then = before[engine][name]
            print(f"  {engine:10} {name:10} {then.fds:4} → {now.fds:4} fds {then.megabytes:5} → {now.megabytes:5} MB")
    for seconds_taken, at, number in sorted(run.times, reverse=True)[:5]:
        print(f"  slowest: {seconds_taken:.1f} s, request {number} from {time.strftime('%H:%M:%S', time.localtime(at))}")
    for name, count in sorted(counted.items()):
        print(f"  {name:32} {count:,}")
    for error in run.errors[:5]:
        print(f"  error: {error}")
    if options.json:
        report = {"machine": machine(), "share": share, "kills": len(kills), "seconds": seconds, "counted": counted}
        outcome = {"wrong": run.wrong, "failed": run.failed, "hung": run.hung, "leaks": problems, "grown": grown}
        sizes = {
            when: {e: {n: asdict(h) for n, h in p.items()} for e, p in found.items()}
            for when, found in (("before", before), ("after", after))
        }
        options.json.write_text(json.dumps({**report, **outcome, **sizes, "errors": run.errors}, indent=1))
    return int(share < 0.99 or bool(run.wrong or run.hung or problems or grown))


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
