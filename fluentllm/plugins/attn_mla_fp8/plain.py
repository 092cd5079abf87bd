"""The backend `mla_fp8` in plain torch, on any device, sequence by sequence: the same cache, the same arithmetic, no speed."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from fluentllm.core.protocols import Appending
from fluentllm.kernels.attention_mla import mla_expanded
from fluentllm.kernels.mla_decode import fp8_planes
from fluentllm.kernels.mla_decode.reference import (
    append_reference,
    attend,
    fetch_reference,
    gather_tokens,
    quantised_query,
)

if TYPE_CHECKING:
    from torch import Tensor

    from fluentllm.core.batch import Batch
    from fluentllm.core.protocols import AttentionContext


class Span(NamedTuple):
    """One sequence of a pass that has rows."""

    rows: slice
    number: int
    keys: int
    """Cached ones and its own."""

    @property
    def cached(self) -> int:
        return self.keys - (self.rows.stop - self.rows.start)


class PlainMlaFp8(Appending):
    """`core.protocols.AttentionBackend`. Decode is absorbed, with quantised queries; prefill is expanded, over its own tokens
    as they are and earlier ones out of the cache."""

    capturable = False

    def __init__(self, context: AttentionContext) -> None:
        pool, kv = context.pool, context.pool.spec
        self._page_size = pool.page_size
        self._planes = [fp8_planes(pool.latent[layer], kv.latent_dim, kv.rope_dim) for layer in range(kv.layers)]
        self._spans: list[Span] = []

    def begin(self, batch: Batch) -> None:
        starts = batch.query_start.tolist()
        lengths = batch.kv_lengths_host or batch.kv_lengths.tolist()
        ranges = zip(starts, starts[1:], lengths, strict=False)
        self._spans = [
            Span(slice(start, stop), number, keys) for number, (start, stop, keys) in enumerate(ranges) if stop > start
        ]

    def append_mla(self, layer: int, latent: Tensor, k_rope: Tensor, batch: Batch) -> None:
        append_reference(self._planes[layer], latent, k_rope, batch.kv_rows)

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
        if batch.query_length is not None:
            return self._decode(layer, q_nope, q_rope, up_k, up_v, batch, scale)
        out = q_nope.new_empty(q_nope.shape[0], q_nope.shape[1], up_v.shape[1])
        for span in self._spans:
            rows = span.rows
            cached, turned = self._known(layer, batch, span.number, span.cached, latent.dtype)
            keys, rope = torch.cat((cached, latent[rows])), torch.cat((turned, k_rope[rows]))
            mask = _visible(batch, span) if span.cached or batch.first_key else None
            out[rows] = mla_expanded(q_nope[rows], q_rope[rows], keys, rope, up_k, up_v, mask, scale)
        return out

    def _decode(
        self, layer: int, q_nope: Tensor, q_rope: Tensor, up_k: Tensor, up_v: Tensor, batch: Batch, scale: float
    ) -> Tensor:
        absorbed = torch.bmm(q_nope.transpose(0, 1), up_k).transpose(0, 1)
        content, turned = quantised_query(absorbed, q_rope, torch.float32)
        summed = torch.empty_like(absorbed)
        for span in self._spans:
            rows = span.rows
            # A sequence may end before the rows that verify it do: positions count from its own end.
            keys, rope = self._known(layer, batch, span.number, span.keys, torch.float32)
            summed[rows] = attend(content[rows], turned[rows], keys, rope, scale, torch.float32, batch.first_key).to(
                summed.dtype
            )
        return torch.bmm(summed.transpose(0, 1), up_v.transpose(1, 2)).transpose(0, 1)

    def _known(self, layer: int, batch: Batch, number: int, keys: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The first `keys` tokens of a sequence out of the cache: latents [keys, C], rotary keys [keys, R]."""
        tokens = gather_tokens(batch.page_table[number], keys, self._page_size)
        return fetch_reference(self._planes[layer], tokens, dtype)


def _visible(batch: Batch, span: Span) -> Tensor:
    """[1, 1, rows, keys] bool."""
    index = torch.arange(span.keys, device=batch.positions.device)
    seen = index <= batch.positions[span.rows].unsqueeze(1).clamp(min=batch.first_key)
    return (seen & (index >= batch.first_key))[None, None]
