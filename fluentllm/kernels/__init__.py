"""Tensor operations: each file holds the plain torch version beside its fast ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .ops import Ops


def choose_ops(device: torch.device, deterministic: bool) -> Ops:
    """The arithmetic of a model: fast, or with every row's bits independent of the rest of the batch."""
    if deterministic:
        from .fixed_order import FixedOrderOps

        return FixedOrderOps()
    if device.type == "cuda":
        from .triton.ops import TritonOps

        return TritonOps()
    from .plain import PlainOps

    return PlainOps(copy_budget=_copy_budget() if device.type == "cpu" else 0)


def choose_precision(setting: str, device: torch.device, dtype: torch.dtype, deterministic: bool) -> str:
    """`model.weight_precision` → what matrix weights are packed to (`weights.PRECISIONS`).

    auto: `packed` on a CPU; on a GPU, and in deterministic mode, the dtype of the activations.
    """
    if setting != "auto":
        return setting
    if deterministic or device.type != "cpu":
        return str(dtype).removeprefix("torch.")
    return "packed"


def _copy_budget() -> int:
    """Bytes for second copies of packed matrices: a quarter of the memory."""
    import os

    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    except (AttributeError, ValueError, OSError):
        return 1 << 30
