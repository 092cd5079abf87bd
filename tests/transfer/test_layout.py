"""Layouts: what a pool looks like to others, and what is refused."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from fluentllm.core.kv.pool import KVPool
from fluentllm.core.types import KVSpec
from fluentllm.kernels.mla_decode import fp8_planes
from fluentllm.transfer.layout import KVLayout, LayoutMismatch, check_compatible, fingerprint, layout_of, memory_of

GQA = KVLayout(model="m", kind="gqa", dtype="bfloat16", page_size=16, pages=9, layers=3, heads=4, head_dim=8, v_head_dim=6)
MLA = KVLayout(model="m", kind="mla", dtype="float32", page_size=4, pages=5, layers=2, latent_dim=6, rope_dim=2)
FP8 = msgspec.structs.replace(MLA, dtype="float8_e4m3fn")


@pytest.mark.parametrize(
    "spec",
    [
        KVSpec(kind="gqa", layers=3, heads=4, head_dim=8, v_head_dim=6),
        KVSpec(kind="mla", layers=2, latent_dim=6, rope_dim=2),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_pools_layout_is_its_memory(spec: KVSpec, dtype: torch.dtype) -> None:
    pool = KVPool(spec, 7, 4, dtype, torch.device("cpu"))
    layout = layout_of(pool, "m")
    memory = memory_of(pool)
    assert [region.size for region in layout.tensors()] == [tensor.numel() * tensor.element_size() for tensor in memory]
    assert layout.bytes_per_page() * layout.pages == pool.bytes
    base = 0
    for region, tensor in zip(layout.tensors(), memory, strict=True):
        assert region.offset == base
        assert region.layer_bytes == tensor.stride(0) * tensor.element_size()
        assert region.page_bytes == tensor.stride(1) * tensor.element_size()
        assert region.token_bytes == tensor.stride(2) * tensor.element_size()
        base += region.size


def test_parts_of_a_page_are_the_planes_of_the_fp8_cache() -> None:
    """The first tokens of a page, cut out by the layout, are those that kernels see; nobody knows the planes twice."""
    for latent, rope, page in ((512, 64, 64), (24, 8, 16), (5, 3, 16)):
        spec = KVSpec(kind="mla", layers=1, latent_dim=latent, rope_dim=rope)
        pool = KVPool(spec, 2, page, torch.float8_e4m3fn, torch.device("cpu"))
        planes = fp8_planes(pool.latent[0], latent, rope)
        parts = planes.latent.view(torch.uint8), planes.scale[:, :, None].view(torch.uint8), planes.rope.view(torch.uint8)
        pool.latent.random_()
        [region] = layout_of(pool, "m").tensors()
        content = pool.latent[0, 2].flatten()
        for tokens in (1, page - 1, page):
            found = [content[start : start + size] for start, size in region.parts(tokens)]
            assert [part.tolist() for part in found] == [part[2, :tokens].flatten().tolist() for part in parts]
        assert region.token_bytes == sum(size for _, size in region.parts(1)) == latent + 4 + 2 * rope


def test_a_layout_crosses_the_network() -> None:
    for layout in (GQA, MLA, FP8):
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(layout), type=KVLayout) == layout


def test_a_rank_of_eight_shares_heads() -> None:
    assert [msgspec.structs.replace(GQA, tp_size=size).local_heads for size in (1, 2, 4, 8)] == [4, 2, 1, 1]
    assert [msgspec.structs.replace(MLA, tp_size=size).local_heads for size in (1, 8)] == [1, 1]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("model", "other"), ("dtype", "float16"), ("page_size", 32), ("layers", 4), ("draft_layers", 1), ("heads", 8)),
        *(("head_dim", 4), ("v_head_dim", 4), ("version", 2)),
    ],
)
def test_what_differs_is_refused_with_both_layouts(field: str, value: object) -> None:
    other = msgspec.structs.replace(GQA, **{field: value})
    with pytest.raises(LayoutMismatch) as caught:
        check_compatible(GQA, other)
    text = str(caught.value)
    assert f"differs in {field} ({getattr(GQA, field)} and {value})" in text
    assert "prefill: version=1 model=m kind=gqa" in text.replace(f"decode:  version={value}", "")
    assert text.count("page_size=") == 2


def test_pages_and_ranks_may_differ() -> None:
    check_compatible(GQA, msgspec.structs.replace(GQA, pages=100, tp_size=2, tp_rank=1))
    with pytest.raises(LayoutMismatch, match="kind"):
        check_compatible(GQA, MLA)
    with pytest.raises(LayoutMismatch, match=r"dtype \(float32 and float8_e4m3fn\)"):
        check_compatible(MLA, FP8)


@pytest.mark.parametrize(
    "change",
    [
        *({"tp_size": 3}, {"tp_size": 2, "tp_rank": 2}, {"dtype": "int4"}, {"page_size": 0}, {"heads": 0}),
        *({"layers": 2**40}, {"model": "x" * 200}, {"kind": "other"}, {"draft_layers": 4}, {"surprise": 1}),
    ],
)
def test_nonsense_is_refused_while_decoding(change: dict[str, object]) -> None:
    data = msgspec.msgpack.encode(msgspec.structs.asdict(GQA) | change)
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(data, type=KVLayout)


def test_the_fingerprint_sees_config_and_weights(tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    first.write_bytes(bytes(300_000))
    second.write_bytes(b"tiny")
    plain = fingerprint({"hidden": 4, "layers": 2}, [first, second])
    assert len(plain) == 32
    assert fingerprint({"layers": 2, "hidden": 4}, [second, first]) == plain
    assert fingerprint({"layers": 3, "hidden": 4}, [first, second]) != plain
    second.write_bytes(b"tinz")
    assert fingerprint({"hidden": 4, "layers": 2}, [first, second]) != plain
    second.write_bytes(b"tiny")
    changed = bytearray(300_000)
    changed[-1] = 1
    first.write_bytes(changed)
    assert fingerprint({"hidden": 4, "layers": 2}, [first, second]) != plain
    first.write_bytes(b"")
    assert fingerprint({}, [first]) != fingerprint({}, [])
