"""One backend made of several on the same pool: each pass goes to the first, in the order of its phase, that serves it.

All backends keep KV where the pool says, in the pool's type, so what one has written another can read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...core.buckets import CAPTURED_KEYS
from ...core.protocols import AttentionBackend, FusedGQA, FusedMLA, PartialAttention, PassPlan, PlannedPrefill

if TYPE_CHECKING:
    from torch import Tensor

    from ...core.batch import Batch

log = logging.getLogger(__name__)

SHORT = CAPTURED_KEYS
"""Keys of a pass up to which launching it kernel by kernel, 10 ms and more, is taken to cost more than another backend's
attention could save: estimated, not measured with one."""

Reorder = Callable[[], Sequence[AttentionBackend]]


class Order:
    """Backends of one phase, the best first."""

    def __init__(
        self,
        backends: Iterable[AttentionBackend],
        waiting: Sequence[PartialAttention] = (),
        again: Reorder | None = None,
        *,
        named: bool = False,
    ) -> None:
        """`named`: a setting asks for the first. `waiting` could not be compared yet: once one of them serves a pass, `again`
        gives the order with it. For passes that are not captured."""
        self.backends = until_sure(backends)
        self.named = named
        self._waiting, self._again = tuple(waiting), again

    def pick(self, batch: Batch) -> AttentionBackend:
        if self._again is not None and any(backend.serves(batch) for backend in self._waiting):
            again, self._again = self._again, None
            try:
                self.backends = until_sure(again())
            except Exception:
                log.warning("attention backends could not be compared: it stays as it is", exc_info=True)
        for backend in self.backends[:-1]:
            if not isinstance(backend, PartialAttention) or backend.serves(batch):
                return backend
        return self.backends[-1]


def until_sure(backends: Iterable[AttentionBackend]) -> list[AttentionBackend]:
    """Up to the first that serves every pass: what follows would never be asked, and is not taken."""
    taken: list[AttentionBackend] = []
    for backend in backends:
        taken.append(backend)
        if not isinstance(backend, PartialAttention):
            return taken
    raise ValueError("no backend among them serves every pass")


class PhasedAttention(PlannedPrefill):
    """`core.protocols.AttentionBackend`."""

    def __init__(self, prefill: Order, decode: Order) -> None:
        self.capturable = all(getattr(backend, "capturable", False) for backend in decode.backends)
        self.prefill, self.decode = prefill, decode
        self._current: Any = decode.backends[-1]
        self._in_prefill = False

    def begin(self, batch: Batch) -> None:
        self._in_prefill = batch.query_length is None
        if batch.plan is not None:
            self._current, own = batch.plan.plan
            self._current.begin(replace(batch, plan=own))
            return
        self._current = (self.prefill if self._in_prefill else self.decode).pick(batch)
        self._current.begin(batch)

    def plan_prefill(self, batch: Batch) -> PassPlan | None:
        """Over short contexts launching takes longer than attention, whoever does it: the first that can be captured is taken,
        unless another was asked for."""
        first, short = self.prefill.pick(batch), sum(batch.kv_lengths_host or ()) <= SHORT
        for backend in (first, *(self.prefill.backends if short and not self.prefill.named else ())):
            plan = backend.plan_prefill(batch) if isinstance(backend, PlannedPrefill) else None
            if plan is not None:
                return PassPlan((id(backend), plan.key), (backend, plan))
        return None

    def gqa(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch, scale: float) -> Tensor:
        out: Tensor = self._current.gqa(layer, q, k, v, batch, scale)
        return out

    def mla(
        self,
        layer: int,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        up_k: Tensor,
        up_v: Tensor,
        batch: Batch,
        scale: float,
    ) -> Tensor:
        out: Tensor = self._current.mla(layer, q_nope, q_rope, latent, k_rope, up_k, up_v, batch, scale)
        return out


class FusedPhasedAttention(PhasedAttention, FusedGQA, FusedMLA):
    """Where all of them take products as they come."""

    def gqa_from_product(self, layer: int, qkv: Tensor, heads: int, *operands: Any, **options: Any) -> Tensor:
        out: Tensor = self._current.gqa_from_product(layer, qkv, heads, *operands, **options)
        return out

    def gqa_append(self, layer: int, *operands: Any, **options: Any) -> None:
        self._current.gqa_append(layer, *operands, **options)

    def mla_from_products(self, layer: int, *operands: Any, **options: Any) -> Tensor:
        if self._in_prefill:
            return super().mla_from_products(layer, *operands, **options)  # in two steps, the first of which is followed
        out: Tensor = self._current.mla_from_products(layer, *operands, **options)
        return out

    def mla_append(self, layer: int, *operands: Any, **options: Any) -> None:
        self._current.mla_append(layer, *operands, **options)

    def mla_from_query(self, layer: int, q: Tensor, *operands: Any, **options: Any) -> Tensor:
        out: Tensor = self._current.mla_from_query(layer, q, *operands, **options)
        return out


def phased(prefill: Order, decode: Order, others: Sequence[AttentionBackend] = ()) -> AttentionBackend:
    """One backend alone is given as it is. `others`: what an order may take in later."""
    backends = [*prefill.backends, *decode.backends, *others]
    first = backends[0]
    if all(backend is first for backend in backends):
        return first
    fused = all(isinstance(backend, FusedGQA) and isinstance(backend, FusedMLA) for backend in backends)
    return (FusedPhasedAttention if fused else PhasedAttention)(prefill, decode)
