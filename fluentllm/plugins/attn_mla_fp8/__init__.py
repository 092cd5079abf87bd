"""MLA over an FP8 cache of 644 bytes a token (SnapMLA's format): on Hopper by kernels, elsewhere in plain torch.

`kv.dtype: fp8` asks for it where a model has MLA. What lies in the cache is in `kernels/mla_decode/layout.py`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fluentllm.core.hookspecs import hookimpl
from fluentllm.core.kv.formats import quantised_latents

if TYPE_CHECKING:
    from fluentllm.core.protocols import AttentionBackend, AttentionContext, AttentionSpec, Register

FLUENT_API_VERSION = 1

PAGE_MULTIPLE = 16
"""Tokens: with it the planes of a page are aligned, whatever the widths."""

log = logging.getLogger(__name__)


class MlaFp8Plugin:
    @hookimpl
    def fluent_attention(self, register: Register) -> None:
        register("mla_fp8", _create, supports=_supports)


def _supports(spec: AttentionSpec) -> str | None:
    if spec.model.kv.kind != "mla":
        return f"it is for MLA, not for {spec.model.kv.kind}"
    if not quantised_latents(spec.model.kv.kind, spec.kv_dtype):
        return f"it keeps KV in FP8 (kv.dtype: fp8), not in {spec.kv_dtype}"
    if spec.page_size % PAGE_MULTIPLE:
        return f"it has pages of multiples of {PAGE_MULTIPLE} tokens, not {spec.page_size} (kv.page_size)"
    return None


def why_plain(spec: AttentionSpec) -> str | None:
    """None where the Hopper kernels serve, else why they don't."""
    kv = spec.model.kv
    if spec.device != "cuda":
        return f"kernels run on NVIDIA GPUs, not on {spec.device}"
    if spec.deterministic:
        return "the order of their additions depends on the batch, which deterministic mode forbids"
    if spec.dtype != "bfloat16":
        return f"kernels compute in bfloat16, not {spec.dtype} (model.dtype)"
    if (kv.latent_dim, kv.rope_dim, spec.page_size) != (512, 64, 64):
        found = f"{kv.latent_dim} + {kv.rope_dim} and {spec.page_size}"
        return f"kernels are built for latents of 512 + 64 values in pages of 64 tokens, not {found}"

    import torch

    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        return f"kernels are built for Hopper (compute capability 9.0), not {capability[0]}.{capability[1]}"
    return None


def _create(context: AttentionContext) -> AttentionBackend:
    reason = why_plain(context.spec)
    if reason is None:
        from .hopper import HopperMlaFp8

        return HopperMlaFp8(context)
    if context.spec.device == "cuda":
        log.warning("MLA over an FP8 cache runs in plain torch, which is slow: %s.", reason)
    if context.spec.deterministic:
        from .fixed import FixedOrderMlaFp8

        return FixedOrderMlaFp8(context)
    from .plain import PlainMlaFp8

    return PlainMlaFp8(context)


plugin = MlaFp8Plugin()
"""What the entry point names."""
