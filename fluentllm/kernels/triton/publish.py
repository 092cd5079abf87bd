"""Results of a step into a ring in pinned host memory: a few posted writes over the bus, inside the step's own program."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .launch import launch

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1024
"""Words of a program."""


@triton.jit(do_not_specialize=["padding", "count", "row_words", "offset"])
def _publish_kernel(ring, turns, words, slots, padding, count, row_words, offset, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
                    LAST: tl.constexpr):  # fmt: skip
    turn = tl.load(turns)
    row = ring + turn % ENTRIES * row_words
    step = tl.num_programs(0) * BLOCK
    for base in range(tl.program_id(0) * BLOCK, count, step):
        at = base + tl.arange(0, BLOCK)
        tl.store(row + offset + at, tl.load(words + at, mask=at < count), mask=at < count)
    if LAST:
        tl.store(row, turn.to(tl.int32))
        tl.store(turns, turn + (tl.load(slots) != padding).to(tl.int64))


def publish(ring: Tensor, turns: Tensor, words: Tensor, slots: Tensor, padding: int, offset: int, *, last: bool) -> None:
    """words [W] int32, contiguous, to place `offset` of row turns[0] % entries of `ring` [entries, row] int32, which the device
    can write to: pinned, or its own. `last`: of a step's results. The row's first word then becomes the turn, and turns [1]
    int64 goes on, unless slots [B] int64 begin with `padding`: who ran for nobody leaves the row to the next.

    Reference: `step.result_ring.publish_reference`.
    """
    count = words.shape[0]
    # The last one counts the turn on, so nobody beside it may still have to read it.
    programs = 1 if last else max(1, -(-count // BLOCK))
    launch(
        _publish_kernel, (programs,), ring, turns, words, slots, padding, count, ring.stride(0), offset,
        ENTRIES=ring.shape[0], BLOCK=BLOCK, LAST=last, num_warps=4,
    )  # fmt: skip
