"""Plugin: reads GGUF files of the Llama and Qwen layouts, under Hugging Face's names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fluentllm.core.errors import CheckpointError
from fluentllm.core.hookspecs import hookimpl

if TYPE_CHECKING:
    from pathlib import Path

    from fluentllm.core.protocols import Checkpoint, RegisterWeights, WeightsContext


def supports(path: Path) -> str | None:
    """None, or why there is nothing for us at `path`."""
    if not path.is_file():
        return f"{path.name} is not a file"
    with path.open("rb") as file:
        return None if file.read(4) == b"GGUF" else f"{path.name} is not a GGUF file"


def _open(context: WeightsContext) -> Checkpoint:
    reason = supports(context.path)
    if reason is not None:
        raise CheckpointError(f"The gguf reader cannot open it: {reason}.", fix="Leave model.load_format at auto.")
    from .checkpoint import GGUFCheckpoint

    return GGUFCheckpoint(context.path)


class GGUFPlugin:
    @hookimpl
    def fluent_weights(self, register: RegisterWeights) -> None:
        register("gguf", _open, supports=supports)


plugin = GGUFPlugin()
