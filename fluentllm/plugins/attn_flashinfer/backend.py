"""The backend `flashinfer`: decode of grouped heads by xqa, prefill by FlashAttention 3, in the pool that all backends share.

Norms, rotary and the KV write are the same launches as for any backend on a GPU (`kernels.triton`). What FlashInfer has no
kernel for, or none yet, is left to another backend (`core.protocols.PartialAttention`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fluentllm.core.protocols import PartialAttention
from fluentllm.kernels.triton.mla_rows import rotate_queries
from fluentllm.layers.pool_writes import PoolWrites

from .decode import PagedDecode
from .modules import MOST_ROWS, Module, decode_module, prefill_module
from .prefill import Heads, PagedPrefill, RaggedPrefill

if TYPE_CHECKING:
    from torch import Tensor

    from fluentllm.core.batch import Batch
    from fluentllm.core.protocols import AttentionContext

    from .compiling import Modules


class FlashInferAttention(PoolWrites, PartialAttention):
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
    def _attend(self, layer: int, q: Tensor, batch: Batch, scale: float) -> Tensor:
        k_pages, v_pages = self._pages[layer]
        if batch.query_length is not None:
            assert self._decode is not None
            return self._decode(q.contiguous(), k_pages, v_pages, batch, scale)
        if self._paged is None:
            self._paged = PagedPrefill(q.device)
        heads = Heads(q.shape[1], k_pages.shape[2], q.shape[2], v_pages.shape[3], q.dtype, scale)
        if heads != self._planned:
            # At a pass's first layer; a draft layer may have other heads.
            self._paged.plan(batch, heads)
            self._planned = heads
        return self._paged.run(q.contiguous(), k_pages, v_pages)

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
        return self._mla_prefill(layer, torch.cat((q_nope, q_rope), -1), up_k, up_v, batch, scale)

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
