"""N-gram embedding in two launches: rows of all hashed tables and of the word's, then their projection and mean.

Tables may lie in pinned host memory: the gather then reads over the bus, a row at a time, and nothing waits on the host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .language import FIRST, LOADED, start_next, wait_for_inputs
from .launch import launch, power_of_2, programmatic
from .linear import linear

if TYPE_CHECKING:
    from torch import Tensor

    from .linear_tiles import LinearTile


@triton.jit
def _ngram_gather_kernel(rows, word_rows, tokens, positions, slots, history, stops, factors, moduli, starts, tables, words,
                         history_row, table_row, word_row, last, TABLES: tl.constexpr, NEIGHBORS: tl.constexpr,
                         STOPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Program (token, i): for i < TABLES the row of table i, else a part of the word's row as wide."""
    t = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1)
    d = tl.arange(0, BLOCK)
    inside = d < WIDTH
    start_next(PDL, FIRST)
    wait_for_inputs(PDL)
    token = tl.load(tokens + t).to(tl.int64)
    if i < TABLES:
        modulus = tl.load(moduli + i)
        position = tl.load(positions + t).to(tl.int64)
        line = history + tl.load(slots + t).to(tl.int64) * history_row
        total = token * tl.load(factors + i)
        open_ = 1
        for back in tl.static_range(1, NEIGHBORS):
            place = position - back
            before = tl.load(line + tl.minimum(tl.maximum(place, 0), last)).to(tl.int64)
            open_ = tl.where(place >= 0, open_, 0)
            for e in tl.static_range(STOPS):
                open_ = tl.where(before == tl.load(stops + e), 0, open_)
            total += tl.where(open_ > 0, before, 0) * tl.load(factors + back * TABLES + i)
        row = tl.load(starts + i) + total % modulus
        start_next(PDL, LOADED)
        value = tl.load(tables + row * table_row + d, mask=inside, other=0.0)
        tl.store(rows + (t * TABLES + i) * WIDTH + d, value, mask=inside)
    else:
        part = (i - TABLES) * WIDTH + d
        start_next(PDL, LOADED)
        value = tl.load(words + token * word_row + part, mask=inside, other=0.0)
        tl.store(word_rows + t * (TABLES * WIDTH) + part, value, mask=inside)


def ngram_gather(
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    history: Tensor,
    stops: Tensor,
    factors: Tensor,
    moduli: Tensor,
    starts: Tensor,
    tables: Tensor,
    words: Tensor,
) -> tuple[Tensor, Tensor]:
    """Rows of all tables side by side [T, hidden], and the words' [T, hidden].

    tokens, positions, slots [T], history [S, L], stops [E] and the hash's factors [neighbors, tables] and moduli [tables] as in
    `kernels.ngram.ngram_ids`, contiguous; starts [tables] int64, first row of each table in `tables` [rows, hidden / tables],
    on the device or in pinned host memory; words [vocab, hidden], on the device. Reference: `kernels.ngram.ngram_ids` and
    `F.embedding`.
    """
    count, width, hidden = moduli.shape[0], tables.shape[1], words.shape[1]
    rows, word_rows = (torch.empty(tokens.shape[0], hidden, dtype=words.dtype, device=tokens.device) for _ in range(2))
    launch(
        _ngram_gather_kernel, (tokens.shape[0], 2 * count), rows, word_rows, tokens, positions, slots, history, stops, factors,
        moduli, starts, tables, words, history.stride(0), tables.stride(0), words.stride(0), history.shape[1] - 1,
        TABLES=count, NEIGHBORS=factors.shape[0], STOPS=stops.shape[0], WIDTH=width, BLOCK=power_of_2(width),
        num_warps=max(1, min(4, width // 256)), **programmatic(tokens.device),
    )  # fmt: skip
    return rows, word_rows


def ngram_embedding(
    rows: Tensor, word_rows: Tensor, projection: Tensor, tables: int, *, counters: Tensor | None = None,
    tile: LinearTile | None = None,
) -> Tensor:  # fmt: skip
    """(word + Σ_i P_i e_i) / (1 + tables), [T, hidden], of what `ngram_gather` found; projection [hidden, hidden], the tables'
    projections side by side. For few tokens: many are `F.linear`'s."""
    return linear(rows, projection, other=word_rows, factor=1 / (1 + tables), counters=counters, tile=tile)
