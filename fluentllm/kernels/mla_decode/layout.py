"""How an MLA token lies in the KV pool: 576 BF16 values, or 644 bytes of FP8 cache.

FP8 cache. A page of 64 tokens is 41,216 contiguous bytes in three planes:

    bytes     0 … 32,767   latent  E4M3     [64, 512]   round(latent / scale)
    bytes 32,768 … 33,023  scale   float32  [64]        a power of two, one a token
    bytes 33,024 … 41,215  rotary  BF16     [64, 64]    rotary / scale, so that scale restores both parts of a logit

The scale is the least power of two ≥ amax(latent) / 448. E4M3 being a floating-point format, that costs no precision against
amax / 448 itself, dividing the rotary part by it is exact, and kernels read its logarithm and its reciprocal off the bits.

Other widths of latent and rotary key, and pages of other multiples of 16 tokens, lie alike: `fp8_planes` takes them, for the
plain versions. The kernels are for 512, 64 and pages of 64.

Planes, not 644-byte rows: 644 is no multiple of 16, so rows could be fetched neither by TMA nor in 16-byte pieces. With
planes inside the page every plane starts on a multiple of 128 bytes and TMA fetches it, and a page is still one contiguous
range: copying, leasing and sending pages needs no knowledge of what is in them (64 tokens × 644 bytes travel as they are).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

PAGE = 64
LATENT = 512
ROPE = 64
TOKEN_BYTES = LATENT + 4 + 2 * ROPE
PAGE_BYTES = PAGE * TOKEN_BYTES
E4M3_MAX = 448.0
MIN_SCALE, MAX_SCALE = 2.0**-40, 2.0**30
"""Bounds of the content scale. Latents beyond 448 · 2³⁰ saturate."""
ROPE_MAX = 2.0**30
"""Largest aligned rotary value: the scale is at least 2⁻³⁰ of the largest one; what MAX_SCALE then leaves beyond, saturates.
With these bounds no finite input makes a logit overflow: |q·k| ≤ (512 · 448² + 64 · 2⁶⁰) · 2³⁰ · 2³⁰ < 2¹²⁷."""


@dataclass(frozen=True, slots=True)
class Fp8Planes:
    """One layer's FP8 cache seen as its three planes. Views: writing to them writes to the pool."""

    latent: Tensor
    """[pages, 64, 512] float8_e4m3fn."""
    scale: Tensor
    """[pages, 64] float32."""
    rope: Tensor
    """[pages, 64, 64] bfloat16."""

    @property
    def page(self) -> int:
        """Tokens of a page."""
        return self.scale.shape[1]


def new_fp8_pool(pages: int, device: torch.device | str) -> Tensor:
    """[pages, 41216] uint8 of zeros."""
    return torch.zeros(pages, PAGE_BYTES, dtype=torch.uint8, device=device)


def fp8_planes(pool: Tensor, latent: int = LATENT, rope: int = ROPE) -> Fp8Planes:
    """The planes of `pool`: uint8, [pages, 41216] or [pages, page size, 644], pages contiguous inside.

    Raises ValueError for another type or shape, or a page stride that is no multiple of 16 bytes.
    """
    page = pool.shape[1] if pool.ndim == 3 else PAGE
    size = page * (latent + 4 + 2 * rope)
    if pool.dtype != torch.uint8 or pool[0].numel() != size or not pool[0].is_contiguous():
        raise ValueError(f"An FP8 MLA pool is uint8 [pages, {size}]; this one is {pool.dtype} {list(pool.shape)}.")
    pages, stride = pool.shape[0], pool.stride(0)
    if stride % 16:
        raise ValueError(f"The pages of an FP8 MLA pool lie at multiples of 16 bytes; this stride is {stride}.")
    flat = pool.as_strided((pages, size), (stride, 1))
    content, scales = page * latent, page * (latent + 4)
    return Fp8Planes(
        latent=flat[:, :content].view(torch.float8_e4m3fn).unflatten(1, (page, latent)),
        scale=flat[:, content:scales].view(torch.float32),
        rope=flat[:, scales:].view(torch.bfloat16).unflatten(1, (page, rope)),
    )
