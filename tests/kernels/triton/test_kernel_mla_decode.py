"""MLA decode and verification of the backend `triton`, from a layer's products to its heads' values, beside the torch backend.

The attention kernel itself is Gluon's, which runs on Hopper alone: where there is none, its pieces are computed in torch, as
the plan divides them, into the buffers that it would write. All around it is what runs on a GPU.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fluentllm.core.batch import Batch
from fluentllm.core.kv.pool import KVPool
from fluentllm.core.protocols import AttentionContext, AttentionSpec
from fluentllm.core.settings import Settings
from fluentllm.core.slots import SlotTables
from fluentllm.core.types import KVSpec, ModelSpec
from fluentllm.kernels.mla_decode import decode, expand
from fluentllm.kernels.mla_decode.hopper_bf16 import decode_bf16
from fluentllm.kernels.mla_decode.hopper_bf16_few import decode_bf16_few
from fluentllm.kernels.mla_decode.plan import DecodePlan
from fluentllm.kernels.mla_decode.reference import gather_tokens
from fluentllm.kernels.mla_decode.replay import pieces
from fluentllm.kernels.plain import PlainOps
from fluentllm.kernels.triton import mla_absorb
from fluentllm.kernels.triton.launch import launch
from fluentllm.plugins.attn_torch.backend import TorchAttention
from fluentllm.plugins.attn_triton.backend import TritonAttention
from fluentllm.step.decode import decode_batch

NOPE, VALUE, SCALE, LENGTHS = 32, 24, 0.05, [150, 2, 400]
MODES = (None, True, False)
INTERPRETED = not torch.cuda.is_available()
HOPPER = not INTERPRETED and torch.cuda.get_device_capability() == (9, 0)


def in_torch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`launch`, but for the attention kernel."""
    if kernel not in (decode_bf16, decode_bf16_few):
        launch(kernel, grid, *args, **options)
        return
    q, rope, cache, _, out, partial, lse, table, lengths, starts, spans, records, _, _, parts, scale_log2, _ = args
    rows, heads = options["ROWS"], options["HEADS"]
    queries = torch.cat((q.base, rope.base), 1).view(lengths.shape[0], rows, -1)
    plan = DecodePlan(parts, lengths, starts, spans, records)
    for piece in pieces(plan):
        keys = int(lengths[piece.sequence])
        tokens = gather_tokens(table[piece.sequence], keys)[piece.first * 64 : piece.last * 64]
        known = cache.base.flatten(0, 1)[tokens].float()
        seen = keys - rows // heads + 1 + torch.arange(rows, device=known.device) // heads
        position = piece.first * 64 + torch.arange(known.shape[0], device=known.device)
        logits = queries[piece.sequence].float() @ known.T * (scale_log2 * math.log(2))
        logits = logits.masked_fill(position >= seen[:, None], -math.inf)
        sums = logits.logsumexp(1)
        values = (logits - sums[:, None]).exp().nan_to_num(0.0) @ known[:, :512]
        if piece.last - piece.first == -(-keys // 64):
            out.view(-1, rows, 512)[piece.sequence] = values.to(out.dtype)
        else:
            partial[piece.slot], lse[piece.slot] = values, sums / math.log(2)


class Case:
    def __init__(self, heads: int, device: torch.device, rng: torch.Generator) -> None:
        self.heads, self.device, self.rng = heads, device, rng
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        kv = KVSpec(kind="mla", layers=1, latent_dim=512, rope_dim=64)
        self.tables = SlotTables(3, 1024, 64, 50, device, max_drafts=7)
        pages = 3 * self.tables.max_pages
        self.tables.page_table[:3] = (torch.randperm(pages, generator=rng) + 1).view(3, -1).to(device, torch.int32)
        self.tables.length[:3] = torch.tensor(LENGTHS).to(device)
        self.tables.drafted[:3] = torch.tensor([7, 0, 2]).to(device)
        self.tables.finished[:3] = False
        model = ModelSpec(architecture="", vocab_size=50, hidden_size=64, layers=1, heads=heads, max_position=1024, kv=kv)
        name = str(self.dtype).removeprefix("torch.")
        spec = AttentionSpec(model=model, device=device.type, dtype=name, kv_dtype=name, page_size=64, deterministic=False)
        self.pools = [KVPool(kv, pages, 64, self.dtype, device) for _ in range(3)]
        known = self.random(1, pages + 1, 64, 576)
        for pool in self.pools:
            pool.latent.copy_(known)
        contexts = [AttentionContext(spec, pool, Settings()) for pool in self.pools]
        self.plain = TorchAttention(contexts[0])
        self.ours, self.apart = (TritonAttention(context) for context in contexts[1:])
        self.up_k, self.up_v = (self.random(heads, n, 512) * 0.05 for n in (NOPE, VALUE))

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.rng).to(self.device, self.dtype)

    def batch(self, drafts: int) -> Batch:
        """Three sequences in another order, with as many drafts or fewer, and an inert one."""
        return decode_batch(torch.tensor([2, 0, 1, 3], device=self.device), drafts, self.tables)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize(
    ("heads", "drafts", "interleaved", "inside"),
    [(3, 0, False, None), (2, 3, True, True), (4, 1, True, False)]
    if INTERPRETED
    else [(heads, drafts, bool(drafts & 1), inside) for heads in (16, 20, 64) for drafts in (0, 1, 3, 7) for inside in MODES],
)
def test_decode_from_products(
    heads: int, drafts: int, interleaved: bool, inside: bool | None, device: torch.device, rng: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(expand, "MERGE_INSIDE", inside)
    if not HOPPER:
        monkeypatch.setattr(decode, "launch", in_torch)
    case, ops = Case(heads, device, rng), PlainOps()
    batch = case.batch(drafts)
    rows = batch.tokens.shape[0]
    down, q = case.random(rows, 40 + 576), case.random(rows, heads, NOPE + 64)
    rope, weight = (case.random(rows, 1, 64), case.random(rows, 1, 64)), case.random(512) * 0.2 + 1
    latent = ops.rms_norm(down[:, 40:552], weight, 1e-6) * 1.5
    key, turned = (ops.rotary(x, *rope, interleaved=interleaved) for x in (down[:, None, 552:], q[..., NOPE:]))
    for backend in (case.plain, case.ours, case.apart):
        backend.begin(batch)
    expected = case.plain.mla(0, q[..., :NOPE], turned, latent, key[:, 0], case.up_k, case.up_v, batch, SCALE)
    given = (0, down[:, 40:], weight, q, rope, case.up_k, case.up_v, batch, SCALE)
    named = {"eps": 1e-6, "latent_scale": 1.5, "interleaved": interleaved}
    out = case.ours.mla_from_products(*given, **named)
    monkeypatch.setattr(mla_absorb, "MOST_TOKENS", 0)
    apart = case.apart.mla_from_products(*given, **named)
    # What inert rows get depends on what lies in the scratch page: nobody reads it.
    live = batch.kv_rows >= 64
    # BF16: queries, latents, probabilities and sums are each rounded to 8 bits, on both sides.
    rounds = case.dtype is torch.bfloat16
    limit = 0.02 if rounds else 1e-4
    assert error(out[live], expected[live]) < limit
    assert error(apart[live], expected[live]) < limit
    written = [pool.latent[:, 1:] for pool in case.pools]
    # Two kernels may add a row's squares up in another order; the torch backend was given rotary keys of rounded products.
    torch.testing.assert_close(written[1], written[2], rtol=2.0**-7 if rounds else 0.0, atol=1e-3 if rounds else 0.0)
    torch.testing.assert_close(written[1], written[0], rtol=2.0**-5 if rounds else 1e-4, atol=2.0**-3 if rounds else 1e-4)
