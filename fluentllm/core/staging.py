"""Between host and device without waiting: small uploads through pinned memory, results back into pinned memory.

PyTorch's caching host allocator keeps a pinned block until the copies that read or write it are done, so the blocks that
steps use form a ring of their own accord.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(values: Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A list to the device, in stream order. The host does not wait."""
    return to_device(torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda"), device)


def upload_all(lists: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """Several lists of integers in one copy → int64 views of one tensor."""
    flat: list[int] = [value for values in lists for value in values]
    return list(torch.split(upload(flat, torch.int64, device), [len(values) for values in lists]))


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A host tensor to the device, in stream order, from pinned memory. The host does not wait."""
    if device.type == "cpu":
        return host
    if device.type == "cuda" and not host.is_pinned():
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, there when the stream gets to it: wait for an event behind it before reading. On a CPU the
    tensor itself."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
