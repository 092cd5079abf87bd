"""Multi-head latent attention: keys and values are kept as one small latent a token, beside a rotary key shared by all heads.

Formulas: DeepSeek-V2 (arXiv:2405.04434, section 2.1) as in Transformers' `deepseek_v3`, with the two scale factors of
`longcat_flash`. The attention backend chooses the absorbed or the expanded form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..core.protocols import Appending, FusedMLA, WeightSlot
from ..kernels.moe import LiveRows
from .linear import Linear
from .module import Module, join
from .norm import RMSNorm
from .rotary import Rotary, yarn_mscale

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from ..core.batch import Batch
    from ..core.protocols import AttentionBackend, BuildContext
    from ..kernels.residual import Addend, Product, Rows
    from .module import Block

LATENT_EPS = 1e-6
"""Of the norms of both latents, whatever the config's `rms_norm_eps`."""


@dataclass(frozen=True, slots=True)
class MLAShape:
    hidden: int
    heads: int
    q_lora: int | None
    """None: the query has one projection, `q_proj`."""
    kv_lora: int
    nope: int
    rope: int
    value: int
    bias: bool = False
    """`attention_bias`: of q_a_proj, kv_a_proj_with_mqa and o_proj."""
    query_scale: float = 1.0
    """Multiplies the normed query latent."""
    latent_scale: float = 1.0
    """Multiplies the normed KV latent; the rotary key is not scaled."""


