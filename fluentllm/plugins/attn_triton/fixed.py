"""Deterministic mode of the backend `triton`: one kernel, and one order of additions, for prefill, decode and verification.

MLA is absorbed everywhere, and keys are always read from the pool. Nothing waits for the host, so decode can be captured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fluentllm.kernels.triton.fixed_attention import FixedPlan, fixed_attention, plan_decode, plan_prefill, span_of
from fluentllm.kernels.triton.fixed_product import fixed_bmm
from fluentllm.kernels.triton.mla_rows import rotate_queries
from fluentllm.layers.pool_writes import PoolWrites

if TYPE_CHECKING:
    from torch import Tensor

    from fluentllm.core.batch import Batch
    from fluentllm.core.protocols import AttentionContext


class FixedTritonAttention(PoolWrites):
    """`core.protocols.AttentionBackend`. Its reference is `attn_torch.fixed.FixedOrderAttention`."""

    capturable = True

    def __init__(self, context: AttentionContext) -> None:
        pool, model = context.pool, context.spec.model
        layers = range(pool.spec.layers)
        self._mla = pool.spec.kind == "mla"
        self._rows = [pool.rows(layer) for layer in layers]
        if self._mla:
            self._latent_pages = [pool.latent[layer].unsqueeze(2) for layer in layers]
            self._kv_heads, self._value_dim = 1, pool.spec.latent_dim
        else:
            self._pages = [(pool.k[layer], pool.v[layer]) for layer in layers]
            self._kv_heads, self._value_dim = pool.spec.heads, pool.spec.v_head_dim
        self._span = span_of(model.max_position)
        self._batch: Batch | None = None
        self._plans: dict[int, FixedPlan] = {}

    def begin(self, batch: Batch) -> None:
        self._batch = batch
        self._plans = {}

    def _plan(self, heads: int) -> FixedPlan:
        """Made at the first layer of a pass; the target and a draft layer may differ in heads."""
        plan = self._plans.get(heads)
        if plan is None:
            batch, group = self._batch, heads // self._kv_heads
            assert batch is not None
            if batch.query_length is None:
                assert batch.query_lengths is not None
                plan = plan_prefill(
                    batch.query_start, batch.kv_lengths, batch.query_lengths, group, self._value_dim, self._span
                )
            else:
                longest = batch.page_table.shape[1] * batch.page_size
                plan = plan_decode(
                    batch.query_start, batch.kv_lengths, batch.query_length, group, self._value_dim, self._kv_heads, longest,
                    self._span,
                )  # fmt: skip
            self._plans[heads] = plan
        return plan

    # ------------------------------------------------------------------------------------------------------------------ gqa
    def _attend(self, layer: int, q: Tensor, batch: Batch, scale: float) -> Tensor:
        pages = self._pages[layer]
        return fixed_attention(q, *pages, batch.page_table, self._plan(q.shape[1]), scale, first_key=batch.first_key)

    # ------------------------------------------------------------------------------------------------------------------ mla
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
        self._append_latents(layer, latent, k_rope, batch)
        query = self._absorbed(q_nope, up_k, q_rope.shape[2])
        query[..., latent.shape[1] :] = q_rope
        return self._attend_to_latents(layer, query, up_v, batch, scale)

    def mla_from_query(
        self,
        layer: int,
        q: Tensor,
        rope: tuple[Tensor, Tensor],
        up_k: Tensor,
        up_v: Tensor,
        batch: Batch,
        scale: float,
        *,
        interleaved: bool,
    ) -> Tensor:
        nope, width = up_k.shape[1:]
        query = self._absorbed(q[..., :nope], up_k, q.shape[2] - nope)
        rotate_queries(q[..., nope:], *rope, query[..., width:], interleaved=interleaved)
        return self._attend_to_latents(layer, query, up_v, batch, scale)

    def _absorbed(self, q_nope: Tensor, up_k: Tensor, rope: int) -> Tensor:
        """[T, H, C + rope], whose last `rope` values are still to be written."""
        query = q_nope.new_empty(*q_nope.shape[:2], up_k.shape[2] + rope)
        fixed_bmm(q_nope.transpose(0, 1), up_k, query[..., : up_k.shape[2]].transpose(0, 1))
        return query

    def _attend_to_latents(self, layer: int, query: Tensor, up_v: Tensor, batch: Batch, scale: float) -> Tensor:
        pages, width = self._latent_pages[layer], up_v.shape[2]
        plan = self._plan(query.shape[1])
        latent = fixed_attention(query, pages, pages[..., :width], batch.page_table, plan, scale, first_key=batch.first_key)
        out = query.new_empty(*query.shape[:2], up_v.shape[1])
        fixed_bmm(latent.transpose(0, 1), up_v.transpose(1, 2), out.transpose(0, 1))
        return out
