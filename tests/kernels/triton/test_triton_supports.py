"""What the backend `triton` refuses, and why: said before anything is built, on any machine."""

from __future__ import annotations

import msgspec
import pytest
import torch

from fluentllm.core.protocols import AttentionSpec
from fluentllm.core.types import KVSpec, ModelSpec
from fluentllm.kernels import choose_ops
from fluentllm.kernels.triton.ops import TritonOps
from fluentllm.plugins.attn_triton import _supports

GQA = KVSpec(kind="gqa", layers=2, heads=2, head_dim=128, v_head_dim=128)
MLA = KVSpec(kind="mla", layers=2, latent_dim=512, rope_dim=64)


def spec(kv: KVSpec = GQA, **changes: object) -> AttentionSpec:
    model = ModelSpec(architecture="x", vocab_size=9, hidden_size=64, layers=2, heads=4, max_position=64, kv=kv)
    fields = {"device": "cuda", "dtype": "bfloat16", "kv_dtype": "bfloat16", "page_size": 64, "deterministic": False}
    return AttentionSpec(model=model, **(fields | changes))  # type: ignore[arg-type]


def test_grouped_heads_on_a_gpu_are_supported() -> None:
    assert _supports(spec()) is None
    assert _supports(spec(kv_dtype="float8_e4m3fn", page_size=16)) is None


def test_deterministic_mode_is_supported_on_any_gpu() -> None:
    assert _supports(spec(deterministic=True)) is None
    assert _supports(spec(MLA, deterministic=True, dtype="float32", kv_dtype="float32", page_size=16)) is None


@pytest.mark.parametrize(
    ("kv", "changes", "reason"),
    [
        (GQA, {"device": "cpu"}, "not on cpu"),
        (MLA, {"deterministic": True, "kv_dtype": "float8_e4m3fn"}, "in deterministic mode"),
        (GQA, {"page_size": 8}, "not 8"),
        (GQA, {"kv_dtype": "int8"}, "not int8"),
        (msgspec.structs.replace(GQA, head_dim=512), {}, "not 512"),
        (MLA, {"kv_dtype": "float16"}, "over float16"),
        (MLA, {"page_size": 16}, "set kv.page_size: 64"),
        (msgspec.structs.replace(MLA, latent_dim=256), {}, "not 256 + 64"),
    ],
)
def test_reasons(kv: KVSpec, changes: dict[str, object], reason: str) -> None:
    assert reason in (_supports(spec(kv, **changes)) or "")


def test_a_gpu_gets_triton_ops() -> None:
    assert isinstance(choose_ops(torch.device("cuda"), deterministic=False), TritonOps)
    assert choose_ops(torch.device("cuda"), deterministic=True).deterministic
    assert not isinstance(choose_ops(torch.device("cpu"), deterministic=False), TritonOps)
