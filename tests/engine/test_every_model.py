"""Every model kind through the whole engine: batches, chunks, prefix hits and preemptions change no token."""

from __future__ import annotations

import random
from typing import Any

import pytest

from .harness import TINY_LLAMA, Harness, write_tiny_llama

MLA = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "vocab_size": 160,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "eos_token_id": 2,
}
LONGCAT = {
    **MLA,
    "architectures": ["LongcatFlashForCausalLM"],
    "model_type": "longcat_flash",
    "num_layers": 2,
    "ffn_hidden_size": 96,
    "expert_ffn_hidden_size": 32,
    "moe_topk": 3,
    "n_routed_experts": 6,
    "zero_expert_num": 3,
    "routed_scaling_factor": 2.0,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {**TINY_LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "qwen3_moe": {
        **TINY_LLAMA,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "deepseek_v3": {
        **MLA,
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.0,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
    },
    "longcat": LONGCAT,
    "longcat_ngram": {
        **LONGCAT,
        "architectures": ["LongcatFlashNgramForCausalLM"],
        "ngram_vocab_size_ratio": 3,
        "emb_neighbor_num": 3,
        "emb_split_num": 2,
    },
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Harness:
    folder = write_tiny_llama(tmp_path_factory.mktemp(request.param), base=MODELS[request.param])
    return Harness(folder, **{"engine.deterministic": True, "kv.page_size": 8})


async def test_tokens_do_not_depend_on_what_else_runs(model: Harness) -> None:
    rng = random.Random(7)
    shared = rng.choices(range(3, 160), k=30)
    work = [
        ([*shared[: rng.randint(1, 30)], *rng.choices(range(3, 160), k=rng.randint(1, 20))], {"seed": i, "temperature": i % 2})
        for i in range(8)
    ]
    params: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True}
    async with model.engine(**{"kv.prefix_cache": False, "engine.overlap_depth": 0}) as running:
        expected = [await running.tokens(tokens, **params, **own) for tokens, own in work]
    page_bytes = model.page_bytes(8)
    crowded = {"engine.overlap_depth": 1, "scheduler.prefill_tokens": 17, "kv.memory": str(22 * page_bytes)}
    async with model.engine(**crowded, **{"model.max_model_len": 128}) as running:
        ids = [running.submit(tokens, **params, **own) for tokens, own in work]
        assert [await running.rest(i) for i in ids] == expected
        assert running.engine.stats().preemptions > 0
        again = running.submit(work[0][0], **params, **work[0][1])
        outputs = await running.outputs(again)
        assert [t for output in outputs for t in output.tokens] == expected[0]
        assert running.engine.stats().cached_tokens > 0
