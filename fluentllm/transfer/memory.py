"""The registered memory of an engine, by pages and layers: what checksums are made of."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from .layout import KVLayout, Region


class RegisteredMemory:
    """Views of the pool's tensors and of what a proposer keeps for each page, as bytes."""

    def __init__(self, layout: KVLayout, tensors: Sequence[Tensor]) -> None:
        """tensors: in the order of `KVLayout.tensors`, then `KVLayout.states`; contiguous."""
        import torch

        regions = (*layout.tensors(), *layout.states())
        self._layout = layout
        self._regions = layout.tensors()
        views = [_shaped(tensor.view(-1).view(torch.uint8), region) for tensor, region in zip(tensors, regions, strict=True)]
        self._kv, self._states = views[: len(self._regions)], views[len(self._regions) :]

    def checksum(
        self, pages: Sequence[int], layers: range, tokens: int, states: bool, heads: Sequence[range] | None = None
    ) -> int:
        """CRC-32 of `layers` of `pages`, of which the last has `tokens` tokens, and of their page states. It goes by runs of
        this rank's heads (None: all), tensor by tensor, plane by plane, layer by layer, page by page, so both ends of a
        transfer get the same whatever their pages' numbers. On a GPU it copies the pages to the host and waits for that."""
        import torch

        index = torch.tensor(pages, dtype=torch.int64)
        size = self._layout.page_size
        partial = tokens < size
        sum_ = 0
        runs = [range(self._layout.local_heads)] if heads is None else heads
        for run, (view, region) in itertools.product(runs, zip(self._kv, self._regions, strict=True)):
            for plane in _planes(view[layers.start : layers.stop], region):
                width = plane.shape[-1] // region.heads
                part = plane[..., run.start * width : run.stop * width]
                whole = index[:-1] if partial else index
                sum_ = _crc(part[:, whole.to(view.device)], sum_)
                if partial:
                    sum_ = _crc(part[:, int(index[-1]), :tokens], sum_)
        for view in self._states if states else ():
            sum_ = _crc(view[:, index.to(view.device)], sum_)
        return sum_


def _shaped(flat: Tensor, region: Region) -> Tensor:
    """[layers, pages, bytes of a page]."""
    return flat.view(region.layers, region.pages, region.page_bytes)


def _planes(pages: Tensor, region: Region) -> Iterator[Tensor]:
    """[layers, pages, bytes of a page] → each plane, [layers, pages, page_size, bytes of a token]."""
    start = 0
    for width in region.planes or (region.token_bytes,):
        size = region.page_size * width
        yield pages[..., start : start + size].unflatten(-1, (region.page_size, width))
        start += size


def _crc(part: Tensor, start: int) -> int:
    return zlib.crc32(np.ascontiguousarray(part.cpu().numpy()).data, start)
