"""The floor of a decode step: weights of loaded models, against sums by hand, and what `fluent bench latency` says of it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine.harness import TINY_LLAMA, Harness, write_tiny_llama
from speculation import eagle, mtp

from fluentllm.bench import costs, floor, offline
from fluentllm.bench.floor import Floor, routing_of, weight_bytes
from fluentllm.bench.offline import Drafts
from fluentllm.core import config
from fluentllm.core.errors import FluentError
from fluentllm.core.kv.formats import token_bytes
from fluentllm.core.protocols import BuildContext, DraftReads
from fluentllm.core.types import RequestOutput
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
from fluentllm.plugins.spec_mtp.proposer import MTPChain
from fluentllm.plugins.spec_pld.proposer import PromptLookup

SHAPES = Path(__file__).parents[1] / "benchmarks" / "gpu" / "models"
NANO: dict[str, Any] = {"model.load_format": "auto", "model.dtype": "float32"}
SMALL_DEEPSEEK = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 128, "n_routed_experts": 16,
    "num_hidden_layers": 3, "q_lora_rank": 128, "num_nextn_predict_layers": 0, "num_attention_heads": 4,
}  # fmt: skip


def load(folder: Path | str, **settings: Any) -> Any:
    return Harness(Path(folder), **settings).loaded.model


def on_a_gpu(name: str, *, drafts: bool = False) -> Any:
    """The model of benchmarks/gpu/models, without memory, as a GPU has it in BF16; `drafts`: with its MTP layer, whose
    embedding and head are the target's."""
    shape = json.loads((SHAPES / name / "config.json").read_text())
    families: dict[str, Any] = {"DeepseekV3ForCausalLM": DeepseekFamily("DeepseekV3ForCausalLM")}
    longcat.fluent_models(families.__setitem__)
    context = BuildContext(torch.device("meta"), torch.bfloat16, TritonOps(), "bfloat16", max_positions=16)
    model = families[shape["architectures"][0]].build(shape, context)
    borrowable = model.mtp.borrowable()
    for slot in model.weight_slots():
        if not slot.optional or (drafts and not slot.unused and slot.name not in borrowable):
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


def floor_of(model: Any, reads: DraftReads, kv_dtype: str) -> Floor:
    """At 3.0 TB/s."""
    info: Any = SimpleNamespace(spec=model.spec, kv_dtype=kv_dtype)
    return Floor(model, info, 3.0e12, reads)


@pytest.mark.parametrize(
    ("name", "floors"),
    [
        ("deepseek-v3-lite", {1: 1.50, 8: 3.72, 32: 4.11, 128: 4.53}),
        ("longcat-flash-lite", {1: 1.85, 8: 4.31, 32: 4.89, 128: 5.30}),
    ],
)
def test_the_floors_of_the_targets_with_drafts(name: str, floors: dict[int, float]) -> None:
    """In ms a token with three drafts and an accepted length of 3.0, as above. DeepSeek's are the 1.5, 3.7, 4.1 and 4.5
    that benchmarks/gpu/README.md has from elsewhere. LongCat's layer is dense: 33 M weights of attention, 57 M of a network,
    19 M of eh_proj, beside the head's 403 M."""
    model = on_a_gpu(name, drafts=True)
    counted = floor_of(model, MTPChain(model.mtp, model.spec).reads, "bfloat16")
    drafts = Drafts(decodes=Counter({3: 100}), decoded=300)
    found = {batch: counted.seconds_a_token(batch, 1088, drafts) * 1e3 for batch in floors}
    assert found == pytest.approx(floors, rel=0.01)


@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("k", [1, 3])
def test_deepseek_with_drafts_by_hand(batch: int, k: int) -> None:
    """Beside the target's pass, k of a layer with experts of its own for one token a sequence, with eh_proj, three norms, and
    the target's head and embedding."""
    model = on_a_gpu("deepseek-v3-lite", drafts=True)
    attention = (1536 + 576) * 2048 + 16 * 192 * 1536 + 2 * 16 * 128 * 512 + 2048 * 2048 + 1536 + 512 + 2 * 2048
    router, expert = 4 * (64 * 2048 + 64), 2 * 3 * 1408 * 2048

    def layer(tokens: int) -> float:
        return 2 * attention + router + expert * (64 * (1 - (1 - 6 / 64) ** tokens) + 2)

    rows, head = batch * (k + 1), 2 * 102400 * 2048
    target = 2 * (attention + 3 * 10944 * 2048) + 26 * layer(rows) + head + 2 * 2048 + rows * 2 * 2048
    draft = layer(batch) + 2 * (2 * 2048 * 2048 + 3 * 2048) + head + batch * 2 * 2048
    kv = batch * 1000 * 576 * 2
    counted = floor_of(model, MTPChain(model.mtp, model.spec).reads, "bfloat16")
    wanted = target + 27 * kv + k * (draft + kv)
    assert counted.seconds(batch, 1000, k) * 3.0e12 == pytest.approx(wanted, rel=1e-9)
    # A step without drafts reads nothing of the layer that makes them.
    assert counted.seconds(batch, 1000, 0) * 3.0e12 == pytest.approx(weight_bytes(model, batch) + 27 * kv, rel=1e-9)


