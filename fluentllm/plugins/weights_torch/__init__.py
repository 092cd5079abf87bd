"""Plugin: reads PyTorch's own files (`pytorch_model.bin`), in which most EAGLE heads are published. Where a folder has
safetensors too, these are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fluentllm.core.errors import CheckpointError
from fluentllm.core.hookspecs import hookimpl
from fluentllm.hub.weight_files import PYTORCH

if TYPE_CHECKING:
    from pathlib import Path

    from fluentllm.core.protocols import Checkpoint, RegisterWeights, WeightsContext


def supports(path: Path) -> str | None:
    """None, or why there is nothing for us at `path`."""
    if not path.is_dir():
        return f"{path.name} is not a folder"
    if not (path / "config.json").is_file():
        return f"{path} has no config.json"
    if any(path.glob("*.safetensors")):
        return f"{path} has safetensors"
    if not PYTORCH.present(path):
        return f"{path} has no pytorch_model.bin"
    return None


def _open(context: WeightsContext) -> Checkpoint:
    reason = supports(context.path)
    if reason is not None:
        raise CheckpointError(
            f"The reader of PyTorch's files cannot open it: {reason}.", fix="Leave model.load_format at auto."
        )
    from .checkpoint import TorchCheckpoint

    return TorchCheckpoint(context.path)


class TorchPlugin:
    @hookimpl
    def fluent_weights(self, register: RegisterWeights) -> None:
        register("torch", _open, supports=supports)


plugin = TorchPlugin()
