"""The floor of a decode step: weights of loaded models, against sums by hand, and what `fluent bench latency` says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.harness import TINY_LLAMA, Harness, write_tiny_llama

from fluentllm.bench import costs, floor, offline
from fluentllm.bench.floor import routing_of, weight_bytes
from fluentllm.core import config
from fluentllm.core.errors import FluentError
from fluentllm.core.kv.formats import token_bytes
from fluentllm.core.protocols import BuildContext
from fluentllm.kernels.copies import COPIES
from fluentllm.kernels.moe import Routing
from fluentllm.kernels.native.pack import TiledWeight
from fluentllm.kernels.quantise import quantise_int8
from fluentllm.kernels.triton.ops import TritonOps
from fluentllm.kernels.weights import DenseWeight, Int8Weight, TwoWeights
from fluentllm.layers.module import Module
from fluentllm.local import LocalEngine
from fluentllm.plugins.model_deepseek import DeepseekFamily
from fluentllm.plugins.model_longcat import plugin as longcat

SHAPES = Path(__file__).parents[1] / "benchmarks" / "gpu" / "models"
NANO: dict[str, Any] = {"model.load_format": "auto", "model.dtype": "float32"}
SMALL_DEEPSEEK = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 128, "n_routed_experts": 16,
    "num_hidden_layers": 3, "q_lora_rank": 128, "num_nextn_predict_layers": 0, "num_attention_heads": 4,
}  # fmt: skip


def load(folder: Path | str, **settings: Any) -> Any:
    return Harness(Path(folder), **settings).loaded.model


def on_a_gpu(name: str) -> Any:
    """The model of benchmarks/gpu/models, without memory, as a GPU has it in BF16, and without its draft layer."""
    shape = json.loads((SHAPES / name / "config.json").read_text())
    families: dict[str, Any] = {"DeepseekV3ForCausalLM": DeepseekFamily("DeepseekV3ForCausalLM")}
    longcat.fluent_models(families.__setitem__)
    context = BuildContext(torch.device("meta"), torch.bfloat16, TritonOps(), "bfloat16", max_positions=16)
    model = families[shape["architectures"][0]].build(shape, context)
    for slot in model.weight_slots():
        if not slot.optional:
            slot.load(torch.empty(slot.shape, dtype=torch.bfloat16, device="meta"))
    model.finalize()
    return model


@pytest.mark.parametrize(
    ("name", "floors"),
    [
        ("deepseek-v3-lite", {1: 1.7, 8: 6.0, 32: 10.3, 128: 11.8}),
        ("longcat-flash-lite", {1: 2.7, 8: 6.6, 32: 12.1, 128: 14.6}),
    ],
)
def test_the_floors_of_the_targets(name: str, floors: dict[int, float]) -> None:
    """In ms at 3.0 TB/s, as benchmarks/gpu/README.md has them, contexts of 1,024 tokens and some; computed by hand there."""
    model = on_a_gpu(name)
    kv = model.spec.kv.layers * token_bytes(model.spec.kv, "bfloat16")
    found = {batch: (weight_bytes(model, batch) + batch * 1088 * kv) / 3.0e9 for batch in floors}
    assert found == pytest.approx(floors, rel=0.02)


@pytest.mark.parametrize("batch", [1, 32])
def test_deepseek_by_hand(batch: int) -> None:
    """27 layers, the first dense. Of 64 experts six a token, and two for everybody; the router is in float32."""
    model = on_a_gpu("deepseek-v3-lite")
    attention = (1536 + 576) * 2048 + 16 * 192 * 1536 + 2 * 16 * 128 * 512 + 2048 * 2048 + 1536 + 512 + 2 * 2048
    expert, distinct = 3 * 1408 * 2048, 64 * (1 - (1 - 6 / 64) ** batch) + 2
    total = 2 * (27 * attention + 3 * 10944 * 2048 + 26 * distinct * expert + 102400 * 2048 + 2048 + batch * 2048)
    assert weight_bytes(model, batch) == pytest.approx(total + 26 * 4 * (64 * 2048 + 64), rel=1e-9)


def nano_layer(width: float, routed: float) -> float:
    """longcat-nano: bytes of a layer with `width` bytes a value of a product's matrix and `routed` experts."""
    attention = (32 + 576) * 128 + 8 * 96 * 32 + 128 * 256
    matrices = 2 * attention + 2 * 3 * 128 * 256 + routed * 3 * 64 * 128
    # Not packed: keys' and values' matrices, norms; the router, whose bias is one of 12.
    return width * matrices + 4 * (2 * (2 * 8 * 32 * 512 + 32 + 512 + 2 * 128) + 12 * 128 + 12)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(("precision", "width"), [("float32", 4), ("bfloat16", 2)])
