"""MLA decode as others do it, for the comparison in `mla_decode.py`: plain torch, and FlashInfer's FlashAttention 3. Both read
a cache in BF16, of 576 values a token.

Plain torch is the absorbed form in three operations over keys that lie dense, one sequence after the other: gathering them
from pages is not counted, since who writes it so has a cache without pages.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from fluentllm.kernels.mla_decode.layout import LATENT, PAGE, ROPE
from fluentllm.plugins.attn_flashinfer import ARCHITECTURE
from fluentllm.plugins.attn_flashinfer.modules import import_flashinfer
from fluentllm.plugins.attn_flashinfer.toolkit import environment

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from fluentllm.kernels.mla_decode import Fp8Planes

MOST_BYTES = 4 << 30
"""That plain torch may take: a batch that needs more has no such column."""
WORKSPACE_BYTES = 128 << 20
"""As FlashInfer recommends."""
PAGES_AT_ONCE = 1024


def dense_bytes(batch: int, rows: int, longest: int) -> int:
    """Of `torch_decode`, for `rows` query rows a sequence: keys, three sets of logits in BF16, which of them are hidden."""
    return batch * longest * (2 * (LATENT + ROPE) + rows * (3 * 2 + 1))


def bf16_tokens(planes: Fp8Planes) -> Tensor:
    """An FP8 cache as a BF16 one, [pages, 64, 576]: the same values, since scales are powers of two."""
    out = torch.empty(*planes.scale.shape, LATENT + ROPE, dtype=torch.bfloat16, device=planes.scale.device)
    for start in range(0, out.shape[0], PAGES_AT_ONCE):  # in float32 it would be large
        part = slice(start, start + PAGES_AT_ONCE)
        scale = planes.scale[part].unsqueeze(-1)
        out[part, :, :LATENT] = planes.latent[part].float() * scale
        out[part, :, LATENT:] = planes.rope[part].float() * scale
    return out


def dense_keys(pool: Tensor, table: Tensor, longest: int) -> Tensor:
    """pool [pages, 64, 576], table [N, P] → [N, longest, 576]."""
    return pool[table.long()].flatten(1, 2)[:, :longest]


def torch_decode(
    q_latent: Tensor, q_rope: Tensor, keys: Tensor, lengths: Tensor, scale: float
) -> Callable[[], Tensor]:  # fmt: skip
    """q_latent [N, q, H, 512], q_rope [N, q, H, 64], keys of `dense_keys`, lengths [N] → a call that gives [N, q, H, 512]."""
    batch, q_len, heads, _ = q_latent.shape
    queries = torch.cat((q_latent, q_rope), -1).flatten(1, 2)
    hidden = hidden_keys(lengths, q_len, heads, keys.shape[1])
    values, start = keys[..., :LATENT], queries.new_zeros(1, 1, 1)

    def run() -> Tensor:
        logits = torch.baddbmm(start, queries, keys.transpose(1, 2), beta=0, alpha=scale)
        if hidden is not None:
            logits = logits.masked_fill(hidden, -math.inf)
        return torch.bmm(logits.softmax(-1), values).view(batch, q_len, heads, LATENT)

    return run


def hidden_keys(lengths: Tensor, q_len: int, heads: int, longest: int) -> Tensor | None:
    """[N, q · H, longest] bool: the keys that a row does not see; None if all see all."""
    if q_len == 1 and bool((lengths == longest).all()):
        return None
    last = lengths[:, None] - q_len + torch.arange(q_len, device=lengths.device)
    hidden = torch.arange(longest, device=lengths.device) > last[..., None]
    return hidden.repeat_interleave(heads, 1)


@cache
def flashinfer_wrapper() -> Any | None:
    """FlashInfer's class for MLA, its kernels loaded; None where it cannot be had, after saying why."""
    if importlib.util.find_spec("flashinfer") is None:
        print("  FlashInfer is not installed (pip install 'fluentllm[cuda]'): no figures of it", flush=True)
        return None
    print("  FlashInfer compiles its MLA kernels, where its cache folder has none: some minutes", flush=True)
    try:
        os.environ.update(environment())
        import_flashinfer(ARCHITECTURE)
        make = importlib.import_module("flashinfer.mla").BatchMLAPagedAttentionWrapper
        one = torch.ones(1, dtype=torch.int32, device="cuda")
        _planned(make, 1, 1, one, one.view(1, 1), 1.0)
    except Exception as error:
        print(f"  FlashInfer cannot be used: {type(error).__name__}: {str(error)[:300]}", flush=True)
        return None
    return make


def flashinfer_decode(
    make: Any, q_latent: Tensor, q_rope: Tensor, pool: Tensor, table: Tensor, lengths: Tensor, scale: float
) -> Callable[[], Tensor]:
    """The same by the class of `flashinfer_wrapper`, over pages: pool [pages, 64, 576], table [N, P], lengths [N] int32, at
    least 1."""
    q_len, heads = q_latent.shape[1:3]
    wrapper = _planned(make, q_len, heads, lengths, table, scale)
    latent, rope = pool.split((LATENT, ROPE), -1)
    rows, rotary, out = q_latent.flatten(0, 1), q_rope.flatten(0, 1), torch.empty_like(q_latent)

    def run() -> Tensor:
        wrapper.run(rows, rotary, latent, rope, out=out.view_as(rows))
        return out

    return run


def _planned(make: Any, q_len: int, heads: int, lengths: Tensor, table: Tensor, scale: float) -> Any:
    """Planning is not timed, as ours is not."""
    wrapper = make(torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=lengths.device), backend="fa3")
    ends, pages = ragged_pages(lengths, table)
    starts = torch.arange(lengths.shape[0] + 1, dtype=torch.int32) * q_len
    wrapper.plan(
        starts, ends, pages, lengths, heads, LATENT, ROPE, PAGE, q_len > 1, scale, torch.bfloat16, torch.bfloat16
    )  # fmt: skip
    return wrapper


def ragged_pages(lengths: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Where each sequence's pages end, [N + 1] int32 on the host, and the pages, one sequence after the other, int32."""
    counts: Sequence[int] = (-(-lengths // PAGE)).tolist()
    ends = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
    return ends, torch.cat([row[:count] for row, count in zip(table, counts, strict=True)]).int()
