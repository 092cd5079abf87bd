"""Put an engine together: checkpoint → model → memory plan → pool, tables, attention, programs → engine.

The one place that knows which plugin objects the settings ask for. Used by the engine process and by `LLM`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
)
from .core.settings import Settings
from .core.slots import SlotTables
from .core.types import ModelInfo, ModelSpec, SpeculativeInfo
from .hub import ModelFiles, load_config
from .hub.cache import cache_folder
from .kernels import choose_ops, choose_precision, load_library
from .kernels.fixed_order import slowdown
from .layers.loading import load_weights
from .memory import plan_pages
from .step.programs import StepPrograms
from .step.synthetic import share_for

if TYPE_CHECKING:
    from .core.plugins import PluginManager
    from .core.plugins.registry import Entry
    from .kernels.native.library import Library

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DEFAULT_SLOTS = {"cpu": 64, "cuda": 256}

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    model: Model
    device: torch.device
    dtype: torch.dtype
    weight_bytes: int
    weight_precision: str
    library: Library | None = None
    """C kernels."""


def build_engine(settings: Settings, files: ModelFiles, plugins: PluginManager, progress: Progress | None = None) -> Engine:
    """Load the model and build an engine around it; `progress` gets a line for each stage, from another thread.

    Raises `CheckpointError`, `ConfigError`, `OutOfMemory`.
    """
    # OpenMP keeps a pool of workers for each thread that ever computed in parallel, and with more workers than cores all of
    # them sleep where they would spin: a step then takes twice as long. What loads must end before what serves begins.
    with ThreadPoolExecutor(1, "fluent-load") as loader:
        return loader.submit(_build_engine, settings, files, plugins, progress or (lambda line: None)).result()


def _build_engine(settings: Settings, files: ModelFiles, plugins: PluginManager, tell: Progress) -> Engine:
    started = time.perf_counter()
    loaded = load_model(settings, files, plugins)
    tell(f"loaded {loaded.weight_bytes / 1e6:.0f} MB of weights in {time.perf_counter() - started:.1f} s")
    if settings.engine.deterministic:
        tell(_slowdown(loaded))
    return assemble(settings, files.name, loaded, plugins)


def _slowdown(loaded: LoadedModel, rows: int = 8) -> str:
    with torch.inference_mode():
        plain, fixed = slowdown(loaded.model.matrices(), rows, loaded.dtype, loaded.device)
    products = f"the matrix products of a step of {rows} sequences take {fixed * 1e3:.1f} ms instead of {plain * 1e3:.1f}"
    return f"deterministic mode: {products} ({fixed / plain:.1f} ×, measured now)"


def load_model(settings: Settings, files: ModelFiles, plugins: PluginManager) -> LoadedModel:
    """Build the network that the checkpoint's config names, and fill it."""
    device = choose_device(settings.engine.device)
    dtype = choose_dtype(settings.model.dtype, device)
    if device.type == "cpu" and settings.engine.threads is not None:
        torch.set_num_threads(settings.engine.threads)
    config = load_config(files)
    family = plugins.registry("models").get(_architecture(config)).factory
    spec: ModelSpec = family.spec(config)
    check_speculation(settings, spec, plugins)
    precision = choose_precision(settings.model.weight_precision, device, dtype, settings.engine.deterministic)
    library = choose_library(settings, device)
    context = BuildContext(
        device=device,
        dtype=dtype,
        ops=choose_ops(device, settings.engine.deterministic, library),
        weight_precision=precision,
        max_positions=max_model_len(settings, spec) + positions_ahead(settings),
    )
    with torch.inference_mode():
        model: Model = family.build(config, context)
        reader = _reader(settings, files, plugins)
        checkpoint = reader(WeightsContext(files.path, settings, slots=model.weight_slots()))
        try:
            load_weights(model, checkpoint, device)
        finally:
            checkpoint.close()
    return LoadedModel(model, device, dtype, model.nbytes(), precision, library)


def assemble(settings: Settings, name: str, loaded: LoadedModel, plugins: PluginManager) -> Engine:
    """An engine around a loaded model."""
    spec, device = loaded.model.spec, loaded.device
    page_size = choose_page_size(settings, spec)
    kv_dtype = loaded.dtype if settings.kv.dtype == "auto" else _dtype(settings.kv.dtype)
    slots = settings.scheduler.max_running or _DEFAULT_SLOTS.get(device.type, 64)
    longest = max_model_len(settings, spec)

    drafts = draft_length(settings)
    max_drafts = drafts.max_k if drafts is not None else 0
    tables = SlotTables(slots, longest, page_size, spec.vocab_size, device, max_drafts=max_drafts)
    entry = plugins.registry("proposers").require(settings.speculative.method, spec) if drafts is not None else None
    draft_memory = _draft_memory(entry, spec, loaded.dtype)
    kv_spec = structs.replace(spec.kv, layers=spec.kv.layers + draft_memory.kv_layers)
    page_bytes = KVPool.bytes_per_page(kv_spec, page_size, kv_dtype) + draft_memory.bytes_per_page
    wanted, least = slots * tables.max_pages, tables.max_pages
    pages = plan_pages(settings.kv.memory, device, page_bytes, page_size, wanted=wanted, least=least)
    pool = KVPool(kv_spec, pages, page_size, kv_dtype, device)
    attention_spec = AttentionSpec(
        model=spec,
        device=device.type,
        dtype=_name(loaded.dtype),
        kv_dtype=_name(kv_dtype),
        page_size=page_size,
        deterministic=settings.engine.deterministic,
    )
    backend = _attention(settings, attention_spec, plugins)
    attention = backend(AttentionContext(attention_spec, pool, settings, loaded.library))

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
    )

    kv = KVCache(pages, page_size, settings.kv.prefix_cache, listen=plugins.observers.watches_kv)
    make_scheduler = plugins.registry("schedulers").get(settings.scheduler.policy).factory
    scheduler = make_scheduler(SchedulerContext(settings, kv, slots, longest, spec.eos_token_ids, max_drafts))
    info = ModelInfo(
        name=settings.model.served_name or name,
        spec=spec,
        max_model_len=longest,
        device=str(device),
        dtype=_name(loaded.dtype),
        weight_precision=loaded.weight_precision,
        memory={"weights": loaded.weight_bytes, "kv_pool": page_bytes * (pages + 1), "slots": tables.nbytes()},
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
def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"engine.device is {name!r}.", fix="Use auto, cpu, cuda or cuda:N.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"engine.device is {name!r}, but PyTorch sees no GPU.", fix="Use --device cpu, or run `fluent doctor`."
        )
    return device


def choose_library(settings: Settings, device: torch.device) -> Library | None:
    """The C kernels, where they have something to do; compiled now if they were not yet."""
    return load_library(cache_folder() / "kernels") if wants_library(settings, device) else None


def wants_library(settings: Settings, device: torch.device) -> bool:
    return device.type == "cpu" and settings.engine.native and not settings.engine.deterministic


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
    return supported[0].factory


__all__ = ["LoadedModel", "assemble", "build_engine", "choose_device", "choose_dtype", "load_model"]
