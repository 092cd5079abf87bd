"""The backend `triton` and `TritonOps` beside the torch ones: the same passes over pools of their own."""

from __future__ import annotations

import pytest
import torch

from fluentllm.core.batch import Batch
from fluentllm.core.errors import PluginError
from fluentllm.core.kv.pool import KVPool
from fluentllm.core.protocols import AttentionBackend, AttentionContext, AttentionSpec, BuildContext, Model
from fluentllm.core.settings import Settings
from fluentllm.core.slots import SlotTables
from fluentllm.core.types import KVSpec, ModelSpec, PrefillChunk
from fluentllm.kernels.ops import Ops
from fluentllm.kernels.plain import PlainOps
from fluentllm.kernels.triton.ops import TritonOps
from fluentllm.layers.attention import Attention, AttentionShape
from fluentllm.layers.mla import MLA, MLAShape
from fluentllm.layers.rotary import Rotary
from fluentllm.plugins.attn_torch.backend import TorchAttention
from fluentllm.plugins.attn_triton.backend import TritonAttention
from fluentllm.plugins.model_llama import plugin as llama
from fluentllm.step.decode import decode_batch
from fluentllm.step.prefill import prefill_batch

PAGE = 16
LENGTHS = [22, 2, 5]
CHUNKS = [
    [PrefillChunk(slot=0, start=0, count=18, last=False), PrefillChunk(slot=1, start=0, count=2, last=True)],
    [PrefillChunk(slot=0, start=18, count=4, last=True), PrefillChunk(slot=2, start=0, count=5, last=True)],
]


def tables(device: torch.device, rng: torch.Generator, vocab: int = 50) -> SlotTables:
    made = SlotTables(3, 64, PAGE, vocab, device, max_drafts=3)
    made.history.copy_(torch.randint(0, vocab, made.history.shape, generator=rng))
    pages = torch.randperm(3 * made.max_pages, generator=rng) + 1
    made.page_table[:3] = pages.view(3, -1).to(device, torch.int32)
    made.length[:3] = torch.tensor(LENGTHS).to(device)
    made.drafted[:3] = torch.tensor([3, 0, 2]).to(device)
    made.finished[:3] = False
    return made


def passes(made: SlotTables) -> list[Batch]:
    """Two ragged prefills, the second behind a cached prefix, then a plain decode and one that verifies three drafts, where all
    were left."""
    device = made.device
    slots = torch.tensor([2, 0, 1, 3], device=device)
    return [*(prefill_batch(chunks, made) for chunks in CHUNKS), decode_batch(slots, 0, made), decode_batch(slots, 3, made)]


def backends(kv: KVSpec, made: SlotTables) -> list[AttentionBackend]:
    spec = ModelSpec(architecture="x", vocab_size=50, hidden_size=64, layers=2, heads=4, max_position=64, kv=kv)
    asked = AttentionSpec(
        model=spec, device=made.device.type, dtype="float32", kv_dtype="float32", page_size=PAGE, deterministic=False
    )
    pools = [KVPool(kv, 3 * made.max_pages, PAGE, torch.float32, made.device) for _ in range(2)]
    contexts = [AttentionContext(asked, pool, Settings()) for pool in pools]
    return [TorchAttention(contexts[0]), TritonAttention(contexts[1])]


@pytest.mark.parametrize("norm", [False, True])
def test_gqa(norm: bool, device: torch.device, rng: torch.Generator) -> None:
    heads, kv_heads, dim = 4, 2, 32
    made = tables(device, rng)
    kv = KVSpec(kind="gqa", layers=1, heads=kv_heads, head_dim=dim, v_head_dim=dim)
    plain, ours = backends(kv, made)
    _, fused = backends(kv, made)
    assert isinstance(fused, TritonAttention)
    ops = PlainOps()
    weights = [(torch.rand(dim, generator=rng) + 0.5).to(device) for _ in range(2)]
    for batch in passes(made)[0 if norm else -1 :]:
        rows = batch.tokens.shape[0]
        qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim, generator=rng).to(device)
        rope = tuple(torch.randn(rows, 1, dim, generator=rng).to(device) for _ in range(2))
        q, k, v = qkv.view(rows, -1, dim).split([heads, kv_heads, kv_heads], 1)
        if norm:
            q, k = ops.rms_norm(q, weights[0], 1e-6), ops.rms_norm(k, weights[1], 1e-6)
        q, k = ops.rotary(q, *rope), ops.rotary(k, *rope)
        for backend in (plain, ours, fused):
            backend.begin(batch)
        expected = plain.gqa(0, q, k, v, batch, 0.2)
        # What inert rows get depends on what lies in the scratch page: nobody reads it.
        live = batch.kv_rows >= PAGE
        named = {"q_weight": weights[0], "k_weight": weights[1], "eps": 1e-6} if norm else {}
        for out in (ours.gqa(0, q, k, v, batch, 0.2), fused.gqa_from_product(0, qkv, heads, rope, batch, 0.2, **named)):
            torch.testing.assert_close(out[live], expected[live], rtol=1e-4, atol=1e-5)


