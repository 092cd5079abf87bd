"""Token embedding enriched by n-grams: the mean of the word's row and of projected rows of large hashed tables.

The tables hold most of LongCat-Flash-Lite's parameters, so they may stay in host memory while the model is on a GPU. Which rows
to read comes from the slots' token history (`kernels.ngram`).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from ..core.protocols import WeightSlot
from ..kernels.ngram import NgramHash, NgramTables
from .embedding import Embedding
from .module import Module, join

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from ..core.batch import Batch
    from ..core.protocols import BuildContext
    from ..kernels.weights import Weight


class NgramEmbedding(Module):
    """batch → [T, hidden]: (word + Σ_i P_i · E_i[id_i]) / (1 + tables).

    Names: `<prefix>.embedders.<i>.weight` [rows_i, width], `<prefix>.post_projs.<i>.weight` [hidden, width];
    width = hidden / tables.
    """

    def __init__(
        self, ctx: BuildContext, prefix: str, word: Embedding, hash_: NgramHash, hidden: int, *, host: bool = False
    ) -> None:
        """`host`: keep the tables in host memory, pinned where the model is on a GPU."""
        self.prefix = prefix
        self.word = word
        self.hash = hash_
        self.hidden = hidden
        self.width = hidden // hash_.tables
        sizes = [hash_.rows(i) for i in range(hash_.tables)]
        self.starts = [sum(sizes[:i]) for i in range(hash_.tables)]
        self.tables = torch.zeros(
            sum(sizes), self.width, dtype=ctx.dtype, device="cpu" if host else ctx.device,
            pin_memory=host and ctx.device.type == "cuda",
        )  # fmt: skip
        """All tables one below the other."""
        starts, stops = (torch.tensor(n, dtype=torch.int64, device=ctx.device) for n in (self.starts, hash_.stops))
        self._ngram = NgramTables(self.tables, starts, hash_.factors().to(ctx.device), hash_.moduli().to(ctx.device), stops)
        self._projection: Tensor | None = torch.zeros(hidden, hidden, dtype=ctx.dtype, device=ctx.device)
        self._packed: Weight | None = None
        self._ops = ctx.ops
        # Its rows are sums of many tables': three bits of mantissa are too few for so small a matrix.
        self._precision = str(ctx.dtype).removeprefix("torch.") if ctx.weight_precision == "fp8" else ctx.weight_precision

    def __call__(self, batch: Batch) -> Tensor:
        assert self._packed is not None
        slots = batch.slots[batch.sequences]
        return self._ops.ngram_embedding(
            batch.tokens, batch.positions, slots, batch.history, self._ngram, self.word.table, self._packed
        )

    def own_slots(self) -> Iterator[WeightSlot]:
        for i, start in enumerate(self.starts):
            table = self.tables[start : start + self.hash.rows(i)]
            yield WeightSlot(join(self.prefix, "embedders", str(i), "weight"), tuple(table.shape), table.copy_)
        for i in range(self.hash.tables):
            take = partial(self._take_projection, i)
            yield WeightSlot(join(self.prefix, "post_projs", str(i), "weight"), (self.hidden, self.width), take)

    def _take_projection(self, i: int, tensor: Tensor) -> None:
        if self._projection is not None:
            self._projection[:, i * self.width : (i + 1) * self.width].copy_(tensor)

    def own_finalize(self) -> None:
        if self._projection is not None:
            # Σ_i P_i e_i is one product of the rows side by side.
            self._packed = self._ops.pack(self._projection, self._precision)
            self._projection = None
