"""Prompt lookup over the slots' histories: each is cut into slices, one program each, and a second kernel takes the drafts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .launch import launch, power_of_2

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1024


@triton.jit
def _scan_kernel(best, history, slots, length, width, length_stride, history_row, SHORTEST: tl.constexpr,
                 LONGEST: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    slot = tl.load(slots + sequence)
    known = tl.load(length + slot * length_stride).to(tl.int32)
    row = history + slot * history_row
    span = tl.cdiv(known, tl.num_programs(1))
    first = part * span
    last = tl.minimum(first + span, known)
    score = tl.full([BLOCK], -1, tl.int32)
    for base in range(first, last, BLOCK):
        end = base + tl.arange(0, BLOCK)
        unbroken = (end > 0) & (end < last)
        matched = tl.zeros([BLOCK], tl.int32)
        for i in tl.static_range(LONGEST):
            # No token is -1: a history too short for i + 1 tokens matches nothing.
            wanted = tl.where(known > i + 1, tl.load(row + tl.maximum(known - 1 - i, 0)), -1)
            token = tl.load(row + end - 1 - i, mask=unbroken & (end > i), other=0)
            unbroken = unbroken & (end > i) & (token == wanted)
            matched += unbroken.to(tl.int32)
        score = tl.maximum(score, tl.where(matched >= SHORTEST, matched * width + end, -1))
    tl.store(best + sequence * tl.num_programs(1) + part, tl.max(score, 0))


@triton.jit
def _take_kernel(drafts, valid, best, history, slots, length, width, length_stride, history_row, COUNT: tl.constexpr,
                 PARTS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + sequence)
    known = tl.load(length + slot * length_stride).to(tl.int32)
    score = tl.max(tl.load(best + sequence * PARTS + tl.arange(0, PARTS)), 0)
    place = tl.where(score >= 0, score % width, 0)
    period = tl.maximum(known - place, 1)
    j = tl.arange(0, BLOCK)
    token = tl.load(history + slot * history_row + place + j % period, mask=j < COUNT, other=0)
    tl.store(drafts + sequence * COUNT + j, token.to(tl.int64), mask=j < COUNT)
    tl.store(valid + sequence, tl.where(score >= 0, COUNT, 0).to(tl.int64))


def prompt_lookup(
    history: Tensor, slots: Tensor, length: Tensor, count: int, shortest: int, longest: int
) -> tuple[Tensor, Tensor]:
    """history [S, L] int32 and length [S] int64 (any stride) of the slot tables, slots [B] int64 → drafts [B, count] int64,
    valid [B] int64 (0 or count). Reference: `kernels.prompt_lookup.prompt_lookup`, over gathered rows.
    (longest + 1) · L < 2³¹."""
    batch, width = slots.shape[0], history.shape[1]
    # Enough slices that a long history of one sequence is read by many programs.
    parts = min(32, power_of_2(-(-width // (4 * BLOCK))))
    best = torch.empty(batch, parts, dtype=torch.int32, device=history.device)
    drafts = torch.empty(batch, count, dtype=torch.int64, device=history.device)
    valid = torch.empty(batch, dtype=torch.int64, device=history.device)
    launch(
        _scan_kernel, (batch, parts), best, history, slots, length, width, length.stride(0), history.stride(0),
        SHORTEST=shortest, LONGEST=longest, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    launch(
        _take_kernel, (batch,), drafts, valid, best, history, slots, length, width, length.stride(0), history.stride(0),
        COUNT=count, PARTS=parts, BLOCK=power_of_2(count), num_warps=1,
    )  # fmt: skip
    return drafts, valid