class MLA(Module):
    """x [T, hidden], normed → [T, hidden]; keeps its KV in the backend's layer `layer`."""

    def __init__(self, ctx: BuildContext, prefix: str, shape: MLAShape, rotary: Rotary, layer: int) -> None:
        self.layer = layer
        self.shape = shape
        self.prefix = prefix
        self.rotary = rotary
        head = shape.nope + shape.rope
        kv = {"kv_a_proj_with_mqa": shape.kv_lora + shape.rope}
        if shape.q_lora is None:
            self.query = Linear(ctx, prefix, shape.hidden, {"q_proj": shape.heads * head})
            self.down = Linear(ctx, prefix, shape.hidden, kv, bias=shape.bias)
        else:
            self.down = Linear(ctx, prefix, shape.hidden, {"q_a_proj": shape.q_lora, **kv}, bias=shape.bias)
            self.query_norm = RMSNorm(ctx, join(prefix, "q_a_layernorm"), shape.q_lora, LATENT_EPS)
            self.query = Linear(ctx, prefix, shape.q_lora, {"q_b_proj": shape.heads * head})
        self.latent_norm = RMSNorm(ctx, join(prefix, "kv_a_layernorm"), shape.kv_lora, LATENT_EPS)
        self.up_k = torch.zeros(shape.heads, shape.nope, shape.kv_lora, dtype=ctx.dtype, device=ctx.device)
        self.up_v = torch.zeros(shape.heads, shape.value, shape.kv_lora, dtype=ctx.dtype, device=ctx.device)
        self.out = Linear(ctx, prefix, shape.heads * shape.value, {"o_proj": shape.hidden}, bias=shape.bias)
        # The query's scale is the same for both of its parts, so it scales the scores.
        self.scale = softmax_scale(rotary, head) * shape.query_scale

    def __call__(self, x: Rows, rows: tuple[Tensor, Tensor], batch: Batch, attention: AttentionBackend) -> Product:
        """`rows` are the rotary's of the batch's positions."""
        shape = self.shape
        if shape.q_lora is None:
            q, kv = self.query(x), self.down(x)
        else:
            latent, kv = self.down.with_norm(x, self.query_norm)
            q = self.query(latent)
        q = q.unflatten(1, (shape.heads, -1))
        if isinstance(attention, FusedMLA):
            out = attention.mla_from_products(
                self.layer, kv, self.latent_norm.weight, q, rows, self.up_k, self.up_v, batch, self.scale, eps=LATENT_EPS,
                latent_scale=shape.latent_scale, interleaved=self.rotary.interleaved,
            )  # fmt: skip
            return self.out.later(out.flatten(1))
        q_nope, q_rope = q.split([shape.nope, shape.rope], -1)
        latent, k_rope = self._kept(kv, rows)
        q_rope = self.rotary(q_rope, rows)
        out = attention.mla(self.layer, q_nope, q_rope, latent, k_rope, self.up_k, self.up_v, batch, self.scale)
        return self.out.later(out.flatten(1))

    def append(self, x: Rows, rows: tuple[Tensor, Tensor], batch: Batch, attention: AttentionBackend) -> None:
        """The KV of all rows, and no more where the backend can do that alone."""
        if not isinstance(attention, (FusedMLA, Appending)):
            self(x, rows, batch, attention)
            return
        shape = self.shape
        kv = self.down(x)[:, -(shape.kv_lora + shape.rope) :]
        if isinstance(attention, Appending):
            attention.append_mla(self.layer, *self._kept(kv, rows), batch)
            return
        attention.mla_append(
            self.layer, kv, self.latent_norm.weight, rows, batch, eps=LATENT_EPS, latent_scale=shape.latent_scale,
            interleaved=self.rotary.interleaved,
        )  # fmt: skip

    def _kept(self, kv: Tensor, rows: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """kv [T, C + R] → what the pool keeps of it: the latent [T, C], normed and scaled, and the key's rotary part [T, R]."""
        latent, k_rope = kv.split([self.shape.kv_lora, self.shape.rope], -1)
        latent = self.latent_norm(latent)
        if self.shape.latent_scale != 1.0:
            latent = latent * self.shape.latent_scale
        return latent, self.rotary(k_rope.unsqueeze(1), rows).squeeze(1)

    def own_slots(self) -> Iterator[WeightSlot]:
        shape = self.shape
        rows = shape.heads * (shape.nope + shape.value)
        yield WeightSlot(join(self.prefix, "kv_b_proj", "weight"), (rows, shape.kv_lora), self._take_up)

    def _take_up(self, tensor: Tensor) -> None:
        heads = tensor.view(self.shape.heads, -1, self.shape.kv_lora)
        self.up_k.copy_(heads[:, : self.shape.nope])
        self.up_v.copy_(heads[:, self.shape.nope :])


class MLALayer(Module):
    """x + MLA(norm(x)), then + feed-forward(norm(·)): DeepSeek's decoder layer, and the block inside an MTP layer.

    The residual is carried beside and added in place, as in `layers.decoder`.
    """

    def __init__(
        self, ctx: BuildContext, prefix: str, shape: MLAShape, eps: float, rotary: Rotary, layer: int, feed_forward: Block
    ) -> None:
        self.input_norm = RMSNorm(ctx, join(prefix, "input_layernorm"), shape.hidden, eps)
        self.attention = MLA(ctx, join(prefix, "self_attn"), shape, rotary, layer)
        self.post_norm = RMSNorm(ctx, join(prefix, "post_attention_layernorm"), shape.hidden, eps)
        self.feed_forward = feed_forward

    def __call__(
        self, delta: Addend | None, residual: Tensor, rows: tuple[Tensor, Tensor], batch: Batch, attention: AttentionBackend
    ) -> Addend:
        """`delta` is what is still to be added to `residual` → what this layer leaves to be added. `residual` changes."""
        attended = self.attention(self.input_norm.enter(delta, residual), rows, batch, attention)
        return self.feed_forward.later(self.post_norm.enter(attended, residual), LiveRows(batch.kv_rows, batch.page_size))

    def some_rows(
        self, residual: Tensor, rows: tuple[Tensor, Tensor], batch: Batch, attention: AttentionBackend, wanted: Tensor
    ) -> tuple[Addend, Tensor]:
        """The same where nothing follows that needs all rows: KV for all of them, and for those of `wanted` [W] int64, W > 0,
        what is left to be added and their residual, [W, hidden] each."""
        attended = self.attention(self.input_norm(residual), rows, batch, attention).of(wanted)
        residual = residual[wanted]
        live = LiveRows(batch.kv_rows, batch.page_size, wanted)
        return self.feed_forward.later(self.post_norm.enter(attended, residual), live), residual


def softmax_scale(rotary: Rotary, head: int) -> float:
    """head^-0.5, times the square of yarn's mscale where the config scales the rotary positions with `mscale_all_dim`."""
    rope = rotary.parameters
    if rope["rope_type"] == "default" or not rope.get("mscale_all_dim"):
        return head**-0.5
    return head**-0.5 * yarn_mscale(float(rope["factor"]), float(rope["mscale_all_dim"])) ** 2
