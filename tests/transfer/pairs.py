"""Two connected ends in this process, one of them on a wire that the test looks into."""

from __future__ import annotations

from contextlib import AbstractContextManager

from fluentllm.plugins.kv_loopback.wire import LoopbackWire
from fluentllm.testing.bench import Bench, Pair
from fluentllm.transfer.polled import PolledTransport
from fluentllm.transfer.wire import Wire


def pair_on(wire: Wire, sizes: list[int]) -> AbstractContextManager[Pair]:
    """The source is on `wire`, the target on a loopback; both register tensors of `sizes` bytes."""
    wires = iter([wire, LoopbackWire()])
    bench = Bench(lambda context: PolledTransport(context, next(wires)), 1, "cpu", "127.0.0.1", seed=0, timeout=60)
    return bench.pair(sizes)
