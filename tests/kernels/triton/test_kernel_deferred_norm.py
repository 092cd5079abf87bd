"""Whole layers with norms shared out between products (`DeferringOps`), beside norms that are launches of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_kernel_backend import PAGE, tables

from fluentllm.core.kv.pool import KVPool
from fluentllm.core.protocols import AttentionContext, AttentionSpec, BuildContext, Model
from fluentllm.core.settings import Settings
from fluentllm.kernels.ops import Ops
from fluentllm.kernels.plain import PlainOps
from fluentllm.kernels.triton import ops as triton_ops
from fluentllm.kernels.triton.deferred_norm import DeferringOps
from fluentllm.kernels.triton.launch import recording
from fluentllm.kernels.triton.ops import TritonOps
from fluentllm.plugins.attn_torch.backend import TorchAttention
from fluentllm.plugins.model_deepseek import plugin as deepseek
from fluentllm.plugins.model_llama import plugin as llama
from fluentllm.plugins.model_longcat import plugin as longcat
from fluentllm.step.decode import decode_batch

COMMON = {
    "hidden_size": 128, "vocab_size": 50, "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "hidden_act": "silu", "num_attention_heads": 4, "num_key_value_heads": 4, "eos_token_id": 1,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 64, "kv_lora_rank": 48, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "n_routed_experts": 8,
}  # fmt: skip
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "LlamaForCausalLM": (llama, {"model_type": "llama", "num_hidden_layers": 2, "intermediate_size": 96}),
    "DeepseekV3ForCausalLM": (
        deepseek,
        {
            **LATENT, "model_type": "deepseek_v3", "num_hidden_layers": 3, "intermediate_size": 96, "moe_intermediate_size": 32,
            "n_shared_experts": 1, "num_experts_per_tok": 3, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
            "routed_scaling_factor": 2.0, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0,
        },
    ),
    "LongcatFlashForCausalLM": (
        longcat,
        {
            **LATENT, "model_type": "longcat_flash", "num_layers": 2, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 32,
            "zero_expert_num": 4, "moe_topk": 3, "routed_scaling_factor": 2.0, "zero_expert_type": "identity",
        },
    ),
}  # fmt: skip


def model(name: str, ops: Ops, device: torch.device, dtype: torch.dtype, seed: int) -> Model:
    """The same weights in any dtype, all of them BF16 values."""
    plugin, config = CONFIGS[name]
    found: dict[str, Any] = {}
    plugin.fluent_models(found.setdefault)
    context = BuildContext(device=device, dtype=dtype, ops=ops, weight_precision=str(dtype).removeprefix("torch."))
    made: Model = found[name].build({**COMMON, **config, "architectures": [name]}, context)
    generator = torch.Generator().manual_seed(seed)
    for slot in made.weight_slots():
        if slot.unused:
            continue
        drawn = torch.randn(slot.shape, generator=generator) * 0.08 + (1.0 if slot.init == "ones" else 0.0)
        if slot.name.endswith("e_score_correction_bias"):
            # The choice of experts hangs on no last bit.
            drawn = 10.0 * torch.randperm(slot.shape[0], generator=generator)
        slot.load(drawn.to(torch.bfloat16))
    made.finalize()
    return made


def attention(made: Model, pages: int, device: torch.device, dtype: torch.dtype, seed: int) -> TorchAttention:
    spec, named = made.spec, str(dtype).removeprefix("torch.")
    asked = AttentionSpec(model=spec, device=device.type, dtype=named, kv_dtype=named, page_size=PAGE, deterministic=False)
    pool = KVPool(spec.kv, pages, PAGE, dtype, device)
    generator = torch.Generator().manual_seed(seed)
    for tensor in (pool.k, pool.v, pool.latent):
        tensor.copy_(torch.randn(tensor.shape, generator=generator).to(torch.bfloat16))
    return TorchAttention(AttentionContext(asked, pool, Settings()))


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_with_deferred_norms(
    name: str, device: torch.device, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Under the interpreter the kernels serve the CPU.
    monkeypatch.setattr(triton_ops, "in_kernels", lambda _: True)
    made = tables(device, rng)
    seed = int(torch.randint(0, 1 << 30, (1,), generator=rng))
    slots, hidden, norms = torch.tensor([2, 0, 1], device=device), {}, {}
    kinds: dict[str, tuple[type[Ops], torch.dtype]] = {
        "exact": (PlainOps, torch.float32), "apart": (TritonOps, torch.bfloat16), "deferred": (DeferringOps, torch.bfloat16),
    }  # fmt: skip
    for kind, (ops, dtype) in kinds.items():
        built = model(name, ops(), device, dtype, seed)
        backend = attention(built, 3 * made.max_pages, device, dtype, seed)
        with recording(run=True) as launches:
            hidden[kind] = [built.forward(decode_batch(slots, drafts, made), backend).float() for drafts in (0, 2)]
        norms[kind] = sum(launch.kernel.__name__ == "_rms_norm_kernel" for launch in launches) // 2
    for exact, apart, deferred in zip(*hidden.values(), strict=True):
        # BF16 rounds at other places, as often.
        assert (deferred - exact).norm() <= 2 * (apart - exact).norm() + 0.01 * exact.norm()
    # In front of every block but the first, and of the query latents.
    gone = {"LlamaForCausalLM": 2 * 2 - 1, "DeepseekV3ForCausalLM": 2 * 3 - 1 + 3, "LongcatFlashForCausalLM": 4 * 2 - 1 + 4}
    assert norms["apart"] - norms["deferred"] == gone[name]
