"""The kernels' backend of MLA over an FP8 cache beside the plain one: the same passes over pools of their own. Decode is
Gluon's, so it runs on Hopper alone; prefill, behind cached prefixes and without, runs in the interpreter too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fluentllm.core.batch import Batch
from fluentllm.core.buckets import pass_rows
from fluentllm.core.errors import PluginError
from fluentllm.core.kv.pool import KVPool
from fluentllm.core.protocols import AttentionContext, AttentionSpec
from fluentllm.core.settings import Settings
from fluentllm.core.slots import SlotTables
from fluentllm.core.types import KVSpec, ModelSpec, PrefillChunk
from fluentllm.kernels.plain import PlainOps
from fluentllm.kernels.triton import mla_absorb
from fluentllm.plugins.attn_mla_fp8.hopper import HopperMlaFp8
from fluentllm.plugins.attn_mla_fp8.plain import PlainMlaFp8
from fluentllm.step.decode import decode_batch
from fluentllm.step.padded_prefill import PaddedPrefill
from fluentllm.step.prefill import prefill_batch

NOPE, VALUE, LAYERS, SCALE = 32, 24, 2, 0.1
LENGTHS = [150, 2, 65]
CHUNKS = [
    [PrefillChunk(slot=0, start=0, count=70, last=False), PrefillChunk(slot=1, start=0, count=2, last=True)],
    [PrefillChunk(slot=0, start=70, count=80, last=True), PrefillChunk(slot=2, start=0, count=64, last=False)],
    [PrefillChunk(slot=2, start=64, count=1, last=True)],
]
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
HEADS = 16 if HOPPER else 4
"""Decode's tiles want 16. In prefill each is a program of its own, and a padded pass has dozens for each."""


class Case:
    def __init__(self, device: torch.device, rng: torch.Generator) -> None:
        self.device, self.rng = device, rng
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        kv = KVSpec(kind="mla", layers=LAYERS, latent_dim=512, rope_dim=64)
        self.tables = SlotTables(3, 256, 64, 50, device, max_drafts=7)
        pages = 3 * self.tables.max_pages
        self.tables.page_table[:3] = (torch.randperm(pages, generator=rng) + 1).view(3, -1).to(device, torch.int32)
        self.tables.length[:3] = torch.tensor(LENGTHS).to(device)
        self.tables.drafted[:3] = torch.tensor([2, 7, 0]).to(device)
        self.tables.finished[:3] = False
        model = ModelSpec(architecture="", vocab_size=50, hidden_size=64, layers=LAYERS, heads=HEADS, max_position=256, kv=kv)
        spec = AttentionSpec(
            model=model, device=device.type, dtype=str(self.dtype).removeprefix("torch."), kv_dtype="float8_e4m3fn",
            page_size=64, deterministic=False,
        )  # fmt: skip
        self.pools = [KVPool(kv, pages, 64, torch.float8_e4m3fn, device) for _ in range(2)]
        contexts = [AttentionContext(spec, pool, Settings()) for pool in self.pools]
        self.plain, self.fast = PlainMlaFp8(contexts[0]), HopperMlaFp8(contexts[1])
        self.up_k, self.up_v = (self.random(HEADS, n, 512) * 0.05 for n in (NOPE, VALUE))

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.rng).to(self.device, self.dtype)

    def run(self, batch: Batch, layer: int, *, fused: bool, interleaved: bool) -> tuple[Tensor, Tensor]:
        """(plain, fast), live rows only: what inert ones get depends on what lies in the scratch page."""
        ops, rows = PlainOps(), batch.tokens.shape[0]
        down, rope = self.random(rows, 40 + 576) * 3, (self.random(rows, 1, 64), self.random(rows, 1, 64))
        weight = (torch.rand(512, generator=self.rng) + 0.5).to(self.device, self.dtype)
        q = self.random(rows, HEADS, NOPE + 64)
        latent = ops.rms_norm(down[:, 40:552], weight, 1e-6) * 2.0
        k_rope = ops.rotary(down[:, None, 552:], *rope, interleaved=interleaved)[:, 0]
        q_rope = ops.rotary(q[..., NOPE:], *rope, interleaved=interleaved)
        given = (q[..., :NOPE], q_rope, latent, k_rope, self.up_k, self.up_v, batch, SCALE)
        expected = self.plain.mla(layer, *given)
        if fused:
            out = self.fast.mla_from_products(
                layer, down[:, 40:], weight, q.clone(), rope, self.up_k, self.up_v, batch, SCALE, eps=1e-6, latent_scale=2.0,
                interleaved=interleaved,
            )  # fmt: skip
        else:
            out = self.fast.mla(layer, *given)
        live = batch.kv_rows >= 64
        return expected[live], out[live]


