"""The oracle for models with experts: router biases small enough that every expert is chosen by some token, and MTP layers
added to what Transformers saved, since it has none."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from driver import Driver
from msgspec import structs
from oracle import Oracle, make_oracle, relative_error
from safetensors.torch import load_file, save_file

from fluentllm.core.types import KVSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedConfig

    from fluentllm.core.batch import Batch
    from fluentllm.core.protocols import Model

STEPS = 4


@dataclass(slots=True)
class CachedOracle(Oracle):
    """Computes the logits of a sequence once: models with experts are compared very often. `known` may be cleared."""

    known: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def logits(self, tokens: list[int]) -> Tensor:
        key = tuple(tokens)
        if key not in self.known:
            self.known[key] = Oracle.logits(self, tokens)
        return self.known[key]


def make_expert_oracle(config: PreTrainedConfig, folder: Path, bias: float) -> CachedOracle:
    """`bias`: standard deviation of the routers' `e_score_correction_bias`, on the scale of the scores."""
    oracle = make_oracle(config, folder)
    for name, buffer in oracle.model.named_buffers():
        if "e_score_correction_bias" in name:
            buffer.mul_(bias / 0.3)
    oracle.model.save_pretrained(folder)
    return CachedOracle(oracle.model, folder, oracle.tokens)


def state_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def add_tensors(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Draw these tensors as the oracle draws its own, and save them beside those → all tensors."""
    generator = torch.Generator().manual_seed(5)
    state = state_of(folder)
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            state[name] = values if "embed" in name else values * shape[-1] ** -0.5
        else:
            state[name] = 1 + 0.3 * values if "norm" in name else 0.1 * values
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return state


def copy_checkpoint(
    source: Path, to: Path, *, without: Iterable[str] = (), change: Mapping[str, Tensor] | None = None, **config: Any
) -> None:
    """The checkpoint with tensors left out, changed or added, and config fields set."""
    state = {**load_file(source / "model.safetensors"), **(change or {})}
    save_file({n: t for n, t in state.items() if n not in set(without)}, to / "model.safetensors", {"format": "pt"})
    settings = {**json.loads((source / "config.json").read_text()), **config}
    (to / "config.json").write_text(json.dumps(settings))


def target_hidden(oracle: Oracle, tokens: list[int]) -> Tensor:
    """After the final norm, [T, hidden]."""
    with torch.inference_mode():
        return oracle.model.model(torch.tensor([tokens])).last_hidden_state[0]


class Drafter(Driver):
    """Drives a model together with its draft layer, whose KV lies after the target's."""

    def __init__(self, model: Model, tokens: list[list[int]], *, deterministic: bool = False) -> None:
        target = model.spec
        layers = target.kv.layers + target.draft_kv_layers
        model.spec = structs.replace(target, kv=structs.replace(target.kv, layers=layers))
        super().__init__(model, tokens, deterministic=deterministic)
        model.spec = target
        assert isinstance(self.pool.spec, KVSpec)

    @torch.inference_mode()
    def target(self, batch: Batch) -> Tensor:
        return self.model.forward(batch, self.attention)

    @torch.inference_mode()
    def draft(self, hidden: Tensor, batch: Batch) -> Tensor:
        return self.model.mtp.forward(hidden, batch, self.attention)


def draft_at_prefill(driver: Drafter, lengths: list[int]) -> list[Tensor]:
    """Whole prompts; the state before a prompt's first token is arbitrary."""
    out = []
    for s, n in enumerate(lengths):
        batch = driver.batch([(s, 0, n)])
        hidden = driver.target(batch)
        out.append(driver.draft(torch.cat((torch.randn(1, hidden.shape[1]), hidden[:-1])), batch))
    return out


def draft_step_by_step(driver: Drafter, lengths: list[int]) -> list[Tensor]:
    """A prompt in two chunks, then one token a pass, all sequences together; the hidden state is carried from pass to pass."""
    chunks = [[(0, 5) for _ in lengths], [(5, n - STEPS - 5) for n in lengths]]
    carried = torch.zeros(len(lengths), driver.model.spec.hidden_size)
    parts: list[list[Tensor]] = [[] for _ in lengths]
    passes = [*chunks, *([(n - STEPS + i, 1) for n in lengths] for i in range(STEPS))]
    for number, rows in enumerate(passes):
        live = [(s, start, count) for s, (start, count) in enumerate(rows) if count > 0]
        batch = driver.batch(live, decode=number >= 2)
        hidden = driver.target(batch)
        before, start = [], 0
        for s, _, count in live:
            before.append(torch.cat((carried[s : s + 1], hidden[start : start + count - 1])))
            carried[s] = hidden[start + count - 1]
            start += count
        drafted = driver.draft(torch.cat(before), batch).split([count for _, _, count in live])
        for (s, _, _), part in zip(live, drafted, strict=True):
            parts[s].append(part)
    return [torch.cat(part) for part in parts]


DRAFTING: dict[str, Callable[[Drafter, list[int]], list[Tensor]]] = {
    "prefill": draft_at_prefill,
    "steps": draft_step_by_step,
}


def draft_error(model: Model, oracle: Oracle, expected: list[Tensor], way: str, *, deterministic: bool = False) -> float:
    """Largest relative error of the draft layer's output, over all sequences."""
    driver = Drafter(model, oracle.tokens, deterministic=deterministic)
    ours = DRAFTING[way](driver, [len(tokens) for tokens in oracle.tokens])
    return max(relative_error(mine, reference) for mine, reference in zip(ours, expected, strict=True))
