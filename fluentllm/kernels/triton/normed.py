"""An RMS norm shared out between the product in front of it and the products behind it, so that it takes no launch of its own.

The first product adds to the residual stream, multiplies by the norm's weight and leaves the sum of squares of each of its
tiles; the others apply the factor 1 / sqrt(mean + eps) to their sums, since W (x ∘ g · f) = f · W (x ∘ g). RMS norm:
arXiv:1910.07467.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Normed:
    """Rows of an RMS norm but for each row's factor 1 / sqrt(Σ squares / D + eps)."""

    rows: Tensor
    """[T, D], x · weight."""
    squares: Tensor
    """[parts, T] float32, Σ x² over each part of the columns."""
    eps: float

    def tensor(self) -> Tensor:
        """[T, D], with the factor."""
        factor = torch.rsqrt(self.squares.sum(0) / self.rows.shape[1] + self.eps)
        return (self.rows.float() * factor.unsqueeze(1)).to(self.rows.dtype)


@dataclass(frozen=True, slots=True)
class NormAfter:
    """What a product does with its first columns, as many as `weight` has values."""

    weight: Tensor
    """[D], D a multiple of the tile's rows, or all of the product's columns."""
    eps: float
    residual: Tensor | None = None
    """[T, D], to which the product is added first, in place: then D is all columns."""


def opened(x: Tensor | Normed) -> tuple[Tensor, Tensor | None, int, float]:
    """(rows, squares, parts, eps), as kernels take them; without squares the rows are finished."""
    if isinstance(x, torch.Tensor):
        return x, None, 0, 0.0
    return x.rows, x.squares, x.squares.shape[0], x.eps


def opened_after(after: NormAfter | None, parts: int, tokens: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(residual, norm's weight, room for squares), as kernels that leave a norm take them."""
    if after is None:
        return None, None, None
    device = after.weight.device
    return after.residual, after.weight, torch.empty(parts, tokens, dtype=torch.float32, device=device)


def left(out: Tensor, squares: Tensor | None, after: NormAfter | None) -> Tensor | Normed:
    """What such a kernel left."""
    return out if after is None or squares is None else Normed(out, squares, after.eps)


@triton.jit
def load_squares(squares, m, M, parts, PARTS: tl.constexpr):
    """[PARTS, BLOCK_M] float32: what `norm_factor` adds up. Asked for early, so that nobody waits for it."""
    part = tl.arange(0, PARTS)
    inside = (part < parts)[:, None] & (m < M)[None, :]
    return tl.load(squares + (part.to(tl.int64) * M)[:, None] + m[None, :], mask=inside, other=0.0)


@triton.jit
def leave_row(y, residual, norm, squares, token, part, i, inside, tokens, residual_row):
    """A piece of a token's row, y [n] at columns i, added to the residual stream and normed but for the factor; its sum of
    squares is the row's part `part`. → what readers get. `token` int64."""
    at = residual + token * residual_row + i
    y = (y.to(tl.float32) + tl.load(at, mask=inside, other=0.0).to(tl.float32)).to(y.dtype)
    tl.store(at, y, mask=inside)
    wide = tl.where(inside, y.to(tl.float32), 0.0)
    tl.store(squares + part.to(tl.int64) * tokens + token, tl.sum(wide * wide, 0))
    return (wide * tl.load(norm + i, mask=inside, other=0.0).to(tl.float32)).to(y.dtype)


@triton.jit
def norm_factor(found, size, eps):
    """[BLOCK_M]: 1 / sqrt(mean of squares + eps)."""
    return tl.rsqrt(tl.sum(found, 0) / size + eps)