async def test_eagle3_by_hand(tmp_path: Path) -> None:
    """fc of three states once a step; for each draft a layer on [embedding ; state] with its own KV, a head of 70 tokens. The
    embedding is the target's."""
    model = eagle.harness(tmp_path, "eagle3", "mla")
    async with model.engine() as running:
        reads = running.engine.executor.programs.proposer.reads  # type: ignore[attr-defined]
    counted = floor_of(model.loaded.model, reads, "float32")
    plain = weight_bytes(model.loaded.model, 4 * 3) + 4 * 20 * 2 * token_bytes(model.loaded.model.spec.kv, "float32")
    once = 64 * 3 * 64
    each = (64 + 2 * 32) * 128 + 64 * 64 + 3 * 80 * 64 + 4 * 64 + 70 * 64
    kv = 4 * 20 * 2 * 2 * 16
    wanted = plain + 4 * (once + 2 * (each + kv))
    assert counted.seconds(4, 20, 2) * 3.0e12 == pytest.approx(wanted, rel=1e-9)


def test_steps_with_fewer_drafts_count_as_such() -> None:
    """Two steps with a draft that brought three tokens, one without that brought one."""
    model = load("longcat-nano", **NANO)
    counted = floor_of(model, MTPChain(model.mtp, model.spec).reads, "float32")
    drafts = Drafts()
    for first, drafted, tokens in ((True, 0, 1), (False, 1, 2), (False, 1, 1), (False, 0, 1)):
        drafts.add(RequestOutput(id="a", tokens=[5] * tokens, drafted=drafted, accepted=tokens - 1), first=first)
    wanted = (2 * counted.seconds(3, 10, 1) + counted.seconds(3, 10)) / 4
    assert counted.seconds_a_token(3, 10, drafts) == pytest.approx(wanted)


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

    def test_with_drafts_it_is_that_of_a_token(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of an MTP layer, accepted at random; by the tokens that steps brought."""
        monkeypatch.setattr(floor, "copy_rate", lambda device: 1e9)
        folder = str(write_tiny_llama(tmp_path / "mtp", base=mtp.CONFIGS["deepseek_v3"]))
        wanted = {"model.dtype": "float32", "model.weight_precision": "float32", "kv.dtype": "float32"}
        drafts = {"speculative.method": "mtp", "speculative.k": 2, "speculative.synthetic_acceptance": 2.0}
        rows, said = self.measure(folder, **wanted, **drafts)
        network = Harness(Path(folder), **wanted, **{"speculative.method": "mtp"}).loaded.model
        info: Any = SimpleNamespace(spec=network.spec, kv_dtype="float32")
        counted = Floor(network, info, 1e9, MTPChain(network.mtp, network.spec).reads)
        for row in rows:
            assert 1 < row["tokens_a_step"] <= 3
            # Steps verify two drafts each, but those at the end of a budget.
            least = counted.seconds(row["batch"], 32.5, 2) / row["tokens_a_step"]
            assert row["floor_ms"] == pytest.approx(least * 1e3, rel=0.1)
            assert row["share"] == pytest.approx(row["floor_ms"] / row["tpot_ms"])
            assert f"floor {row['floor_ms']:.2f} ms ({row['share']:.0%}), {row['tokens_a_step']:.2f} tokens a step" in said

    def test_prompt_lookup_reads_nothing_but_the_target(self, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(floor, "copy_rate", lambda device: 1e9)
        rows, _ = self.measure(model, **{"speculative.method": "pld", "speculative.k": 2, "plugins.spec_pld.shortest": 1})
        plain, _ = self.measure(model)
        for row, other in zip(rows, plain, strict=True):
            assert row["floor_ms"] * row["tokens_a_step"] == pytest.approx(other["floor_ms"], rel=0.05)

    def test_there_is_none_of_a_proposer_that_says_nothing(self, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(PromptLookup, "reads")
        rows, said = self.measure(model, **{"speculative.method": "pld", "speculative.k": 2})
        assert [(row["floor_ms"], row["share"]) for row in rows] == [(None, None)] * 2
        assert "floor" not in said
