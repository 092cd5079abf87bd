"""Tiny LongCat-Flash and DeepSeek-V3 with MTP layers, and what their drafts must be: computed from scratch, without a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from engine.harness import Harness, write_tiny_llama
from engine.test_every_model import LONGCAT, MODELS
from safetensors.torch import save_file

from fluentllm.core.plugins import PluginManager
from fluentllm.core.protocols import BuildContext
from fluentllm.kernels import choose_ops

from .watching import Primed, WholeSequence, whole

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from fluentllm.core.protocols import Model

VOCAB = 160
CONFIGS: dict[str, dict[str, Any]] = {
    "longcat": LONGCAT,
    "longcat_ngram": MODELS["longcat_ngram"],
    "deepseek_v3": {**MODELS["deepseek_v3"], "num_nextn_predict_layers": 1},
}


def write_checkpoint(folder: Path, config: dict[str, Any]) -> Path:
    """Random weights, large enough that attention and experts decide what comes out; every MTP tensor is there."""
    write_tiny_llama(folder, base=config)
    family = PluginManager.load({"executor"}, allow=[], deny=[]).registry("models").get(config["architectures"][0]).factory
    device = torch.device("cpu")
    context = BuildContext(device=device, dtype=torch.float32, ops=choose_ops(device, deterministic=False), max_positions=64)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for slot in family.build(config, context).weight_slots():
        if not slot.unused:
            norm = len(slot.shape) == 1
            tensors[slot.name] = torch.randn(slot.shape, generator=generator) * (0.1 if norm else 0.25) + float(norm)
    save_file(tensors, folder / "model.safetensors")
    return folder


def harness(folder: Path, kind: str) -> Harness:
    overrides = {"model.load_format": "safetensors", "engine.deterministic": True, "kv.page_size": 8}
    overrides |= {"speculative.method": "mtp", "speculative.max_k": 5}
    return Harness(write_checkpoint(folder, CONFIGS[kind]), **overrides)


class Reference(Primed):
    """Scores of the MTP layer's drafts after a history, from nothing but the tokens."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model: Any = model

    @torch.inference_mode()
    def scores(self, history: list[int], drafts: list[int]) -> Tensor:
        """[drafts, vocab] float32: logits that each draft was to be drawn from, given the drafts before it."""
        states = torch.cat((torch.zeros(1, self.model.spec.hidden_size), self.states(history[:-1])))
        tokens = list(history)
        rows = []
        for draft in drafts:
            out = self.model.mtp.forward(states, whole(tokens), WholeSequence())
            rows.append(self.model.mtp.logits(out[-1:]))
            states, tokens = torch.cat((states, out[-1:])), [*tokens, draft]
        return torch.cat(rows)

    def compute(self, tokens: list[int]) -> Tensor:
        hidden: Tensor = self.model.forward(whole(tokens), WholeSequence())
        return hidden
