"""What attention backends on a GPU do before they attend: norms, rotary and the write into the pool's rows (no planes)."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from ..core.protocols import FusedGQA, FusedMLA
from ..kernels.triton.kv_append import append, flat_heads, rotate_and_append
from ..kernels.triton.mla_rows import append_latents
from ..kernels.triton.qkv_product import QkvProduct

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.batch import Batch


class PoolWrites(FusedGQA, FusedMLA):
    """Derive from it, set `_rows`, and attend to what has been written."""

    _rows: list[tuple[Tensor, ...]]
    """Of each layer, as `KVPool.rows` gives them."""

    @abstractmethod
    def _attend(self, layer: int, q: Tensor, batch: Batch, scale: float) -> Tensor:
        """q [T, H, D], rotated; grouped heads, whose keys and values are in the pool → [T, H, Dv]."""
        ...

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
        q_weight: Tensor | None = None,
        k_weight: Tensor | None = None,
        eps: float = 0.0,
        interleaved: bool = False,
    ) -> Tensor:
        product = QkvProduct(qkv, *rope, batch.kv_rows, heads, q_weight, k_weight, eps, interleaved)
        return self._attend_product(layer, product, batch, scale)

    def gqa_append(
        self,
        layer: int,
        qkv: Tensor,
        heads: int,
        rope: tuple[Tensor, Tensor],
        batch: Batch,
        *,
        q_weight: Tensor | None = None,
        k_weight: Tensor | None = None,
        eps: float = 0.0,
        interleaved: bool = False,
    ) -> None:
        self._append_product(layer, QkvProduct(qkv, *rope, batch.kv_rows, heads, q_weight, k_weight, eps, interleaved))

    def _attend_product(self, layer: int, product: QkvProduct, batch: Batch, scale: float) -> Tensor:
        return self._attend(layer, self._append_product(layer, product), batch, scale)

    def _append_product(self, layer: int, product: QkvProduct) -> Tensor:
        """Norms, rotary and the KV write in one launch → queries [T, H, D]."""
        k_rows, v_rows = self._rows[layer]
        return rotate_and_append(
            product.qkv, product.cos, product.sin, product.kv_rows, k_rows, v_rows, product.heads,
            q_weight=product.q_weight, k_weight=product.k_weight, eps=product.eps, interleaved=product.interleaved,
        )  # fmt: skip

    def _append_latents(self, layer: int, latent: Tensor, k_rope: Tensor, batch: Batch) -> None:
        """latent [T, C] and k_rope [T, rope], as `mla` is given them."""
        (cache,) = self._rows[layer]
        width = latent.shape[1]
        append(latent, k_rope, batch.kv_rows, cache[:, :width], cache[:, width:])

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
        (cache,) = self._rows[layer]
        append_latents(kv, kv_weight, *rope, batch.kv_rows, cache, eps=eps, latent_scale=latent_scale, interleaved=interleaved)
