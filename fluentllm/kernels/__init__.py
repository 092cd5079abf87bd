"""Tensor operations: each file holds the plain torch version beside its fast ones."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from .native.library import Library
    from .ops import Ops

log = logging.getLogger(__name__)


def choose_ops(device: torch.device, deterministic: bool, library: Library | None = None) -> Ops:
    """The arithmetic of a model: fast, or with every row's bits independent of the rest of the batch. `library`: C kernels
    for a CPU (`load_library`)."""
    if deterministic:
        from .fixed_order import FixedOrderOps

        return FixedOrderOps()
    if device.type == "cuda":
        from .triton.ops import TritonOps

        return TritonOps()
    if library is not None and device.type == "cpu":
        from .native.ops import NativeOps

        return NativeOps(library, _copy_budget())
    from .plain import PlainOps

    return PlainOps(copy_budget=_copy_budget() if device.type == "cpu" else 0)


def load_library(folder: Path) -> Library | None:
    """The C kernels, compiled into `folder` if need be; None where they cannot be had, with a line in the log."""
    from .native.library import NotAvailable, load

    try:
        return load(folder)
    except NotAvailable as reason:
        log.info("no C kernels, torch's operations serve: %s", reason)
        return None


def in_kernels(tensor: torch.Tensor) -> bool:
    """Do the GPU's kernels serve this tensor? So they do on `meta`, where their launches are recorded, to be compiled."""
    return tensor.device.type in ("cuda", "meta")


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
