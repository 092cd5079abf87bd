"""Attention backends: they write KV and attend over it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..errors import PluginError

if TYPE_CHECKING:
    from collections.abc import Hashable

    from torch import Tensor

    from ..batch import Batch
    from ..kv.pool import KVPool
    from ..settings import Settings
    from ..types import ModelSpec

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What `supports` and the factory of an attention backend are asked about."""

    model: ModelSpec
    device: str
    """`cpu`, `cuda`."""
    dtype: str
    kv_dtype: str
    page_size: int
    deterministic: bool
    phases: tuple[Phase, ...] = PHASES
    """What it is wanted for: prefill passes, decode passes (verification among them), or both."""


@dataclass(frozen=True, slots=True)
class AttentionContext:
    spec: AttentionSpec
    pool: KVPool
    settings: Settings
    library: Any = None
    """`fluentllm.kernels.native.library.Library`: the C kernels of a CPU, where they are wanted and can be had."""


class AttentionBackend(Protocol):
    """Writes KV to the pool's pages and attends over them. `layer` counts KV layers, 0 … kv.layers - 1.

    One whose `supports` takes models with MLA alone needs no `gqa`, one for grouped heads alone no `mla`.

    A backend whose decode neither waits for the device nor depends on lengths that only the host knows says so by
    `capturable = True`: decode programs are then captured in CUDA graphs.
    """

    capturable: bool = False

    def begin(self, batch: Batch) -> None:
        """Once a forward pass, before its first layer: plan what all layers share."""
        ...

    def gqa(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch, scale: float) -> Tensor:
        """q [T, H, D], k [T, Hkv, D], v [T, Hkv, Dv], rotary applied → [T, H, Dv]."""
        raise _lacks(self, "grouped heads")

    def mla(
        self,
        layer: int,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        up_k: Tensor,
        up_v: Tensor,
        batch: Batch,
        scale: float,
    ) -> Tensor:
        """q_nope [T, H, nope], q_rope [T, H, rope], latent [T, C] (normed, scaled), k_rope [T, rope] (rotary applied),
        up_k [H, nope, C], up_v [H, Dv, C] (the two halves of kv_b) → [T, H, Dv]. The backend chooses the absorbed or the
        expanded form."""
        raise _lacks(self, "MLA")


def _lacks(backend: AttentionBackend, kind: str) -> PluginError:
    name = f"{type(backend).__module__}.{type(backend).__qualname__}"
    return PluginError(
        f"The attention backend {name} was chosen for a model with {kind}, which it does not compute.",
        fix="Let its supports() refuse such models (spec.model.kv.kind), or choose another attention.backend.",
    )


class PartialAttention(AttentionBackend):
    """A backend that may leave passes to another on the same pool: its kernels are still being compiled, or a pass has
    something that they do not know. Derive from it to be asked."""

    @abstractmethod
    def load(self) -> None:
        """Once, before the first pass: waits until kernels that were compiled earlier are loaded. Compiles nothing."""
        ...

    @abstractmethod
    def serves(self, batch: Batch) -> bool:
        """Before `begin`: will it do this pass? Waits for nothing. Of decode passes with the same number of sequences, query
        length and first key the answer never changes, since they are captured."""
        ...


@dataclass(frozen=True, slots=True)
class PassPlan:
    """What a backend has planned for one prefill pass."""

    key: Hashable
    """Passes with as many rows and equal keys launch the same kernels on the same tensors."""
    plan: Any
    """The backend's own."""


class PlannedPrefill(AttentionBackend):
    """A backend whose prefill passes can be captured: what it makes of lengths that only the host knows is made outside of the
    program, in tensors that stay where they are. Derive from it to be asked."""

    @abstractmethod
    def plan_prefill(self, batch: Batch) -> PassPlan | None:
        """Of a pass whose tensors stay where they are, at its launch, from what the host knows of it: they are filled after
        this call. `begin` finds it in `batch.plan`, also when it is captured, and then does nothing that a repetition of its
        launches would not do. None: this pass is launched kernel by kernel."""
        ...


class Appending(AttentionBackend):
    """A backend that can write rows' KV where nobody asks what they attend to: a draft layer's, while nothing is drafted.
    Derive from it to be asked. Fused backends have calls of their own for that."""

    def append_gqa(self, layer: int, k: Tensor, v: Tensor, batch: Batch) -> None:
        """What `gqa` writes."""
        raise _lacks(self, "grouped heads")

    def append_mla(self, layer: int, latent: Tensor, k_rope: Tensor, batch: Batch) -> None:
        """What `mla` writes."""
        raise _lacks(self, "MLA")


