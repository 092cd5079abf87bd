"""Builds a draft network and fills it from its checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fluentllm.core.errors import ConfigError
from fluentllm.layers.loading import load_weights

from .config import PARAM, draft_path, of_draft, parse
from .network import DraftLayer, Eagle, Eagle3

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    import torch

    from fluentllm.core.protocols import BuildContext, Checkpoint, DraftContext, PackedTensor, WeightSlot

EMBEDDING = "embed_tokens.weight"


def load_draft(context: DraftContext) -> DraftLayer:
    """Raises `ConfigError` for a draft model or target that do not fit each other, or a checkpoint that is not whole."""
    config = parse(draft_path(context.settings), context.target.spec)
    if config.taps:
        tap = getattr(context.target, "tap", None)
        if tap is None:
            raise ConfigError(
                f"The target, {context.target.spec.architecture}, does not give the hidden states that EAGLE-3 needs.",
                fix="Use a draft model of the first EAGLE, or method pld.",
                param=PARAM,
            )
        tap(config.taps)
    make = Eagle3 if config.eagle3 else Eagle
    layer = make(_build(context.build), config, context.target, "midlayer" if config.eagle3 else "layers.0")
    with of_draft(config.path):
        checkpoint = _Draft(context.open(config.path, list(_slots(layer))), config.eagle3)
        try:
            if EMBEDDING not in checkpoint.shapes():
                layer.share_embedding(context.target)
            load_weights(layer, checkpoint, context.build.device)  # type: ignore[arg-type]
        finally:
            checkpoint.close()
    return layer


def _build(target: BuildContext) -> BuildContext:
    """As the target, but where that has its checkpoint's blocks on a CPU, matrices of 16 bits are kept in 8: a draft costs
    what its weights take to read, and its last bits decide nothing."""
    packed = target.weight_precision == "packed" and target.device.type == "cpu"
    return replace(target, weight_precision="int8") if packed else target


def _slots(layer: DraftLayer) -> Iterator[WeightSlot]:
    """For random weights, which then share the target's embedding."""
    return (replace(slot, unused=slot.unused or slot.name == EMBEDDING) for slot in layer.weight_slots())


class _Draft:
    """A `Checkpoint` under the names that the papers' own checkpoints use: other tools write EAGLE-3's layer as `layers.0`,
    and both kinds under `model.`."""

    def __init__(self, checkpoint: Checkpoint, eagle3: bool) -> None:
        self._checkpoint = checkpoint
        self._names: dict[str, str] = {}
        for name in checkpoint.shapes():
            short = name.removeprefix("model.")
            if eagle3 and short.startswith("layers.0."):
                short = "midlayer." + short.removeprefix("layers.0.")
            self._names[short] = name

    @property
    def config(self) -> Mapping[str, Any]:
        return self._checkpoint.config

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        shapes = self._checkpoint.shapes()
        return {short: shapes[name] for short, name in self._names.items()}

    def read(self, name: str, device: torch.device) -> torch.Tensor:
        return self._checkpoint.read(self._names[name], device)

    def packed(self, name: str) -> PackedTensor | None:
        return self._checkpoint.packed(self._names[name])

    def close(self) -> None:
        self._checkpoint.close()
