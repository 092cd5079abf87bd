"""What the backends of an FP8 cache have in common, whatever computes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fluentllm.core.protocols import AttentionBackend

if TYPE_CHECKING:
    from torch import Tensor

    from fluentllm.core.batch import Batch


class MlaOnly(AttentionBackend):
    """For models with MLA: the plugin supports no others, so no layer asks for grouped heads."""

    def gqa(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch, scale: float) -> Tensor:
        raise NotImplementedError("This backend is for MLA.")
