"""4-bit and 8-bit weights in the tiles that `products.c` reads, and their products."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..quantise import GROUP

if TYPE_CHECKING:
    from torch import Tensor

    from .library import Library

TILE = 16
"""Rows of the matrix side by side in a tile."""
_WORKSPACE = 76
"""Bytes that a product needs for each group of activations: `Activations` of byte_products.c; products.c needs fewer."""


class TiledWeight:
    """Groups of 32 along the row, their scales in float16: value = q · scale (+ zero), the checkpoint's own values. Activations
    are float32, or, where the CPU multiplies bytes, integers of 16 bits with a step for each 32 of them; sums are float32."""

    def __init__(self, library: Library, q: Tensor, scale: Tensor, zero: Tensor | None) -> None:
        """q [out, in]: uint8 0 … 15 where there is a `zero`, else int8; scale, zero [out, in / 32]. out is a multiple of 16."""
        self.out_features, self.in_features = q.shape
        self._groups = self.in_features // GROUP
        self._has_zero = zero is not None
        self._tiles = _tiles(q, scale, zero)
        self.multiplies_bytes = library.multiplies_bytes
        self._product = library.product4 if self._has_zero else library.product8
        self._weights = self._tiles.data_ptr()
        self.nbytes = self._tiles.nbytes

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rows, width = x.shape
        if width != self.in_features:  # it would be read past its end: a plugin's attention may be of another shape
            raise ValueError(f"rows of {width} values cannot be multiplied with a matrix of {self.in_features} columns")
        wide = x if x.dtype is torch.float32 else x.float()
        wide = wide.contiguous()
        out = torch.empty(rows, self.out_features)
        workspace = torch.empty(rows * self._groups * _WORKSPACE, dtype=torch.uint8)
        self._product(
            wide.data_ptr(),
            self._weights,
            out.data_ptr(),
            workspace.data_ptr(),
            rows,
            self.in_features,
            self.out_features,
        )
        if x.dtype is not torch.float32:
            out = out.to(x.dtype)
        return out if bias is None else out.add_(bias)

    def dequantised(self) -> Tensor:
        """[out, in] float32."""
        q, scale, zero = _untiled(self._tiles, self._has_zero)
        values = q.float().unflatten(1, (-1, GROUP)) * scale.unsqueeze(-1)
        if zero is not None:
            values += zero.unsqueeze(-1)
        return values.flatten(1)


def fits(rows: int, columns: int) -> bool:
    return columns % GROUP == 0 and rows % TILE == 0


def _tiles(q: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """→ uint8 [out / 16, in / 32, bytes of a group]."""
    tiles, groups = q.shape[0] // TILE, q.shape[1] // GROUP

    def halves(values: Tensor) -> Tensor:
        by_group = values.to(torch.float16).view(tiles, TILE, groups).transpose(1, 2).contiguous()
        return by_group.view(torch.uint8)

    # [tiles, groups, GROUP / 4, TILE, 4]
    bytes_ = q.view(torch.uint8).view(tiles, TILE, groups, -1, 4).permute(0, 2, 3, 1, 4)
    if zero is None:
        return torch.cat((halves(scale), bytes_.flatten(2)), -1)
    nibbles = bytes_[:, :, : GROUP // 8] | bytes_[:, :, GROUP // 8 :] << 4
    return torch.cat((halves(scale), halves(zero), nibbles.flatten(2)), -1)


def _untiled(tiled: Tensor, has_zero: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """The q, scale and zero that `_tiles` was made from, scale and zero as float32."""
    tiles, groups, _ = tiled.shape

    def floats(start: int) -> Tensor:
        values = tiled[:, :, start : start + 2 * TILE].contiguous().view(torch.float16).float()
        return values.transpose(1, 2).reshape(tiles * TILE, groups)

    if not has_zero:
        q = tiled[:, :, 2 * TILE :].contiguous().view(torch.int8).view(tiles, groups, GROUP // 4, TILE, 4)
        return q.permute(0, 3, 1, 2, 4).reshape(tiles * TILE, -1), floats(0), None
    nibbles = tiled[:, :, 4 * TILE :].view(tiles, groups, GROUP // 8, TILE, 4)
    q = torch.cat((nibbles & 15, nibbles >> 4), 2)
    return q.permute(0, 3, 1, 2, 4).reshape(tiles * TILE, -1), floats(0), floats(2 * TILE)
