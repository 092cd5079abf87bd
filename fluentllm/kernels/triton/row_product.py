"""One product of few rows with what happens at both of its ends, as `linear` hands it to whoever computes it: `held`,
`linear_hopper` or `linear_streamed`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .launch import power_of_2

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RowProduct:
    """out = x Wᵀ, between norms and additions; `linear.linear` and `linear.linear_norm` say what each means."""

    x: Tensor
    """[T, K]."""
    weight: Tensor
    """[N, K]; gated [2 N, K]."""
    out: Tensor
    """[T, N]."""
    x_scale: Tensor | None = None
    """[⌈K / 128⌉, T] float32, of x in E4M3."""
    w_scale: Tensor | None = None
    """[⌈N / 128⌉, ⌈K / 128⌉] float32, of a weight in E4M3."""
    gated: bool = False
    squares: Tensor | None = None
    """[parts, T] float32: of x's norm, whose factor is applied here."""
    eps: float = 0.0
    other: Tensor | None = None
    factor: float = 1.0
    residual: Tensor | None = None
    norm: Tensor | None = None
    """Weight of the norm of the first columns."""
    squares_out: Tensor | None = None
    """[⌈normed columns / rows of a tile⌉, T] float32: gets their sums of squares."""
    counters: Tensor | None = None
    """`linear.new_counters` of the matrix."""

    @property
    def tokens(self) -> int:
        return self.x.shape[0]

    @property
    def depth(self) -> int:
        return self.x.shape[1]

    @property
    def rows(self) -> int:
        return self.out.shape[1]

    @property
    def halves(self) -> int:
        """Matrices of `rows` rows: gate and up, or one."""
        return 2 if self.gated else 1

    @property
    def normed(self) -> int:
        """Columns that are normed."""
        return 0 if self.norm is None else self.norm.shape[0]

    @property
    def parts(self) -> int:
        """Of x's squares."""
        return 0 if self.squares is None else self.squares.shape[0]

    @property
    def padded_parts(self) -> int:
        """The least power of two that holds them; 0: none."""
        return power_of_2(self.parts) if self.parts else 0

    @property
    def scale_row(self) -> int:
        """Elements from one row of `x_scale` to the next."""
        return 0 if self.x_scale is None else self.x_scale.stride(0)

    @property
    def other_row(self) -> int:
        """The same of `other`; 0: all tokens get the same."""
        return 0 if self.other is None or self.other.ndim == 1 else self.other.stride(0)

    @property
    def residual_row(self) -> int:
        return 0 if self.residual is None else self.residual.stride(0)
