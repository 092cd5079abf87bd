"""Rate of a KV transport against a plain NIXL loop over the same descriptors, in the same run, between two processes.

    python benchmarks/disaggregation/transfer_rate.py [--repeat 15] [--in-a-row 8] [--device cuda] [--json FILE]

Two ways to send take turns: ours submits to `kv_nixl` and waits for its events; the plain loop makes one NIXL transfer of all
rows with its notification, posts it and polls it every 50 µs (`--poll-us`; 0: without a pause). Both write from the same memory
to the same endpoint of the other process, a `kv_nixl` transport, which so polls for both in the same way, counts their
notifications and answers when all have come. Each is measured in two ways:

- in a row, as prefill sends its layers: N transfers, each with a notification of its own, none waited for before all are
  submitted. The loop makes and posts one after the other and polls them only then, all of them until all are done; ours submits
  all and waits for every `TransferDone`. The rate is all bytes by the time from the first call until the sender knows that all
  is written. A share of TARGET is asked of this one, best against best: other work on the machine spoils medians.
- single, each waited for before the next begins: the time of one, whose share holds the wake-ups of threads that a stream
  hides. Reported, nothing is asked of it.

The transfers in a row write different pages, or layers, as far as there are any. Every shape's bytes are compared after a row
of ours. Exits with 1 if the share of any shape but a single page is below TARGET.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from fluentllm.core.settings import Settings
from fluentllm.core.transport import Notified, Peer, PeerReady, TransferDone, TransportContext
from fluentllm.plugins.kv_nixl import NixlSettings
from fluentllm.plugins.kv_nixl.wire import NixlWire
from fluentllm.testing.ends import read_frame, write_frame
from fluentllm.transfer.descriptors import plan_writes
from fluentllm.transfer.layout import KVLayout
from fluentllm.transfer.naps import Bell, keep_time
from fluentllm.transfer.polled import PolledTransport
from fluentllm.transfer.wire import Address, Envelope, read_address, regions_of

LAYOUT = KVLayout(model="m", kind="mla", dtype="bfloat16", page_size=32, pages=257, layers=61, latent_dim=512, rope_dim=64)
"""61 layers of 36 KiB pages: 564 MB."""
PAGES = 64
POLL = 50e-6
TARGET = 0.85
SMALL = "a single page"
"""Shows what a transfer costs whatever it holds; TARGET is not asked of it."""
SINGLE, ROW = "single", "in a row"


class Ours:
    """The transport, and what the benchmark asks of it."""

    def __init__(self, name: str, memory: torch.Tensor, settings: NixlSettings) -> None:
        self.woken = Bell()
        self.events: list[Any] = []
        context = TransportContext(name, "127.0.0.1", Settings(plugin={"kv_nixl": settings}), self.woken.ring)
        self.transport = PolledTransport(context, NixlWire("127.0.0.1", settings))
        self.transport.register([memory])
        self.transport.expect(1)

    def connect(self, address: bytes) -> Peer:
        """The last one connected to is who `once` writes to."""
        self.peer = self.transport.connect(address)
        self.wait(PeerReady)
        return self.peer

    def wait(self, kind: type) -> Any:
        """The next event of the kind; those of other kinds stay."""
        while True:
            self.events += self.transport.poll()
            for event in self.events:
                if isinstance(event, kind):
                    self.events.remove(event)
                    return event
            self.woken.wait(1)

    def once(self, row: list[np.ndarray]) -> float:
        """Seconds from the first submit until all are done."""
        started = time.perf_counter()
        for rows in row:
            self.transport.submit(self.peer, rows, b"written")
        for _ in row:
            assert self.wait(TransferDone).status == "done"
        seconds = time.perf_counter() - started
        self.wait(Notified)
        return seconds


class Plain:
    """NIXL as its examples use it. Its notes are made as ours, for a transport to take them."""

    EPOCH = 1

    def __init__(self, memory: torch.Tensor, settings: NixlSettings, nap: float) -> None:
        self.wire, self.nap = NixlWire("127.0.0.1", settings), nap
        self.memory, regions = memory, regions_of([memory])
        wire = self.wire.open("plain", self.EPOCH, [memory], regions)
        self.base = regions[0].address
        self.address = msgspec.msgpack.encode(Address("nixl", "plain", self.EPOCH, memory.device.type, regions, wire))
        self.agent = self.wire._agent

    def connect(self, metadata: bytes) -> None:
        address = read_address(metadata, "nixl")
        self.peer, _, self.device = self.wire.connect(address)
        self.remote = address.regions[0].address
        self.note = msgspec.msgpack.encode(Envelope(self.EPOCH, address.epoch, b"written"))

    def answer(self) -> bytes:
        """The peer also sends signs of life."""
        while True:
            for note in self.wire.received():
                if payload := msgspec.msgpack.decode(note, type=Envelope).payload:
                    return payload
            time.sleep(POLL)

    def begin(self, rows: np.ndarray) -> Any:
        """Post it. Returns its handle and state."""
        ours, theirs = np.zeros((len(rows), 3), dtype=np.uint64), np.zeros((len(rows), 3), dtype=np.uint64)
        ours[:, 0], ours[:, 1], ours[:, 2] = rows[:, 0] + self.base, rows[:, 2], self.memory.device.index or 0
        theirs[:, 0], theirs[:, 1], theirs[:, 2] = rows[:, 1] + self.remote, rows[:, 2], self.device
        kind = "VRAM" if self.memory.is_cuda else "DRAM"
        local, remote = self.agent.get_xfer_descs(ours, kind), self.agent.get_xfer_descs(theirs, kind)
        handle = self.agent.initialize_xfer("WRITE", local, remote, self.peer, self.note)
        return handle, self.agent.transfer(handle)

    def once(self, row: list[np.ndarray]) -> float:
        started = time.perf_counter()
        open = [self.begin(rows) for rows in row]
        while True:
            for handle, state in open:
                assert state in ("PROC", "DONE"), state
                if state == "DONE":
                    self.agent.release_xfer_handle(handle)
            open = [handle for handle, state in open if state == "PROC"]
            if not open:
                break
            if self.nap:
                time.sleep(self.nap)
            open = [(handle, self.agent.check_xfer_state(handle)) for handle in open]
        seconds = time.perf_counter() - started
        assert self.answer() == b"answer"
        return seconds


def target(descriptor: str, settings: str, device: str) -> None:
    """The receiving process: answers when as many notifications have come as it is told."""
    torch.set_num_threads(1)
    memory = torch.zeros(sum(region.size for region in LAYOUT.tensors()), dtype=torch.uint8, device=device)
    here = Ours("target", memory, msgspec.json.decode(settings, type=NixlSettings))
    with socket.socket(fileno=int(descriptor)) as control:
        write_frame(control, here.transport.metadata())
        peers = {which: here.connect(address) for which, address in read_frame(control).items()}
        write_frame(control, True)
        while True:
            try:
                command, count = read_frame(control)
            except EOFError:
                break
            if command in peers:
                for _ in range(count):
                    here.wait(Notified)
                here.transport.submit(peers[command], np.empty((0, 3), dtype=np.int64), b"answer")
                here.wait(TransferDone)
            elif command == "zero":
                memory.zero_()
                if memory.is_cuda:
                    torch.cuda.synchronize()
            write_frame(control, memory[:count].cpu().numpy().tobytes() if command == "read" else True)
    here.transport.close()


def shapes(rng: np.random.Generator, only: str, transfers: int) -> dict[str, list[np.ndarray]]:
    """The rows of each of the transfers in a row, by name, of those that have `only` in it."""
    straight = np.arange(1, LAYOUT.pages)
    scattered = rng.permutation(straight), rng.permutation(straight)

    def row(layers: int, pages: int, local: np.ndarray, remote: np.ndarray) -> list[np.ndarray]:
        """Of other pages and layers each, until all have had their turn."""
        plans = []
        for number in range(transfers):
            first, page = number * layers % (LAYOUT.layers - layers + 1), number * pages % len(straight)
            part = slice(page, page + pages)
            plans.append(plan_writes(LAYOUT, LAYOUT, range(first, first + layers), local[part], remote[part]))
        return plans

    every = {
        "61 layers × 64 pages, scattered": row(LAYOUT.layers, PAGES, *scattered),
        "61 layers × 64 pages, contiguous": row(LAYOUT.layers, PAGES, straight, straight),
        "8 layers × 64 pages, scattered": row(8, PAGES, *scattered),
        "8 layers × 64 pages, contiguous": row(8, PAGES, straight, straight),
        SMALL: row(1, 1, straight, straight),
    }
    return {name: plans for name, plans in every.items() if only in name}


def compare(times: dict[str, list[float]], total: int) -> dict[str, Any]:
    """By way: best and median seconds of `total` bytes; ours as a share of the loop's rate."""
    best = {which: min(found) for which, found in times.items()}
    median = {which: statistics.median(found) for which, found in times.items()}
    shares = {"share": best["plain"] / best["ours"], "median_share": median["plain"] / median["ours"]}
    return {"MB": total / 1e6, "best_s": best, "median_s": median, **shares}


