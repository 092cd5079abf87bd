"""Matrix weights as products want them: dense, float16 through FBGEMM, int8 rows, 4 bits in groups of 32, C's tiles, block FP8.

`pack` and `pack_blocks` are called once a matrix, after loading; `Weight.product` once a layer and step. Which is fastest when
is in benchmarks/cpu/README.md.
"""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F

from .copies import COPIES
from .fp8_weight import Fp8BlockWeight
from .native.pack import TiledWeight, fits as tiles_fit
from .quantise import GROUP, dequantise_blocks, quantise_int4, quantise_int8
from .split_int8 import SplitInt8Weight, has_vnni

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from .native.library import Library

DENSE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRECISIONS = (*DENSE, "int8", "int4", "packed", "fp8")
"""packed: a checkpoint's blocks as it has them where products can use them (on a CPU 4 bits, and 8 bits as int8 rows; on a GPU
FP8), everything else in 16 bits. fp8: block FP8, activations too."""


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


class HalfWeight:
    """float16 for FBGEMM: half the bytes of float32, activations and sums in float32. Only where FBGEMM is (x86)."""

    def __init__(self, weight: Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self.nbytes = 2 * weight.numel()
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight.float().contiguous(), None)
        self._product = torch.ops.quantized.linear_dynamic_fp16.default

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not x.shape[0]:
            return x.new_empty(0, self.out_features)
        y = self._product(x.float(), self._packed).to(x.dtype)
        return y if bias is None else y.add_(bias)

    def dequantised(self) -> Tensor:
        weight: Tensor = torch.ops.quantized.linear_unpack_fp16(self._packed)[0]
        return weight


class Int8Weight:
    """Symmetric int8 with one scale a row: value = q · scale. The product runs in bfloat16."""

    def __init__(self, q: Tensor, scale: Tensor) -> None:
        """q int8 [out, in], scale [out]."""
        self.q = q.contiguous()
        self.scale = scale.to(torch.bfloat16)
        self.out_features, self.in_features = q.shape
        self.nbytes = q.nbytes + self.scale.nbytes
        self._product = torch.ops.aten._weight_int8pack_mm.default

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not x.shape[0]:
            return x.new_empty(0, self.out_features)
        y = self._product(x.to(torch.bfloat16), self.q, self.scale).to(x.dtype)
        return y if bias is None else y.add_(bias)

    def dequantised(self) -> Tensor:
        return self.q.float() * self.scale.float().unsqueeze(1)


class Int4Weight:
    """4 bits a value in groups of 32 along the row: value = (q - 8) · scale + zero. The product runs in bfloat16."""

    def __init__(self, q: Tensor, scale: Tensor, zero: Tensor) -> None:
        """q uint8 [out, in], 0 … 15; scale and zero [out, in / 32]."""
        self.out_features, self.in_features = q.shape
        self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.to(torch.int32), 1)
        self._scale_zero = torch.stack((scale.T, zero.T), dim=-1).to(torch.bfloat16).contiguous()
        self.nbytes = self._packed.nbytes + self._scale_zero.nbytes
        self._product = torch.ops.aten._weight_int4pack_mm_for_cpu.default

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not x.shape[0]:
            return x.new_empty(0, self.out_features)
        y = self._product(x.to(torch.bfloat16), self._packed, GROUP, self._scale_zero).to(x.dtype)
        return y if bias is None else y.add_(bias)

    def dequantised(self) -> Tensor:
        eye = torch.eye(self.in_features, dtype=torch.bfloat16)
        return self._product(eye, self._packed, GROUP, self._scale_zero).T.float()


class TwoWeights:
    """One matrix twice: `few` for up to `border` rows, where reading it is what costs, and a copy for more, where computing is.
    The copy is made in the background; until it is there `few` does all the work."""

    def __init__(self, few: Weight, make: Callable[[], Weight], copy_nbytes: int, border: int) -> None:
        """`make` is called once, for the copy of `copy_nbytes`."""
        self.few, self.border = few, border
        self.many: Weight | None = None
        self.out_features, self.in_features = few.out_features, few.in_features
        self.copy_nbytes = copy_nbytes
        self.nbytes = few.nbytes + copy_nbytes
        self._make_copy: Callable[[], Weight] | None = make
        COPIES.add(self._make)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        many = self.many
        return (self.few if x.shape[0] <= self.border or many is None else many).product(x, bias)

    def dequantised(self) -> Tensor:
        return self.few.dequantised()

    def _make(self) -> None:
        assert self._make_copy is not None
        with torch.inference_mode():
            self.many = self._make_copy()
        self._make_copy = None


