"""Transformers as the oracle: a small checkpoint with everything drawn at random, loaded by it and by us.

    oracle = make_oracle(LlamaConfig(...), folder)
    model = load_ours(oracle.folder)
    check(model, oracle, scenario)          # one of SCENARIOS

What a checkpoint leaves at 1 or 0 hides a dropped tensor, so every parameter and persistent buffer is drawn.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from driver import Driver
from transformers import AutoModelForCausalLM

from fluentllm.core.protocols import BuildContext, WeightsContext
from fluentllm.core.settings import Settings
from fluentllm.kernels import choose_ops
from fluentllm.layers.loading import load_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

    from fluentllm.core.protocols import Model, ModelFamily

TOLERANCE = 1e-4
"""max|Δ| / max|ref|, float32."""
LENGTHS = (23, 9, 14)


@dataclass(slots=True)
class Oracle:
    model: PreTrainedModel
    folder: Path
    tokens: list[list[int]]
    """Three random sequences of unequal lengths."""

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> Tensor:
        """[T] → [T, vocab] float32."""
        return self.model(torch.tensor([tokens])).logits[0].float()


def make_oracle(config: PreTrainedConfig, folder: Path, *, seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> Oracle:
    """Save a random checkpoint of `config` in `folder`, and keep Transformers' model of it. Attention is eager, float32."""
    generator = torch.Generator().manual_seed(seed)
    config.torch_dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        saved = model.state_dict()
        for name, tensor in saved.items():
            if tensor.is_floating_point():
                tensor.copy_(_draw(name, tensor, generator))
    model.save_pretrained(folder)
    tokens = [torch.randint(3, config.vocab_size, (length,), generator=generator).tolist() for length in lengths]
    return Oracle(model, folder, tokens)


