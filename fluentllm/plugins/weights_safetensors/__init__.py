"""Plugin: reads safetensors checkpoints, in one file or many, also DeepSeek's block-FP8."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from msgspec import Meta, Struct

from fluentllm.core.errors import CheckpointError
from fluentllm.core.hookspecs import hookimpl

if TYPE_CHECKING:
    from pathlib import Path

    from fluentllm.core.protocols import Checkpoint, RegisterConfig, RegisterWeights, WeightsContext

NAME = "weights_safetensors"


class SafetensorsSettings(Struct, kw_only=True, forbid_unknown_fields=True):
    """Of loading to a GPU; on a CPU the files are mapped."""

    threads: Annotated[int, Meta(description="Threads that read at once.", ge=1, le=64)] = 8
    staging_bytes: Annotated[
        int, Meta(description="Pinned host memory between files and GPU.", ge=32 << 20, extra_json_schema={"unit": "bytes"})
    ] = 256 << 20


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

    return SafetensorsCheckpoint(context.path, context.settings.plugin.get(NAME))


class SafetensorsPlugin:
    @hookimpl
    def fluent_config(self, register: RegisterConfig) -> None:
        register(SafetensorsSettings)

    @hookimpl
    def fluent_weights(self, register: RegisterWeights) -> None:
        register("safetensors", _open, supports=supports)


plugin = SafetensorsPlugin()
