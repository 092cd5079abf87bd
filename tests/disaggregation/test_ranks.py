"""Engines of several ranks: every rank of prefill writes its heads into every rank of decode that wants them. The ranks are
simulated, pools with random KV and no model; handoffs, control connections and transports are the real ones."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
import torch

from fluentllm.core import config
from fluentllm.core.handoff import HandoffContext
from fluentllm.core.kv.cache import KVCache
from fluentllm.core.kv.pages import Lease
from fluentllm.core.kv.pool import KVPool
from fluentllm.core.plugins import PluginManager
from fluentllm.core.sequence import Sequence
from fluentllm.core.types import Handoff, KVSpec, PrefillChunk, Request, SamplingParams, SlotResult, StepPlan
from fluentllm.plugins.kv_layerwise import LayerwiseSettings
from fluentllm.plugins.kv_layerwise.handoffs import LayerwiseHandoffs
from fluentllm.transfer.layout import memory_of
from fluentllm.transfer.slices import heads_of

from .pair import KEY

LAYERS, DRAFT_LAYERS, PAGE_SIZE, PAGES, TOKENS, FIRST = 5, 1, 4, 24, 27, 77
PROMPT = [(5 * i) % 90 + 1 for i in range(TOKENS)]


class Rank:
    """Implements `core.handoff.Host` for one rank, without an engine."""

    waiting = 0

    def __init__(self, role: str, transport: str, heads: int, size: int, rank: int, **settings: Any) -> None:
        """heads: of the model; 0 for MLA."""
        local = len(heads_of(heads, size, rank)) if heads else 0
        spec = KVSpec(kind="gqa", layers=LAYERS, heads=local, head_dim=6, v_head_dim=2)
        if not heads:
            spec = KVSpec(kind="mla", layers=LAYERS, latent_dim=6, rope_dim=2)
        self.pool = KVPool(spec, PAGES, PAGE_SIZE, torch.float32, torch.device("cpu"))
        self.states = torch.zeros(PAGES + 1, 3)
        for tensor in (*memory_of(self.pool), self.states):
            tensor.fill_(-1)
        self.kv = KVCache(PAGES, PAGE_SIZE, True)
        factory = PluginManager.load({"executor"}).registry("kv_transports").get(transport).factory
        self.handoffs = LayerwiseHandoffs(
            HandoffContext(
                settings=config.load(None, {"disaggregation.role": role}, {}).settings,
                role=role,  # type: ignore[arg-type]
                model="random",
                pool=self.pool,
                draft_layers=DRAFT_LAYERS,
                make_transport=factory,
                page_states=[self.states],
                speculative="mtp",
                tp_size=size,
                tp_rank=rank,
                kv_heads=heads or None,
            ),
            LayerwiseSettings(key=KEY, checksums=True, **settings),
        )
        self.sequence: Sequence | None = None
        self.token: int | None = None
        self.handoffs.start(self)

    def hand(self, port: int = 0) -> Sequence:
        handoff = Handoff(id="h", host="127.0.0.1" if port else "", port=port)
        params = SamplingParams(max_tokens=4)
        self.sequence = Sequence(Request(id="r", prompt=PROMPT, params=params, handoff=handoff), [])
        self.adopted = self.handoffs.adopt(self.sequence)
        return self.sequence

    def compute_prompt(self, model: list[torch.Tensor], states: torch.Tensor, heads: range, chunk: int) -> None:
        """As the engine's loop and its launch thread would, in chunks."""
        sequence, watcher = self.hand(), self.handoffs.watcher
        assert watcher is not None
        assert self.kv.admit(sequence, TOKENS)
        for step, start in enumerate(range(0, TOKENS, chunk)):
            count = min(chunk, TOKENS - start)
            plan = StepPlan(step=step, prefill=[PrefillChunk(0, start, count, start + count == TOKENS)])
            self.handoffs.planned(plan, [sequence])
            watcher.begin(plan)
            for layer in range(LAYERS - DRAFT_LAYERS):
                self._write(model, heads, range(start, start + count), layer)
                watcher.layer(layer)
            for layer in range(LAYERS - DRAFT_LAYERS, LAYERS):
                self._write(model, heads, range(start, start + count), layer)
            for page in range(-(-(start + count) // PAGE_SIZE)):
                self.states[sequence.pages[page]] = states[page]
            watcher.end()
        self.handoffs.drew(sequence, SlotResult(0, 0, [FIRST], None))

    def _write(self, model: list[torch.Tensor], heads: range, tokens: range, layer: int) -> None:
        assert self.sequence is not None
        for pool, whole in zip(memory_of(self.pool), model, strict=True):
            for token in tokens:
                row = whole[layer, token, heads.start : heads.stop]
                place = pool[layer, self.sequence.pages[token // PAGE_SIZE], token % PAGE_SIZE]
                place.copy_(row.reshape(place.shape))

    def prompt_kv(self) -> list[torch.Tensor]:
        """[layers, tokens, …] of each tensor of the pool."""
        assert self.sequence is not None
        return [tensor[:, self.sequence.pages].flatten(1, 2)[:, :TOKENS] for tensor in memory_of(self.pool)]

    # ------------------------------------------------------------------------------------------------------------- Host
    def expect(self, sequence: Sequence, label: str) -> Lease | None:
        return self.kv.expect(sequence, TOKENS, label)

    def give_up(self, sequence: Sequence) -> None:
        self.kv.release(sequence)

    def arrived(self, sequence: Sequence, token: int, logprob: Any, report: Any) -> None:
        self.token, self.report = token, report

    def compute(self, sequence: Sequence) -> None:
        raise AssertionError("the prompt would be computed here")

    submit = withdraw = refuse = compute

    def wake(self) -> None:
        """The test turns by itself."""

    def fail(self, error: Exception) -> None:
        raise error


def free_ports(count: int) -> int:
    """The first of so many free ports that follow each other."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            base = int(probe.getsockname()[1])
        try:
            for port in range(base, base + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return base


async def until(condition: Any) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.002)


async def hand_over(transport: str, heads: int, source: int, target: int, chunk: int, early: bool) -> None:
    base = free_ports(source)
    prefill = [Rank("prefill", transport, heads, source, rank, port=base) for rank in range(source)]
    decode = [Rank("decode", transport, heads, target, rank, peers=[f"127.0.0.1:{base}"]) for rank in range(target)]
    widths = (6, 2) if heads else (8,)
    model = [torch.rand(LAYERS, TOKENS, heads or 1, width) for width in widths]
    states = torch.rand(-(-TOKENS // PAGE_SIZE), 3)
    try:
        await asyncio.sleep(0.01)  # doors open

        def ask() -> None:
            for rank in decode:
                rank.hand(base)

        def compute() -> None:
            for number, rank in enumerate(prefill):
                rank.kv.allocator.allocate(rank.kv.allocator.lease("request", "other pages"), number + 1)
                rank.compute_prompt(model, states, heads_of(heads, source, number) if heads else range(1), chunk)

        def turned() -> bool:
            for rank in decode:
                rank.handoffs.turn()
            return all(rank.token is not None for rank in decode)

        if early:
            ask()
            await until(lambda: turned() or all(rank.handoffs.receiver._receiving for rank in decode))  # type: ignore[union-attr]
            await asyncio.sleep(0.05)
            compute()
        else:
            compute()
            ask()
        await until(turned)
        for number, rank in enumerate(decode):
            mine = heads_of(heads, target, number) if heads else range(1)
            assert rank.token == FIRST
            for found, whole in zip(rank.prompt_kv(), model, strict=True):
                assert torch.equal(found, whole[:, :, mine.start : mine.stop].reshape(found.shape))
            assert rank.sequence is not None
            assert torch.equal(rank.states[rank.sequence.pages], states)
            # Every byte once, however many ranks have it.
            assert rank.report.received_bytes == rank.handoffs.exchange.layout.bytes_of(TOKENS)
        received = sum(rank.report.received_bytes for rank in decode)
        await until(lambda: sum(rank.handoffs.stats().get("sent_bytes", 0) for rank in prefill) == received)
        await until(lambda: not any(rank.handoffs.quarantine.open for rank in decode))
        for rank in decode:
            assert rank.kv.allocator.leases("remote") == []
            assert rank.handoffs.stats().get("attempts_failed", 0) == 0
        # Ranks that nobody writes from hear nothing, and give up by their own deadline.
        wrote = [rank for rank in prefill if rank.handoffs.stats().get("sent_bytes", 0)]
        await until(lambda: not any(rank.handoffs.open for rank in wrote))
        for rank in wrote:
            assert rank.kv.allocator.leases("sending") == []
    finally:
        for rank in (*decode, *prefill):
            rank.handoffs.close()


SIZES = [(4, 2, 1), (4, 1, 2), (4, 2, 2), (4, 2, 4), (2, 4, 1), (0, 2, 1), (0, 1, 2), (0, 4, 2)]


@pytest.mark.parametrize(("heads", "source", "target"), SIZES)
@pytest.mark.parametrize(("chunk", "early"), [(TOKENS, False), (8, True)])
async def test_pages_equal_bit_for_bit(heads: int, source: int, target: int, chunk: int, early: bool) -> None:
    await hand_over("loopback", heads, source, target, chunk, early)


@pytest.mark.transports
@pytest.mark.parametrize("transport", ["nixl", "mooncake"])
@pytest.mark.parametrize(("heads", "source", "target"), [(4, 2, 1), (4, 1, 2), (0, 2, 1)])
async def test_over_real_transports(transport: str, heads: int, source: int, target: int) -> None:
    await hand_over(transport, heads, source, target, 8, True)


async def test_ranks_that_answer_at_the_wrong_port_are_not_used() -> None:
    """What is configured is the first rank's port."""
    base = free_ports(2)
    prefill = [Rank("prefill", "loopback", 4, 2, rank, port=base) for rank in range(2)]
    decode = Rank("decode", "loopback", 4, 1, 0, peers=[f"127.0.0.1:{base + 1}"], attempts=1)
    computed: list[Sequence] = []
    decode.compute = computed.append  # type: ignore[method-assign]
    try:
        await asyncio.sleep(0.01)
        decode.hand(base + 1)

        def gave_up() -> bool:
            decode.handoffs.turn()
            return bool(computed)

        await until(gave_up)
        stats = decode.handoffs.stats()
        # Tried when the peer was named, and again for the request if the first try was over by then.
        assert 1 <= stats["connections_failed"] <= 2
        assert "groups_received" not in stats
    finally:
        for rank in (decode, *prefill):
            rank.handoffs.close()
