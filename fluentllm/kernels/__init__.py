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
    if deterministic and device.type == "cuda":
        from .triton.fixed_ops import FixedTritonOps

        return FixedTritonOps()
    if deterministic:
        from .fixed_order import FixedOrderOps

        return FixedOrderOps()
    if device.type == "cuda":
        from .triton.deferred_norm import DeferringOps

        return DeferringOps()
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


def choose_precision(
    setting: str, device: torch.device, dtype: torch.dtype, deterministic: bool, *, fp8_checkpoint: bool = False
) -> str:
    """`model.weight_precision` → what matrix weights are packed to (`weights.PRECISIONS`).

    auto: `packed` on a CPU, and on a GPU with FP8 products for a checkpoint in block FP8; on a GPU else, and in deterministic
    mode, the dtype of the activations. fp8 on a GPU without such products is that dtype too; on a CPU it is the plain version.
    """
    from .fp8_weight import fp8_products

    dense = str(dtype).removeprefix("torch.")
    if setting == "fp8" and device.type == "cuda" and not fp8_products(device):
        logging.getLogger("fluentllm.engine").warning(
            "model.weight_precision is fp8, but %s multiplies no FP8: matrices are kept in %s.", device, dense
        )
        return dense
    if setting != "auto":
        return setting
    if deterministic:
        return dense
    if device.type == "cpu":
        return "packed"
    # What a checkpoint keeps in 16 bits is bfloat16 then, so activations must be, too.
    return "packed" if fp8_checkpoint and dense == "bfloat16" and fp8_products(device) else dense


def _copy_budget() -> int:
    """Bytes for second copies of packed matrices: a quarter of the memory."""
    import os

    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    except (AttributeError, ValueError, OSError):
        return 1 << 30