def test_mla_prefill(device: torch.device, rng: torch.Generator) -> None:
    heads, nope, rope, width, value = 2, 32, 16, 48, 24
    made = tables(device, rng)
    plain, ours = backends(KVSpec(kind="mla", layers=1, latent_dim=width, rope_dim=rope), made)
    up_k, up_v = (torch.randn(heads, n, width, generator=rng).to(device) * 0.2 for n in (nope, value))
    for batch in passes(made)[:2]:
        rows = batch.tokens.shape[0]
        shapes = (rows, heads, nope), (rows, heads, rope), (rows, width), (rows, rope)
        inputs = [torch.randn(*shape, generator=rng).to(device) for shape in shapes]
        outs = []
        for backend in (plain, ours):
            backend.begin(batch)
            outs.append(backend.mla(0, *inputs, up_k, up_v, batch, 0.15))
        torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("q_lora", [40, None])
def test_an_mla_layer_through_both(q_lora: int | None, device: torch.device, rng: torch.Generator) -> None:
    """One takes the layer's products as they come, the other normed latents and rotated keys."""
    made = tables(device, rng)
    attentions = backends(KVSpec(kind="mla", layers=1, latent_dim=48, rope_dim=16), made)
    shape = MLAShape(hidden=64, heads=3, q_lora=q_lora, kv_lora=48, nope=32, rope=16, value=24, latent_scale=1.5)
    seed = int(torch.randint(1 << 30, (1,), generator=rng))
    layers = []
    for ops in (PlainOps(), TritonOps()):
        context = BuildContext(device=device, dtype=torch.float32, ops=ops)
        config = {"rope_theta": 10000.0, "max_position_embeddings": 64}
        layer = MLA(context, "", shape, Rotary(context, config, 16, 64, interleaved=q_lora is None), 0)
        generator = torch.Generator().manual_seed(seed)
        for slot in layer.weight_slots():
            slot.load(torch.randn(slot.shape, generator=generator) * 0.2 + (1.0 if slot.init == "ones" else 0.0))
        layer.finalize()
        layers.append(layer)
    for batch in passes(made)[:2]:
        x = torch.randn(batch.tokens.shape[0], 64, generator=rng).to(device)
        outs = []
        for layer, attention in zip(layers, attentions, strict=True):
            attention.begin(batch)
            outs.append(layer(x, layer.rotary.rows(batch.positions), batch, attention).tensor())
        torch.testing.assert_close(outs[1], outs[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_keys_and_values_alone(kind: str, device: torch.device, rng: torch.Generator) -> None:
    """What a draft layer writes where nobody asks for its rows is what it writes beside attending."""
    made = tables(device, rng)
    kv = {
        "mla": KVSpec(kind="mla", layers=1, latent_dim=48, rope_dim=16),
        "gqa": KVSpec(kind="gqa", layers=1, heads=2, head_dim=32, v_head_dim=32),
    }[kind]
    plain, ours = backends(kv, made)
    seed, layers = int(torch.randint(1 << 30, (1,), generator=rng)), []
    for ops in (PlainOps(), TritonOps()):
        context = BuildContext(device=device, dtype=torch.float32, ops=ops)
        rotary = Rotary(context, {"rope_theta": 10000.0, "max_position_embeddings": 64}, 16 if kind == "mla" else 32, 64)
        if kind == "mla":
            shape = MLAShape(hidden=64, heads=3, q_lora=40, kv_lora=48, nope=32, rope=16, value=24, latent_scale=1.5)
            layer: MLA | Attention = MLA(context, "", shape, rotary, 0)
        else:
            layer = Attention(context, "", AttentionShape(64, 4, 2, 32, norm_eps=1e-6), 0, rotary)
        generator = torch.Generator().manual_seed(seed)
        for slot in layer.weight_slots():
            slot.load(torch.randn(slot.shape, generator=generator) * 0.2 + (1.0 if slot.init == "ones" else 0.0))
        layer.finalize()
        layers.append((layer, rotary))
    for batch in passes(made):
        x = torch.randn(batch.tokens.shape[0], 64, generator=rng).to(device)
        plain.begin(batch)
        ours.begin(batch)
        (attending, rotary), (appending, _) = layers
        attending(x, rotary.rows(batch.positions), batch, plain)
        appending.append(x, rotary.rows(batch.positions), batch, ours)
        for expected, found in zip(plain._rows[0], ours._rows[0], strict=True):
            torch.testing.assert_close(found[PAGE:], expected[PAGE:], rtol=1e-4, atol=1e-5)


def test_mla_without_its_first_key_is_refused(device: torch.device, rng: torch.Generator) -> None:
    made = tables(device, rng)
    _, ours = backends(KVSpec(kind="mla", layers=1, latent_dim=48, rope_dim=16), made)
    for batch in passes(made):
        batch.first_key = 1
        with pytest.raises(PluginError, match=r"from its first on\. Give the layers grouped heads"):
            ours.begin(batch)


def small_llama(ops: Ops, device: torch.device) -> Model:
    found = {}
    llama.fluent_models(found.setdefault)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 50, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64, "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu",
    }  # fmt: skip
    context = BuildContext(device=device, dtype=torch.float32, ops=ops)
    model = found["LlamaForCausalLM"].build(config, context)
    generator = torch.Generator().manual_seed(3)
    for slot in model.weight_slots():
        slot.load(torch.randn(slot.shape, generator=generator) * 0.1 + (1.0 if slot.init == "ones" else 0.0))
    model.finalize()
    return model


def test_a_model_through_both(device: torch.device, rng: torch.Generator) -> None:
    made = tables(device, rng)
    models = [small_llama(ops, device) for ops in (PlainOps(), TritonOps())]
    attentions = backends(models[0].spec.kv, made)
    for batch in passes(made):
        live = batch.kv_rows >= PAGE
        plain, ours = (m.logits(m.forward(batch, a))[live] for m, a in zip(models, attentions, strict=True))
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)
