"""Draw one token a row: argmax(processed logits / T + noise(seed, position)), and argmax alone at T = 0.

The noise is keyed by seed and position only, so a draw does not depend on the batch, the step it happens in, or
speculation: a draft is right exactly if it is the token drawn here.
"""

from __future__ import annotations

from torch import Tensor

from ..core.slots import SlotTables
from ..core.types import Feature
from ..kernels import in_kernels
from ..kernels.argmax import argmax_rows
from ..kernels.sampling import filter_logits, gumbel_noise


def draw(logits: Tensor, slots: Tensor, positions: Tensor, tables: SlotTables, features: int) -> Tensor:
    """As `draw_reference`, of which this is two launches on a GPU, and one more with filters."""
    return (_draw_in_kernels if in_kernels(logits) else draw_reference)(logits, slots, positions, tables, features)


def _draw_in_kernels(logits: Tensor, slots: Tensor, positions: Tensor, tables: SlotTables, features: int) -> Tensor:
    from ..kernels.triton import draw as kernels
    from ..kernels.triton.filter import filter_thresholds

    if not features & Feature.SAMPLING:
        return kernels.argmax(logits)
    thresholds = None
    if features & Feature.FILTER:
        thresholds = filter_thresholds(logits, slots, tables.temperature, tables.top_k, tables.top_p, tables.min_p)
    return kernels.draw(logits, slots, positions, tables.temperature, tables.seed, thresholds)


def draw_reference(logits: Tensor, slots: Tensor, positions: Tensor, tables: SlotTables, features: int) -> Tensor:
    """logits [R, V] float32, processed; slots, positions [R] int64 → tokens [R] int64."""
    greedy = argmax_rows(logits)
    if not features & Feature.SAMPLING:
        return greedy
    temperature = tables.temperature[slots]
    sampled = temperature > 0
    scaled = logits / temperature.where(sampled, temperature.new_ones(())).unsqueeze(1)
    if features & Feature.FILTER:
        scaled = filter_logits(scaled, tables.top_k[slots], tables.top_p[slots], tables.min_p[slots])
    scaled += gumbel_noise(tables.seed[slots], positions, logits.shape[1])
    return argmax_rows(scaled).where(sampled, greedy)
