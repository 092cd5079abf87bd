"""Attention in plain torch, on any device: the backend of the CPU, and the reference of all others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fluentllm.core.hookspecs import hookimpl
from fluentllm.core.kv.formats import FP8, quantised_latents

if TYPE_CHECKING:
    from fluentllm.core.protocols import AttentionBackend, AttentionContext, AttentionSpec, Register

FLUENT_API_VERSION = 1


class TorchAttentionPlugin:
    @hookimpl
    def fluent_attention(self, register: Register) -> None:
        register("torch", _create, supports=_supports)


def _supports(spec: AttentionSpec) -> str | None:
    if spec.model.kv.kind not in ("gqa", "mla"):
        return f"it knows gqa and mla, not {spec.model.kv.kind}"
    if quantised_latents(spec.model.kv.kind, spec.kv_dtype):
        return "MLA over an FP8 cache is the backend mla_fp8"
    if spec.kv_dtype not in ("float32", "bfloat16", "float16", FP8):
        return f"it reads KV in float32, bfloat16, float16 or {FP8}, not {spec.kv_dtype}"
    return None


def _create(context: AttentionContext) -> AttentionBackend:
    if context.spec.deterministic:
        from .fixed import FixedOrderAttention

        return FixedOrderAttention(context)
    from .backend import TorchAttention

    return TorchAttention(context)


plugin = TorchAttentionPlugin()
