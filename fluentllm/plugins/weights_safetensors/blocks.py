"""Block-FP8, the format of DeepSeek's checkpoints: one float32 scale for each tile of 128 × 128 float8_e4m3fn values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fluentllm.core.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

SCALE_SUFFIX = "_scale_inv"
"""`….weight` has its scales in `….weight_scale_inv`; the value is weight × scale, whatever the name suggests."""


def fp8_block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The tile (rows, columns) of a block-FP8 checkpoint, None for one that is not quantised.

    Raises `CheckpointError` naming any other quantisation.
    """
    quantization = config.get("quantization_config")
    if not quantization:
        return None
    method = quantization.get("quant_method")
    if method != "fp8":
        raise CheckpointError(
            f"The checkpoint is quantised by {method!r}, which cannot be read.",
            fix="Use the unquantised checkpoint, a block-FP8 one or a GGUF.",
        )
    block = quantization.get("weight_block_size")
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(isinstance(side, int) and side > 0 for side in block):
        raise CheckpointError(
            f"The checkpoint is FP8 with weight_block_size {block!r}; only blocks such as [128, 128] can be read.",
            fix="Use the unquantised checkpoint or a block-FP8 one.",
        )
    return block[0], block[1]


def dequantize_blocks(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """weight [R, C] float8 times scale [⌈R/r⌉, ⌈C/c⌉] float32, tile by tile of (r, c); edges may be ragged → float32.

    One row of tiles at a time: the only large temporary is the result.
    """
    rows, columns = weight.shape
    result = torch.empty(rows, columns, dtype=torch.float32, device=weight.device)
    for i, scales in enumerate(scale.to(torch.float32)):
        part = slice(i * block[0], min((i + 1) * block[0], rows))
        wide = scales.repeat_interleave(block[1])[:columns]
        torch.mul(weight[part].to(torch.float32), wide, out=result[part])
    return result
