"""Build an engine: model, memory plan, step, cache, scheduler. Used by the engine process and by `LLM`."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import torch
from msgspec import structs

from ..core.engine import Engine
from ..core.errors import ConfigError
from ..core.executor import Executor
from ..core.grammars import GrammarStore
from ..core.handoff import HandoffContext, Handoffs
from ..core.kv.cache import KVCache
from ..core.prefill_budget import PrefillBudget
from ..core.preparation import Preparation
from ..core.protocols import DraftMemory, DraftTarget, GrammarContext, SchedulerContext
from ..core.timeline import Timeline
from ..core.transport import TransportSpec
from ..core.types import ModelInfo
from ..kernels.fixed_order import slowdown
from ..memory import PoolShape, plan_pages, room_on_cpu
from ..rehearsal import Largest, measure
from ..transfer.layout import memory_of
from .choices import (
    DEFAULT_PREFILL_TOKENS,
    DEFAULT_SLOTS,
    DEFAULT_STEP_RATIO,
    draft_length,
    draftings,
    max_model_len,
    name_of,
    speculative_info,
)
from .loading import LoadedModel, load_draft_model, load_model
from .proposers import choose_proposer
from .step import Parts, PartsMaker, Sizes

if TYPE_CHECKING:
    from ..core.plugins import PluginManager
    from ..core.settings import Settings
    from ..hub import ModelFiles

GRAMMAR_BYTES = 64 * 2**20
"""Of the table of all grammars' states, where nothing else is said."""

Progress = Callable[[str], None]


def build_engine(
    settings: Settings,
    files: ModelFiles,
    plugins: PluginManager,
    progress: Progress | None = None,
    timeline: Timeline | None = None,
) -> Engine:
    """Load the model and build an engine around it; `progress` gets a line for each stage, from another thread, and `timeline`
    the stages.

    Raises `CheckpointError`, `ConfigError`, `OutOfMemory`.
    """
    # OpenMP keeps a pool of workers for each thread that ever computed in parallel, and with more workers than cores all of
    # them sleep where they would spin: a step then takes twice as long. What loads must end before what serves begins.
    with ThreadPoolExecutor(1, "fluent-load") as loader:
        tell, timeline = progress or (lambda line: None), timeline or Timeline("engine")
        return loader.submit(_build_engine, settings, files, plugins, tell, timeline).result()


def _build_engine(settings: Settings, files: ModelFiles, plugins: PluginManager, tell: Progress, timeline: Timeline) -> Engine:
    started = time.perf_counter()
    loaded = load_model(settings, files, plugins, timeline)
    tell(f"loaded {loaded.weight_bytes / 1e6:.0f} MB of weights in {time.perf_counter() - started:.1f} s")
    if settings.engine.deterministic:
        tell(_slowdown(loaded))
    engine = assemble(settings, files.name, loaded, plugins, timeline)
    engine.info = structs.replace(engine.info, startup=tuple(timeline.stages))
    return engine


def _slowdown(loaded: LoadedModel, rows: int = 8) -> str:
    with torch.inference_mode():
        plain, fixed = slowdown(loaded.model.matrices(), rows, loaded.dtype, loaded.device)
    products = f"the matrix products of a step of {rows} sequences take {fixed * 1e3:.1f} ms instead of {plain * 1e3:.1f}"
    return f"deterministic mode: {products} ({fixed / plain:.1f} ×, measured now)"


