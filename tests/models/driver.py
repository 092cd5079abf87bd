"""Drives a model and an attention backend by hand-built batches, without an engine: what model tests compare with the oracle.

Sequences own randomly scattered pages of a small pool; a pass takes any mixture of chunks.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch

from fluentllm.core.batch import Batch
from fluentllm.core.kv.pool import KVPool
from fluentllm.core.protocols import AttentionContext, AttentionSpec
from fluentllm.core.settings import Settings
from fluentllm.plugins.attn_torch import _create, _supports

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from fluentllm.core.protocols import AttentionBackend, Model

Chunk = tuple[int, int, int]
"""(sequence, first position, number of rows)."""


class Driver:
    """`tokens[s]` is the history of sequence s; a pass computes the rows that its chunks name."""

    def __init__(
        self,
        model: Model,
        tokens: list[list[int]],
        *,
        page_size: int = 4,
        deterministic: bool = False,
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        create: Callable[[AttentionContext], AttentionBackend] = _create,
        seed: int = 0,
    ) -> None:
        """`create` makes the attention backend; the torch backend's unless given."""
        self.device = device = device or torch.device("cpu")
        self.model = model
        self.page_size = page_size
        self.history = torch.zeros(len(tokens) + 2, max(map(len, tokens)) + 8, dtype=torch.int32)
        self.slots = list(range(1, len(tokens) + 1))
        for slot, row in zip(self.slots, tokens, strict=True):
            self.history[slot, : len(row)] = torch.tensor(row, dtype=torch.int32)
        self.history = self.history.to(device)
        per_sequence = -(-self.history.shape[1] // page_size)
        pages = len(tokens) * per_sequence
        numbers = list(range(1, pages + 1))
        random.Random(seed).shuffle(numbers)
        self.page_table = torch.tensor(numbers, dtype=torch.int32).view(len(tokens), per_sequence).to(device)
        kv = model.spec.kv
        kv_dtype = kv_dtype or dtype
        self.pool = KVPool(kv, pages, page_size, kv_dtype, device)
        # What was never written must not matter, as long as it is finite.
        for tensor in (self.pool.k, self.pool.v, self.pool.latent):
            if tensor.dtype is torch.uint8:  # planes of bytes, all of which mean a finite number so
                tensor.random_(0x30, 0x40)
            else:
                tensor.copy_(torch.randn(tensor.shape))
        name, kv_name = (str(kind).removeprefix("torch.") for kind in (dtype, kv_dtype))
        spec = AttentionSpec(
            model=model.spec, device=device.type, dtype=name, kv_dtype=kv_name, page_size=page_size, deterministic=deterministic
        )
        # Float64 is no dtype of an engine, but the backend computes in it.
        assert create is not _create or dtype is torch.float64 or _supports(spec) is None
        self.attention = create(AttentionContext(spec, self.pool, Settings()))

    def batch(self, chunks: list[Chunk], *, decode: bool = False) -> Batch:
        """As the prefill program builds it, or with `decode` as the decode program does (equal rows a sequence)."""
        counts = [count for _, _, count in chunks]
        lengths = [start + count for _, start, count in chunks]
        device = self.device
        order = torch.tensor([sequence for sequence, _, _ in chunks], dtype=torch.int64, device=device)
        slots = torch.tensor([self.slots[sequence] for sequence, _, _ in chunks], dtype=torch.int64, device=device)
        positions = torch.cat([torch.arange(start, start + count) for _, start, count in chunks]).to(device)
        sequences = torch.repeat_interleave(torch.arange(len(chunks)), torch.tensor(counts)).to(device)
        page_table = self.page_table[order]
        pages = page_table[sequences, positions // self.page_size].long()
        assert not decode or len(set(counts)) == 1
        return Batch(
            tokens=self.history[slots[sequences], positions].long(),
            positions=positions,
            sequences=sequences,
            slots=slots,
            query_start=torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device=device),
            kv_lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
            page_table=page_table,
            kv_rows=pages * self.page_size + positions % self.page_size,
            history=self.history,
            page_size=self.page_size,
            query_length=counts[0] if decode else None,
            query_lengths=None if decode else tuple(counts),
            kv_lengths_host=None if decode else tuple(lengths),
        )

    @torch.inference_mode()
    def run(self, chunks: list[Chunk], *, decode: bool = False) -> list[Tensor]:
        """One forward pass → for each chunk its logits [count, vocab] float32."""
        batch = self.batch(chunks, decode=decode)
        logits = self.model.logits(self.model.forward(batch, self.attention))
        return list(logits.split([count for _, _, count in chunks]))

    @torch.inference_mode()
    def hidden(self, chunks: list[Chunk], *, decode: bool = False) -> Tensor:
        """One forward pass → hidden states after the final norm, [T, hidden]."""
        return self.model.forward(self.batch(chunks, decode=decode), self.attention)
