"""Attention by torch's scaled dot product: a constant number of calls a layer in decode, one a sequence in prefill.

Where the C kernels are (`kernels.native`), decode of float32 is one call a layer that reads the pages where they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from fluentllm.core.protocols import Appending
from fluentllm.kernels.attention_mla import mla_absorbed, mla_expanded
from fluentllm.kernels.kv_fp8 import kept, write_rows
from fluentllm.kernels.native.attention import PagedDecode

from .plan import DecodePlan, SequencePlan, plan_decode, plan_prefill
from .window import Window

if TYPE_CHECKING:
    from torch import Tensor

    from fluentllm.core.batch import Batch
    from fluentllm.core.protocols import AttentionContext


class TorchAttention(Appending):
    """`core.protocols.AttentionBackend`. MLA: absorbed in decode, expanded in prefill."""

    capturable = False

    def __init__(self, context: AttentionContext) -> None:
        pool = context.pool
        self._dtype: torch.dtype = getattr(torch, context.spec.dtype)
        self._kv_dtype = pool.dtype
        self._converts = pool.dtype is not self._dtype
        layers = range(pool.spec.layers)
        self._rows = [pool.rows(layer) for layer in layers]
        tensors = (pool.latent,) if pool.spec.kind == "mla" else (pool.k, pool.v)
        self._pages = [tuple(tensor[layer] for tensor in tensors) for layer in layers]
        self._paged: PagedDecode | None = None
        if context.library is not None and pool.spec.kind == "gqa" and self._dtype is self._kv_dtype is torch.float32:
            self._paged = PagedDecode(context.library)
        self._decode: DecodePlan | None = None
        self._prefill: list[SequencePlan] = []
        self._window: Window | None = None
        # The target's layers and a draft layer's run in passes of their own: each has its window, by its first layer.
        self._windows: dict[int, Window] | None = None
        if pool.device.type == "cpu" and pool.dtype is self._dtype:
            self._windows = {}
        self._bytes_per_token = pool.bytes // ((pool.pages + 1) * pool.page_size)
        self._started = False

    def begin(self, batch: Batch) -> None:
        self._started = False
        if batch.query_length is None:
            self._decode, self._prefill = None, plan_prefill(batch)
        elif self._paged is None:
            self._decode, self._prefill = plan_decode(batch, self._dtype), []

    def _start(self, layer: int, batch: Batch, plan: DecodePlan) -> None:
        """At a decode pass's first layer."""
        self._started = True
        self._window = None
        if self._windows is None or plan.side_by_side is not None or not plan.sequences:
            return
        window = self._windows.setdefault(layer, Window(self._bytes_per_token))
        if window.begin(batch, plan.keys):
            self._window = window

    # ------------------------------------------------------------------------------------------------------------------ gqa
    def gqa(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch, scale: float) -> Tensor:
        if self._paged is not None and batch.query_length is not None:
            pool_k, pool_v = self._pages[layer]
            places = batch.kv_rows, batch.page_table, batch.positions
            return self._paged(q, k, v, (pool_k, pool_v), *places, scale, batch.first_key)
        k_rows, v_rows = self._rows[layer]
        if self._converts:
            k, v = kept(k, self._kv_dtype), kept(v, self._kv_dtype)
        write_rows(k_rows, batch.kv_rows, k)
        write_rows(v_rows, batch.kv_rows, v)
        if self._decode is not None:
            if not self._started:
                self._start(layer, batch, self._decode)
            return self._gqa_decode(layer, q, k, v, self._decode, scale)
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        for plan in self._prefill:
            part = slice(plan.start, plan.stop)
            if plan.pages is None:
                keys, values = k[part].to(self._dtype), v[part].to(self._dtype)
            else:
                keys, values = (self._sequence(pages, plan) for pages in self._pages[layer])
            out[part] = F.scaled_dot_product_attention(
                q[part].transpose(0, 1).unsqueeze(0),
                keys.transpose(0, 1).unsqueeze(0),
                values.transpose(0, 1).unsqueeze(0),
                attn_mask=plan.mask,
                is_causal=plan.mask is None,
                scale=scale,
                enable_gqa=True,
            )[0].transpose(0, 1)
        return out

    def append_gqa(self, layer: int, k: Tensor, v: Tensor, batch: Batch) -> None:
        for rows, new in zip(self._rows[layer], (k, v), strict=True):
            write_rows(rows, batch.kv_rows, kept(new, self._kv_dtype) if self._converts else new)

    def append_mla(self, layer: int, latent: Tensor, k_rope: Tensor, batch: Batch) -> None:
        (cache,) = self._rows[layer]
        cache.index_copy_(0, batch.kv_rows, torch.cat((latent, k_rope), -1).to(self._kv_dtype))

    def _gqa_decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor, plan: DecodePlan, scale: float) -> Tensor:
        rows, heads, dim = q.shape
        if not rows:
            return q.new_empty(0, heads, v.shape[2])
        keys, values = (known.transpose(1, 2) for known in self._known(layer, plan, (k, v)))
        kv_heads = keys.shape[1]
        group = heads // kv_heads
        if plan.rows == 1:
            # The query heads that share keys become the rows of one product.
            grouped = q.view(plan.sequences, kv_heads, group, dim)
            return F.scaled_dot_product_attention(grouped, keys, values, plan.mask, scale=scale).reshape(rows, heads, -1)
        out = F.scaled_dot_product_attention(
            q.view(plan.sequences, plan.rows, heads, dim).transpose(1, 2),
            keys,
            values,
            plan.mask,
            scale=scale,
            enable_gqa=True,
        )
        return out.transpose(1, 2).reshape(rows, heads, -1)

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
        new = torch.cat((latent, k_rope), -1)
        cache.index_copy_(0, batch.kv_rows, new.to(self._kv_dtype))
        if self._decode is not None:
            plan = self._decode
            if not self._started:
                self._start(layer, batch, plan)
            if not q_nope.shape[0]:
                return q_nope.new_empty(0, q_nope.shape[1], up_v.shape[1])
            (known,) = self._known(layer, plan, (new,))
            return mla_absorbed(q_nope, q_rope, known, up_k, up_v, plan.mask, scale)
        out = q_nope.new_empty(q_nope.shape[0], q_nope.shape[1], up_v.shape[1])
        for chunk in self._prefill:
            part = slice(chunk.start, chunk.stop)
            if chunk.pages is None:
                keys, rope = latent[part], k_rope[part]
            else:
                keys, rope = self._sequence(self._pages[layer][0], chunk).split((latent.shape[1], k_rope.shape[1]), -1)
            out[part] = mla_expanded(q_nope[part], q_rope[part], keys, rope, up_k, up_v, chunk.mask, scale)
        return out

    # ----------------------------------------------------------------------------------------------------------------- pages
    def _known(self, layer: int, plan: DecodePlan, new: tuple[Tensor, ...]) -> list[Tensor]:
        """The layer's pool tensors as [N, L, ...] each; `new`: this pass's rows, which the pool holds by now."""
        pages = self._pages[layer]
        if self._window is not None:
            return [copy[:, : plan.keys] for copy in self._window.layer(layer, pages, plan.pages, new)]
        part = plan.side_by_side
        if part is not None:
            return [tensor[part].flatten(0, 1).unsqueeze(0).to(self._dtype) for tensor in pages]
        chosen = plan.pages.flatten()
        gathered = (tensor.index_select(0, chosen) for tensor in pages)
        return [tensor.view(plan.sequences, plan.keys, *tensor.shape[2:]).to(self._dtype) for tensor in gathered]

    def _sequence(self, pages: Tensor, plan: SequencePlan) -> Tensor:
        """[pages, page_size, ...] → [keys, ...]."""
        assert plan.pages is not None
        return pages.index_select(0, plan.pages).flatten(0, 1)[: plan.keys].to(self._dtype)