def test_longcat_nano_by_hand(batch: int, precision: str, width: int) -> None:
    """Real weights with an MTP layer, which a step without drafts leaves alone. Eight experts with weights, four without, three
    choices. The head is tied to the embedding: a matrix once, and the tokens' rows."""
    model = load("longcat-nano", **NANO, **{"model.weight_precision": precision})
    assert model.mtp is not None
    routed = 8 * (1 - (9 / 12) ** batch)
    total = 2 * nano_layer(width, routed) + width * 8192 * 128 + 4 * 128 + batch * 4 * 128
    assert weight_bytes(model, batch) == pytest.approx(total, rel=1e-9)


def test_experts_that_are_packed_one_by_one() -> None:
    """In int8, on a CPU: no tensor holds them all. A byte a value, and scales of a row, two or four bytes, or of 32 values."""
    model = load("longcat-nano", **NANO, **{"model.weight_precision": "int8"})
    bare = 2 * nano_layer(1, 2) + 8192 * 128
    assert bare < weight_bytes(model, 1) < 1.1 * bare
    expert = 2 * 3 * 64 * 128
    distinct = 8 * (1 - (9 / 12) ** 16)
    more = weight_bytes(model, 16) - weight_bytes(model, 1) - 15 * 4 * 128
    assert 1.0 <= more / (expert * (distinct - 2)) < 1.13


def test_ngram_tables_are_gathered() -> None:
    """`longcat-nano-ngram`: eight tables of rows of 16, one projection of 128 × 128."""
    model = load("longcat-nano-ngram", **NANO, **{"model.weight_precision": "float32"})
    assert model.ngram.tables.nbytes > 1_000_000
    attention, mlp = (32 + 576) * 128 + 8 * 96 * 32 + 128 * 256, 3 * 128 * 128
    packed = 2 * (2 * attention + 2 * mlp + 2 * 3 * 64 * 128) + 8192 * 128 + 128 * 128
    others = 2 * (2 * (2 * 8 * 32 * 512 + 32 + 512 + 2 * 128) + 12 * 128 + 12) + 128
    assert weight_bytes(model, 1) == pytest.approx(4 * (packed + others + 128 + 8 * 16), rel=1e-9)


@pytest.mark.parametrize("batch", [1, 8])
def test_block_fp8(tmp_path: Path, batch: int) -> None:
    """A byte a value and a float32 for each 128 × 128; embedding, head, norms, router and absorbed matrices in float32."""
    base = json.loads((SHAPES / "deepseek-v3-lite" / "config.json").read_text())
    folder = write_tiny_llama(tmp_path / "small", base, **SMALL_DEEPSEEK)
    model = load(folder, **{"model.weight_precision": "fp8", "model.dtype": "float32"})

    def blocks(rows: int, columns: int) -> int:
        return rows * columns + 4 * -(-rows // 128) * -(-columns // 128)

    attention = blocks(128 + 576, 256) + blocks(4 * 192, 128) + blocks(256, 512)
    others = 4 * (2 * 4 * 128 * 512 + 128 + 512 + 2 * 256)
    dense = blocks(768, 256) + blocks(256, 384)
    # Two shared experts, side by side in one block.
    shared = blocks(512, 256) + blocks(256, 256)
    routed = 16 * (1 - (10 / 16) ** batch) * (blocks(256, 256) + blocks(256, 128))
    experts = shared + routed + 4 * (16 * 256 + 16)
    total = 3 * (attention + others) + dense + 2 * experts + 4 * (512 * 256 + 256 + batch * 256)
    assert weight_bytes(model, batch) == pytest.approx(total, rel=1e-9)


def test_smollm2_in_four_bits() -> None:
    """Its blocks as they are: 32 values in 16 bytes with a scale and a zero of 16 bits; the head, tied, in eight bits. 30
    layers, nine heads of 64, three of keys."""
    try:
        model = load("smollm2", **NANO)
    except FluentError as error:
        pytest.skip(f"the default model is not here: {error}")
    if not isinstance(model.head.weight, TiledWeight):
        pytest.skip("the head is packed otherwise without a C compiler")
    layer = (576 + 2 * 192 + 576) * 576 + 3 * 1536 * 576
    total = 30 * layer * 20 / 32 + 49152 * 576 * 34 / 32 + 4 * 576 * (2 * 30 + 1 + 4)
    assert weight_bytes(model, 4) == total


def test_of_a_matrix_that_is_kept_twice_one_is_read() -> None:
    class Model(Module):
        def __init__(self, weight: TwoWeights) -> None:
            self.weight = weight

    values = torch.randn(64, 32)
    both = TwoWeights(Int8Weight(*quantise_int8(values)), lambda: DenseWeight(values), values.nbytes, border=8)
    COPIES.wait()
    assert weight_bytes(Model(both), 8) == both.few.nbytes == 64 * 32 + 2 * 64
    assert weight_bytes(Model(both), 9) == 4 * 64 * 32


def test_the_routing_of_a_model() -> None:
    """What `fluent bench step` counts experts by."""

    class Programs:
        model = load("longcat-nano", **NANO)

    found = routing_of(Programs())  # type: ignore[arg-type]
    assert found == Routing(8, 3, zero_experts=4, scale=2.0)
    assert routing_of(object()) is None  # type: ignore[arg-type]


def test_a_copy_reads_and_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "_best", lambda call, device: call().nbytes / 4e9)
    assert costs.copy_rate(torch.device("cpu")) == pytest.approx(8e9)
    # Beside an engine that has taken nearly all memory.
    monkeypatch.setattr(costs, "free_memory", lambda device: 4000)
    monkeypatch.setattr(costs, "_best", lambda call, device: call() is not None)
    assert costs.copy_rate(torch.device("cpu")) == 2 * 1000


