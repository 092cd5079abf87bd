"""The kernels that an engine will launch, compiled while weights load: the same model and step on tensors without memory."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..core.protocols import DraftMemory, DraftTarget
from ..prewarm import META, Prewarm
from ..rehearsal import Largest
from .choices import DEFAULT_PREFILL_TOKENS, DEFAULT_SLOTS, draft_length, max_model_len
from .known_kernels import mark_of, remember
from .proposers import choose_proposer
from .step import PartsMaker, Sizes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ..core.plugins import PluginManager
    from ..core.protocols import BuildContext, Model
    from ..core.settings import Settings
    from ..core.timeline import Timeline
    from ..kernels.triton.launch import Launch
    from ..prewarm import Step

log = logging.getLogger(__name__)


def start_compiling(
    settings: Settings, plugins: PluginManager, family: Any, config: Any, context: BuildContext, path: Path, timeline: Timeline
) -> Prewarm:
    """In the background; nothing to do on a CPU, and where a start like this one has compiled them all."""
    kernels = Prewarm()
    if context.device.type == "cuda":
        versions = {info.name: f"{info.distribution} {info.version}" for info in plugins.infos}
        mark = mark_of(settings, config, context.device, versions)
        if not mark.exists():
            steps = partial(launches_of, settings, plugins, family, config, context, path)
            kernels.start(steps, context.device, timeline, partial(remember, mark))
    return kernels


def launches_of(
    settings: Settings,
    plugins: PluginManager,
    family: Any,
    config: Any,
    context: BuildContext,
    path: Path,
    steps: Sequence[Step] | None = None,
) -> Iterator[list[Launch]]:
    """A list for each step, the first needed first. `steps`: instead of those that an engine will make."""
    from ..prewarm import record
    from .loading import LoadedModel

    model = without_memory(family, config, context)
    if model is None:
        return
    spec, dtype = model.spec, context.dtype
    drafts = draft_length(settings)
    max_drafts = drafts.max_k if drafts is not None else 0
    proposer = choose_proposer(settings, spec, plugins)
    if proposer is not None and proposer.loads:
        proposer = None  # its own model is not here; the target verifies as many drafts all the same
    slots = settings.scheduler.max_running or DEFAULT_SLOTS["cuda"]
    largest = Largest(
        settings.scheduler.prefill_tokens or DEFAULT_PREFILL_TOKENS["cuda"], slots, max_model_len(settings, spec), max_drafts
    )
    loaded = LoadedModel(model, context.device, dtype, 0, context.weight_precision, context, path)
    target = DraftTarget(settings, spec, dtype.itemsize)
    own = proposer.memory(target) if proposer is not None else DraftMemory()
    sizes = Sizes(slots, largest.context, max_drafts, 0)
    maker = PartsMaker(settings, loaded, plugins, sizes, proposer, own, None, place=META)
    yield from record(model, lambda: maker.make(1).programs, largest, steps)


def without_memory(family: Any, config: Any, context: BuildContext) -> Model | None:
    """The model on tensors without memory, not filled; None if it cannot be built so."""
    try:
        with torch.inference_mode():
            model: Model = family.build(config, replace(context, device=META))
    except Exception:
        log.debug("the model cannot be built without memory", exc_info=True)
        return None
    return model
