"""What the backend `flashinfer` refuses, and why; what it would have compiled; and that nothing waits where that cannot be."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch

from fluentllm.core.batch import Batch
from fluentllm.core.kv.pool import KVPool
from fluentllm.core.protocols import AttentionContext, AttentionSpec, PartialAttention
from fluentllm.core.settings import Settings, SpeculativeSettings
from fluentllm.core.types import KVSpec, ModelSpec
from fluentllm.plugins import attn_flashinfer
from fluentllm.plugins.attn_flashinfer import _not_for, _not_installed, plugin, toolkit
from fluentllm.plugins.attn_flashinfer.backend import wanted_modules
from fluentllm.plugins.attn_flashinfer.compiling import Modules
from fluentllm.plugins.attn_flashinfer.modules import Decode, Prefill, from_json, to_json
from fluentllm.plugins.attn_flashinfer.prefill import _ragged, expand

GQA = KVSpec(kind="gqa", layers=2, heads=2, head_dim=128, v_head_dim=128)
MLA = KVSpec(kind="mla", layers=2, latent_dim=512, rope_dim=64, nope_dim=128, value_dim=128)
INSTALLED = importlib.util.find_spec("flashinfer") is not None


def spec(kv: KVSpec = GQA, heads: int = 4, **changes: object) -> AttentionSpec:
    model = ModelSpec(architecture="x", vocab_size=9, hidden_size=64, layers=2, heads=heads, max_position=64, kv=kv)
    fields = {"device": "cuda", "dtype": "bfloat16", "kv_dtype": "bfloat16", "page_size": 64, "deterministic": False}
    return AttentionSpec(model=model, **(fields | changes))  # type: ignore[arg-type]


def test_what_its_kernels_are_for() -> None:
    assert _not_for(spec()) is None
    assert _not_for(spec(page_size=16, dtype="float16", kv_dtype="float16")) is None
    assert _not_for(spec(MLA, phases=("prefill",), page_size=64)) is None


@pytest.mark.parametrize(
    ("kv", "changes", "reason"),
    [
        (GQA, {"device": "cpu"}, "not on cpu"),
        (GQA, {"deterministic": True}, "deterministic"),
        (GQA, {"kv_dtype": "float8_e4m3fn"}, "over float8_e4m3fn"),
        (GQA, {"dtype": "float32", "kv_dtype": "float32"}, "not in float32"),
        (GQA, {"page_size": 8}, "not 8"),
        (GQA, {"heads": 80}, "not 40"),
        (msgspec.structs.replace(GQA, head_dim=96, v_head_dim=96), {}, "not 96 and 96"),
        (MLA, {}, "attention.prefill_backend"),
        (MLA, {"phases": ("decode",)}, "plans each step on the host"),
        (msgspec.structs.replace(MLA, nope_dim=32), {"phases": ("prefill",)}, "not 96 and 128"),
        (msgspec.structs.replace(MLA, nope_dim=0, value_dim=0), {"phases": ("prefill",)}, "not 64 and 0"),
    ],
)
def test_reasons(kv: KVSpec, changes: dict[str, object], reason: str) -> None:
    assert reason in (_not_for(spec(kv, **changes)) or "")  # type: ignore[arg-type]


def test_prefill_alone_takes_any_group() -> None:
    assert _not_for(spec(heads=80, phases=("prefill",))) is None


@pytest.mark.skipif(INSTALLED, reason="FlashInfer is installed")
def test_where_it_is_missing_the_reason_says_how_to_get_it() -> None:
    assert "pip install 'fluentllm[cuda]'" in (_not_installed() or "")


@pytest.mark.skipif(not INSTALLED, reason="FlashInfer is not installed")
def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _not_installed() is None
    monkeypatch.setattr(attn_flashinfer, "VERSION", "0.0.1")
    assert "it is written for FlashInfer 0.0.1" in (_not_installed() or "")


def context(asked: AttentionSpec, settings: Settings | None = None) -> AttentionContext:
    pool = KVPool(asked.model.kv, 1, asked.page_size, torch.bfloat16, torch.device("meta"))
    return AttentionContext(asked, pool, settings or Settings())


def test_modules_for_decode_prefill_and_every_number_of_drafts() -> None:
    assert wanted_modules(context(spec())) == (Decode("bfloat16", 64, 128, 2), Prefill("bfloat16", 128, 128))
    assert wanted_modules(context(spec(MLA))) == (Prefill("bfloat16", 192, 128),)
    drafting = Settings(speculative=SpeculativeSettings(method="pld", max_k=3))
    rows = [module.rows for module in wanted_modules(context(spec(), drafting)) if isinstance(module, Decode)]
    assert rows == [1, 4, 3, 2]
    for module in wanted_modules(context(spec(), drafting)):
        assert from_json(to_json(module)) == module


def test_on_tensors_without_memory_every_pass_is_left_to_others() -> None:
    backend = plugin._create(context(spec()))
    assert isinstance(backend, PartialAttention)
    backend.load()
    (modules,) = (found for wanted, found in plugin._modules.items() if wanted == wanted_modules(context(spec())))
    modules.wait()  # nothing imports behind the back of the tests that follow
    positions = torch.zeros(1, dtype=torch.int64, device="meta")
    batch = Batch(
        tokens=positions, positions=positions, sequences=positions, slots=positions, query_start=positions,
        kv_lengths=positions,
        page_table=positions, kv_rows=positions, history=positions, page_size=64, query_length=1, query_lengths=None,
    )  # fmt: skip
    assert not backend.serves(batch)
    assert not backend.serves(replace(batch, query_length=None, query_lengths=(1,), kv_lengths_host=(1,)))


@pytest.mark.skipif(INSTALLED, reason="FlashInfer is installed")
def test_without_flashinfer_nothing_is_ready_and_nobody_waits() -> None:
    modules = Modules([Prefill("bfloat16", 128, 128)], "9.0a")
    modules.wait()
    assert not modules.ready(modules.wanted[0])
    assert "flashinfer" in (modules.trouble or "")


def test_a_compiler_is_looked_for_where_flashinfer_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert toolkit.find_compiler() is None
    for name in ("bin/nvcc", "tools/ninja", "lib64/stubs/libcuda.so"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "tools"))
    assert toolkit.find_compiler() == tmp_path / "bin" / "nvcc"
    assert toolkit.environment()["PATH"].split(os.pathsep)[0] == str(tmp_path / "tools")
    assert "LIBRARY_PATH" not in toolkit.environment()


def test_ragged_indices() -> None:
    assert _ragged([2, 0, 3], 10).tolist() == [0, 1, 20, 21, 22]
    assert _ragged([], 10).tolist() == []


def test_expanded_keys_and_values() -> None:
    heads, nope, width, rope, value = 3, 5, 7, 2, 4
    known, up_k, up_v = torch.randn(6, width + rope), torch.randn(heads, nope, width), torch.randn(heads, value, width)
    keys, values = expand(known, up_k, up_v)
    latent, rotary = known.split((width, rope), -1)
    for head in range(heads):
        torch.testing.assert_close(keys[:, head], torch.cat((latent @ up_k[head].T, rotary), -1))
        torch.testing.assert_close(values[:, head], latent @ up_v[head].T)
