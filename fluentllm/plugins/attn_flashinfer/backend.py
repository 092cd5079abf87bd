"""The backend `flashinfer`: decode of grouped heads by xqa, prefill by FlashAttention 3, in the pool that all backends share.

Norms, rotary and the KV write are the same launches as for any backend on a GPU (`kernels.triton`). What FlashInfer has no
kernel for, or none yet, is left to another backend (`core.protocols.PartialAttention`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fluentllm.core.protocols import FusedGQA, FusedMLA, PartialAttention
from fluentllm.kernels.triton.kv_append import append, flat_heads, rotate_and_append
from fluentllm.kernels.triton.mla_rows import append_latents, rotate_queries

from .decode import PagedDecode
from .modules import MOST_ROWS, Module, decode_module, prefill_module
from .prefill import Heads, PagedPrefill, RaggedPrefill

if TYPE_CHECKING:
    from torch import Tensor

    from fluentllm.core.batch import Batch
    from fluentllm.core.protocols import AttentionContext

    from .compiling import Modules


class FlashInferAttention(FusedGQA, FusedMLA, PartialAttention):
    """`core.protocols.AttentionBackend`."""

    capturable = True

    def __init__(self, context: AttentionContext, modules: Modules) -> None:
        pool = context.pool
        self._spec, self._modules = context.spec, modules
        self._kv = pool.spec
        self._on_device = pool.device.type == "cuda"
        layers = range(pool.spec.layers)
        self._rows = [pool.rows(layer) for layer in layers]
        self._pages = [(pool.k[layer], pool.v[layer]) for layer in layers] if pool.spec.kind == "gqa" else []
        self._decode: PagedDecode | None = None
        self._paged: PagedPrefill | None = None
        self._ragged: RaggedPrefill | None = None
        self._planned: Heads | None = None
        self._decodes: dict[tuple[int, int], bool] = {}

    def load(self) -> None:
        if self._on_device:
            self._modules.wait()
            self._modules.compile()

    def serves(self, batch: Batch) -> bool:
        if not self._on_device or batch.first_key:
            return False  # neither kernel can leave out keys at the front
        rows = batch.query_length
        if rows is None:
            return bool(batch.tokens.shape[0]) and self._modules.ready(prefill_module(self._spec))
        if self._kv.kind != "gqa" or rows > MOST_ROWS:
            return False
        key = batch.kv_lengths.shape[0], rows
        # A program that was captured once keeps its kernels: what is compiled later serves other programs.
        return self._decodes.setdefault(key, self._modules.ready(decode_module(self._spec, rows)))

    def begin(self, batch: Batch) -> None:
        self._planned = None
        if batch.query_length is not None and self._decode is None:
            self._decode = PagedDecode(batch.kv_lengths.device)

    # ------------------------------------------------------------------------------------------------------------------ gqa
    def gqa(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch, scale: float) -> Tensor:
        k_rows, v_rows = self._rows[layer]
        append(flat_heads(k), flat_heads(v), batch.kv_rows, k_rows.flatten(1), v_rows.flatten(1))
        return self._attend(layer, q.contiguous(), batch, scale)

    def gqa_from_product(
        self,
        layer: int,
        qkv: Tensor,
        heads: int,
        rope: tuple[Tensor, Tensor],
        batch: Batch,
        scale: float,
        *,
        q_weight: Tensor | None = None,
        k_weight: Tensor | None = None,
        eps: float = 0.0,
        interleaved: bool = False,
    ) -> Tensor:
        k_rows, v_rows = self._rows[layer]
        q = rotate_and_append(
            qkv, *rope, batch.kv_rows, k_rows, v_rows, heads, q_weight=q_weight, k_weight=k_weight, eps=eps,
            interleaved=interleaved,
        )  # fmt: skip
        return self._attend(layer, q, batch, scale)

    def _attend(self, layer: int, q: Tensor, batch: Batch, scale: float) -> Tensor:
        k_pages, v_pages = self._pages[layer]
        if batch.query_length is not None:
            assert self._decode is not None
            return self._decode(q, k_pages, v_pages, batch, scale)
        if self._paged is None:
            self._paged = PagedPrefill(q.device)
        heads = Heads(q.shape[1], k_pages.shape[2], q.shape[2], v_pages.shape[3], q.dtype, scale)
        if heads != self._planned:
            # At a pass's first layer; a draft layer may have other heads.
            self._paged.plan(batch, heads)
            self._planned = heads
        return self._paged.run(q, k_pages, v_pages)

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
        return self._mla_prefill(layer, torch.cat((q_nope, q_rope), -1), up_k, up_v, batch, scale)

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
        q_rope = q[..., up_k.shape[1] :]
        rotate_queries(q_rope, *rope, q_rope, interleaved=interleaved)
        return self._mla_prefill(layer, q, up_k, up_v, batch, scale)

    def _mla_prefill(self, layer: int, q: Tensor, up_k: Tensor, up_v: Tensor, batch: Batch, scale: float) -> Tensor:
        if self._ragged is None:
            self._ragged = RaggedPrefill(q.device)
        heads = Heads(q.shape[1], q.shape[1], q.shape[2], up_v.shape[1], q.dtype, scale)
        if heads != self._planned:
            self._ragged.plan(batch, heads)
            self._planned = heads
        return self._ragged.run(q.contiguous(), self._rows[layer][0], up_k, up_v)


def wanted_modules(context: AttentionContext) -> tuple[Module, ...]:
    """What passes of this model will ask for, the most frequent first."""
    spec = context.spec
    if spec.model.kv.kind == "mla":
        return (prefill_module(spec),)
    chosen = context.settings.speculative
    drafts = 0 if chosen.method == "none" else chosen.max_k if chosen.k == "auto" else chosen.k
    verified = [decode_module(spec, drafts + 1 - fewer) for fewer in range(drafts)]
    return (decode_module(spec, 1), prefill_module(spec), *verified)
