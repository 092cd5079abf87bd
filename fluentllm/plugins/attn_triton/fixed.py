"""Deterministic mode of the backend `triton`: one kernel, and one order of additions, for prefill, decode and verification.

MLA is absorbed everywhere, and keys are always read from the pool. Nothing waits for the host, so decode can be captured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fluentllm.core.protocols import FusedGQA, FusedMLA
from fluentllm.kernels.triton.fixed_attention import FixedPlan, fixed_attention, plan_decode, plan_prefill, span_of
from fluentllm.kernels.triton.fixed_product import fixed_bmm
from fluentllm.kernels.triton.kv_append import append, flat_heads, rotate_and_append
from fluentllm.kernels.triton.mla_rows import append_latents, rotate_queries

if TYPE_CHECKING:
    from torch import Tensor

    from fluentllm.core.batch import Batch
    from fluentllm.core.protocols import AttentionContext


class FixedTritonAttention(FusedGQA, FusedMLA):
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
    def gqa(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch, scale: float) -> Tensor:
        k_rows, v_rows = self._rows[layer]
        append(flat_heads(k), flat_heads(v), batch.kv_rows, k_rows.flatten(1), v_rows.flatten(1))
        return self._attend(layer, q, batch, scale)

    def gqa_from_product(
        self,
        layer: int,
        qkv: Tensor,
        heads: int,
        rope: tuple[Tensor, Tensor],
        batch: Batch,
        scale: float,
        *,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        interleaved: bool,
    ) -> Tensor:
        k_rows, v_rows = self._rows[layer]
        q = rotate_and_append(
            qkv, *rope, batch.kv_rows, k_rows, v_rows, heads, q_weight=q_weight, k_weight=k_weight, eps=eps,
            interleaved=interleaved,
        )  # fmt: skip
        return self._attend(layer, q, batch, scale)

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
        (cache,) = self._rows[layer]
        width = latent.shape[1]
        append(latent, k_rope, batch.kv_rows, cache[:, :width], cache[:, width:])
        query = self._absorbed(q_nope, up_k, q_rope.shape[2])
        query[..., width:] = q_rope
        return self._attend_to_latents(layer, query, up_v, batch, scale)

    def mla_append(
        self,
        layer: int,
        down: Tensor,
        q_weight: Tensor | None,
        kv_weight: Tensor,
        rope: tuple[Tensor, Tensor],
        batch: Batch,
        *,
        eps: float,
        latent_scale: float,
        interleaved: bool,
    ) -> Tensor | None:
        (cache,) = self._rows[layer]
        return append_latents(
            down, q_weight, kv_weight, *rope, batch.kv_rows, cache, eps=eps, latent_scale=latent_scale, interleaved=interleaved
        )

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
