"""The pool tensors: shapes, sizes, views, and what is said when they do not fit."""

import re

import pytest
import torch

from fluentllm.core.errors import OutOfMemory
from fluentllm.core.kv import pool as pool_module
from fluentllm.core.kv.pool import KVPool, free_memory
from fluentllm.core.types import KVSpec
from fluentllm.memory import parse_bytes

CPU = torch.device("cpu")
GQA = KVSpec(kind="gqa", layers=3, heads=2, head_dim=8, v_head_dim=4)
MLA = KVSpec(kind="mla", layers=3, latent_dim=16, rope_dim=8)


def test_gqa_has_keys_and_values_and_a_scratch_page():
    pool = KVPool(GQA, pages=5, page_size=4, dtype=torch.float32, device=CPU)
    assert pool.k.shape == (3, 6, 4, 2, 8)
    assert pool.v.shape == (3, 6, 4, 2, 4)
    assert pool.latent.numel() == 0
    assert pool.k.count_nonzero() == pool.v.count_nonzero() == 0


def test_mla_has_one_latent():
    pool = KVPool(MLA, pages=5, page_size=4, dtype=torch.bfloat16, device=CPU)
    assert pool.latent.shape == (3, 6, 4, 24)
    assert pool.latent.count_nonzero() == 0
    assert pool.k.numel() == pool.v.numel() == 0


@pytest.mark.parametrize("spec", [GQA, MLA], ids=lambda spec: spec.kind)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_the_bytes_planned_are_the_bytes_taken(spec: KVSpec, dtype: torch.dtype):
    pool = KVPool(spec, pages=5, page_size=4, dtype=dtype, device=CPU)
    taken = pool.k.nbytes + pool.v.nbytes + pool.latent.nbytes
    assert taken == pool.bytes == 6 * KVPool.bytes_per_page(spec, 4, dtype)


@pytest.mark.parametrize("spec", [GQA, MLA], ids=lambda spec: spec.kind)
def test_rows_are_views_by_token(spec: KVSpec):
    pool = KVPool(spec, pages=5, page_size=4, dtype=torch.float32, device=CPU)
    tensors = [pool.latent] if spec.kind == "mla" else [pool.k, pool.v]
    rows = pool.rows(1)
    assert len(rows) == len(tensors)
    for row, tensor in zip(rows, tensors, strict=True):
        assert row.shape == (24, *tensor.shape[3:])
        value = torch.randn(tensor.shape[3:])
        row[3 * 4 + 2] = value
        assert torch.equal(tensor[1, 3, 2], value)
        assert tensor.count_nonzero() == value.count_nonzero()


@pytest.mark.parametrize("spec", [GQA, MLA], ids=lambda spec: spec.kind)
def test_a_pool_that_does_not_fit_says_what_would(spec: KVSpec):
    with pytest.raises(OutOfMemory) as caught:
        KVPool(spec, pages=10**12, page_size=16, dtype=torch.float32, device=CPU)
    assert "1000000000000 pages of 16 tokens" in caught.value.message
    assert "kv.memory" in (caught.value.fix or "")


def test_an_allocation_that_fails_is_out_of_memory_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pool_module, "free_memory", lambda device: None)
    with pytest.raises(OutOfMemory, match=r"Set kv\.memory to less"):
        KVPool(GQA, pages=10**13, page_size=16, dtype=torch.float32, device=CPU)


def test_where_not_even_a_page_fits_no_setting_is_proposed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pool_module, "free_memory", lambda device: 1000)
    with pytest.raises(OutOfMemory, match="Not even one page fits"):
        KVPool(GQA, pages=4, page_size=16, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("page_size", [16, 400, 5000])
@pytest.mark.parametrize("free", [20_000, 3 * 2**20, 10 * 2**20 + 1])
def test_the_proposed_size_fits(monkeypatch: pytest.MonkeyPatch, page_size: int, free: int):
    """Pages of 5 kB, 112 kB and 1.4 MB."""
    monkeypatch.setattr(pool_module, "free_memory", lambda device: free)
    page = KVPool.bytes_per_page(GQA, page_size, torch.float32)
    with pytest.raises(OutOfMemory) as raised:
        KVPool(GQA, pages=10**6, page_size=page_size, dtype=torch.float32, device=CPU)
    if 2.3 * page > free:
        assert "Not even one page fits" in (raised.value.fix or "")
        return
    said = re.fullmatch(r"Set kv\.memory to (\w+) or less\.", raised.value.fix or "")
    assert said is not None
    pages = parse_bytes(said[1]) // page
    assert 0.6 * free < (pages + 1) * page <= 0.9 * free
    KVPool(GQA, pages, page_size, torch.float32, CPU)


def test_free_memory_respects_a_container(tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\nactive_file 100\ninactive_file 150\n")
    assert pool_module._left_in_group(tmp_path) == 550
    (tmp_path / "memory.max").write_text("max\n")
    assert pool_module._left_in_group(tmp_path) is None
    assert pool_module._left_in_group(tmp_path / "missing") is None
    assert pool_module._fields(tmp_path / "missing") == {}


def test_free_memory_is_known_on_linux():
    free = free_memory(CPU)
    assert free is None or free > 2**20
    assert free_memory(torch.device("meta")) is None
