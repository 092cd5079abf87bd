"""Attention in plain torch, on any device: the backend of the CPU, and the reference of all others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fluentllm.core.hookspecs import hookimpl

if TYPE_CHECKING:
    from fluentllm.core.protocols import AttentionBackend, AttentionContext, AttentionSpec, Register

FLUENT_API_VERSION = 1


class TorchAttentionPlugin:
    @hookimpl
    def fluent_attention(self, register: Register) -> None:
        register("torch", _create, supports=_supports)


def _supports(spec: AttentionSpec) -> str | None:
    if spec.kv_dtype not in ("float32", "bfloat16", "float16"):
        return f"it reads KV in float32, bfloat16 or float16, not {spec.kv_dtype}"
    if spec.model.kv.kind not in ("gqa", "mla"):
        return f"it knows gqa and mla, not {spec.model.kv.kind}"
    return None


def _create(context: AttentionContext) -> AttentionBackend:
    if context.spec.deterministic:
        from .fixed import FixedOrderAttention

        return FixedOrderAttention(context)
    from .backend import TorchAttention

    return TorchAttention(context)


plugin = TorchAttentionPlugin()