BF16_ERROR = 0.02
"""Of a pass in BF16 on a GPU: latents, keys and probabilities are each rounded to 8 bits; 0.013 was the largest seen."""


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize(("fused", "few"), [(False, 64), (True, 64), (True, 0)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_passes_agree(
    fused: bool, few: int, interleaved: bool, device: torch.device, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`few`: decodes of so many tokens take the launches that are made for few."""
    monkeypatch.setattr(mla_absorb, "MOST_TOKENS", few)
    if few == 0 and not HOPPER:
        pytest.skip("only decode differs")
    case = Case(device, rng)
    slots = torch.tensor([2, 0, 1, 3], device=device)
    batches = [prefill_batch(chunks, case.tables) for chunks in CHUNKS]
    if HOPPER:
        batches += [decode_batch(slots, drafts, case.tables) for drafts in (0, 1, 3, 7)]
    for batch in batches:
        for backend in (case.plain, case.fast):
            backend.begin(batch)
        for layer in range(LAYERS):
            expected, out = case.run(batch, layer, fused=fused, interleaved=interleaved)
            assert error(out, expected) < (BF16_ERROR if device.type == "cuda" else 1e-4)
        if device.type == "cpu":
            # The interpreter's E4M3 cast rounds some values the other way (`mla_decode_interpreted`), so prefixes are evened.
            case.pools[1].latent.copy_(case.pools[0].latent)


@pytest.mark.parametrize("fused", [False, True])
def test_padded_passes_are_the_same(fused: bool, device: torch.device, rng: torch.Generator) -> None:
    """With pages and rows of nobody, planned on the device, over the pool that passes without padding have written."""
    case = Case(device, rng)
    padded = PaddedPrefill(None, case.fast, case.tables, None)  # type: ignore[arg-type]  # the model is not asked
    for chunks in CHUNKS:
        plain = prefill_batch(chunks, case.tables)
        rows, own = pass_rows(plain.tokens.shape[0]), plain.tokens.shape[0]
        batch = padded.prepared(chunks)
        assert batch is not None
        assert batch.tokens.shape[0] == rows
        down, rope = case.random(rows, 576) * 3, (case.random(rows, 1, 64), case.random(rows, 1, 64))
        weight, q = case.random(512) + 3, case.random(rows, HEADS, NOPE + 64)
        outs = []
        for each, count in ((plain, own), (batch, rows)):
            case.fast.begin(each)
            cos, sin = (part[:count] for part in rope)
            options = {"eps": 1e-6, "latent_scale": 2.0, "interleaved": True}
            if fused:
                given = down[:count], weight, q[:count].clone(), (cos, sin), case.up_k, case.up_v, each, SCALE
                outs.append(case.fast.mla_from_products(0, *given, **options))
            else:
                parts = q[:count, :, :NOPE], q[:count, :, NOPE:], down[:count, :512], down[:count, 512:]
                outs.append(case.fast.mla(0, *parts, case.up_k, case.up_v, each, SCALE))
        assert error(outs[1][:own], outs[0]) < (BF16_ERROR if device.type == "cuda" else 1e-4)
        assert torch.isfinite(outs[1]).all()


def test_fresh_tokens_are_read_as_they_are(device: torch.device, rng: torch.Generator) -> None:
    """Prefill without a prefix is no less exact than over a cache of 16 bits."""
    case = Case(device, rng)
    batch = prefill_batch(CHUNKS[0], case.tables)
    for backend in (case.plain, case.fast):
        backend.begin(batch)
    expected, out = case.run(batch, 0, fused=False, interleaved=True)
    assert error(out, expected) < (BF16_ERROR if device.type == "cuda" else 1e-4)


def test_a_first_key_that_kernels_would_not_honour_is_refused(device: torch.device, rng: torch.Generator) -> None:
    case = Case(device, rng)
    batch = prefill_batch(CHUNKS[0], case.tables)
    batch.first_key = 1
    with pytest.raises(PluginError, match=r"from its first on\. Give the layers grouped heads"):
        case.fast.begin(batch)
