"""Plugin: random weights from a configuration alone (`--load-format dummy`), for benchmarks of models one does not have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from msgspec import Meta, Struct

from fluentllm.core.hookspecs import hookimpl

if TYPE_CHECKING:
    from pathlib import Path

    from fluentllm.core.protocols import Checkpoint, RegisterConfig, RegisterWeights, WeightsContext

NAME = "weights_dummy"


class DummySettings(Struct, kw_only=True, forbid_unknown_fields=True):
    seed: Annotated[int, Meta(description="Same seed, same weights, on the same kind of device.", ge=0)] = 0


def supports(path: Path) -> str | None:
    """Never chosen by `auto`: made-up weights are for those who ask for them."""
    return f"it makes up weights for {path.name}, which has to be asked for with load_format: dummy"


def _open(context: WeightsContext) -> Checkpoint:
    from .checkpoint import DummyCheckpoint

    settings = context.settings
    own = settings.plugin.get(NAME, DummySettings())
    drafts = settings.speculative.method != "none"
    return DummyCheckpoint(context.path, context.slots or (), settings.model.dtype, own.seed, drafts=drafts)


class DummyPlugin:
    @hookimpl
    def fluent_config(self, register: RegisterConfig) -> None:
        register(DummySettings)

    @hookimpl
    def fluent_weights(self, register: RegisterWeights) -> None:
        register("dummy", _open, supports=supports)


plugin = DummyPlugin()
