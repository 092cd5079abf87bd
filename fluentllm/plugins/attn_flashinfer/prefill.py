"""Prefill by FlashAttention 3: planned on the host, once a pass, since prefill knows its lengths there.

Grouped heads are read from their pages. MLA is multiplied out to heads, one row a key, without the gaps that pages have.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from itertools import accumulate, cycle
from typing import TYPE_CHECKING, Any

import torch

from fluentllm.core.staging import to_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from fluentllm.core.batch import Batch

PLANS = 4
"""Passes that may be under way: a plan is copied from pinned memory, which the next one must not overwrite before."""
WORKSPACE_BYTES = 1 << 20
"""FlashAttention 3 splits no keys, so it keeps nothing there; the wrappers want some memory all the same."""


@dataclass(frozen=True, slots=True)
class Heads:
    """What a plan is for."""

    queries: int
    keys: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    scale: float


class _Plan:
    """One wrapper of FlashInfer, and when its pinned memory may be written again."""

    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper
        self._copied = torch.cuda.Event()

    def renew(self, *operands: Any, **options: Any) -> None:
        self._copied.synchronize()  # of a pass some steps ago: long over
        self.wrapper.plan(*operands, **options)
        self._copied.record()


class PagedPrefill:
    """`plan(batch, heads)` once a pass and kind of heads, then `run` a layer."""

    def __init__(self, device: torch.device) -> None:
        make = importlib.import_module("flashinfer.prefill").BatchPrefillWithPagedKVCacheWrapper
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._plans = cycle([_Plan(make(workspace, "NHD", backend="fa3")) for _ in range(PLANS)])
        self._plan = next(self._plans)

    def plan(self, batch: Batch, heads: Heads) -> None:
        assert batch.query_lengths is not None
        assert batch.kv_lengths_host is not None
        pages = [-(-keys // batch.page_size) for keys in batch.kv_lengths_host]
        flat = _ragged(pages, batch.page_table.shape[1])
        lengths = torch.tensor(batch.kv_lengths_host, dtype=torch.int32)
        self._plan = next(self._plans)
        self._plan.renew(
            _ends(batch.query_lengths),
            _ends(pages),
            batch.page_table.flatten()[to_device(flat, batch.page_table.device)],
            (lengths - 1) % batch.page_size + 1,
            heads.queries,
            heads.keys,
            heads.key_dim,
            batch.page_size,
            head_dim_vo=heads.value_dim,
            causal=True,
            sm_scale=heads.scale,
            q_data_type=heads.dtype,
            kv_data_type=heads.dtype,
            seq_lens=lengths,
            max_token_per_sequence=max(batch.query_lengths),
        )

    def run(self, q: Tensor, k_pages: Tensor, v_pages: Tensor) -> Tensor:
        """q [T, H, D], k_pages [P, page, Hkv, D], v_pages [P, page, Hkv, Dv] → [T, H, Dv]."""
        out = q.new_empty(*q.shape[:2], v_pages.shape[3])
        self._plan.wrapper.run(q, (k_pages, v_pages), out=out)
        return out


class RaggedPrefill:
    """The same over keys and values that stand one after the other, as MLA's expanded form makes them."""

    def __init__(self, device: torch.device) -> None:
        make = importlib.import_module("flashinfer.prefill").BatchPrefillWithRaggedKVCacheWrapper
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._plans = cycle([_Plan(make(workspace, "NHD", backend="fa3")) for _ in range(PLANS)])
        self._plan = next(self._plans)
        self._rows: Tensor | None = None

    def plan(self, batch: Batch, heads: Heads) -> None:
        assert batch.query_lengths is not None
        assert batch.kv_lengths_host is not None
        self._rows = key_rows(batch)
        self._plan = next(self._plans)
        self._plan.renew(
            _ends(batch.query_lengths),
            _ends(batch.kv_lengths_host),
            heads.queries,
            heads.keys,
            heads.key_dim,
            head_dim_vo=heads.value_dim,
            causal=True,
            sm_scale=heads.scale,
            q_data_type=heads.dtype,
            kv_data_type=heads.dtype,
        )

    def run(self, q: Tensor, latent_rows: Tensor, up_k: Tensor, up_v: Tensor) -> Tensor:
        """q [T, H, nope + rope], latent_rows [rows of the pool, C + rope], up_k [H, nope, C], up_v [H, Dv, C] → [T, H, Dv]."""
        assert self._rows is not None
        keys, values = expand(latent_rows.index_select(0, self._rows), up_k, up_v)
        out = q.new_empty(*q.shape[:2], values.shape[2])
        self._plan.wrapper.run(q, keys, values, out=out)
        return out


def expand(known: Tensor, up_k: Tensor, up_v: Tensor) -> tuple[Tensor, Tensor]:
    """known [L, C + rope] → keys [L, H, nope + rope], values [L, H, Dv]. DeepSeek-V2 (arXiv:2405.04434), section 2.1."""
    heads, nope, width = up_k.shape
    latent, rope = known.split((width, known.shape[1] - width), -1)
    keys = known.new_empty(known.shape[0], heads, nope + rope.shape[1])
    keys[..., :nope] = (latent @ up_k.flatten(0, 1).T).unflatten(-1, (heads, nope))
    keys[..., nope:] = rope.unsqueeze(1)
    values = (latent @ up_v.flatten(0, 1).T).unflatten(-1, (heads, up_v.shape[1]))
    return keys, values


def key_rows(batch: Batch) -> Tensor:
    """[sum of lengths] int64: where each key of a prefill pass lies in the pool seen as token rows, sequence by sequence."""
    assert batch.kv_lengths_host is not None
    size = batch.page_size
    lengths = torch.tensor(batch.kv_lengths_host, dtype=torch.int64)
    flat = _ragged(batch.kv_lengths_host, batch.page_table.shape[1] * size)
    flat = to_device(flat, batch.page_table.device)
    assert flat.shape[0] == int(lengths.sum())
    return batch.page_table.flatten()[flat // size].to(torch.int64) * size + flat % size


def _ragged(counts: Sequence[int], stride: int) -> Tensor:
    """[sum of counts] int64: i · stride + 0 … counts[i] - 1, for each i."""
    each = torch.tensor(counts, dtype=torch.int64)
    first = torch.arange(len(counts)) * stride - (each.cumsum(0) - each)
    return torch.repeat_interleave(first, each) + torch.arange(int(each.sum()))


def _ends(counts: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