def _draw(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Matrices with rows of about unit gain, norms about 1, biases about 0; none of them exactly."""
    values = torch.randn(tensor.shape, generator=generator)
    if tensor.dim() >= 2:
        return values * (1.0 if "embed" in name else tensor.shape[-1] ** -0.5)
    if "norm" in name:
        return 1 + 0.3 * values
    return 0.3 * values


def family_of(config: Mapping[str, Any]) -> ModelFamily:
    """The family that a built-in plugin registers for the config's architecture."""
    families: dict[str, ModelFamily] = {}
    for name in ("model_llama", "model_qwen", "model_deepseek", "model_longcat"):
        importlib.import_module(f"fluentllm.plugins.{name}").plugin.fluent_models(families.__setitem__)
    return families[config["architectures"][0]]


def load_ours(
    folder: Path, *, deterministic: bool = False, perturb: str | None = None, precision: str = "float32", **changes: Any
) -> Model:
    """Our model of the checkpoint, through our own reader and loader; `perturb` names a tensor to change on the way;
    `changes` replace config fields."""
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    family = family_of(config)
    device = torch.device("cpu")
    spec = family.spec(config)
    context = BuildContext(
        device=device,
        dtype=torch.float32,
        ops=choose_ops(device, deterministic),
        weight_precision=precision,
        max_positions=spec.max_position,
    )
    reader: dict[str, Callable[[WeightsContext], Any]] = {}
    plugin = importlib.import_module("fluentllm.plugins.weights_safetensors").plugin
    plugin.fluent_weights(lambda name, factory, supports: reader.__setitem__(name, factory))
    checkpoint = reader["safetensors"](WeightsContext(folder, Settings()))
    if perturb is not None:
        checkpoint = Perturbed(checkpoint, perturb)
    with torch.inference_mode():
        model = family.build(config, context)
        load_weights(model, checkpoint, device)
    checkpoint.close()
    return model


def tensor_names(folder: Path) -> list[str]:
    """Every tensor of the checkpoint."""
    plugin = importlib.import_module("fluentllm.plugins.weights_safetensors.checkpoint")
    checkpoint = plugin.SafetensorsCheckpoint(folder)
    names = list(checkpoint.shapes())
    checkpoint.close()
    return names


class Perturbed:
    """A checkpoint with one tensor changed by a tenth of its size."""

    def __init__(self, checkpoint: Any, name: str) -> None:
        self._checkpoint = checkpoint
        self._name = name
        self.touched = False

    def read(self, name: str, device: torch.device) -> Tensor:
        tensor = self._checkpoint.read(name, device)
        if name != self._name:
            return tensor
        self.touched = True
        generator = torch.Generator().manual_seed(1)
        return tensor + 0.1 * tensor.abs().max() * torch.randn(tensor.shape, generator=generator)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._checkpoint, attribute)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """max|Δ| / max|ref|."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


# --------------------------------------------------------------------------------------------------------------- scenarios
def prefill(driver: Driver, lengths: list[int]) -> list[Tensor]:
    """Each prompt alone, whole."""
    return [driver.run([(s, 0, n)])[0] for s, n in enumerate(lengths)]


def decode(driver: Driver, lengths: list[int]) -> list[Tensor]:
    """Prompt but the last tokens, then one token a pass, all sequences together, of unequal lengths."""
    steps = 4
    parts = [[driver.run([(s, 0, n - steps)])[0]] for s, n in enumerate(lengths)]
    for step in range(steps):
        for s, logits in enumerate(driver.run([(s, n - steps + step, 1) for s, n in enumerate(lengths)], decode=True)):
            parts[s].append(logits)
    return [torch.cat(part) for part in parts]


def verify(driver: Driver, lengths: list[int]) -> list[Tensor]:
    """As verification of drafts: four rows a sequence in one decode pass."""
    first = driver.run([(s, 0, n - 4) for s, n in enumerate(lengths)])
    last = driver.run([(s, n - 4, 4) for s, n in enumerate(lengths)], decode=True)
    return [torch.cat(pair) for pair in zip(first, last, strict=True)]


def mixed(driver: Driver, lengths: list[int]) -> list[Tensor]:
    """Ragged passes: whole prompts, then chunks of any length and single rows side by side."""
    first = driver.run([(0, 0, 7), (1, 0, lengths[1] - 1)])
    second = driver.run([(0, 7, lengths[0] - 7), (1, lengths[1] - 1, 1), (2, 0, lengths[2])])
    return [torch.cat((first[0], second[0])), torch.cat((first[1], second[1])), second[2]]


def chunked(driver: Driver, lengths: list[int]) -> list[Tensor]:
    """Each prompt in chunks of five."""
    return [
        torch.cat([driver.run([(s, start, min(5, n - start))])[0] for start in range(0, n, 5)]) for s, n in enumerate(lengths)
    ]


def prefix_hit(driver: Driver, lengths: list[int]) -> list[Tensor]:
    """A second sequence that shares the first one's leading pages computes only the rest."""
    out = prefill(driver, lengths)
    shared = 2 * driver.page_size
    driver.page_table[1] = driver.page_table[1].flip(0)
    driver.page_table[1, :2] = driver.page_table[0, :2]
    driver.history[driver.slots[1]] = driver.history[driver.slots[0]]
    rest = driver.run([(1, shared, lengths[0] - shared)])[0]
    return [torch.cat((out[0][:shared], rest)), out[1], out[2]]


SCENARIOS: dict[str, Callable[[Driver, list[int]], list[Tensor]]] = {
    "prefill": prefill,
    "decode": decode,
    "verify": verify,
    "mixed": mixed,
    "chunked": chunked,
    "prefix_hit": prefix_hit,
}


def error_of(model: Model, oracle: Oracle, scenario: str, *, deterministic: bool = False) -> float:
    """Largest relative error of any sequence."""
    driver = Driver(model, oracle.tokens, deterministic=deterministic)
    ours = SCENARIOS[scenario](driver, [len(tokens) for tokens in oracle.tokens])
    return max(relative_error(mine, oracle.logits(tokens)) for mine, tokens in zip(ours, oracle.tokens, strict=True))


def check(model: Model, oracle: Oracle, scenario: str, *, deterministic: bool = False) -> None:
    error = error_of(model, oracle, scenario, deterministic=deterministic)
    assert error <= TOLERANCE, f"{scenario}: max|Δ|/max|ref| = {error:.2e}"


def check_every_tensor_matters(oracle: Oracle) -> None:
    """Changing any one tensor of the checkpoint makes the comparison fail."""
    driverless = [name for name in tensor_names(oracle.folder) if _error_with(oracle, name) <= TOLERANCE]
    assert not driverless, f"these tensors change nothing: {driverless}"


def _error_with(oracle: Oracle, name: str) -> float:
    return error_of(load_ours(oracle.folder, perturb=name), oracle, "prefill")