def pack(weight: Tensor, precision: str, *, twice: bool = False, library: Library | None = None) -> Weight:
    """weight [out, in], float → the same matrix at `precision`; `twice`: with a copy for many rows, if that is faster;
    `library`: for products of few rows with packed weights.

    int4 needs rows of whole groups of 32 and a multiple of 16 rows; where it does not fit, int8 is taken, which needs whole
    groups too, and else 16 bits. Off the CPU there is neither, and bfloat16 is taken. fp8 is quantised here.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, one of {PRECISIONS} is expected")
    if precision in DENSE:
        return DenseWeight(weight.to(DENSE[precision]))
    if precision == "fp8":
        return Fp8BlockWeight.of(weight)
    if weight.device.type != "cpu":
        return DenseWeight(weight.to(torch.bfloat16))
    # With other widths torch's int8 product reads past the end of rows.
    if precision == "packed" or weight.shape[1] % GROUP:
        return _half(weight)
    if precision == "int4" and _fits_int4(*weight.shape):
        few = _int4(*quantise_int4(weight), library)
        return _with_copy(few, few.dequantised) if twice else few
    return _int8(weight, twice, library)


def pack_blocks(
    kind: str, parts: Mapping[str, Tensor], precision: str, *, twice: bool = False, library: Library | None = None
) -> Weight | None:
    """A checkpoint's blocks, or None where this precision has no place for them.

    `q4_1` (value = d · q + m) are 4-bit groups with scale = d, zero = m + 8 d. `q8_0` (value = d · q) are taken as they are
    by the library; without it they are rounded to int8 rows where the product can keep float32 sums, and elsewhere take 16
    bits: they are heads more often than not, and logits in bfloat16 tie. `fp8_block` stays as it is for `fp8`, and off the CPU
    for `packed`.
    """
    q = parts["q"]
    if kind == "fp8_block":
        taken = precision == "fp8" or (precision == "packed" and q.device.type != "cpu")
        return Fp8BlockWeight(q, parts["scale"]) if taken else None
    if precision not in ("packed", "int4") or q.device.type != "cpu":
        return None
    if kind == "q4_1" and _fits_int4(*q.shape):
        few = _int4(q, parts["d"], parts["m"] + 8 * parts["d"], library)
        return _with_copy(few, partial(dequantise_blocks, kind, parts)) if twice else few
    if kind == "q8_0" and precision == "packed":
        if library is not None and tiles_fit(*q.shape):
            few = TiledWeight(library, q, parts["d"], None)
            return _with_copy(few, partial(dequantise_blocks, kind, parts)) if twice else few
        values = dequantise_blocks(kind, parts)
        return _int8(values, twice, library) if has_vnni() else _half(values)
    return None


def copy_bytes(weight: Weight) -> int:
    """Bytes of a `TwoWeights`' second copy, else 0."""
    return weight.copy_nbytes if isinstance(weight, TwoWeights) else 0


def _int4(q: Tensor, scale: Tensor, zero: Tensor, library: Library | None) -> Weight:
    """value = (q - 8) · scale + zero."""
    if library is None:
        return Int4Weight(q, scale, zero)
    return TiledWeight(library, q, scale, zero.float() - 8 * scale.float())


def _int8(values: Tensor, twice: bool, library: Library | None) -> Weight:
    q, scale = quantise_int8(values)
    few: Weight
    if library is not None and tiles_fit(*q.shape):
        few = TiledWeight(library, q, scale.unsqueeze(1).expand(-1, q.shape[1] // GROUP), None)
    elif has_vnni():
        return SplitInt8Weight(q, scale)
    else:
        few = Int8Weight(q, scale)
    return _with_copy(few, lambda: values) if twice else few


def _with_copy(few: Weight, values: Callable[[], Tensor]) -> Weight:
    """`few`, and what is fastest for more rows beside it, made from `values()`, the matrix in float32.

    The borders were measured with benchmarks/cpu/ops.py.
    """
    if isinstance(few, TiledWeight) and few.multiplies_bytes:
        return few  # fastest for any number of rows
    size = few.out_features * few.in_features
    if has_vnni():
        return TwoWeights(few, lambda: SplitInt8Weight(*quantise_int8(values())), size, 8)
    if not _has_fbgemm():
        return few
    return TwoWeights(few, lambda: HalfWeight(values()), 2 * size, _border(few))


def _border(few: Weight) -> int:
    """Rows up to which `few` is faster than FBGEMM's float16."""
    if isinstance(few, TiledWeight):
        return 24
    return 3 if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2") else 12


def _half(weight: Tensor) -> Weight:
    return HalfWeight(weight) if _has_fbgemm() else DenseWeight(weight.to(torch.bfloat16))


@cache
def _has_fbgemm() -> bool:
    return "fbgemm" in torch.backends.quantized.supported_engines


def _fits_int4(rows: int, columns: int) -> bool:
    return columns % GROUP == 0 and rows % 16 == 0