class FusedGQA(AttentionBackend):
    """A backend that takes the QKV product as it comes; derive from it to be given it. Layers ask with `isinstance`."""

    @abstractmethod
    def gqa_from_product(
        self,
        layer: int,
        qkv: Tensor,
        heads: int,
        rope: tuple[Tensor, Tensor],
        batch: Batch,
        scale: float,
        *,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        interleaved: bool,
    ) -> Tensor:
        """`gqa` from qkv [T, (H + 2 Hkv) · D]: norms of queries and keys (weights [D], or neither), rotary (`rope` are cos and
        sin of the rows, as `layers.rotary.Rotary.rows` gives them) and the KV write are the backend's → [T, H, D]."""
        ...

    def gqa_append(
        self,
        layer: int,
        qkv: Tensor,
        heads: int,
        rope: tuple[Tensor, Tensor],
        batch: Batch,
        *,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        interleaved: bool,
    ) -> None:
        """The KV write of `gqa_from_product`, where nobody asks what the rows attend to: by default with the rest."""
        self.gqa_from_product(
            layer, qkv, heads, rope, batch, 1.0, q_weight=q_weight, k_weight=k_weight, eps=eps, interleaved=interleaved
        )


@dataclass(frozen=True, slots=True)
class MlaProducts:
    """What `FusedMLA.mla_from_products` is given of a layer."""

    kv: Tensor
    """[T, C + R], as for `mla_append`."""
    kv_weight: Tensor
    """[C]."""
    q: Tensor
    """[T, H, nope + R], as for `mla_from_query`."""
    rope: tuple[Tensor, Tensor]
    up_k: Tensor
    up_v: Tensor
    eps: float
    latent_scale: float
    interleaved: bool


class FusedMLA(AttentionBackend):
    """The same for MLA. `mla_from_products` is what layers call. It is two steps, of which the first has written the layer's KV
    before the second attends; in decode a backend may do both at once."""

    def mla_from_products(
        self,
        layer: int,
        kv: Tensor,
        kv_weight: Tensor,
        q: Tensor,
        rope: tuple[Tensor, Tensor],
        up_k: Tensor,
        up_v: Tensor,
        batch: Batch,
        scale: float,
        *,
        eps: float,
        latent_scale: float,
        interleaved: bool,
    ) -> Tensor:
        """`mla` from products: kv as for `mla_append`, q as for `mla_from_query` → [T, H, Dv]. In prefill it is always two
        steps: who follows passes layer by layer hears of a layer's KV by the first."""
        if batch.query_length is not None:
            given = MlaProducts(kv, kv_weight, q, rope, up_k, up_v, eps, latent_scale, interleaved)
            out = self.mla_at_once(layer, given, batch, scale)
            if out is not None:
                return out
        self.mla_append(layer, kv, kv_weight, rope, batch, eps=eps, latent_scale=latent_scale, interleaved=interleaved)
        return self.mla_from_query(layer, q, rope, up_k, up_v, batch, scale, interleaved=interleaved)

    def mla_at_once(self, layer: int, given: MlaProducts, batch: Batch, scale: float) -> Tensor | None:
        """In decode: append and attend in one way → [T, H, Dv]; None: in the two steps."""
        return None

    @abstractmethod
    def mla_append(
        self,
        layer: int,
        kv: Tensor,
        kv_weight: Tensor,
        rope: tuple[Tensor, Tensor],
        batch: Batch,
        *,
        eps: float,
        latent_scale: float,
        interleaved: bool,
    ) -> None:
        """kv [T, C + R], of the down projection, rows at any distance: KV latent, rotary key. Norm (kv_weight [C]), scale of
        the latent, rotary and the KV write."""
        ...

    @abstractmethod
    def mla_from_query(
        self,
        layer: int,
        q: Tensor,
        rope: tuple[Tensor, Tensor],
        up_k: Tensor,
        up_v: Tensor,
        batch: Batch,
        scale: float,
        *,
        interleaved: bool,
    ) -> Tensor:
        """q [T, H, nope + rope], not rotated yet, which may be overwritten; after `mla_append` of the layer → [T, H, Dv]."""
        ...
