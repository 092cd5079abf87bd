"""`fluent bench step`: the costs it counts, against plain arithmetic, and a look at a real step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine.harness import write_tiny_llama

from fluentllm.bench import step
from fluentllm.bench.costs import Load, of_launch, of_product
from fluentllm.bench.step import advances, lines, measure
from fluentllm.core import config
from fluentllm.core.kv.formats import token_bytes
from fluentllm.core.types import KVSpec, ModelSpec
from fluentllm.kernels.moe import Routing
from fluentllm.local import LocalEngine

GQA = KVSpec(kind="gqa", layers=2, heads=8, head_dim=128, v_head_dim=128)
MLA = KVSpec(kind="mla", layers=2, latent_dim=512, rope_dim=64)


def load(kv: KVSpec = GQA, batch: int = 32, length: float = 1000) -> Load:
    spec = ModelSpec(architecture="A", vocab_size=9, hidden_size=64, layers=2, heads=32, max_position=64, kv=kv)
    return Load(spec, batch, 1, length, token_bytes(kv, "bfloat16"))


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_products() -> None:
    mm = of_product("aten::mm", [[32, 4096], [4096, 6144]], 2)
    assert mm is not None
    assert mm.flops == 2 * 32 * 4096 * 6144
    assert mm.bytes == 2 * (32 * 4096 + 4096 * 6144 + 32 * 6144)
    addmm = of_product("aten::addmm", [[32, 10], [32, 20], [20, 10], [], []], 4)
    assert addmm is not None
    assert addmm.flops == 2 * 32 * 20 * 10
    bmm = of_product("aten::bmm", [[16, 32, 128], [16, 128, 512]], 2)
    assert bmm is not None
    assert bmm.flops == 2 * 16 * 32 * 128 * 512
    assert of_product("aten::mul", [[3, 4], [3, 4]], 2) is None


def test_attention_reads_what_the_lengths_say() -> None:
    cache = meta(1000, 16, 8, 128)
    cost = of_launch("_decode_kernel", (meta(32, 32, 128), cache, cache), load())
    assert cost.bytes == 32 * 1000 * 8 * 256 * 2
    assert cost.flops == 2 * 32 * 1000 * 32 * 256
    latent = of_launch("decode_bf16", (meta(32, 1, 16, 512),), load(MLA))
    assert latent.bytes == 32 * 1000 * 576 * 2
    assert latent.flops == 2 * 32 * 1000 * 32 * (576 + 512)


def test_tables_that_are_indexed_cost_nothing_and_operands_their_size() -> None:
    table, rows = meta(128256, 4096), meta(32, 4096)
    assert of_launch("_embedding_kernel", (table, meta(32, dtype=torch.int64), rows), load()).bytes == 32 * 8 + 32 * 4096 * 2
    norm = of_launch("_rms_norm_kernel", (rows, meta(4096), meta(32, 4096), 1e-5), load())
    assert (norm.bytes, norm.flops) == (2 * (2 * 32 * 4096 + 4096), 0)
    linear = of_launch("_linear_kernel", (rows, meta(6144, 4096), meta(32, 6144)), load())
    assert linear.flops == 2 * 32 * 4096 * 6144


@pytest.mark.parametrize("drafts", [{}, {"speculative.method": "pld", "speculative.k": 3, "speculative.min_acceptance": 0.0}])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_step_of_a_real_engine(tmp_path: Path, device: str, drafts: dict[str, Any]) -> None:
    folder = write_tiny_llama(tmp_path / "tiny")
    overrides = {"model.name": str(folder), "model.load_format": "dummy", "engine.device": device, "engine.threads": 1} | drafts
    with LocalEngine(config.load(None, overrides, {}).settings) as local:
        figures = measure(local, batch=3, context=20, steps=5)
        assert local.engine.executor.programs.__class__.__name__ == "StepPrograms"  # nothing of the look stays
    assert figures["steps"] >= 5
    assert figures["kernels"]
    assert figures["sum_us"] == pytest.approx(sum(row["us"] for row in figures["kernels"]))
    assert figures["gap_us"] == pytest.approx(figures["step_us"] - figures["sum_us"])
    assert [row["us"] for row in figures["kernels"]] == sorted((row["us"] for row in figures["kernels"]), reverse=True)
    if device == "cuda":
        attention = next(row for row in figures["kernels"] if row["name"] == "_decode_kernel")
        assert attention["count"] == local.engine.info.spec.layers
        assert attention["bytes"]
    printed = "\n".join(lines(figures))
    assert figures["kernels"][0]["name"][:50] in printed
    assert "sum " in printed


def test_a_step_is_looked_at_with_its_models_routing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What experts are counted by on a GPU."""
    loads: list[Load] = []

    def noted(*arguments: Any) -> Load:
        loads.append(Load(*arguments))
        return loads[-1]

    monkeypatch.setattr(step, "Load", noted)
    overrides = {"model.name": "longcat-nano", "engine.device": "cpu", "engine.threads": 1, "kv.memory": "64MiB"}
    with LocalEngine(config.load(None, overrides, {}).settings) as local:
        measure(local, batch=2, context=10, steps=2)
    [found] = loads
    assert (found.batch, found.rows) == (2, 1)
    assert found.routing == Routing(8, 3, zero_experts=4, scale=2.0)


def test_kernels_that_overlap_are_charged_with_what_they_add() -> None:
    """The second is set up while the first runs, the third begins after a gap."""
    spans = [(1.0, 3.0, "first"), (1.5, 4.0, "second"), (5.0, 6.0, "third"), (1.2, 3.5, "inside")]
    found = list(advances(spans))
    assert [name for name, _ in found] == ["first", "inside", "second", "third"]
    assert [seconds for _, seconds in found] == pytest.approx([2.0, 0.5, 0.5, 2.0])
    assert sum(seconds for _, seconds in found) == pytest.approx(6.0 - 1.0)
    assert list(advances([])) == []
