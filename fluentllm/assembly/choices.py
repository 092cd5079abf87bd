"""From settings to values: lengths, dtypes, speculation; refused where they cannot work with the model."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from ..core.draft_length import DraftLength
from ..core.draft_watchdog import AcceptanceWatch
from ..core.errors import CheckpointError, ConfigError
from ..core.kv.formats import SETTINGS as KV_FORMATS
from ..core.types import Drafting, SpeculativeInfo
from ..hub.cache import cache_folder
from ..kernels import load_library
from ..step.synthetic import share_for

if TYPE_CHECKING:
    from ..core.settings import Settings
    from ..core.types import ModelSpec
    from ..kernels.native.library import Library

log = logging.getLogger(__name__)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_KV_DTYPES = {name: getattr(torch, kept) for name, kept in KV_FORMATS.items()}
DEFAULT_SLOTS = {"cpu": 64, "cuda": 256}
DEFAULT_PREFILL_TOKENS = {"cpu": 512, "cuda": 8192}
DEFAULT_STEP_RATIO = {"cuda": 4.0}
DEFAULT_PAGE_SIZE = {"mla": 64, "gqa": 16}
"""64: what the MLA kernels read. Grouped heads read any; `benchmarks/kernels/attention.py` compares them."""


def choose_library(settings: Settings, device: torch.device) -> Library | None:
    """The C kernels, where they have something to do; compiled now if they were not yet."""
    return load_library(cache_folder() / "kernels") if wants_library(settings, device) else None


def wants_library(settings: Settings, device: torch.device) -> bool:
    return device.type == "cpu" and settings.engine.native and not settings.engine.deterministic


def draft_length(settings: Settings, *, eager: bool = False) -> DraftLength | None:
    """None if speculation is off, by its method or a k of 0. `eager`: programs are not captured. Raises `ConfigError` as
    `synthetic_share`."""
    wanted = settings.speculative
    if wanted.method == "none" or wanted.k == 0:
        return None
    # Acceptance at random says nothing of the proposer.
    least = wanted.min_acceptance if wanted.synthetic_acceptance is None else 0.0
    watch = AcceptanceWatch(least, f"proposer {wanted.method!r}")
    max_k = wanted.max_k if wanted.k == "auto" else wanted.k
    return DraftLength(wanted.k, max_k, watch, eager=eager, synthetic=synthetic_share(settings, max_k))


def draftings(lengths: DraftLength | None) -> list[Drafting]:
    """What a step may draft, the likeliest first."""
    if lengths is None:
        return [Drafting()]
    if lengths.fixed is not None:
        return [Drafting(lengths.fixed, lengths.fixed)]
    return [Drafting(), Drafting(0, 1, True), *(Drafting(k, k) for k in range(1, lengths.max_k + 1))]


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


def speculative_info(settings: Settings, max_drafts: int) -> SpeculativeInfo:
    chosen = settings.speculative
    info = SpeculativeInfo(method=chosen.method, k=chosen.k, max_k=max_drafts, synthetic_acceptance=chosen.synthetic_acceptance)
    if info.synthetic is not None:
        log.warning("%s", info.synthetic)
    return info


def positions_ahead(settings: Settings) -> int:
    """How far behind the end of the longest context drafts may stand."""
    drafts = draft_length(settings)
    return 2 * drafts.max_k + 1 if drafts is not None else 0


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return dtype_named(name)


def choose_kv_dtype(settings: Settings, dtype: torch.dtype) -> torch.dtype:
    """`dtype`: of the activations."""
    chosen: torch.dtype = _KV_DTYPES.get(settings.kv.dtype, dtype)
    return chosen


def choose_page_size(settings: Settings, spec: ModelSpec) -> int:
    return settings.kv.page_size or DEFAULT_PAGE_SIZE[spec.kv.kind]


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


def dtype_named(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ConfigError(f"dtype {name!r} is not available here.", fix=f"Use one of {', '.join(_DTYPES)}.")
    return _DTYPES[name]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def architecture_of(config: Any) -> str:
    names = config.get("architectures") or []
    if not names:
        raise CheckpointError(
            "config.json names no architecture.", fix='Add "architectures": ["LlamaForCausalLM"] or the like.'
        )
    return str(names[0])


def is_fp8(config: Any) -> bool:
    """Are the checkpoint's matrices FP8? In which blocks is the reader's business."""
    return (config.get("quantization_config") or {}).get("quant_method") == "fp8"