def assemble(
    settings: Settings, name: str, loaded: LoadedModel, plugins: PluginManager, timeline: Timeline | None = None
) -> Engine:
    """An engine around a loaded model."""
    timeline = timeline or Timeline("engine")
    spec, device = loaded.model.spec, loaded.device
    slots = settings.scheduler.max_running or DEFAULT_SLOTS.get(device.type, 64)
    prefill_tokens = settings.scheduler.prefill_tokens or DEFAULT_PREFILL_TOKENS.get(device.type, 512)
    longest = max_model_len(settings, spec)

    drafts = draft_length(settings, eager=device.type == "cpu")
    max_drafts = drafts.max_k if drafts is not None else 0
    proposer, draft_model, draft_bytes, own = choose_proposer(settings, spec, plugins), None, 0, DraftMemory()
    if proposer is not None:
        draft_model, draft_bytes = load_draft_model(proposer, settings, loaded, plugins)
        own = proposer.memory(DraftTarget(settings, spec, loaded.dtype.itemsize))
    grammars = _grammars(settings, loaded, plugins)
    sizes = Sizes(slots, longest, max_drafts, grammars.states, token_masks=grammars.offered)
    maker = PartsMaker(settings, loaded, plugins, sizes, proposer, own, draft_model)

    least = maker.tables(torch.device("meta")).max_pages
    if device.type == "cuda":
        expanded = spec.kv.kind == "mla"
        largest = Largest(prefill_tokens, slots, longest, max_drafts, whole_context=expanded, grammars=grammars.offered)
        with timeline.stage("kernels awaited"):
            loaded.kernels.wait()
        with timeline.stage("largest steps"):
            pool = (least + 1) * maker.page_bytes if settings.kv.memory is None else 0
            room = measure(maker.make, largest, device, settings.engine.memory_share, pool)
    else:
        room = room_on_cpu(device)
    with timeline.stage("pool"):
        shape = PoolShape(maker.page_bytes, maker.page_size, wanted=slots * least, least=least, drafts=max_drafts)
        pages = plan_pages(settings.kv.memory, room, shape)
        parts = maker.make(pages)
    handoffs = _handoffs(settings, loaded, plugins, parts, own.kv_layers)
    if handoffs is not None and handoffs.watcher is not None:
        parts.programs.watch(handoffs.watcher)

    kv = KVCache(pages, maker.page_size, settings.kv.prefix_cache, listen=plugins.observers.watches_kv)
    ratio = settings.scheduler.max_step_ratio or DEFAULT_STEP_RATIO.get(device.type)
    budget = PrefillBudget(prefill_tokens, ratio, padded=device.type == "cuda")
    make_scheduler = plugins.registry("schedulers").get(settings.scheduler.policy).factory
    scheduler = make_scheduler(SchedulerContext(settings, kv, slots, longest, spec.eos_token_ids, max_drafts, budget))
    if settings.disaggregation.role == "decode" and not hasattr(scheduler, "resume"):
        raise ConfigError(
            f"The scheduling policy {settings.scheduler.policy!r} cannot resume prompts that were computed elsewhere.",
            fix="Use scheduler.policy=fcfs on decode engines.",
            param="scheduler.policy",
        )
    memory = {
        "weights": loaded.weight_bytes + draft_bytes,
        "kv_pool": maker.page_bytes * (pages + 1),
        "slots": parts.tables.nbytes(),
    }
    if room.workspace:
        memory["workspace"] = room.workspace
    info = ModelInfo(
        name=settings.model.served_name or name,
        spec=spec,
        max_model_len=longest,
        device=str(device),
        dtype=name_of(loaded.dtype),
        weight_precision=loaded.weight_precision,
        memory=memory,
        kv_tokens=pages * maker.page_size,
        page_size=maker.page_size,
        slots=slots,
        kv_dtype=name_of(maker.kv_dtype),
        speculative=speculative_info(settings, max_drafts) if drafts is not None else None,
        handoff=handoffs.door if handoffs is not None else None,
    )
    executor = Executor(parts.programs, parts.tables, threads=settings.engine.threads)
    ahead = settings.engine.capture_when_idle and parts.programs.captures
    return Engine(
        info=info,
        scheduler=scheduler,
        executor=executor,
        kv=kv,
        overlap_depth=settings.engine.overlap_depth,
        draft_length=drafts,
        prefill_budget=budget,
        observers=plugins.observers,
        calls=plugins.calls(),
        grammars=grammars,
        handoffs=handoffs,
        preparation=Preparation(executor.prepare, slots, draftings(drafts)) if ahead else None,
    )


def _handoffs(
    settings: Settings, loaded: LoadedModel, plugins: PluginManager, parts: Parts, draft_layers: int
) -> Handoffs | None:
    """What hands requests over to or from other engines; None for an engine that does all itself."""
    chosen = settings.disaggregation
    if chosen.role == "both":
        return None
    spec, draft_pool = TransportSpec(device=loaded.device.type), parts.draft_pool
    # A layer of the proposer's own pool, whose pages have the same numbers, is something more that it keeps for each page.
    own_kv = [layer for tensor in memory_of(draft_pool) for layer in tensor] if draft_pool is not None else []
    transport = plugins.registry("kv_transports").require(chosen.transport, spec)
    context = HandoffContext(
        settings=settings,
        role=chosen.role,
        model=loaded.fingerprint,
        pool=parts.pool,
        draft_layers=draft_layers,
        make_transport=transport.factory,
        page_states=(*parts.page_states, *own_kv),
        speculative=settings.speculative.method if parts.programs.proposer is not None else "none",
    )
    handoffs: Handoffs = plugins.registry("handoffs").get(chosen.method).factory(context)
    return handoffs


def _grammars(settings: Settings, loaded: LoadedModel, plugins: PluginManager) -> GrammarStore:
    registry, spec = plugins.registry("grammars"), loaded.model.spec
    context = GrammarContext(settings, spec, loaded.path)
    entries = registry.supported(spec)
    compilers = {entry.name: partial(entry.factory, context) for entry in entries}
    states = settings.grammar.states or GRAMMAR_BYTES // (4 * spec.vocab_size)
    tables = any(getattr(entry.factory, "tables", True) for entry in entries)
    return GrammarStore(states if tables else 0, compilers, spec.vocab_size, registry.why_not(spec))
