"""The backend `triton`: KV rows by one launch, grouped heads by our decode and prefill kernels, MLA by ours on Hopper.

In decode nothing waits for the host, so a step can be captured; so can prefill, whose tiles the host plans in front of its
program.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fluentllm.core.protocols import PlannedPrefill
from fluentllm.kernels.triton.gqa_decode import gqa_decode, query_tiles
from fluentllm.kernels.triton.gqa_plan import GqaPlan, plan_gqa
from fluentllm.kernels.triton.gqa_prefill import gqa_prefill
from fluentllm.kernels.triton.gqa_prefill_plan import PaddedPlan, PaddedPlans, PrefillPlan
from fluentllm.kernels.triton.mla_absorb import absorb, absorbs
from fluentllm.kernels.triton.mla_rows import append_and_rotate, rotate_queries
from fluentllm.kernels.triton.qkv_product import from_product_fits
from fluentllm.layers.pass_plans import plan_pass
from fluentllm.layers.pool_writes import PoolWrites

from .expand import ExpandedPages, expand_on_device, expand_pages

if TYPE_CHECKING:
    from torch import Tensor

    from fluentllm.core.batch import Batch
    from fluentllm.core.protocols import AttentionContext, MlaProducts, PassPlan
    from fluentllm.kernels.mla_decode.decode import MlaDecode
    from fluentllm.kernels.triton.qkv_product import QkvProduct

MOST_APPENDED = 8
"""Up to so many tokens grouped heads' decode norms, rotates and appends by itself; more by a launch in front. On one H100 with
Qwen3-0.6B's shape a step of one token is 2 % shorter this way, one of 32 tokens 6 % longer: each program norms its own queries,
and a launch is hidden there (benchmarks/kernels/launches.py)."""
FLOAT32_TILE = 16
"""Rows of a prefill tile in float32, which is multiplied without tensor cores."""


class TritonAttention(PoolWrites, PlannedPrefill):
    """`core.protocols.AttentionBackend`. MLA: absorbed in decode, expanded in prefill."""

    capturable = True

    def __init__(self, context: AttentionContext) -> None:
        pool = context.pool
        self._kv = pool.spec
        self._heads = context.spec.model.heads
        layers = range(pool.spec.layers)
        self._rows = [pool.rows(layer) for layer in layers]
        if pool.spec.kind == "mla":
            self._latent_pages = [pool.latent[layer] for layer in layers]
        else:
            self._pages = [(pool.k[layer], pool.v[layer]) for layer in layers]
        self._plan: GqaPlan | None = None
        self._prefill_plan: PrefillPlan | PaddedPlan | None = None
        # Expanded keys belong to one head each.
        kv_heads = self._heads if pool.spec.kind == "mla" else pool.spec.heads
        self._padded = PaddedPlans(self._heads, kv_heads, pool.device, rows=self._tile_rows)
        self._expanded: ExpandedPages | None = None
        self._mla: dict[tuple[int, int, int], MlaDecode] = {}
        self._mla_lengths: Tensor | None = None
        self._mla_table: Tensor | None = None

    def begin(self, batch: Batch) -> None:
        if self._kv.kind == "mla":
            batch.refuse_first_key()
        self._plan = self._prefill_plan = self._expanded = None
        self._mla = {}
        self._mla_lengths, self._mla_table = batch.kv_lengths, batch.page_table
        if batch.query_length is not None:
            if self._kv.kind == "gqa":
                longest = batch.page_table.shape[1] * batch.page_size
                _, tiles = query_tiles(batch.query_length, self._heads // self._kv.heads)
                self._plan = plan_gqa(batch.kv_lengths, kv_heads=self._kv.heads, longest=longest, tiles=tiles)
            return
        if batch.plan is not None:
            self._prefill_plan, pages = batch.plan.plan
            if self._kv.kind == "mla":
                self._expanded = expand_on_device(batch, pages)
            return
        assert batch.query_lengths is not None
        assert batch.kv_lengths_host is not None
        device = batch.kv_lengths.device
        self._prefill_plan = PrefillPlan(batch.query_lengths, batch.kv_lengths_host, device, rows=self._tile_rows)
        if self._kv.kind == "mla":
            self._expanded = expand_pages(batch)

    def plan_prefill(self, batch: Batch) -> PassPlan | None:
        expands = self._kv.kind == "mla"
        if expands:
            batch.refuse_first_key()
        return plan_pass(self._padded, batch, expands=expands)

    @property
    def _tile_rows(self) -> int:
        # The kernel takes the dtype of the queries; float32 is for tests and has no use for large tiles.
        return FLOAT32_TILE if self._rows[0][0].dtype is torch.float32 else 128

    # ------------------------------------------------------------------------------------------------------------------ gqa
    def _attend_product(self, layer: int, product: QkvProduct, batch: Batch, scale: float) -> Tensor:
        fits = from_product_fits(self._kv.head_dim, self._kv.v_head_dim)
        if self._plan is None or not fits or product.qkv.shape[0] > MOST_APPENDED:
            return super()._attend_product(layer, product, batch, scale)
        return self._attend(layer, product, batch, scale)

    def _attend(self, layer: int, q: Tensor | QkvProduct, batch: Batch, scale: float) -> Tensor:
        k_pages, v_pages = self._pages[layer]
        if self._plan is not None:
            assert batch.query_length is not None
            return gqa_decode(
                q, k_pages, v_pages, batch.page_table, batch.kv_lengths, self._plan, batch.query_length, scale,
                first_key=batch.first_key,
            )  # fmt: skip
        assert self._prefill_plan is not None
        assert isinstance(q, torch.Tensor)
        return gqa_prefill(q, k_pages, v_pages, batch.page_table, self._prefill_plan, scale, first_key=batch.first_key)

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
        if batch.query_length is None:
            return self._mla_prefill(layer, torch.cat((q_nope, q_rope), -1), up_k, up_v, scale)
        return self._mla_decode(layer, q_nope, q_rope.contiguous(), up_k, up_v, batch, scale)

    def mla_at_once(self, layer: int, given: MlaProducts, batch: Batch, scale: float) -> Tensor | None:
        (cache,) = self._rows[layer]
        if not absorbs(given.q.shape[0], batch.query_length):
            nope = given.up_k.shape[1]
            rotated = append_and_rotate(
                given.q[..., nope:], given.kv, given.kv_weight, *given.rope, batch.kv_rows, cache, eps=given.eps,
                latent_scale=given.latent_scale, interleaved=given.interleaved,
            )  # fmt: skip
            return self._mla_decode(layer, given.q[..., :nope], rotated, given.up_k, given.up_v, batch, scale)
        absorbed, rotated = absorb(
            given.q, given.up_k, given.kv, given.kv_weight, *given.rope, batch.kv_rows, cache, eps=given.eps,
            latent_scale=given.latent_scale, interleaved=given.interleaved,
        )  # fmt: skip
        return self._mla_attend(layer, absorbed, rotated, batch, scale, given.up_v)

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
        nope = up_k.shape[1]
        q_nope, q_rope = q[..., :nope], q[..., nope:]
        if batch.query_length is None:
            rotate_queries(q_rope, *rope, q_rope, interleaved=interleaved)
            return self._mla_prefill(layer, q, up_k, up_v, scale)
        rotated = q_rope.new_empty(q_rope.shape)
        rotate_queries(q_rope, *rope, rotated, interleaved=interleaved)
        return self._mla_decode(layer, q_nope, rotated, up_k, up_v, batch, scale)

    def _mla_prefill(self, layer: int, q: Tensor, up_k: Tensor, up_v: Tensor, scale: float) -> Tensor:
        assert self._expanded is not None
        assert self._prefill_plan is not None
        keys, values = self._expanded.keys_and_values(self._latent_pages[layer], up_k, up_v)
        return gqa_prefill(q, keys, values, self._expanded.page_table, self._prefill_plan, scale)

    def _mla_decode(
        self, layer: int, q_nope: Tensor, q_rope: Tensor, up_k: Tensor, up_v: Tensor, batch: Batch, scale: float
    ) -> Tensor:
        """q_rope [T, H, rope] contiguous."""
        rows, heads, _ = q_nope.shape
        # Products with the heads' matrices, written where their readers want them.
        absorbed = q_nope.new_empty(rows, heads, up_k.shape[2])
        torch.bmm(q_nope.transpose(0, 1), up_k, out=absorbed.transpose(0, 1))
        latent = self._mla_attend(layer, absorbed, q_rope, batch, scale).view_as(absorbed)
        out = q_nope.new_empty(rows, heads, up_v.shape[1])
        torch.bmm(latent.transpose(0, 1), up_v.transpose(1, 2), out=out.transpose(0, 1))
        return out

    def _mla_attend(
        self, layer: int, absorbed: Tensor, q_rope: Tensor, batch: Batch, scale: float, up_v: Tensor | None = None
    ) -> Tensor:
        """`MlaDecode.bf16` of absorbed [T, H, C] and q_rope [T, H, rope]."""
        rows, heads, _ = absorbed.shape
        query_length = batch.query_length or 1
        shape = (rows // query_length, query_length, heads, -1)
        latent = torch.empty_like(absorbed).view(shape)
        return self._decode_for(heads, query_length).bf16(
            absorbed.view(shape), q_rope.view(shape), self._latent_pages[layer], batch.page_table, scale, latent, up_v
        )

    def _decode_for(self, heads: int, query_length: int) -> MlaDecode:
        """Planned at the first layer of a pass; the target and a draft layer may differ in heads."""
        from fluentllm.kernels.mla_decode.decode import MlaDecode

        assert self._mla_lengths is not None
        key = (self._mla_lengths.shape[0], heads, query_length)
        if key not in self._mla:
            # Made with the plan of these lengths.
            self._mla[key] = MlaDecode.create(self._mla_lengths, heads, query_length, page_table=self._mla_table)
        return self._mla[key]
