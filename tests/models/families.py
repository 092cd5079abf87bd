"""Every model family small, of random weights, and its logits by any dtype, device and attention backend: float64 on the CPU is
what all others are measured against.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu.models import VOCABULARY, small
from torch import Tensor

from fluentllm.core.plugins import PluginManager
from fluentllm.core.protocols import (
    PHASES,
    AttentionBackend,
    AttentionContext,
    AttentionSpec,
    BuildContext,
    Model,
    Phase,
    WeightSlot,
)
from fluentllm.kernels import choose_ops, weights
from fluentllm.layers.loading import load_weights

from .driver import Chunk, Driver

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
    """One of `FAMILIES`, its configuration in `folder`."""

    def __init__(self, name: str, folder: Path) -> None:
        shape, changes = FAMILIES[name]
        small(shape, folder, max_position_embeddings=512, **changes)
        self._config = json.loads((folder / "config.json").read_text())
        plugins = PluginManager.load({"engine", "executor"}, allow=[], deny=[])
        self.backends = plugins.registry("attention")
        self._family = plugins.registry("models").get(self._config["architectures"][0]).factory
        self.spec = self._family.spec(self._config)
        rng = random.Random(5)
        self.tokens = [[rng.randrange(3, VOCABULARY) for _ in range(length)] for length in LENGTHS]
        shapes = self._build(torch.device("meta"), torch.float32, deterministic=False)
        self._checkpoint = Drawn(self._config, shapes.weight_slots())

    def asks(
        self, device: str, kv_dtype: torch.dtype, *, deterministic: bool = False, phases: tuple[Phase, ...] = PHASES
    ) -> AttentionSpec:
        """What backends are asked about, for BF16."""
        kept = str(kv_dtype).removeprefix("torch.")
        return AttentionSpec(self.spec, device, "bfloat16", kept, page_size=64, deterministic=deterministic, phases=phases)

    def bf16_errors(self, exact: Tensor, kv_dtype: torch.dtype, *, deterministic: bool = False) -> Tensor:
        """Of BF16 on the CPU, over such a cache: what a GPU is measured by."""
        create = self.backends.supported(self.asks("cpu", kv_dtype, deterministic=deterministic))[0].factory
        cpu = torch.device("cpu")
        return errors(self.logits(cpu, torch.bfloat16, create, deterministic=deterministic, kv_dtype=kv_dtype), exact)

    def _build(self, device: torch.device, dtype: torch.dtype, *, deterministic: bool) -> Model:
        real = torch.device("cpu") if device.type == "meta" else device
        name = str(dtype).removeprefix("torch.")
        context = BuildContext(device, dtype, choose_ops(real, deterministic), name, self.spec.max_position)
        with torch.inference_mode():
            return self._family.build(self._config, context)

    def logits(
        self,
        device: torch.device,
        dtype: torch.dtype,
        create: Create | None = None,
        *,
        deterministic: bool = False,
        kv_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """[rows of all sequences, vocab] float64 on the CPU, by the passes of `cuts`. `create`: torch's backend if None;
        `kv_dtype`: `dtype` if None."""
        model = self._build(device, dtype, deterministic=deterministic)
        with torch.inference_mode():
            load_weights(model, self._checkpoint, device)
        made = {} if create is None else {"create": create}
        driver = Driver(
            model, self.tokens, page_size=64, dtype=dtype, kv_dtype=kv_dtype, device=device, deterministic=deterministic, **made
        )
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


@contextmanager
def float64_weights() -> Iterator[None]:
    """Weights may be float64 inside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(weights.DENSE, "float64", torch.float64)
        patch.setattr(weights, "PRECISIONS", (*weights.PRECISIONS, "float64"))
        yield
