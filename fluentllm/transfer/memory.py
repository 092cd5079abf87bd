"""The registered memory of an engine, by pages and layers: what checksums are made of."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
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

    def checksum(self, pages: Sequence[int], layers: range, tokens: int, states: bool) -> int:
        """CRC-32 of `layers` of `pages`, of which the last has `tokens` tokens, and of their page states. It goes tensor by
        tensor, layer by layer, page by page, so both ends of a transfer get the same whatever their pages' numbers. On a GPU
        it copies the pages to the host and waits for that."""
        import torch

        index = torch.tensor(pages, dtype=torch.int64)
        size = self._layout.page_size
        partial = tokens < size
        sum_ = 0
        for view, region in zip(self._kv, self._regions, strict=True):
            part = view[layers.start : layers.stop]
            whole = index[:-1] if partial else index
            sum_ = _crc(part[:, whole.to(view.device)], sum_)
            if partial:
                last = part[:, int(index[-1])]
                for start, length in region.parts(tokens):
                    sum_ = _crc(last[:, start : start + length], sum_)
        for view in self._states if states else ():
            sum_ = _crc(view[:, index.to(view.device)], sum_)
        return sum_


def _shaped(flat: Tensor, region: Region) -> Tensor:
    """[layers, pages, bytes of a page]."""
    return flat.view(region.layers, region.pages, region.page_bytes)


def _crc(part: Tensor, start: int) -> int:
    return zlib.crc32(np.ascontiguousarray(part.cpu().numpy()).data, start)
