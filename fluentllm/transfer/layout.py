"""How an engine's KV lies in its memory: what two engines tell each other before one writes into the other's pool.

A `KVLayout` crosses the network; it is compared at the handshake, and turned into byte arithmetic by `slices` and
`descriptors`. Torch-free.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from ..core.errors import FluentError
from ..core.kv.formats import ITEM_BYTES, latent_planes

if TYPE_CHECKING:
    from ..core.kv.pool import KVPool

LAYOUT_VERSION = 1

Count = Annotated[int, Meta(ge=0, lt=2**31)]
Size = Annotated[int, Meta(ge=1, lt=2**31)]
Text = Annotated[str, Meta(max_length=128)]


class LayoutMismatch(FluentError):
    """Two engines whose KV does not fit each other."""

    status, code = 409, "kv_layout_mismatch"


class KVLayout(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One rank's pool. Tensors are [layers, pages, page_size, heads of the rank, dim], or without heads for MLA."""

    version: Count = LAYOUT_VERSION
    model: Text
    """`fingerprint` of config and weights."""
    kind: Literal["gqa", "mla"]
    dtype: Text
    """By torch's name. MLA in float8_e4m3fn has pages of planes (`core.kv.formats.latent_planes`)."""
    page_size: Size
    pages: Size
    """Rows of the pool's page dimension, scratch page and all."""
    layers: Size
    """KV layers, draft layers last."""
    draft_layers: Count = 0
    heads: Count = 0
    """gqa: KV heads of the whole model, over all ranks."""
    head_dim: Count = 0
    v_head_dim: Count = 0
    latent_dim: Count = 0
    rope_dim: Count = 0
    tp_size: Size = 1
    tp_rank: Count = 0
    proposer: Text = "none"
    """Whose draft layers and page states these are."""
    page_states: Annotated[tuple[Size, ...], Meta(max_length=8)] = ()
    """Bytes that a proposer keeps for each page, in tensors [pages, bytes] behind the pool's."""

    def __post_init__(self) -> None:
        """Raises `ValueError`, which decoding turns into a `ValidationError`."""
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"unknown dtype {self.dtype!r}; known: {', '.join(ITEM_BYTES)}")
        if self.tp_rank >= self.tp_size:
            raise ValueError(f"tp_rank {self.tp_rank} of {self.tp_size}")
        if self.draft_layers > self.layers:
            raise ValueError(f"{self.draft_layers} draft layers of {self.layers}")
        if self.kind == "gqa":
            if not (self.heads and self.head_dim and self.v_head_dim):
                raise ValueError("gqa needs heads, head_dim and v_head_dim")
            if self.heads % self.tp_size and self.tp_size % self.heads:
                raise ValueError(f"{self.heads} KV heads cannot be spread evenly over {self.tp_size} ranks")
        elif not self.latent_dim:
            raise ValueError("mla needs latent_dim")

    @property
    def local_heads(self) -> int:
        """Heads in this rank's pool; MLA's latent counts as one, which every rank has."""
        return max(1, self.heads // self.tp_size) if self.kind == "gqa" else 1

    def tensors(self) -> tuple[Region, ...]:
        """The pool's tensors as bytes, in the order in which they are registered."""
        if self.kind == "mla":
            planes = latent_planes(self.latent_dim, self.rope_dim, self.dtype)
            return (Region(0, self.layers, self.pages, self.page_size, 1, sum(planes), planes),)
        regions, offset = [], 0
        for width in (self.head_dim, self.v_head_dim):
            size = width * ITEM_BYTES[self.dtype]
            region = Region(offset, self.layers, self.pages, self.page_size, self.local_heads, size)
            regions.append(region)
            offset += region.size
        return tuple(regions)

    def states(self) -> tuple[Region, ...]:
        """What the proposer keeps for each page, registered behind `tensors`; a page counts as one token of one layer."""
        regions, offset = [], sum(region.size for region in self.tensors())
        for width in self.page_states:
            regions.append(Region(offset, 1, self.pages, 1, 1, width))
            offset += regions[-1].size
        return tuple(regions)

    def bytes_per_page(self) -> int:
        """Over all layers and tensors, of this rank."""
        return sum(region.layers * region.page_bytes for region in self.tensors())

    def bytes_of(self, tokens: int) -> int:
        """That a prompt of so many tokens takes, page states and all: what a handoff sends of it."""
        token = self.bytes_per_page() // self.page_size
        return tokens * token + -(-tokens // self.page_size) * sum(self.page_states)


class Region(Struct, frozen=True):
    """One tensor [layers, pages, page_size, heads, head_bytes] in the registered memory."""

    offset: int
    """Bytes before it."""
    layers: int
    pages: int
    page_size: int
    heads: int
    head_bytes: int
    planes: tuple[int, ...] = ()
    """Bytes of a token in each plane of a page, one plane after the other; none: one plane of token rows."""

    def parts(self, tokens: int) -> tuple[tuple[int, int], ...]:
        """Where the first `tokens` tokens of a page lie in it: (offset, bytes) each."""
        found, start = [], 0
        for width in self.planes or (self.token_bytes,):
            found.append((start, tokens * width))
            start += self.page_size * width
        return tuple(found)

    @property
    def token_bytes(self) -> int:
        return self.heads * self.head_bytes

    @property
    def page_bytes(self) -> int:
        return self.page_size * self.token_bytes

    @property
    def layer_bytes(self) -> int:
        return self.pages * self.page_bytes

    @property
    def size(self) -> int:
        return self.layers * self.layer_bytes


def layout_of(
    pool: KVPool,
    model: str,
    *,
    draft_layers: int = 0,
    heads: int | None = None,
    tp_size: int = 1,
    tp_rank: int = 0,
    proposer: str = "none",
    page_states: tuple[int, ...] = (),
) -> KVLayout:
    """Of a rank's pool, whose spec counts the rank's own heads. heads: KV heads of the whole model, where ranks share them.
    Register `memory_of(pool)` for it."""
    spec = pool.spec
    return KVLayout(
        model=model,
        kind=spec.kind,
        dtype=str(pool.dtype).removeprefix("torch."),
        page_size=pool.page_size,
        pages=pool.pages + 1,
        layers=spec.layers,
        draft_layers=draft_layers,
        heads=(spec.heads * tp_size if heads is None else heads) if spec.kind == "gqa" else 0,
        head_dim=spec.head_dim,
        v_head_dim=spec.v_head_dim,
        latent_dim=spec.latent_dim,
        rope_dim=spec.rope_dim,
        tp_size=tp_size,
        tp_rank=tp_rank,
        proposer=proposer,
        page_states=page_states,
    )


def memory_of(pool: KVPool) -> list[Any]:
    """The pool's tensors in the order of `KVLayout.tensors`, for `KVTransport.register`."""
    return [pool.latent] if pool.spec.kind == "mla" else [pool.k, pool.v]


MUST_EQUAL = (
    *("version", "model", "kind", "dtype", "page_size", "layers", "draft_layers"),
    *("heads", "head_dim", "v_head_dim", "latent_dim", "rope_dim"),
    *("proposer", "page_states"),
)
"""Pages, and how the heads are spread over ranks, may differ."""


def check_compatible(source: KVLayout, target: KVLayout) -> None:
    """Raises `LayoutMismatch`, with both layouts, if KV of `source` cannot be written to `target`."""
    different = [name for name in MUST_EQUAL if getattr(source, name) != getattr(target, name)]
    if different:
        fields = ", ".join(f"{name} ({getattr(source, name)} and {getattr(target, name)})" for name in different)
        raise LayoutMismatch(
            f"The KV of the two engines differs in {fields}.\nprefill: {describe(source)}\ndecode:  {describe(target)}",
            fix="Start both with the same model and the same kv settings.",
        )


def describe(layout: KVLayout) -> str:
    """All fields on one line."""
    return " ".join(f"{name}={value}" for name, value in msgspec.structs.asdict(layout).items())


SAMPLE, SAMPLES = 4096, 64


def fingerprint(config: Mapping[str, Any], files: Iterable[Path]) -> str:
    """Names a model by what it computes, 32 hexadecimal digits: its config, and of each weight file the name, the size and 64
    evenly spread samples. Two checkpoints of one architecture differ by it; reading them whole would take minutes."""
    digest = hashlib.sha256(msgspec.json.encode(config, order="deterministic"))
    for path in sorted(files, key=lambda path: path.name):
        size = path.stat().st_size
        digest.update(f"\0{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for index in range(SAMPLES):
                file.seek(max(0, size - SAMPLE) * index // (SAMPLES - 1))
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:32]
