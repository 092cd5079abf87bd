"""What the host plans of a prefill pass: its tiles, on the device without waiting."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def tile_table(tiles: Sequence[tuple[int, ...]], numbers: int, device: torch.device) -> Tensor:
    """`tiles` of so many numbers each → [numbers, tiles] int32, in stream order."""
    table = torch.tensor(tiles, dtype=torch.int32).view(-1, numbers).T.contiguous()
    # `core.staging` does this for others; kernels know nothing of it.
    return (table.pin_memory() if device.type == "cuda" else table).to(device, non_blocking=True)
