"""The backend `mla_fp8` on Hopper. In decode nothing waits for the host and the device divides the work, so it can be captured;
so can prefill, whose tiles the host plans in front of its program.

A layer of decode of few tokens: the queries' product with up_k in one launch with norm, rotary, quantisation and KV write;
rotary and quantisation of the queries in one; the decode; merging its splits and the product with up_v in one, or two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fluentllm.core.protocols import FusedMLA, PlannedPrefill
from fluentllm.kernels.attention_mla import expanded_keys_and_values
from fluentllm.kernels.mla_decode import fp8_planes
from fluentllm.kernels.mla_decode.append import absorb_norms, append_norms
from fluentllm.kernels.mla_decode.decode import MlaDecode
from fluentllm.kernels.mla_decode.quantise import append, fetch, quantise_query
from fluentllm.kernels.triton.gqa_prefill import gqa_prefill
from fluentllm.kernels.triton.gqa_prefill_plan import PaddedPlan, PaddedPlans, PrefillPlan
from fluentllm.kernels.triton.mla_absorb import absorbs
from fluentllm.kernels.triton.mla_rows import rotate_queries
from fluentllm.layers.pass_plans import plan_pass

from .prefix import Workspace, plan_workspace, workspace_on_device

if TYPE_CHECKING:
    from torch import Tensor

    from fluentllm.core.batch import Batch
    from fluentllm.core.protocols import AttentionContext, MlaProducts, PassPlan


class HopperMlaFp8(FusedMLA, PlannedPrefill):
    """`core.protocols.AttentionBackend`. Decode is absorbed; prefill is expanded, over its own tokens as they are and earlier
    ones out of the cache."""

    capturable = True

    def __init__(self, context: AttentionContext) -> None:
        pool = context.pool
        self._planes = [fp8_planes(pool.latent[layer]) for layer in range(pool.spec.layers)]
        self._prefill_plan: PrefillPlan | PaddedPlan | None = None
        # Expanded keys belong to one head each.
        self._padded = PaddedPlans(context.spec.model.heads, context.spec.model.heads, pool.device)
        self._workspace: Workspace | None = None
        self._known: tuple[int, Tensor] | None = None
        """In prefill: the layer whose tokens `mla_append` has laid out, and these, [pages · 64, 576]."""
        self._decodes: dict[tuple[int, int], MlaDecode] = {}
        self._lengths: Tensor | None = None
        self._table: Tensor | None = None

    def begin(self, batch: Batch) -> None:
        self._prefill_plan = self._workspace = self._known = None
        self._decodes = {}
        self._lengths, self._table = batch.kv_lengths, batch.page_table
        batch.refuse_first_key()
        if batch.plan is not None:
            self._prefill_plan, pages = batch.plan.plan
            self._workspace = workspace_on_device(batch, pages)
        elif batch.query_length is None:
            assert batch.query_lengths is not None
            assert batch.kv_lengths_host is not None
            self._prefill_plan = PrefillPlan(batch.query_lengths, batch.kv_lengths_host, batch.kv_lengths.device)
            self._workspace = plan_workspace(batch)

    def plan_prefill(self, batch: Batch) -> PassPlan | None:
        batch.refuse_first_key()
        return plan_pass(self._padded, batch, expands=True)

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
        append(self._planes[layer], latent, k_rope, batch.kv_rows)
        if self._workspace is not None:
            plain = self._laid_out(layer, latent)
            plain.index_copy_(0, self._workspace.fresh, torch.cat((latent, k_rope), -1))
            return self._prefill(layer, torch.cat((q_nope, q_rope), -1), up_k, up_v, scale)
        return self._decode(layer, q_nope, q_rope, None, up_k, up_v, batch, scale, interleaved=False)

    def mla_at_once(self, layer: int, given: MlaProducts, batch: Batch, scale: float) -> Tensor | None:
        if not absorbs(given.q.shape[0], batch.query_length):
            return None
        absorbed = absorb_norms(
            given.q, given.up_k, given.kv, given.kv_weight, *given.rope, batch.kv_rows, self._planes[layer], eps=given.eps,
            latent_scale=given.latent_scale, interleaved=given.interleaved,
        )  # fmt: skip
        q_rope = given.q[..., given.up_k.shape[1] :]
        return self._attend(layer, absorbed, q_rope, given.rope, batch, scale, given.up_v, interleaved=given.interleaved)

    def mla_append(
        self,
        layer: int,
        kv: Tensor,
        kv_weight: Tensor,
        rope: tuple[Tensor, Tensor],
        batch: Batch,
        *,
        eps: float,
        latent_scale: float,
        interleaved: bool,
    ) -> None:
        fresh = self._workspace.fresh if self._workspace is not None else None
        append_norms(
            kv, kv_weight, *rope, batch.kv_rows, self._planes[layer], eps=eps, latent_scale=latent_scale,
            interleaved=interleaved, plain=self._laid_out(layer, kv) if fresh is not None else None, plain_rows=fresh,
        )  # fmt: skip

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
        if self._workspace is not None:
            rotate_queries(q_rope, *rope, q_rope, interleaved=interleaved)
            return self._prefill(layer, q, up_k, up_v, scale)
        return self._decode(layer, q_nope, q_rope, rope, up_k, up_v, batch, scale, interleaved=interleaved)

    # -------------------------------------------------------------------------------------------------------------- prefill
    def _laid_out(self, layer: int, like: Tensor) -> Tensor:
        """The layer's workspace [rows, 576] with the cached tokens; its own are still to be written. Rows behind a sequence's
        end stay as they are found: nobody sees them."""
        assert self._workspace is not None
        planes, space = self._planes[layer], self._workspace
        known = like.new_empty(space.pages * planes.page, planes.latent.shape[2] + planes.rope.shape[2])
        fetch(planes, space.cached, out=known, out_rows=space.cached_to)
        self._known = layer, known
        return known

    def _prefill(self, layer: int, q: Tensor, up_k: Tensor, up_v: Tensor, scale: float) -> Tensor:
        """q [T, H, nope + rope], rotated."""
        assert self._workspace is not None
        assert self._prefill_plan is not None
        assert self._known is not None
        found, known = self._known
        assert found == layer, "mla_append comes first"
        self._known = None
        pages = known.view(self._workspace.pages, -1, known.shape[1])
        keys, values = expanded_keys_and_values(pages, up_k, up_v)
        return gqa_prefill(q, keys, values, self._workspace.page_table, self._prefill_plan, scale)

    # --------------------------------------------------------------------------------------------------------------- decode
    def _decode(
        self,
        layer: int,
        q_nope: Tensor,
        q_rope: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        up_k: Tensor,
        up_v: Tensor,
        batch: Batch,
        scale: float,
        *,
        interleaved: bool,
    ) -> Tensor:
        """`rope`: how q_rope is still to be rotated; None: it has been."""
        rows, heads, _ = q_nope.shape
        # Products with the heads' matrices, written where their readers want them.
        absorbed = q_nope.new_empty(rows, heads, up_k.shape[2])
        torch.bmm(q_nope.transpose(0, 1), up_k, out=absorbed.transpose(0, 1))
        latent = self._attend(layer, absorbed, q_rope, rope, batch, scale, None, interleaved=interleaved).view_as(absorbed)
        out = q_nope.new_empty(rows, heads, up_v.shape[1])
        torch.bmm(latent.transpose(0, 1), up_v.transpose(1, 2), out=out.transpose(0, 1))
        return out

    def _attend(
        self,
        layer: int,
        absorbed: Tensor,
        q_rope: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        batch: Batch,
        scale: float,
        up_v: Tensor | None,
        *,
        interleaved: bool,
    ) -> Tensor:
        """`MlaDecode.fp8` of absorbed [T, H, 512] and q_rope [T, H, 64]."""
        rows, heads, _ = absorbed.shape
        query_length = batch.query_length or 1
        shape = (rows // query_length, query_length, heads)
        content, turned, factor = quantise_query(absorbed, q_rope, rotary=rope, interleaved=interleaved)
        latent = torch.empty_like(absorbed)
        return self._decode_for(heads, query_length).fp8(
            content.view(*shape, -1), turned.view(*shape, -1), factor.view(shape), self._planes[layer], batch.page_table, scale,
            latent.view(*shape, -1), up_v,
        )  # fmt: skip

    def _decode_for(self, heads: int, query_length: int) -> MlaDecode:
        """Planned at the first layer of a pass, on the device; the target and a draft layer may differ in heads."""
        key = heads, query_length
        if key not in self._decodes:
            assert self._lengths is not None
            # Made with the plan of these lengths.
            self._decodes[key] = MlaDecode.create(self._lengths, heads, query_length, page_table=self._table)
        return self._decodes[key]
