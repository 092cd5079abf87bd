"""How a token's KV is kept: dtypes by name, bytes of a token, and how the tokens of a page lie in it. Torch-free.

Everything that counts bytes asks here: the pool, the memory plan, the layout that engines show each other, the roofline.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..types import KVSpec

FP8 = "float8_e4m3fn"
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, FP8: 1, "float8_e5m2": 1, "uint8": 1, "int8": 1}
"""Bytes of one value, by torch's name of the dtype."""
SETTINGS = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16", "fp8": FP8}
"""`kv.dtype` → torch's name of the dtype; `auto` is the activations'."""
ROPE_BYTES = 2
"""Of a rotary value in MLA's FP8 cache, which stays BF16."""
SCALE_BYTES = 4


def quantised_latents(kind: str, dtype: str) -> bool:
    """Is it MLA's FP8 cache, whose pages are planes of bytes: latents in E4M3, a float32 scale a token, rotary keys in BF16?"""
    return kind == "mla" and dtype == FP8


def latent_planes(latent_dim: int, rope_dim: int, dtype: str) -> tuple[int, ...]:
    """MLA: bytes of a token in each plane of a page. One plane: token rows; several: in a page of n tokens, n × the first
    width, then n × the second …"""
    if dtype == FP8:
        return latent_dim, SCALE_BYTES, rope_dim * ROPE_BYTES
    return ((latent_dim + rope_dim) * ITEM_BYTES[dtype],)


def token_bytes(spec: KVSpec, dtype: str) -> int:
    """Bytes of one token in one layer."""
    if spec.kind == "mla":
        return sum(latent_planes(spec.latent_dim, spec.rope_dim, dtype))
    return spec.heads * (spec.head_dim + spec.v_head_dim) * ITEM_BYTES[dtype]
