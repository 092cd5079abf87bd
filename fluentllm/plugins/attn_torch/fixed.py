"""Deterministic attention: every row reads its keys from the pool, in a fixed order, whatever pass it is part of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fluentllm.core.protocols import Appending
from fluentllm.kernels.attention_fixed import fixed_order_attention
from fluentllm.kernels.attention_reference import gather_rows
from fluentllm.kernels.fixed_order import FixedOrderOps
from fluentllm.kernels.kv_fp8 import kept, write_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from fluentllm.core.batch import Batch
    from fluentllm.core.protocols import AttentionContext


class FixedOrderAttention(Appending):
    """`core.protocols.AttentionBackend` for deterministic mode. MLA is absorbed everywhere."""

    capturable = False

    def __init__(self, context: AttentionContext) -> None:
        self._pool = context.pool
        self._ops = FixedOrderOps()
        self._spans: list[tuple[int, int, int]] = []

    def begin(self, batch: Batch) -> None:
        starts = batch.query_start.tolist()
        self._spans = list(zip(starts, starts[1:], batch.kv_lengths.tolist(), strict=False))

    def gqa(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch, scale: float) -> Tensor:
        self.append_gqa(layer, k, v, batch)
        pool_k, pool_v = self._pool.k[layer], self._pool.v[layer]
        parts = [
            fixed_order_attention(
                q[span],
                gather_rows(pool_k, pages, keys),
                gather_rows(pool_v, pages, keys),
                batch.positions[span],
                scale,
                batch.first_key,
            )
            for span, pages, keys in self._sequences(batch)
        ]
        return torch.cat(parts) if parts else q.new_empty(0, q.shape[1], v.shape[2])

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
        self.append_mla(layer, latent, k_rope, batch)
        absorbed = self._ops.bmm(q_nope.transpose(0, 1), up_k).transpose(0, 1)
        queries = torch.cat((absorbed, q_rope), -1)
        width = latent.shape[1]
        parts = []
        for span, pages, keys in self._sequences(batch):
            known = gather_rows(self._pool.latent[layer], pages, keys).unsqueeze(1)
            values, first = known[..., :width], batch.first_key
            parts.append(fixed_order_attention(queries[span], known, values, batch.positions[span], scale, first))
        if not parts:
            return q_nope.new_empty(0, q_nope.shape[1], up_v.shape[1])
        return self._ops.bmm(torch.cat(parts).transpose(0, 1), up_v.transpose(1, 2)).transpose(0, 1)

    def append_gqa(self, layer: int, k: Tensor, v: Tensor, batch: Batch) -> None:
        for rows, new in zip(self._pool.rows(layer), (k, v), strict=True):
            write_rows(rows, batch.kv_rows, kept(new, rows.dtype))

    def append_mla(self, layer: int, latent: Tensor, k_rope: Tensor, batch: Batch) -> None:
        (rows,) = self._pool.rows(layer)
        rows.index_copy_(0, batch.kv_rows, torch.cat((latent, k_rope), -1).to(rows.dtype))

    def _sequences(self, batch: Batch) -> Iterator[tuple[slice, Tensor, int]]:
        """(its rows, its pages, its keys) of each sequence that has rows."""
        for number, (start, stop, keys) in enumerate(self._spans):
            if stop > start:
                yield slice(start, stop), batch.page_table[number], keys
