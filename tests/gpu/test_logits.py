"""Logits of every model family by every attention backend, against the same weights on the CPU in float64.

How far BF16 may be off is measured: the same model in BF16 on the CPU is the measure, and a GPU may be off twice as far. Where
experts are chosen, rounding now and then chooses others, on a CPU as on a GPU; so rows are compared by quantiles, and each
family's smallest error is far below what a wrong row would have.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from models.driver import Chunk, Driver
from torch import Tensor

from fluentllm.core.plugins import PluginManager
from fluentllm.core.protocols import AttentionBackend, AttentionContext, AttentionSpec, BuildContext, Model, WeightSlot
from fluentllm.kernels import choose_ops, weights
from fluentllm.layers.loading import load_weights

from .models import VOCABULARY, small

NGRAM = {
    "architectures": ["LongcatFlashNgramForCausalLM"], "ngram_vocab_size_ratio": 3, "emb_neighbor_num": 3, "emb_split_num": 2,
}  # fmt: skip
QWEN_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 16, "num_experts_per_tok": 4,
    "moe_intermediate_size": 128, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama-3.1-8b", {}),
    "qwen": ("qwen3-0.6b", {}),
    "qwen-moe": ("qwen3-0.6b", QWEN_MOE),
    "deepseek": ("deepseek-v3-lite", {}),
    "longcat": ("longcat-flash-lite", {}),
    "longcat-ngram": ("longcat-flash-lite", NGRAM),
}
LENGTHS = (1, 37, 130, 200)
Passes = list[tuple[list[Chunk], bool]]
"""Chunks of a pass, and whether it is a decode program's."""
Create = Callable[[AttentionContext], AttentionBackend]


