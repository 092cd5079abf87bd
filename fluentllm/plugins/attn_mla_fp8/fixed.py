"""The same in deterministic mode: every row reads all of its keys out of the cache, its own too, in a fixed order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fluentllm.kernels.attention_fixed import fixed_order_attention
from fluentllm.kernels.fixed_order import FixedOrderOps
from fluentllm.kernels.mla_decode.reference import append_reference

from .plain import PlainMlaFp8

if TYPE_CHECKING:
    from torch import Tensor

    from fluentllm.core.batch import Batch
    from fluentllm.core.protocols import AttentionContext


class FixedOrderMlaFp8(PlainMlaFp8):
    """Absorbed everywhere; queries are not quantised."""

    def __init__(self, context: AttentionContext) -> None:
        super().__init__(context)
        self._ops = FixedOrderOps()

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
        append_reference(self._planes[layer], latent, k_rope, batch.kv_rows)
        queries = torch.cat((self._ops.bmm(q_nope.transpose(0, 1), up_k).transpose(0, 1), q_rope), -1)
        parts = []
        for span in self._spans:
            values, turned = self._known(layer, batch, span.number, span.keys, torch.float32)
            keys, rows, first = torch.cat((values, turned), -1), span.rows, batch.first_key
            parts.append(
                fixed_order_attention(
                    queries[rows], keys.unsqueeze(1), values.unsqueeze(1), batch.positions[rows], scale, first
                )
            )
        if not parts:
            return q_nope.new_empty(0, q_nope.shape[1], up_v.shape[1])
        return self._ops.bmm(torch.cat(parts).transpose(0, 1), up_v.transpose(1, 2)).transpose(0, 1)
