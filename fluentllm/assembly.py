"""Put an engine together: checkpoint → model → memory plan → pool, tables, attention, programs → engine.

The one place that knows which plugin objects the settings ask for. Used by the engine process and by `LLM`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from msgspec import structs

from .core.draft_length import DraftLength
from .core.engine import Engine
from .core.errors import CheckpointError, ConfigError
from .core.executor import Executor
from .core.kv.cache import KVCache
from .core.kv.pool import KVPool
from .core.protocols import (
    AttentionContext,
    AttentionSpec,
    BuildContext,
    DraftMemory,
    Model,
    ProposerContext,
    SchedulerContext,
    WeightsContext,
    WeightSlot,
)
from .core.settings import Settings
from .core.slots import SlotTables
from .core.timeline import Timeline
from .core.types import ModelInfo, ModelSpec, SpeculativeInfo
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
    from .core.plugins import PluginManager
    from .core.plugins.registry import Entry

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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
    check_speculation(settings, spec, plugins)
    precision = choose_precision(
        settings.model.weight_precision, device, dtype, settings.engine.deterministic, fp8_checkpoint=_is_fp8(config)
    )
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
    return LoadedModel(model, device, dtype, model.nbytes(), precision)


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
    entry = plugins.registry("proposers").require(settings.speculative.method, spec) if drafts is not None else None
    draft_memory = _draft_memory(entry, spec, loaded.dtype)
    kv_spec = structs.replace(spec.kv, layers=spec.kv.layers + draft_memory.kv_layers)
    page_bytes = KVPool.bytes_per_page(kv_spec, page_size, kv_dtype) + draft_memory.bytes_per_page
    attention_spec = AttentionSpec(
        model=spec,
        device=device.type,
        dtype=_name(loaded.dtype),
        kv_dtype=_name(kv_dtype),
        page_size=page_size,
        deterministic=settings.engine.deterministic,
    )
    backend = _attention(settings, attention_spec, plugins)

    def make_tables(place: torch.device) -> SlotTables:
        return SlotTables(slots, longest, page_size, spec.vocab_size, place, max_drafts=max_drafts)

    def make_programs(pages: int) -> tuple[StepPrograms, SlotTables]:
        pool = KVPool(kv_spec, pages, page_size, kv_dtype, device)
        tables = make_tables(device)
        attention = backend(AttentionContext(attention_spec, pool, settings))
        proposer = None
        if entry is not None:
            dtype = _name(loaded.dtype)
            proposer = entry.factory(ProposerContext(settings, loaded.model, tables, attention, max_drafts, pages, dtype))
        programs = StepPrograms(
            loaded.model,
            attention,
            tables,
            proposer,
            proposer_name=f"proposer {entry.name!r} of plugin {entry.plugin!r}" if entry is not None else "",
            synthetic=synthetic_share(settings, max_drafts),
            graphs=device.type == "cuda" and settings.engine.cuda_graphs and getattr(attention, "capturable", False),
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
    memory = {"weights": loaded.weight_bytes, "kv_pool": page_bytes * (pages + 1), "slots": tables.nbytes()}
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
    return DraftLength(wanted.k, wanted.max_k) if wanted.k != 0 else None


def check_speculation(settings: Settings, spec: ModelSpec, plugins: PluginManager) -> None:
    """Before anything is loaded. Raises `ConfigError` for what cannot work with this model."""
    drafts = draft_length(settings)
    synthetic_share(settings, drafts.max_k if drafts is not None else 0)
    if drafts is not None:
        plugins.registry("proposers").require(settings.speculative.method, spec)


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


def _is_fp8(config: Any) -> bool:
    """Are the checkpoint's matrices FP8? In which blocks is the reader's business."""
    return (config.get("quantization_config") or {}).get("quant_method") == "fp8"


def _reader(settings: Settings, files: ModelFiles, plugins: PluginManager) -> Callable[[WeightsContext], Any]:
    registry = plugins.registry("weights")
    if settings.model.load_format != "auto":
        factory: Callable[[WeightsContext], Any] = registry.get(settings.model.load_format).factory
        return factory
    supported = registry.supported(files.path)
    if not supported:
        reasons = "; ".join(f"{name}: {why}" for name, why in registry.why_not(files.path).items())
        raise CheckpointError(
            f"No reader can open {files.path} ({reasons}).", fix="Give a folder with .safetensors, or a .gguf."
        )
    return supported[0].factory


def _draft_memory(entry: Entry | None, spec: ModelSpec, dtype: torch.dtype) -> DraftMemory:
    ask: Callable[[ModelSpec, int], DraftMemory] | None = getattr(entry.factory, "memory", None) if entry is not None else None
    return ask(spec, dtype.itemsize) if ask is not None else DraftMemory()


def _attention(settings: Settings, spec: AttentionSpec, plugins: PluginManager) -> Callable[[AttentionContext], Any]:
    registry = plugins.registry("attention")
    name = settings.attention.backend
    if name != "auto":
        entry = registry.get(name)
        reason = entry.supports(spec)
        if reason is not None:
            raise ConfigError(
                f"attention.backend {name!r} cannot serve this model: {reason}.", fix="Use attention.backend=auto."
            )
        return entry.factory
    supported = registry.supported(spec)
    if not supported:
        raise ConfigError(f"No attention backend supports this model: {registry.why_not(spec)}.", fix="Run `fluent doctor`.")
    # The plain backend serves everything; one of its own device comes first.
    return min(supported, key=lambda entry: entry.name == "torch").factory


__all__ = ["LoadedModel", "assemble", "build_engine", "choose_device", "choose_dtype", "load_model"]
