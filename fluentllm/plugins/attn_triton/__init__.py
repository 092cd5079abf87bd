"""Attention in Triton kernels that read lengths and page tables on the device: the GPU's own backend, capturable in decode."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fluentllm.core.hookspecs import hookimpl

if TYPE_CHECKING:
    from fluentllm.core.protocols import AttentionBackend, AttentionContext, AttentionSpec, Register

FLUENT_API_VERSION = 1

PAGE_SIZES = (16, 32, 64, 128)
MOST_VALUES = 256
"""A head's, in the tiles of the kernels."""
MOST_LATENT = 512
"""Values of a latent, in the tiles of deterministic mode."""


class TritonAttentionPlugin:
    @hookimpl
    def fluent_attention(self, register: Register) -> None:
        register("triton", _create, supports=_supports)


def _supports(spec: AttentionSpec) -> str | None:
    kv = spec.model.kv
    if spec.device != "cuda":
        return f"it runs on NVIDIA GPUs, not on {spec.device}"
    if spec.page_size not in PAGE_SIZES:
        return f"it reads pages of {', '.join(map(str, PAGE_SIZES))} tokens, not {spec.page_size} (kv.page_size)"
    if kv.kind == "gqa":
        return _supports_gqa(spec)
    if kv.kind == "mla":
        return _supports_mla(spec) if not spec.deterministic else _supports_fixed_mla(spec)
    return f"it knows gqa and mla, not {kv.kind}"


def _supports_gqa(spec: AttentionSpec) -> str | None:
    kv = spec.model.kv
    if spec.kv_dtype not in ("float32", "bfloat16", "float16", "float8_e4m3fn"):
        return f"it reads KV in float32, bfloat16, float16 or float8_e4m3fn, not {spec.kv_dtype}"
    if max(kv.head_dim, kv.v_head_dim) > MOST_VALUES:
        return f"it has tiles for heads of up to {MOST_VALUES} values, not {max(kv.head_dim, kv.v_head_dim)}"
    return None


def _supports_mla(spec: AttentionSpec) -> str | None:
    kv = spec.model.kv
    if spec.dtype != "bfloat16" or spec.kv_dtype != "bfloat16":
        return f"its MLA decode computes in bfloat16 over a bfloat16 cache, not {spec.dtype} over {spec.kv_dtype}"
    if (kv.latent_dim, kv.rope_dim) != (512, 64):
        return f"its MLA decode is built for latents of 512 + 64 values, not {kv.latent_dim} + {kv.rope_dim}"
    if spec.page_size != 64:
        return f"its MLA decode reads pages of 64 tokens, not {spec.page_size}: set kv.page_size: 64"

    import torch

    capability = torch.cuda.get_device_capability()
    if capability[0] != 9:
        return f"its MLA decode is built for Hopper (compute capability 9.0), not {capability[0]}.{capability[1]}"
    return None


def _supports_fixed_mla(spec: AttentionSpec) -> str | None:
    """Deterministic mode has one kernel for grouped heads and for absorbed MLA."""
    if spec.kv_dtype not in ("float32", "bfloat16", "float16"):
        return f"in deterministic mode it reads latents in float32, bfloat16 or float16, not {spec.kv_dtype}"
    if spec.model.kv.latent_dim > MOST_LATENT:
        return f"it has tiles for latents of up to {MOST_LATENT} values, not {spec.model.kv.latent_dim}"
    return None


def _create(context: AttentionContext) -> AttentionBackend:
    if context.spec.deterministic:
        from .fixed import FixedTritonAttention

        return FixedTritonAttention(context)
    from .backend import TritonAttention

    return TritonAttention(context)


plugin = TritonAttentionPlugin()
"""What the entry point names."""
