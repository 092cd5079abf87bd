"""Put an engine together: checkpoint → model → memory plan → pool, tables, attention, programs → engine.

The one place that knows which plugin objects the settings ask for. Used by the engine process and by `LLM`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from msgspec import structs

from .core.draft_length import DraftLength
from .core.draft_watchdog import AcceptanceWatch
from .core.engine import Engine
from .core.errors import CheckpointError, ConfigError
from .core.executor import Executor
from .core.grammars import GrammarStore
from .core.kv.cache import KVCache
from .core.kv.pool import KVPool
from .core.protocols import (
    AttentionBackend,
    AttentionContext,
    AttentionSpec,
    BuildContext,
    Checkpoint,
    DraftContext,
    DraftMemory,
    DraftTarget,
    GrammarContext,
    Model,
    ProposerContext,
    SchedulerContext,
    WeightsContext,
    WeightSlot,
)
from .core.settings import Settings
from .core.slots import SlotTables
from .core.timeline import Timeline
from .core.types import KVSpec, ModelInfo, ModelSpec, SpeculativeInfo
from .devices import choose_device
from .hub import ModelFiles, load_config
from .kernels import choose_ops, choose_precision
from .kernels.fixed_order import slowdown
from .layers.loading import load_weights
from .memory import plan_pages, room_on_cpu, weights_too_large
from .rehearsal import Largest, measure
from .step.programs import StepPrograms
from .step.synthetic import share_for

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from .core.plugins import PluginManager
    from .core.plugins.registry import Entry

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GRAMMAR_BYTES = 64 * 2**20
"""Of the table of all grammars' states, where nothing else is said."""
_DEFAULT_SLOTS = {"cpu": 64, "cuda": 256}
_DEFAULT_PREFILL_TOKENS = {"cpu": 512, "cuda": 8192}

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    model: Model
    device: torch.device
    dtype: torch.dtype
    weight_bytes: int
    weight_precision: str
    context: BuildContext
    path: Path


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


def load_model(settings: Settings, files: ModelFiles, plugins: PluginManager, timeline: Timeline | None = None) -> LoadedModel:
    """Build the network that the checkpoint's config names, and fill it."""
    timeline = timeline or Timeline("engine")
    with timeline.stage("device"):
        device = choose_device(settings.engine.device)
    dtype = choose_dtype(settings.model.dtype, device)
    if device.type == "cpu" and settings.engine.threads is not None:
        torch.set_num_threads(settings.engine.threads)
    config = load_config(files)
    family = plugins.registry("models").get(_architecture(config)).factory
    spec: ModelSpec = family.spec(config)
    check_speculation(settings, spec, plugins, DraftTarget(settings, spec, dtype.itemsize, files.path))
    precision = choose_precision(settings.model.weight_precision, device, dtype, settings.engine.deterministic)
    context = BuildContext(
        device=device,
        dtype=dtype,
        ops=choose_ops(device, settings.engine.deterministic),
        weight_precision=precision,
        max_positions=max_model_len(settings, spec) + positions_ahead(settings),
    )
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
        slots = _slots_without_memory(family, config, context) if model is None else list(model.weight_slots())
        raise weights_too_large(slots, device, dtype, error) from None
    return LoadedModel(model, device, dtype, model.nbytes(), precision, context, files.path)


def _slots_without_memory(family: Any, config: Any, context: BuildContext) -> list[WeightSlot] | None:
    """What the model is made of, where there is no room to build it; None if it cannot be built on tensors without memory."""
    try:
        return list(family.build(config, replace(context, device=torch.device("meta"))).weight_slots())
    except Exception:
        return None


