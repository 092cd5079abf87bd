"""MLA from a layer's products on a GPU: which launches, in which order, and when who follows a prefill hears of its KV.
Recorded on tensors without memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fluentllm.assembly.attention.passes import FusedPhasedAttention, Order
from fluentllm.core.batch import Batch
from fluentllm.core.handoff import watched
from fluentllm.core.kv.pool import KVPool
from fluentllm.core.protocols import AttentionContext, AttentionSpec, FusedMLA
from fluentllm.core.settings import Settings
from fluentllm.core.slots import SlotTables
from fluentllm.core.types import KVSpec, ModelSpec, PrefillChunk
from fluentllm.kernels.mla_decode.decode import MOST_SWAPPED
from fluentllm.kernels.triton import mla_absorb
from fluentllm.kernels.triton.launch import recording
from fluentllm.plugins.attn_mla_fp8.hopper import HopperMlaFp8
from fluentllm.plugins.attn_triton.backend import TritonAttention
from fluentllm.step.decode import decode_batch
from fluentllm.step.prefill import prefill_batch

META, HEADS, LAYERS = torch.device("meta"), 16, 2
KV = KVSpec(kind="mla", layers=LAYERS, latent_dim=512, rope_dim=64)


def backend(dtype: torch.dtype, longest: int) -> FusedMLA:
    model = ModelSpec(architecture="", vocab_size=50, hidden_size=64, layers=LAYERS, heads=HEADS, max_position=longest, kv=KV)
    spec = AttentionSpec(
        model=model, device="cuda", dtype="bfloat16", kv_dtype=str(dtype).removeprefix("torch."), page_size=64,
        deterministic=False,
    )  # fmt: skip
    context = AttentionContext(spec, KVPool(KV, 50, 64, dtype, META), Settings())
    return TritonAttention(context) if dtype is torch.bfloat16 else HopperMlaFp8(context)


def tables(longest: int) -> SlotTables:
    return SlotTables(80, longest, 64, 50, META, max_drafts=3)


def layer(attention: FusedMLA, number: int, batch: Batch) -> Tensor:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=META)

    rows = batch.tokens.shape[0]
    rope, ups = (empty(rows, 1, 64), empty(rows, 1, 64)), (empty(HEADS, 128, 512), empty(HEADS, 128, 512))
    return attention.mla_from_products(
        number, empty(rows, 2112)[:, 1536:], empty(512), empty(rows, HEADS, 192), rope, *ups, batch, 0.1, eps=1e-6,
        latent_scale=1.0, interleaved=False,
    )  # fmt: skip


BEFORE = ["_append_and_rotate_kernel"], ["_append_norms", "_quantise_query"]
FEW = ["_absorb_kernel"], ["_absorb_norms", "_quantise_query"]


@pytest.mark.parametrize(
    ("longest", "sequences", "rows", "before", "behind"),
    [
        (256, 1, 1, FEW, ["_merge_and_expand"]),
        (1024, 1, 1, FEW, ["combine_splits", "_merge_and_expand"]),
        (65536, 1, 1, FEW, ["combine_splits", "_merge_and_expand"]),
        (65536, 16, 4, FEW, ["combine_splits", "_merge_and_expand"]),
        (65536, 65, 1, BEFORE, ["combine_splits"]),
        (512, 17, 4, BEFORE, ["combine_splits"]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_layer_of_decode(
    longest: int, sequences: int, rows: int, before: tuple[list[str], list[str]], behind: list[str], dtype: torch.dtype
) -> None:
    """`before`, `behind`: attention, in a cache of 16 bits and of 8."""
    attention = backend(dtype, longest)
    quantised = dtype is not torch.bfloat16
    with recording() as launches:
        batch = decode_batch(torch.empty(sequences, dtype=torch.int64, device=META), rows - 1, tables(longest))
        attention.begin(batch)
        for number in range(LAYERS):
            first = len(launches)
            assert layer(attention, number, batch).shape == (sequences * rows, HEADS, 128)
    # The last layer's: in the first one the pass is planned.
    names = [one.kernel.__name__ for one in launches[first:]]
    few = HEADS * rows <= MOST_SWAPPED["fp8" if quantised else "bf16"]
    decode = ("decode_bf16", "decode_bf16_few", "decode_fp8_many", "decode_fp8_few")[2 * quantised + few]
    assert names == [*before[quantised], decode, *behind]


def test_few_tokens_may_go_the_way_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mla_absorb, "MOST_TOKENS", 0)
    attention = backend(torch.bfloat16, 512)
    with recording() as launches:
        batch = decode_batch(torch.empty(1, dtype=torch.int64, device=META), 0, tables(512))
        attention.begin(batch)
        layer(attention, 0, batch)
    assert not {"_absorb_kernel", "_merge_and_expand"} & {one.kernel.__name__ for one in launches}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("among_others", [False, True])
def test_a_prefill_is_followed_before_it_attends(dtype: torch.dtype, among_others: bool) -> None:
    alone = backend(dtype, 512)
    attention: FusedMLA = FusedPhasedAttention(Order([alone]), Order([backend(dtype, 512)])) if among_others else alone
    told: list[tuple[int, list[str]]] = []
    with recording() as launches:

        class Watcher:
            def layer(self, number: int) -> None:
                told.append((number, [one.kernel.__name__ for one in launches]))

        twin = watched(attention, Watcher())  # type: ignore[arg-type]
        batch = prefill_batch([PrefillChunk(slot=0, start=0, count=70, last=True)], tables(512))
        twin.begin(batch)
        for number in range(LAYERS):
            launches.clear()
            assert layer(twin, number, batch).shape == (70, HEADS, 128)
            assert launches[-1].kernel.__name__ == "_prefill_kernel"
    assert [number for number, _ in told] == [*range(LAYERS)]
    assert all(names[-1] == ("_append_norms" if dtype is not torch.bfloat16 else "_append_latents_kernel") for _, names in told)
    assert not any("_prefill_kernel" in names for _, names in told)