def in_turns(
    kinds: dict[str, list[np.ndarray]], repeat: int, measure: Callable[[str, list[np.ndarray]], float]
) -> dict[str, Any]:
    times: dict[str, dict[str, list[float]]] = {kind: {"ours": [], "plain": []} for kind in kinds}
    for turn in range(-2, repeat):  # those below 0 warm up
        for kind, row in kinds.items():
            for which in list(times[kind]) if turn % 2 else list(times[kind])[::-1]:
                seconds = measure(which, row)
                if turn >= 0:
                    times[kind][which].append(seconds)
    return {kind: compare(times[kind], sum(int(rows[:, 2].sum()) for rows in row)) for kind, row in kinds.items()}


def show(name: str, found: dict[str, Any]) -> None:
    """One line: in a row by rates, single ones by times."""

    def line(kind: str, unit: str, value: Callable[[float], float]) -> str:
        parts = []
        for what, share in (("best", "share"), ("median", "median_share")):
            plain, ours = (value(found[kind][f"{what}_s"][which]) for which in ("plain", "ours"))
            parts.append(f"{what} {plain:6.2f} {ours:6.2f} {found[kind][share]:4.0%}")
        return f"{kind} ({unit}): {', '.join(parts)}"

    rates = line(ROW, "GB/s", lambda seconds: found[ROW]["MB"] / 1e3 / seconds)
    times = line(SINGLE, "ms", lambda seconds: seconds * 1e3)
    print(f"{name:32s} {found['writes']:4d} writes {found[SINGLE]['MB']:6.2f} MB   {rates}   {times}", flush=True)


