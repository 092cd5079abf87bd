"""Attention by FlashInfer's kernels: xqa decodes grouped heads, FlashAttention 3 prefills, grouped heads and expanded MLA."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from typing import TYPE_CHECKING

from fluentllm.core.hookspecs import hookimpl

if TYPE_CHECKING:
    from fluentllm.core.protocols import AttentionBackend, AttentionContext, AttentionSpec, Register

    from .compiling import Modules
    from .modules import Module

FLUENT_API_VERSION = 1

VERSION = "0.6.12"
"""The one whose functions these are; others may take other arguments."""
HOPPER = (9, 0)
ARCHITECTURE = "9.0a"
PAGE_SIZES = (16, 32, 64, 128)
DECODE_DIMS = (64, 128, 256)
MOST_GROUPED = 32
"""Query heads a KV head, in xqa's tile."""
PREFILL_DIMS = ((64, 64), (128, 128), (256, 256), (192, 128))
"""Of keys and values."""


class FlashInferPlugin:
    def __init__(self) -> None:
        self._modules: dict[tuple[Module, ...], Modules] = {}
        """What is loaded in this process, whoever made a backend for it."""

    @hookimpl
    def fluent_attention(self, register: Register) -> None:
        register("flashinfer", self._create, supports=_supports)

    def _create(self, context: AttentionContext) -> AttentionBackend:
        from .backend import FlashInferAttention, wanted_modules
        from .compiling import Modules

        wanted = wanted_modules(context)
        modules = self._modules.setdefault(wanted, Modules(wanted, ARCHITECTURE))
        modules.start()
        return FlashInferAttention(context, modules)


def _supports(spec: AttentionSpec) -> str | None:
    return _not_for(spec) or _not_installed() or _not_on_this_gpu()


def _not_for(spec: AttentionSpec) -> str | None:
    """Why it cannot serve such a model, whatever is installed."""
    kv = spec.model.kv
    if spec.device != "cuda":
        return f"it runs on NVIDIA GPUs, not on {spec.device}"
    if spec.deterministic:
        return "its prefill and its decode add in different orders, which deterministic mode forbids"
    if spec.dtype not in ("bfloat16", "float16") or spec.kv_dtype != spec.dtype:
        return f"it computes in bfloat16 or float16 over KV of the same type, not in {spec.dtype} over {spec.kv_dtype}"
    if kv.kind == "mla":
        return _not_for_mla(spec)
    return _not_for_gqa(spec) if kv.kind == "gqa" else f"it knows gqa and mla, not {kv.kind}"


def _not_for_gqa(spec: AttentionSpec) -> str | None:
    kv = spec.model.kv
    if (kv.head_dim, kv.v_head_dim) not in PREFILL_DIMS or kv.head_dim not in DECODE_DIMS:
        dims = ", ".join(map(str, DECODE_DIMS))
        return f"its kernels are for keys and values of {dims} values a head, not {kv.head_dim} and {kv.v_head_dim}"
    if "decode" in spec.phases and spec.model.heads > MOST_GROUPED * kv.heads:
        return f"its decode takes up to {MOST_GROUPED} query heads a KV head, not {spec.model.heads // kv.heads}"
    if spec.page_size not in PAGE_SIZES:
        return f"it reads pages of {', '.join(map(str, PAGE_SIZES))} tokens, not {spec.page_size} (kv.page_size)"
    return None


def _not_for_mla(spec: AttentionSpec) -> str | None:
    kv = spec.model.kv
    if "decode" in spec.phases:
        return (
            "its MLA decode plans each step on the host, with lengths that only the device knows, so it cannot be captured "
            "(its prefill can be had by itself: attention.prefill_backend)"
        )
    dims = kv.nope_dim + kv.rope_dim, kv.value_dim
    if dims not in PREFILL_DIMS:
        known = ", ".join(f"{keys} and {values}" for keys, values in PREFILL_DIMS)
        return f"its prefill is for keys and values of {known} values a head, not {dims[0]} and {dims[1]}"
    return None


def _not_installed() -> str | None:
    if importlib.util.find_spec("flashinfer") is None:
        return "FlashInfer is not installed (pip install 'fluentllm[cuda]')"
    try:
        found = metadata.version("flashinfer-python")
    except metadata.PackageNotFoundError:
        return "the package flashinfer has no metadata, so its version is not known"
    if found.split("+", maxsplit=1)[0] != VERSION:
        return f"it is written for FlashInfer {VERSION}, not {found} (pip install flashinfer-python=={VERSION})"
    return None


def _not_on_this_gpu() -> str | None:
    import torch

    capability = torch.cuda.get_device_capability()
    if capability != HOPPER:
        return f"its kernels are Hopper's (compute capability 9.0), not for {capability[0]}.{capability[1]}"
    return None


plugin = FlashInferPlugin()
"""What the entry point names."""
