"""Matrix weights as products want them: float32, bfloat16, int8 a row, int4 in groups of 32.

`pack` and `pack_blocks` are called once a matrix, after loading; `Weight.product` once a layer and step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

DENSE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRECISIONS = (*DENSE, "int8", "int4")


class Weight(Protocol):
    """One matrix [out_features, in_features]."""

    out_features: int
    in_features: int
    nbytes: int

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, in] → [T, out] in x's dtype."""
        ...

    def dequantised(self) -> Tensor:
        """[out, in] float32, the values that `product` multiplies with."""
        ...


class DenseWeight:
    """Kept in the dtype it has; products in the same dtype."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.out_features, self.in_features = weight.shape
        self.nbytes = weight.nbytes

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = self.weight
        if x.dtype is weight.dtype:
            return F.linear(x, weight, bias)
        y = F.linear(x.to(weight.dtype), weight).to(x.dtype)
        return y if bias is None else y.add_(bias)

    def dequantised(self) -> Tensor:
        return self.weight.float()


class Int8Weight:
    """Symmetric int8 with one scale a row: value = q · scale. The product runs in bfloat16."""

    def __init__(self, q: Tensor, scale: Tensor) -> None:
        self.q = q
        self.scale = scale.to(torch.bfloat16)
        self.out_features, self.in_features = q.shape
        self.nbytes = q.nbytes + self.scale.nbytes

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not x.shape[0]:
            return x.new_empty(0, self.out_features)
        y = torch.ops.aten._weight_int8pack_mm(x.to(torch.bfloat16), self.q, self.scale).to(x.dtype)
        return y if bias is None else y.add_(bias)

    def dequantised(self) -> Tensor:
        return self.q.float() * self.scale.float().unsqueeze(1)


class Int4Weight:
    """4 bits a value in groups of 32 along the row: value = (q - 8) · scale + zero. The product runs in bfloat16."""

    GROUP = 32

    def __init__(self, q: Tensor, scale: Tensor, zero: Tensor) -> None:
        """q uint8 [out, in], 0 … 15; scale and zero [out, in / 32]."""
        self.out_features, self.in_features = q.shape
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.to(torch.int32), 1)
        self.scale_zero = torch.stack((scale.T, zero.T), dim=-1).to(torch.bfloat16).contiguous()
        self.nbytes = self.packed.nbytes + self.scale_zero.nbytes

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not x.shape[0]:
            return x.new_empty(0, self.out_features)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.to(torch.bfloat16), self.packed, self.GROUP, self.scale_zero).to(
            x.dtype
        )
        return y if bias is None else y.add_(bias)

    def dequantised(self) -> Tensor:
        eye = torch.eye(self.in_features, dtype=torch.bfloat16)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(eye, self.packed, self.GROUP, self.scale_zero).T.float()


def pack(weight: Tensor, precision: str) -> Weight:
    """weight [out, in], float → the same matrix at `precision`.

    int4 needs rows of whole groups of 32, a CPU and a multiple of 16 rows; where it does not fit, int8 is taken; off the CPU,
    and where rows are no multiple of 16 values, bfloat16.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, one of {PRECISIONS} is expected")
    # torch's int8 product reads past rows that are no multiple of 16, and crashes.
    if precision in ("int8", "int4") and (weight.device.type != "cpu" or weight.shape[1] % 16):
        precision = "bfloat16"
    if precision == "int4" and _fits_int4(*weight.shape):
        return Int4Weight(*quantise_int4(weight))
    if precision in ("int8", "int4"):
        return Int8Weight(*quantise_int8(weight))
    return DenseWeight(weight.to(DENSE[precision]))


def pack_blocks(kind: str, parts: Mapping[str, Tensor], precision: str) -> Weight | None:
    """`q4_1` blocks (value = d · q + m) are int4 groups with scale = d, zero = m + 8 d; None where that does not fit."""
    q = parts["q"]
    if kind != "q4_1" or precision != "int4" or q.device.type != "cpu" or not _fits_int4(*q.shape):
        return None
    return Int4Weight(q, parts["d"], parts["m"] + 8 * parts["d"])


def dequantise_blocks(kind: str, parts: Mapping[str, Tensor]) -> Tensor:
    """[rows, columns] float32."""
    if kind != "q4_1":
        raise ValueError(f"blocks of kind {kind!r} are unknown, 'q4_1' is expected")
    q, d, m = parts["q"], parts["d"], parts["m"]
    values = q.view(*d.shape, -1).float() * d.float().unsqueeze(-1) + m.float().unsqueeze(-1)
    return values.view(q.shape)


def quantise_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [out, in] → q int8 [out, in], scale float32 [out]; the largest of each row becomes ±127."""
    # Rounded to bfloat16 first, because that is what the product multiplies with.
    scale = (weight.float().abs().amax(1).clamp(min=1e-12) / 127).to(torch.bfloat16).float()
    q = (weight.float() / scale.unsqueeze(1)).round_().clamp_(-127, 127).to(torch.int8)
    return q, scale


def quantise_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """weight [out, in] → q uint8 [out, in], scale and zero float32 [out, in / 32]; each group spans its least and largest."""
    groups = weight.float().unflatten(1, (-1, Int4Weight.GROUP))
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).clamp(min=1e-12).to(torch.bfloat16).float()
    zero = (low + 8 * scale).to(torch.bfloat16).float()
    q = ((groups - zero.unsqueeze(-1)) / scale.unsqueeze(-1) + 8).round_().clamp_(0, 15).to(torch.uint8)
    return q.flatten(1), scale, zero


def _fits_int4(rows: int, columns: int) -> bool:
    return columns % Int4Weight.GROUP == 0 and rows % 16 == 0