def write_report(path: Path, found: dict[str, Any]) -> None:
    versions = {name: metadata.version(name) for name in ("nixl-cu13", "torch", "fluentllm")}
    path.write_text(json.dumps({**found, "versions": versions, "cores": os.cpu_count()}, indent=1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--in-a-row", type=int, default=8, help="transfers that are submitted before any is waited for")
    parser.add_argument("--only", default="", help="shapes whose name has this in it")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cpu", help="of both ends' memory: cpu, cuda, cuda:N")
    parser.add_argument("--kernel-copies", action="store_true", help="let both copy through the kernel (CMA)")
    parser.add_argument("--poll-us", type=float, default=POLL * 1e6, help="the plain loop's nap between looks; 0: none")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_time()  # or Linux makes the loop's naps twice as long
    config = NixlSettings(kernel_copies=options.kernel_copies)
    control, theirs = socket.socketpair()
    with theirs:
        rest = [str(theirs.fileno()), msgspec.json.encode(config).decode(), options.device]
        child = subprocess.Popen([sys.executable, __file__, "target", *rest], pass_fds=[theirs.fileno()])
    size = sum(region.size for region in LAYOUT.tensors())
    memory = torch.randint(-(2**62), 2**62, (size // 8,)).view(torch.uint8).to(options.device)
    ours, plain = Ours("source", memory, config), Plain(memory, config, options.poll_us / 1e6)
    ways: dict[str, Ours | Plain] = {"ours": ours, "plain": plain}
    address = read_frame(control)
    write_frame(control, {"ours": ours.transport.metadata(), "plain": plain.address})
    for way in ways.values():
        way.connect(address)
    read_frame(control)

    def measure(which: str, row: list[np.ndarray]) -> float:
        # Ours looks at the network rarely while the loop has its turn.
        ours.transport.expect(which == "ours")
        write_frame(control, [which, len(row)])
        seconds = ways[which].once(row)
        read_frame(control)
        return seconds

    results: list[dict[str, Any]] = []
    for name, row in shapes(np.random.default_rng(0), options.only, options.in_a_row).items():
        found = in_turns({SINGLE: row[:1], ROW: row}, options.repeat, measure)
        write_frame(control, ["zero", 0])
        read_frame(control)
        measure("ours", row)
        write_frame(control, ["read", size])
        arrived, source = np.frombuffer(read_frame(control), dtype=np.uint8), memory.cpu().numpy()
        expected = np.zeros(size, dtype=np.uint8)
        for start, offset, length in np.concatenate(row).tolist():
            expected[offset : offset + length] = source[start : start + length]
        assert np.array_equal(arrived, expected), f"{name}: wrong bytes"
        results.append({"shape": name, "writes": len(row[0]), "transfers in a row": len(row), **found})
        show(name, results[-1])
    control.close()
    child.wait(20)
    ours.transport.close()
    plain.wire.close()
    if options.json:
        write_report(options.json, {"results": results, **vars(options), "json": None})
    return int(any(result[ROW]["share"] < TARGET for result in results if result["shape"] != SMALL))


if __name__ == "__main__":
    if sys.argv[1:2] == ["target"]:
        target(*sys.argv[2:])
    else:
        sys.exit(main())
