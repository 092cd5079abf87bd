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
    from .plain import PlainOps

    return PlainOps()


def choose_precision(setting: str, device: torch.device, dtype: torch.dtype, deterministic: bool) -> str:
    """`model.weight_precision` → what matrix weights are packed to.

    auto: on a CPU int4 for what the checkpoint itself stores in 4 bits (the rest in bfloat16); on a GPU, and in
    deterministic mode, the dtype of the activations.
    """
    if setting != "auto":
        return setting
    if deterministic or device.type != "cpu":
        return str(dtype).removeprefix("torch.")
    return "float32"
