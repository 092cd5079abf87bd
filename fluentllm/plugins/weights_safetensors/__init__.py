"""Plugin: reads safetensors checkpoints, in one file or many, also DeepSeek's block-FP8."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fluentllm.core.errors import CheckpointError
from fluentllm.core.hookspecs import hookimpl

if TYPE_CHECKING:
    from pathlib import Path

    from fluentllm.core.protocols import Checkpoint, RegisterWeights, WeightsContext


def supports(path: Path) -> str | None:
    """None, or why there is nothing for us at `path`."""
    if not path.is_dir():
        return f"{path.name} is not a folder"
    if not (path / "config.json").is_file():
        return f"{path} has no config.json"
    if not any(path.glob("*.safetensors")):
        return f"{path} has no *.safetensors"
    return None


def _open(context: WeightsContext) -> Checkpoint:
    reason = supports(context.path)
    if reason is not None:
        raise CheckpointError(f"The safetensors reader cannot open it: {reason}.", fix="Leave model.load_format at auto.")
    from .checkpoint import SafetensorsCheckpoint

    return SafetensorsCheckpoint(context.path)


class SafetensorsPlugin:
    @hookimpl
    def fluent_weights(self, register: RegisterWeights) -> None:
        register("safetensors", _open, supports=supports)


plugin = SafetensorsPlugin()