def assemble(
    settings: Settings, name: str, loaded: LoadedModel, plugins: PluginManager, timeline: Timeline | None = None
) -> Engine:
    """An engine around a loaded model."""
    timeline = timeline or Timeline("engine")
    spec, device = loaded.model.spec, loaded.device
    page_size = choose_page_size(settings, spec)
    kv_dtype = loaded.dtype if settings.kv.dtype == "auto" else _dtype(settings.kv.dtype)
    slots = settings.scheduler.max_running or _DEFAULT_SLOTS.get(device.type, 64)
    longest = max_model_len(settings, spec)

    drafts = draft_length(settings)
    max_drafts = drafts.max_k if drafts is not None else 0
    grammars = _grammars(settings, loaded, plugins)
    entry = plugins.registry("proposers").require(settings.speculative.method, spec) if drafts is not None else None
    draft_model = _draft_model(entry, settings, loaded, plugins)
    draft_bytes = draft_model.nbytes() if draft_model is not None else 0
    draft_memory = _draft_memory(entry, DraftTarget(settings, spec, loaded.dtype.itemsize))
    kv_spec = structs.replace(spec.kv, layers=spec.kv.layers + draft_memory.kv_layers)
    page_bytes = KVPool.bytes_per_page(kv_spec, page_size, kv_dtype) + draft_memory.bytes_per_page
    draft_kv = draft_memory.kv
    if draft_kv is not None:
        page_bytes += KVPool.bytes_per_page(draft_kv, page_size, kv_dtype)
    attention_spec = AttentionSpec(
        model=spec,
        device=device.type,
        dtype=_name(loaded.dtype),
        kv_dtype=_name(kv_dtype),
        page_size=page_size,
        deterministic=settings.engine.deterministic,
    )

    def make_tables(place: torch.device) -> SlotTables:
        return SlotTables(
            slots, longest, page_size, spec.vocab_size, place, max_drafts=max_drafts, grammar_states=grammars.states
        )

    def make_attention(attention_spec: AttentionSpec, pages: int, kv: KVSpec, *, or_any: bool = False) -> AttentionBackend:
        backend = _attention(settings, attention_spec, plugins, or_any=or_any)
        made: AttentionBackend = backend(
            AttentionContext(attention_spec, KVPool(kv, pages, page_size, kv_dtype, device), settings)
        )
        return made

    def make_programs(pages: int) -> tuple[StepPrograms, SlotTables]:
        tables = make_tables(device)
        attention = draft_attention = make_attention(attention_spec, pages, kv_spec)
        if draft_kv is not None:
            draft_spec = replace(attention_spec, model=structs.replace(spec, kv=draft_kv))
            draft_attention = make_attention(draft_spec, pages, draft_kv, or_any=True)
        proposer = None
        if entry is not None:
            dtype = _name(loaded.dtype)
            proposer = entry.factory(
                ProposerContext(settings, loaded.model, tables, draft_attention, max_drafts, pages, dtype, draft_model)
            )
        capturable = all(getattr(one, "capturable", False) for one in (attention, draft_attention))
        programs = StepPrograms(
            loaded.model,
            attention,
            tables,
            proposer,
            proposer_name=f"proposer {entry.name!r} of plugin {entry.plugin!r}" if entry is not None else "",
            synthetic=synthetic_share(settings, max_drafts),
            graphs=device.type == "cuda" and settings.engine.cuda_graphs and capturable,
        )
        return programs, tables

    prefill_tokens = settings.scheduler.prefill_tokens or _DEFAULT_PREFILL_TOKENS.get(device.type, 512)
    if device.type == "cuda":
        largest = Largest(prefill_tokens, slots, longest, max_drafts, whole_context=spec.kv.kind == "mla")
        with timeline.stage("largest steps"):
            room = measure(make_programs, largest, device, settings.engine.memory_share)
    else:
        room = room_on_cpu(device)
    least = make_tables(torch.device("meta")).max_pages
    with timeline.stage("pool"):
        pages = plan_pages(settings.kv.memory, room, page_bytes, page_size, wanted=slots * least, least=least)
        programs, tables = make_programs(pages)

    kv = KVCache(pages, page_size, settings.kv.prefix_cache, listen=plugins.observers.watches_kv)
    make_scheduler = plugins.registry("schedulers").get(settings.scheduler.policy).factory
    scheduler = make_scheduler(SchedulerContext(settings, kv, slots, longest, spec.eos_token_ids, max_drafts, prefill_tokens))
    memory = {"weights": loaded.weight_bytes + draft_bytes, "kv_pool": page_bytes * (pages + 1), "slots": tables.nbytes()}
    if room.workspace:
        memory["workspace"] = room.workspace
    info = ModelInfo(
        name=settings.model.served_name or name,
        spec=spec,
        max_model_len=longest,
        device=str(device),
        dtype=_name(loaded.dtype),
        memory=memory,
        kv_tokens=pages * page_size,
        page_size=page_size,
        slots=slots,
        speculative=_speculative_info(settings, max_drafts) if drafts is not None else None,
    )
    return Engine(
        info=info,
        scheduler=scheduler,
        executor=Executor(programs, tables, threads=settings.engine.threads),
        kv=kv,
        overlap_depth=settings.engine.overlap_depth,
        draft_length=drafts,
        observers=plugins.observers,
        calls=plugins.calls(),
        grammars=grammars,
    )


# ------------------------------------------------------------------------------------------------------------------ choices
def draft_length(settings: Settings) -> DraftLength | None:
    """None if speculation is off, by its method or a k of 0. Raises `ConfigError` for a fixed k beyond `max_k`."""
    wanted = settings.speculative
    if wanted.method == "none":
        return None
    if wanted.k != "auto" and not 0 <= wanted.k <= wanted.max_k:
        raise ConfigError(
            f"speculative.k is {wanted.k}, and speculative.max_k {wanted.max_k}.",
            fix=f"Use auto or 0 … {wanted.max_k}, or raise max_k.",
            param="speculative.k",
        )
    if wanted.k == 0:
        return None
    # Acceptance at random says nothing of the proposer.
    least = wanted.min_acceptance if wanted.synthetic_acceptance is None else 0.0
    return DraftLength(wanted.k, wanted.max_k, AcceptanceWatch(least, f"proposer {wanted.method!r}"))


def check_speculation(settings: Settings, spec: ModelSpec, plugins: PluginManager, target: DraftTarget) -> None:
    """Before anything is loaded. Raises `ConfigError` for what cannot work with this model."""
    drafts = draft_length(settings)
    synthetic_share(settings, drafts.max_k if drafts is not None else 0)
    if drafts is not None:
        _draft_memory(plugins.registry("proposers").require(settings.speculative.method, spec), target)


