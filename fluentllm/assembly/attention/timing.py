"""Times attention backends on this GPU, through the calls that layers make, on one layer's random KV.

Decode passes are captured, where they can be, as the engine captures them: the time is that of a replay by calls. Prefill
passes are launched one by one.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from msgspec import structs

from ...core.batch import Batch
from ...core.kv.pool import KVPool, free_memory
from ...core.protocols import AttentionContext, PartialAttention

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from ...core.plugins.registry import Entry
    from ...core.protocols import AttentionBackend, AttentionSpec, Phase
    from ...core.settings import Settings
    from .records import Times

log = logging.getLogger(__name__)

DECODE_POINTS = ((1, 1024), (1, 16384), (32, 1024), (8, 8192))
"""Sequences × keys of each."""
PREFILL_POINTS = ((512, 0), (2048, 0), (2048, 6144))
"""New tokens of one prompt, behind so many cached ones."""
CALLS = 8
"""Layers in a captured pass."""
REPEATS = 3


@dataclass(frozen=True, slots=True)
class Point:
    sequences: int
    rows: int
    """Of each sequence."""
    keys: int
    """Of each sequence, its new rows included."""
    phase: Phase

    @property
    def tokens(self) -> int:
        return self.sequences * self.keys

    def __str__(self) -> str:
        if self.phase == "decode":
            return f"{self.sequences} × {self.keys}"
        return f"{self.rows} after {self.keys - self.rows}"


def points(phase: Phase, longest: int) -> list[Point]:
    """Those that sequences of at most `longest` tokens can reach; at least one."""
    if phase == "decode":
        every = [Point(sequences, 1, keys, phase) for sequences, keys in DECODE_POINTS]
        fallback = Point(1, 1, longest, phase)
    else:
        every = [Point(1, new, new + cached, phase) for new, cached in PREFILL_POINTS]
        fallback = Point(1, longest, longest, phase)
    return [point for point in every if point.keys <= longest] or [fallback]


class Bench:
    """A pool of one layer, as large as the points need, and each backend on it."""

    def __init__(self, settings: Settings, spec: AttentionSpec, device: torch.device, wanted: Sequence[Point]) -> None:
        self.spec, self._settings, self.device = spec, settings, device
        kv = structs.replace(spec.model.kv, layers=1)
        dtype = getattr(torch, spec.kv_dtype)
        page = KVPool.bytes_per_page(kv, spec.page_size, dtype)
        room = (free_memory(device) or 0) // 4  # what prefill expands is as large again, and more
        self.points = [point for point in wanted if self._pages(point) * page <= room] or list(wanted[:1])
        self._pool = KVPool(kv, max(map(self._pages, self.points)), spec.page_size, dtype, device)
        for tensor in (self._pool.k, self._pool.v, self._pool.latent):
            if tensor.numel() and dtype.itemsize > 1:
                tensor.normal_()

    def _pages(self, point: Point) -> int:
        return point.sequences * -(-point.keys // self.spec.page_size)

    def backend(self, entry: Entry) -> AttentionBackend:
        made: AttentionBackend = entry.factory(AttentionContext(self.spec, self._pool, self._settings))
        if isinstance(made, PartialAttention):
            made.load()
        return made

    def batch(self, point: Point) -> Batch:
        size, device = self.spec.page_size, self.device
        count, rows = point.sequences, point.rows
        table = (torch.randperm(self._pages(point), device=device) + 1).view(count, -1)
        positions = torch.arange(point.keys - rows, point.keys, device=device).repeat(count)
        sequences = torch.arange(count, device=device).repeat_interleave(rows)
        return Batch(
            tokens=torch.zeros_like(positions),
            positions=positions,
            sequences=sequences,
            slots=torch.arange(count, device=device),
            query_start=torch.arange(0, count * rows + 1, rows, dtype=torch.int32, device=device),
            kv_lengths=torch.full((count,), point.keys, dtype=torch.int32, device=device),
            page_table=table.to(torch.int32),
            kv_rows=table[sequences, positions // size] * size + positions % size,
            history=torch.zeros(1, 1, dtype=torch.int32, device=device),
            page_size=size,
            query_length=rows if point.phase == "decode" else None,
            query_lengths=(rows,) * count if point.phase == "prefill" else None,
            kv_lengths_host=(point.keys,) * count if point.phase == "prefill" else None,
        )

    def time(self, backend: AttentionBackend, point: Point) -> float | None:
        """Microseconds a layer; None where the backend leaves such passes to others now."""
        batch = self.batch(point)
        if isinstance(backend, PartialAttention) and not backend.serves(batch):
            return None
        layer = self._layer(backend, batch)
        if point.phase == "prefill":
            return _launched(lambda: backend.begin(batch), layer)
        return (_captured if getattr(backend, "capturable", False) else _launched)(lambda: backend.begin(batch), layer)

    def _layer(self, backend: AttentionBackend, batch: Batch) -> Callable[[], Tensor]:
        kv, heads = self.spec.model.kv, self.spec.model.heads
        total, scale = batch.positions.shape[0], 0.1
        dtype = getattr(torch, self.spec.dtype)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=dtype, device=self.device)

        if kv.kind == "gqa":
            q = random(total, heads, kv.head_dim)
            k, v = random(total, kv.heads, kv.head_dim), random(total, kv.heads, kv.v_head_dim)
            return lambda: backend.gqa(0, q, k, v, batch, scale)
        nope, value = kv.nope_dim or 128, kv.value_dim or 128
        operands = (
            random(total, heads, nope), random(total, heads, kv.rope_dim), random(total, kv.latent_dim),
            random(total, kv.rope_dim), random(heads, nope, kv.latent_dim), random(heads, value, kv.latent_dim),
        )  # fmt: skip
        return lambda: backend.mla(0, *operands, batch, scale)


def able(settings: Settings, spec: AttentionSpec, entries: Sequence[Entry], device: torch.device, point: Point) -> set[str]:
    """Names of those that would do such a pass now. Loads what they have compiled; launches nothing of theirs."""
    names = set()
    bench = Bench(settings, spec, device, [point])
    for entry in entries:
        try:
            backend = bench.backend(entry)
            if not isinstance(backend, PartialAttention) or backend.serves(bench.batch(point)):
                names.add(entry.name)
        except Exception as error:
            log.warning("attention backend %r cannot be made: %s: %s", entry.name, type(error).__name__, error)
    return names


def compare(
    settings: Settings, spec: AttentionSpec, entries: Sequence[Entry], device: torch.device, wanted: Sequence[Point]
) -> Times:
    """Times of all that serve. One that fails is named in the log and takes no part."""
    times: Times = {}
    with own_stream(device), torch.inference_mode():
        bench = Bench(settings, spec, device, wanted)
        for entry in entries:
            try:
                backend = bench.backend(entry)
                for point in bench.points:
                    micros = bench.time(backend, point)
                    if micros is not None:
                        times.setdefault(str(point), {})[entry.name] = round(micros, 2)
            except Exception as error:
                log.warning("attention backend %r cannot be timed: %s: %s", entry.name, type(error).__name__, error)
                log.debug("", exc_info=True)
                for row in times.values():
                    row.pop(entry.name, None)
    return times


def _captured(begin: Callable[[], None], layer: Callable[[], Any]) -> float:
    def program() -> None:
        begin()
        for _ in range(CALLS):
            layer()

    program()  # compiles
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        program()
    finally:
        graph.capture_end()
    graph.replay()
    return min(_between(graph.replay) for _ in range(REPEATS)) / CALLS


def _launched(begin: Callable[[], None], layer: Callable[[], Any]) -> float:
    def program() -> None:
        begin()
        layer()
        layer()

    program()
    return min(_between(program) for _ in range(REPEATS)) / 2


def _between(run: Callable[[], Any]) -> float:
    """Microseconds that the device takes, its waiting for the host included."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) * 1e3


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """The default stream cannot be captured. A thread that has a stream of its own keeps it."""
    current = torch.cuda.current_stream(device)
    if current != torch.cuda.default_stream(device):
        yield
        return
    torch.cuda.synchronize(device)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield
        torch.cuda.synchronize(device)