class TestLatency:
    @pytest.fixture
    def model(self, tmp_path: Path) -> str:
        return str(write_tiny_llama(tmp_path / "tiny"))

    @staticmethod
    def measure(model: str, **settings: Any) -> tuple[list[dict[str, Any]], str]:
        """Batches of 1 and 3, 24 prompt tokens, 16 steps → rows, and what was printed."""
        given = {"model.name": model, "model.load_format": "dummy", "engine.device": "cpu", "engine.threads": 1, **settings}
        said: list[str] = []
        with LocalEngine(config.load(None, given, {}).settings) as local:
            rows = offline.latency(local, [1, 3], 24, 16, rounds=1, tell=said.append)
        return rows, "\n".join(said)

    def test_the_floor_is_bytes_by_the_measured_rate(self, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
        devices: list[torch.device] = []
        monkeypatch.setattr(floor, "copy_rate", lambda device: devices.append(device) or 1e9)
        wanted = {"model.dtype": "float32", "model.weight_precision": "float32", "kv.dtype": "float32"}
        rows, said = self.measure(model, **wanted)
        assert devices == [torch.device("cpu")]
        hidden, inner, vocabulary = TINY_LLAMA["hidden_size"], TINY_LLAMA["intermediate_size"], TINY_LLAMA["vocab_size"]
        layer = (64 + 2 * 32 + 64) * hidden + 3 * inner * hidden + 2 * hidden
        weights = 2 * layer + hidden + vocabulary * hidden
        for row in rows:
            # Steps read 25 to 40 tokens' keys and values: two layers, two heads of 16.
            cache = row["batch"] * 32.5 * 2 * 2 * (2 * 16)
            least = 4 * (weights + row["batch"] * hidden + cache) / 1e9
            assert row["floor_ms"] == pytest.approx(least * 1e3)
            assert row["share"] == pytest.approx(least * 1e3 / row["tpot_ms"])
        assert said.splitlines()[0] == "floors are at 1.0 GB/s, which a copy reads and writes here"
        assert f"floor {rows[1]['floor_ms']:.2f} ms ({rows[1]['share']:.0%})" in said.splitlines()[2]

    def test_it_is_measured_between_the_engines_steps(self, model: str) -> None:
        """In this run, by this engine's threads: a copy of the size of a step's bytes takes some time."""
        rows, _ = self.measure(model)
        assert all(0 < row["floor_ms"] < row["tpot_ms"] for row in rows)
        assert 1 < rows[1]["floor_ms"] / rows[0]["floor_ms"] < 3

    def test_there_is_none_with_drafts(self, model: str) -> None:
        rows, said = self.measure(model, **{"speculative.method": "pld", "speculative.k": 2})
        assert [(row["floor_ms"], row["share"]) for row in rows] == [(None, None)] * 2
        assert "floor" not in said