def synthetic_share(settings: Settings, max_drafts: int) -> float | None:
    """Share of drafts to accept at random; None: by the rules. Raises `ConfigError` for a length that so few drafts cannot
    have."""
    length = settings.speculative.synthetic_acceptance
    if length is None:
        return None
    if length > max_drafts + 1:
        raise ConfigError(
            f"speculative.synthetic_acceptance is {length}, but {max_drafts} drafts and the target's own are {max_drafts + 1}.",
            fix="Lower it, raise speculative.k or max_k, or choose a speculative.method.",
            param="speculative.synthetic_acceptance",
        )
    return share_for(length, max_drafts)


def _speculative_info(settings: Settings, max_drafts: int) -> SpeculativeInfo:
    chosen = settings.speculative
    return SpeculativeInfo(method=chosen.method, k=chosen.k, max_k=max_drafts, synthetic_acceptance=chosen.synthetic_acceptance)


def positions_ahead(settings: Settings) -> int:
    """How far behind the end of the longest context drafts may stand."""
    drafts = draft_length(settings)
    return 2 * drafts.max_k + 1 if drafts is not None else 0


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return _dtype(name)


def choose_page_size(settings: Settings, spec: ModelSpec) -> int:
    return settings.kv.page_size or (64 if spec.kv.kind == "mla" else 16)


def max_model_len(settings: Settings, spec: ModelSpec) -> int:
    wanted = settings.model.max_model_len
    if wanted is None:
        return spec.max_position
    if wanted > spec.max_position:
        raise ConfigError(
            f"model.max_model_len is {wanted}, but the checkpoint's context is {spec.max_position} tokens.",
            fix=f"Use at most {spec.max_position}.",
        )
    return wanted


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ConfigError(f"dtype {name!r} is not available here.", fix=f"Use one of {', '.join(_DTYPES)}.")
    return _DTYPES[name]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _architecture(config: Any) -> str:
    names = config.get("architectures") or []
    if not names:
        raise CheckpointError(
            "config.json names no architecture.", fix='Add "architectures": ["LlamaForCausalLM"] or the like.'
        )
    return str(names[0])


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
        raise CheckpointError(f"No reader can open {path} ({reasons}).", fix="Give a folder with .safetensors, or a .gguf.")
    return supported[0].factory


def _draft_memory(entry: Entry | None, target: DraftTarget) -> DraftMemory:
    ask: Callable[[DraftTarget], DraftMemory] | None = getattr(entry.factory, "memory", None) if entry is not None else None
    return ask(target) if ask is not None else DraftMemory()


def _draft_model(entry: Entry | None, settings: Settings, loaded: LoadedModel, plugins: PluginManager) -> Any:
    """The proposer's own, if it has one."""
    load: Callable[[DraftContext], Any] | None = getattr(entry.factory, "load", None) if entry is not None else None
    if load is None:
        return None

    def open_checkpoint(path: Path, slots: Iterable[WeightSlot]) -> Checkpoint:
        registry = plugins.registry("weights")
        dummy = settings.model.load_format == "dummy" and not registry.supported(path)
        factory = registry.get("dummy").factory if dummy else _reader_for(path, plugins)
        checkpoint: Checkpoint = factory(WeightsContext(path, settings, slots=slots))
        return checkpoint

    with torch.inference_mode():
        return load(DraftContext(settings, loaded.model, loaded.context, open_checkpoint))


def _grammars(settings: Settings, loaded: LoadedModel, plugins: PluginManager) -> GrammarStore:
    registry, spec = plugins.registry("grammars"), loaded.model.spec
    context = GrammarContext(settings, spec, loaded.path)
    compilers = {entry.name: partial(entry.factory, context) for entry in registry.supported(spec)}
    states = settings.grammar.states or GRAMMAR_BYTES // (4 * spec.vocab_size)
    return GrammarStore(states if compilers else 0, compilers)


def _attention(
    settings: Settings, spec: AttentionSpec, plugins: PluginManager, *, or_any: bool = False
) -> Callable[[AttentionContext], Any]:
    """`or_any`: where the one that was asked for cannot do it, take another that can."""
    registry = plugins.registry("attention")
    name = settings.attention.backend
    if name != "auto":
        entry = registry.get(name)
        reason = entry.supports(spec)
        if reason is not None and not or_any:
            raise ConfigError(
                f"attention.backend {name!r} cannot serve this model: {reason}.", fix="Use attention.backend=auto."
            )
        if reason is None:
            return entry.factory
    supported = registry.supported(spec)
    if not supported:
        raise ConfigError(f"No attention backend supports this model: {registry.why_not(spec)}.", fix="Run `fluent doctor`.")
    # The plain backend serves everything; one of its own device comes first.
    return min(supported, key=lambda entry: entry.name == "torch").factory


__all__ = ["LoadedModel", "assemble", "build_engine", "choose_device", "choose_dtype", "load_model"]