def cuts() -> Passes:
    """Every row of every sequence once: prompts whole and in chunks, verification of three drafts, single tokens."""
    ends = [max(0, length - 12) for length in LENGTHS]
    passes: Passes = [([(s, 0, end // 2) for s, end in enumerate(ends) if end // 2], False)]
    passes.append(([(s, end // 2, end - end // 2) for s, end in enumerate(ends) if end], False))
    passes.append(([(0, 0, 1)], False))
    longer = [s for s, length in enumerate(LENGTHS) if length > 12]
    passes += [([(s, ends[s] + 4 * i, 4) for s in longer], True) for i in range(2)]
    passes += [([(s, ends[s] + 8 + i, 1) for s in longer], True) for i in range(4)]
    return passes


class Drawn:
    """A `core.protocols.Checkpoint` of random weights that BF16 holds exactly."""

    def __init__(self, config: Mapping[str, Any], slots: Iterator[WeightSlot]) -> None:
        self.config = config
        generator = torch.Generator().manual_seed(11)
        self._tensors: dict[str, Tensor] = {}
        for slot in slots:
            if slot.name not in self._tensors and not slot.optional:
                self._tensors[slot.name] = _draw(slot, generator).bfloat16().float()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str, device: torch.device) -> Tensor:
        return self._tensors[name].to(device)

    def packed(self, name: str) -> None:
        return None

    def close(self) -> None:
        pass


def _draw(slot: WeightSlot, generator: torch.Generator) -> Tensor:
    """Rows of unit gain, so that every layer counts."""
    values = torch.randn(slot.shape, generator=generator)
    if slot.init == "ones":
        return 1 + 0.2 * values
    return 0.2 * values if len(slot.shape) < 2 else values if "embed" in slot.name else values * slot.shape[-1] ** -0.5


class Family:
    def __init__(self, folder: Path) -> None:
        self._config = json.loads((folder / "config.json").read_text())
        plugins = PluginManager.load({"engine", "executor"}, allow=[], deny=[])
        self._family = plugins.registry("models").get(self._config["architectures"][0]).factory
        self.spec = self._family.spec(self._config)
        rng = random.Random(5)
        self.tokens = [[rng.randrange(3, VOCABULARY) for _ in range(length)] for length in LENGTHS]
        shapes = self._build(torch.device("meta"), torch.float32, deterministic=False)
        self._checkpoint = Drawn(self._config, shapes.weight_slots())

    def _build(self, device: torch.device, dtype: torch.dtype, *, deterministic: bool) -> Model:
        real = torch.device("cpu") if device.type == "meta" else device
        name = str(dtype).removeprefix("torch.")
        context = BuildContext(device, dtype, choose_ops(real, deterministic), name, self.spec.max_position)
        with torch.inference_mode():
            return self._family.build(self._config, context)

    def logits(
        self, device: torch.device, dtype: torch.dtype, create: Create | None = None, *, deterministic: bool = False
    ) -> Tensor:
        """[rows of all sequences, vocab] float64 on the CPU, by the passes of `cuts`."""
        model = self._build(device, dtype, deterministic=deterministic)
        with torch.inference_mode():
            load_weights(model, self._checkpoint, device)
        made = {} if create is None else {"create": create}
        driver = Driver(model, self.tokens, page_size=64, dtype=dtype, device=device, deterministic=deterministic, **made)
        rows: dict[tuple[int, int], Tensor] = {}
        for chunks, decode in cuts():
            for (sequence, start, _), found in zip(chunks, driver.run(chunks, decode=decode), strict=True):
                rows |= {(sequence, start + i): row for i, row in enumerate(found.double().cpu())}
        assert len(rows) == sum(LENGTHS)
        return torch.stack([rows[place] for place in sorted(rows)])


def errors(found: Tensor, exact: Tensor) -> Tensor:
    """Of each row, relative to the row's size."""
    assert torch.isfinite(found).all()
    return (found - exact).norm(dim=1) / exact.norm(dim=1)


def check(found: Tensor, measure: Tensor) -> None:
    """`found` and `measure`: errors of rows, of what is tested and of BF16 on the CPU."""
    for share in (0.1, 0.5, 0.9):
        ours, allowed = found.quantile(share).item(), 2 * measure.quantile(share).item()
        assert ours <= allowed, f"the {share} quantile of the rows' errors is {ours:.2e}; BF16 explains {allowed:.2e}"
    assert found.max() <= max(2 * measure.max().item(), 0.5), f"a row is wrong: {found.max():.2e}"


@pytest.fixture(scope="module")
def float64() -> Iterator[None]:
    """Weights may be float64 here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(weights.DENSE, "float64", torch.float64)
        patch.setattr(weights, "PRECISIONS", (*weights.PRECISIONS, "float64"))
        yield


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, float64: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(the family, its exact logits, errors of BF16 on the CPU)."""
    name, changes = FAMILIES[request.param]
    found = Family(small(name, tmp_path_factory.mktemp(request.param), max_position_embeddings=512, **changes))
    cpu = torch.device("cpu")
    exact = found.logits(cpu, torch.float64)
    measure = errors(found.logits(cpu, torch.bfloat16), exact)
    print(f"{request.param}: BF16 on the CPU is off by {measure.median():.2e}, most {measure.max():.2e}")
    return found, exact, measure


@pytest.mark.parametrize("deterministic", [False, True], ids=["plain", "deterministic"])
def test_logits_are_the_float64_ones_as_far_as_bf16_goes(family: Any, deterministic: bool) -> None:
    found, exact, measure = family
    device = torch.device("cuda", 0)
    registry = PluginManager.load({"engine", "executor"}, allow=[], deny=[]).registry("attention")
    spec = AttentionSpec(
        model=found.spec, device="cuda", dtype="bfloat16", kv_dtype="bfloat16", page_size=64, deterministic=deterministic
    )
    # FlashInfer's kernels may not be compiled yet: tests/gpu/test_flashinfer.py waits for them.
    entries = [entry for entry in registry.supported(spec) if entry.name != "flashinfer"]
    assert "triton" in {entry.name for entry in entries}, registry.why_not(spec)
    for entry in entries:
        off = errors(found.logits(device, torch.bfloat16, entry.factory, deterministic=deterministic), exact)
        print(f"{entry.name}: off by {off.median():.2e}, most {off.max():.2e}")
        check(off, measure)
