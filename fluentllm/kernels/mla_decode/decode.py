"""Launching the decode on a Hopper GPU: plan and workspace, the kernel that the cache asks for, and the combine."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..cuda.mla_decode_cluster import decode_by_clusters, takes
from ..triton.launch import launch, multiprocessors, overlaps, programmatic
from . import hopper_bf16, hopper_bf16_few, hopper_fp8, hopper_fp8_few, hopper_fp8_many, switches
from .combine import combine_splits
from .expand import ALL, Shares, merge_and_expand, shares
from .layout import LATENT, PAGE, ROPE, Fp8Planes
from .plan import DecodePlan, new_plan

if TYPE_CHECKING:
    from torch import Tensor

ROW_TILE = 64
"""Query rows (heads × query length) of one CTA."""
MOST_SWAPPED = {"fp8": 16, "bf16": 32}
"""Rows up to which operands may be swapped. FP8: with more, values may go through registers. One H200, 32 rows at ctx 4,096:
41.8 µs at batch 32 and 113.5 at 128 through registers, 44.3 and 128.8 swapped; 16 rows are equal within 3 %. BF16: nothing is
converted, so more rows have no such way, only `hopper_bf16`, whose products of a page take 2,176 cycles however few rows there
are; swapped ones take 1,360 with 16 rows and 1,632 with 32, by what they read of shared memory. Counted, not measured."""
MOST_EACH = 16
"""Rows that one program of the combine merges at most."""
FEW_PROGRAMS = 512
"""Programs of the combine that fill the chip."""


def parts_for(rows: int, device: torch.device) -> int:
    """Parts that fill the chip when a sequence has `rows` query rows."""
    return max(1, multiprocessors(device) // -(-rows // ROW_TILE))


@dataclass(slots=True)
class MlaDecode:
    """MLA decode of one shape: N sequences × q query rows × H heads. Holds plan and workspace.

    `refresh` once a step, after the lengths are known on the device, then `fp8` or `bf16` once a layer. Nothing synchronises
    with the host, so all of it can be captured. Layers must follow each other on one stream: they share the workspace.
    """

    heads: int
    query_length: int
    plan: DecodePlan
    partial: Tensor
    """[2 · parts, q · H, 512] float32, normalised outputs of pieces."""
    lse: Tensor
    """[2 · parts, q · H] float32, their log-sum-exps in log2 units."""
    pdl: bool = False
    """Let what follows be set up while the decode runs (programmatic dependent launch)."""
    _descriptors: dict[tuple[int, ...], tuple[TensorDescriptor, ...]] = field(default_factory=dict)

    @classmethod
    def create(
        cls,
        lengths: Tensor,
        heads: int,
        query_length: int,
        parts: int | None = None,
        page_table: Tensor | None = None,
    ) -> MlaDecode:
        """For `lengths` int32 [N] (keys of each sequence, new ones included; 0 makes a sequence inert), which is read at
        every `refresh`. page_table: what `fp8` and `bf16` will be given, with the same contents as at the last `refresh`,
        so that the plan may look up pages (`switches.PAGES_IN_RECORD`). Raises ValueError for shapes that the kernels don't
        have."""
        rows = heads * query_length
        if not 1 <= query_length <= 8 or not 1 <= heads <= 128:
            raise ValueError(f"MLA decode takes 1 … 8 query rows and 1 … 128 heads, not {query_length} and {heads}.")
        if parts is None:
            parts = parts_for(rows, lengths.device)
        groups = -(-rows // ROW_TILE)
        together = switches.MERGE_TOGETHER and parts > 1 and parts * groups <= multiprocessors(lengths.device)
        plan = new_plan(
            lengths, parts, page_table=page_table if switches.PAGES_IN_RECORD else None,
            cells=groups * 2 if together else 0,
        )  # fmt: skip
        return cls(
            heads=heads,
            query_length=query_length,
            plan=plan,
            partial=torch.empty(2 * parts, rows, LATENT, dtype=torch.float32, device=lengths.device),
            lse=torch.empty(2 * parts, rows, dtype=torch.float32, device=lengths.device),
        )

    @property
    def rows(self) -> int:
        """Query rows of a sequence."""
        return self.heads * self.query_length

    def refresh(self) -> None:
        """Split the work by the lengths as they are when the stream gets here."""
        self.plan.refresh()

    def fp8(
        self,
        q_latent: Tensor,
        q_rope: Tensor,
        q_scale: Tensor,
        cache: Fp8Planes,
        page_table: Tensor,
        scale: float,
        out: Tensor,
        up_v: Tensor | None = None,
    ) -> Tensor:
        """q_latent E4M3 [N, q, H, 512], q_rope BF16 [N, q, H, 64] and q_scale float32 [N, q, H], contiguous, or [N · q, …] as
        `quantise_query` makes them; page_table int32 [N, P] → out [N, q, H, 512], BF16 or float32, contiguous. With up_v
        [H, Dv, 512], contiguous and of out's dtype: out times up_v, [N · q, H, Dv]; out then holds whatever was needed on the
        way."""
        together = self._together(up_v, out, page_table)
        shape = self._options(together=together)
        if switches.CLUSTERS and not together and takes(self.rows):
            decode_by_clusters(
                self.plan, self.heads, self.rows, q_latent, q_rope, q_scale, cache, page_table, scale, out, self.partial,
                self.lse, early=shape["EARLY"], following=shape["PDL"], latent_first=switches.LATENT_FIRST,
            )  # fmt: skip
            return self._finish(out, up_v, page_table, together=together)
        where, rest = self._where(out, page_table, scale, together=together), self._fp8_descriptors(cache)
        tile = MOST_SWAPPED["fp8"]
        if switches.SWAP_OPERANDS and self.rows <= tile:
            launch(
                hopper_fp8_few.decode_fp8_few, (self.plan.parts,),
                _rows_descriptor(q_latent, LATENT, tile, 128), _rows_descriptor(q_rope, ROPE, tile), *rest, q_scale, *where,
                NUM_STAGES=hopper_fp8.STAGES, TILE=tile, **shape,
            )  # fmt: skip
        elif switches.VALUES_IN_REGISTERS and self.rows > tile:
            groups = -(-self.rows // ROW_TILE)
            launch(
                hopper_fp8_many.decode_fp8_many, (self.plan.parts * groups,),
                _rows_descriptor(q_latent, LATENT, ROW_TILE, 128), _rows_descriptor(q_rope, ROPE), *rest, q_scale, *where,
                GROUPS=groups, NUM_STAGES=hopper_fp8_many.STAGES, LATENT_FIRST=switches.LATENT_FIRST, **shape,
            )  # fmt: skip
        else:
            groups = -(-self.rows // ROW_TILE)
            launch(
                hopper_fp8.decode_fp8, (self.plan.parts * groups,),
                q_latent, _rows_descriptor(q_rope, ROPE), *rest, q_scale, *where, GROUPS=groups, NUM_STAGES=hopper_fp8.STAGES,
                TILE=next(tile for tile in (16, 32, 64) if tile >= min(self.rows, ROW_TILE)), **shape,
            )  # fmt: skip
        return self._finish(out, up_v, page_table, together=together)

    def bf16(
        self,
        q_latent: Tensor,
        q_rope: Tensor,
        cache: Tensor,
        page_table: Tensor,
        scale: float,
        out: Tensor,
        up_v: Tensor | None = None,
    ) -> Tensor:
        """q_latent [N, q, H, 512] and q_rope [N, q, H, 64], BF16, contiguous; cache BF16 [pages, 64, 576], latent first,
        pages contiguous inside; page_table int32 [N, P] → out [N, q, H, 512], BF16 or float32, contiguous. up_v: as for
        `fp8`."""
        together = self._together(up_v, out, page_table)
        where, rest = self._where(out, page_table, scale, together=together), self._bf16_descriptors(cache)
        shape = self._options(together=together)
        if switches.SWAP_OPERANDS and self.rows <= MOST_SWAPPED["bf16"]:
            tile = next(tile for tile in hopper_bf16_few.TILES if tile >= self.rows)
            launch(
                hopper_bf16_few.decode_bf16_few, (self.plan.parts,),
                _rows_descriptor(q_latent, LATENT, tile), _rows_descriptor(q_rope, ROPE, tile), *rest, *where,
                HALVES=hopper_bf16_few.HALVES, TILE=tile, **shape,
            )  # fmt: skip
        else:
            groups = -(-self.rows // ROW_TILE)
            launch(
                hopper_bf16.decode_bf16, (self.plan.parts * groups,),
                _rows_descriptor(q_latent, LATENT), _rows_descriptor(q_rope, ROPE), *rest, *where, GROUPS=groups,
                HALVES=hopper_bf16.HALVES, **shape,
            )  # fmt: skip
        return self._finish(out, up_v, page_table, together=together)

    def _where(self, out: Tensor, page_table: Tensor, scale: float, *, together: bool) -> tuple[Any, ...]:
        """Arguments of all decode kernels from `out` on."""
        plan = self.plan
        # Without counters nothing is read there.
        counters = plan.counters if together and plan.counters is not None else plan.spans
        return (
            out, self.partial, self.lse, page_table, plan.lengths, plan.starts, plan.spans, plan.records, counters,
            plan.lengths.shape[0], plan.parts, scale * math.log2(math.e), page_table.stride(0),
        )  # fmt: skip

    def _options(self, *, together: bool) -> dict[str, Any]:
        """Options of all decode kernels."""
        early = switches.LAUNCH_EARLY and overlaps(self.lse.device)
        # The combine reads the plan before it waits for the decode, and the decode may start before the plan is made.
        following = self.pdl and not early
        return {
            "HEADS": self.heads, "ROWS": self.rows, "PDL": following, "PAGES": self.plan.pages, "EARLY": early,
            "MAPS": switches.FETCH_MAPS, "MERGE": together, "num_warps": 4, "enable_fp_fusion": True,
        } | ({"launch_pdl": True} if early else {})  # fmt: skip

    def _share(self, out: Tensor, page_table: Tensor) -> Shares:
        """How merging is divided when a product with up_v follows."""
        return shares(out.shape[0] * out.shape[1], min(self.plan.parts, page_table.shape[1]))

    def _together(self, up_v: Tensor | None, out: Tensor, page_table: Tensor) -> bool:
        """Does the decode merge? Where the product that follows merges all splits anyway, it has less to wait for."""
        return self.plan.counters is not None and (up_v is None or self._share(out, page_table).combines)

    def _finish(self, out: Tensor, up_v: Tensor | None, page_table: Tensor, *, together: bool) -> Tensor:
        """What stands in `out` and `partial` behind the decode, merged, and multiplied with up_v."""
        if up_v is None:
            return out if together else self._combine(out, 1)
        most = self._share(out, page_table).most
        if together:
            most = 1
        elif most != ALL:
            self._combine(out, most)
        return merge_and_expand(out, self.partial, self.lse, self.plan, up_v, most)

    def _combine(self, out: Tensor, most: int) -> Tensor:
        """Merge sequences of more than `most` splits."""
        sequences = self.plan.lengths.shape[0]
        # Few rows come with many splits: narrow programs, many splits in flight. Many rows: the other way round.
        columns, splits = (64, 64) if self.rows * sequences < 256 else (512, 8)
        # Of many sequences most have one part and nothing to merge; starting a program for each row would take longer.
        each = 1
        while each < MOST_EACH and self.rows % (2 * each) == 0 and self.rows * sequences >= 2 * each * FEW_PROGRAMS:
            each *= 2
        launch(
            combine_splits, (self.rows // each, LATENT // columns, sequences),
            out, self.partial, self.lse, self.plan.spans,
            ROWS=self.rows, EACH=each, COLUMNS=columns, SPLITS=splits, MOST=most, num_warps=4, **programmatic(out.device),
        )  # fmt: skip
        return out

    def _fp8_descriptors(self, cache: Fp8Planes) -> tuple[TensorDescriptor, ...]:
        key = (cache.latent.data_ptr(), *cache.latent.shape, cache.latent.stride(0))
        if key not in self._descriptors:
            self._descriptors[key] = (
                _descriptor(cache.latent, [1, PAGE, 128]),
                _descriptor(cache.rope, [1, PAGE, ROPE]),
                _descriptor(cache.scale, [1, PAGE], swizzle=0),
            )
        return self._descriptors[key]

    def _bf16_descriptors(self, cache: Tensor) -> tuple[TensorDescriptor, ...]:
        key = (cache.data_ptr(), *cache.shape, cache.stride(0))
        if key not in self._descriptors:
            self._descriptors[key] = (_descriptor(cache, [1, PAGE, 256]), _descriptor(cache, [1, PAGE, ROPE]))
        return self._descriptors[key]


def _rows_descriptor(queries: Tensor, width: int, rows: int = ROW_TILE, columns: int | None = None) -> TensorDescriptor:
    return _descriptor(queries.view(-1, width), [rows, columns or width])


def _descriptor(tensor: Tensor, block: list[int], swizzle: int = 128) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=tensor.element_size() * 8, rank=len(block))
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block, layout)
