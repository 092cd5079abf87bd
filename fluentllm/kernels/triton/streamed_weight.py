"""Matrices that few rows are multiplied with by our own kernel, many by a library or a kernel for many."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..fp8_library import ROWS, library_product, library_scale
from ..fp8_weight import Fp8BlockWeight
from ..weights import DenseWeight
from . import fp8_gemm, fp8_quantise, linear, linear_tiles

if TYPE_CHECKING:
    from torch import Tensor

    from .normed import NormAfter, Normed


class Streamed(ABC):
    """One matrix [out, in] that `linear.linear` can multiply with."""

    out_features: int

    @abstractmethod
    def streams(self, x: Tensor) -> bool:
        """Are these rows [T, in] few enough, and of its dtype?"""

    @abstractmethod
    def stream(self, x: Tensor | Normed, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None) -> Tensor:
        """x [T, in] → x Wᵀ + bias ([out] or [T, out]) → [T, out]."""

    @abstractmethod
    def gated(self, x: Tensor | Normed) -> Tensor:
        """x [T, in] → silu(gate) · up, gate being the first half of the rows."""

    @abstractmethod
    def takes_norm(self, tokens: int, width: int) -> bool:
        """Can `stream_norm` norm the first `width` columns?"""

    @abstractmethod
    def stream_norm(self, x: Tensor | Normed, after: NormAfter, bias: Tensor | None = None) -> tuple[Normed, Tensor]:
        """As `linear.linear_norm`."""


class StreamedWeight(DenseWeight, Streamed):
    """In the dtype of the activations."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.counters = linear.new_counters(self.out_features, weight.device)

    def streams(self, x: Tensor) -> bool:
        return x.shape[0] <= linear_tiles.MOST_TOKENS and x.dtype is self.weight.dtype and x.stride(-1) == 1

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.stream(x, bias) if self.streams(x) else super().product(x, bias)

    def stream(self, x: Tensor | Normed, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None) -> Tensor:
        return linear.linear(x, self.weight, other=bias, counters=self.counters, out_dtype=out_dtype)

    def gated(self, x: Tensor | Normed) -> Tensor:
        return linear.linear(x, self.weight, gated=True, counters=self.counters)

    def takes_norm(self, tokens: int, width: int) -> bool:
        shape = self.out_features, self.in_features, self.weight.element_size()
        return linear.takes_norm(tokens, *shape, width, self.weight.device)

    def stream_norm(self, x: Tensor | Normed, after: NormAfter, bias: Tensor | None = None) -> tuple[Normed, Tensor]:
        return linear.linear_norm(x, self.weight, after, other=bias, counters=self.counters)


class StreamedFp8Weight(Fp8BlockWeight, Streamed):
    """Block FP8: activations are quantised in front of the product."""

    def __init__(self, q: Tensor, scale: Tensor) -> None:
        super().__init__(q, scale)
        self._counters = linear.new_counters(self.out_features, q.device)
        self._library_scale = library_scale(q, scale)

    def streams(self, x: Tensor) -> bool:
        return x.shape[0] <= linear_tiles.MOST_FP8_TOKENS

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.streams(x):
            return self.stream(x, bias)
        if self._library_scale is None or x.dtype is torch.float16:
            q, scale = fp8_quantise.quantise_rows(x)
            y = fp8_gemm.fp8_gemm(q, scale, self.q, self.scale, out_dtype=x.dtype)
        else:
            q, scale = fp8_quantise.quantise_rows(x, ROWS)
            y = library_product(q, scale, self.q, self._library_scale, x.dtype)[: x.shape[0]]
        return y if bias is None else y.add_(bias)

    def stream(self, x: Tensor | Normed, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None) -> Tensor:
        x, scale, dtype = self._operand(x)
        return linear.linear(
            x, self.q, x_scale=scale, w_scale=self.scale, other=bias, counters=self._counters, out_dtype=out_dtype or dtype
        )

    def gated(self, x: Tensor | Normed) -> Tensor:
        x, scale, dtype = self._operand(x, gated=True)
        return linear.linear(x, self.q, x_scale=scale, w_scale=self.scale, gated=True, counters=self._counters, out_dtype=dtype)

    def takes_norm(self, tokens: int, width: int) -> bool:
        return linear.takes_norm(tokens, self.out_features, self.in_features, 1, width, self.q.device)

    def stream_norm(self, x: Tensor | Normed, after: NormAfter, bias: Tensor | None = None) -> tuple[Normed, Tensor]:
        x, scale, dtype = self._operand(x)
        return linear.linear_norm(
            x, self.q, after, x_scale=scale, w_scale=self.scale, other=bias, counters=self._counters, out_dtype=dtype
        )

    def _operand(self, x: Tensor | Normed, *, gated: bool = False) -> tuple[Tensor | Normed, Tensor | None, torch.dtype]:
        """x as the product takes it, its scales, and its dtype: quantised, unless so few rows are multiplied as they are. A
        scale follows the largest value of its 128, so a factor of the whole row that is still to come changes nothing."""
        rows = x if isinstance(x, torch.Tensor) else x.rows
        features = self.out_features // 2 if gated else self.out_features
        if linear.holds(rows.shape[0], features, self.in_features, gated):
            return x, None, rows.dtype
        q, scale = fp8_quantise.quantise_rows(rows)
        return q if isinstance(x, torch.Tensor) else replace(x, rows=q), scale, rows.dtype
