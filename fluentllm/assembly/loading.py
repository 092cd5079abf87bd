"""From a checkpoint to a filled network, and to the draft model of a proposer that has one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..core.errors import CheckpointError
from ..core.protocols import BuildContext, DraftContext, DraftTarget, WeightsContext
from ..core.timeline import Timeline
from ..devices import choose_device
from ..hub import load_config
from ..hub.weight_files import PYTORCH, SAFETENSORS
from ..kernels import choose_ops, choose_precision
from ..layers.loading import load_weights
from ..memory import weights_too_large
from ..prewarm import Prewarm
from ..transfer.layout import fingerprint
from .choices import architecture_of, choose_dtype, choose_library, is_fp8, max_model_len, positions_ahead
from .kernels import start_compiling, without_memory
from .proposers import check_speculation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from ..core.plugins import PluginManager
    from ..core.protocols import Checkpoint, Model, WeightSlot
    from ..core.settings import Settings
    from ..core.types import ModelSpec
    from ..hub import ModelFiles
    from ..kernels.native.library import Library
    from .proposers import ChosenProposer


@dataclass(frozen=True, slots=True)
class LoadedModel:
    model: Model
    device: torch.device
    dtype: torch.dtype
    weight_bytes: int
    weight_precision: str
    context: BuildContext
    path: Path
    fingerprint: str = ""
    """Of config and weights; engines that hand requests over compare it."""
    library: Library | None = None
    """C kernels."""
    kernels: Prewarm = field(default_factory=Prewarm)
    """Those that steps will launch, being compiled."""


def load_model(settings: Settings, files: ModelFiles, plugins: PluginManager, timeline: Timeline | None = None) -> LoadedModel:
    """Build the network that the checkpoint's config names, and fill it."""
    timeline = timeline or Timeline("engine")
    with timeline.stage("device"):
        device = choose_device(settings.engine.device)
    dtype = choose_dtype(settings.model.dtype, device)
    if device.type == "cpu" and settings.engine.threads is not None:
        torch.set_num_threads(settings.engine.threads)
    config = load_config(files)
    family = plugins.registry("models").get(architecture_of(config)).factory
    spec: ModelSpec = family.spec(config)
    check_speculation(settings, spec, plugins, DraftTarget(settings, spec, dtype.itemsize, files.path))
    precision = choose_precision(
        settings.model.weight_precision, device, dtype, settings.engine.deterministic, fp8_checkpoint=is_fp8(config)
    )
    library = choose_library(settings, device)
    context = BuildContext(
        device=device,
        dtype=dtype,
        ops=choose_ops(device, settings.engine.deterministic, library),
        weight_precision=precision,
        max_positions=max_model_len(settings, spec) + positions_ahead(settings),
        moe_overlap=settings.engine.moe_overlap != "off",
    )
    kernels = start_compiling(settings, plugins, family, config, context, files.path, timeline)
    model: Model | None = None
    try:
        with torch.inference_mode():
            with timeline.stage("model"):
                model = family.build(config, context)
            reader = _reader(settings, files, plugins)
            with timeline.stage("weights"):
                checkpoint = reader(WeightsContext(files.path, settings, slots=model.weight_slots()))
                try:
                    load_weights(model, checkpoint, device)
                finally:
                    checkpoint.close()
    except (torch.OutOfMemoryError, MemoryError) as error:
        model = model or without_memory(family, config, context)
        slots = list(model.weight_slots()) if model is not None else None
        kernels.give_up()
        raise weights_too_large(slots, device, dtype, error) from None
    except BaseException:
        kernels.give_up()
        raise
    model_hash = fingerprint(config, _weight_files(files.path)) if settings.disaggregation.role != "both" else ""
    return LoadedModel(model, device, dtype, model.nbytes(), precision, context, files.path, model_hash, library, kernels)


def _reader(settings: Settings, files: ModelFiles, plugins: PluginManager) -> Callable[[WeightsContext], Any]:
    registry = plugins.registry("weights")
    if settings.model.load_format != "auto":
        factory: Callable[[WeightsContext], Any] = registry.get(settings.model.load_format).factory
        return factory
    return _reader_for(files.path, plugins)


def _reader_for(path: Path, plugins: PluginManager) -> Callable[[WeightsContext], Any]:
    registry = plugins.registry("weights")
    supported = registry.supported(path)
    if not supported:
        reasons = "; ".join(f"{name}: {why}" for name, why in registry.why_not(path).items())
        raise CheckpointError(
            f"No reader can open {path} ({reasons}).", fix="Give a folder with .safetensors or pytorch_model.bin, or a .gguf."
        )
    return supported[0].factory


def load_draft_model(
    proposer: ChosenProposer, settings: Settings, loaded: LoadedModel, plugins: PluginManager
) -> tuple[Any, int]:
    """The proposer's own, None if it has none, and the bytes that it takes."""

    def open_checkpoint(path: Path, slots: Iterable[WeightSlot]) -> Checkpoint:
        registry = plugins.registry("weights")
        dummy = settings.model.load_format == "dummy" and not registry.supported(path)
        factory = registry.get("dummy").factory if dummy else _reader_for(path, plugins)
        checkpoint: Checkpoint = factory(WeightsContext(path, settings, slots=slots))
        return checkpoint

    with torch.inference_mode():
        return proposer.load(DraftContext(settings, loaded.model, loaded.context, open_checkpoint))


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return [file for pattern in (SAFETENSORS.pattern, "*.gguf", PYTORCH.pattern) for file in path.glob(pattern)]
