"""Whole engines over an FP8 cache: MLA by the kernels of `attn_mla_fp8`, grouped heads by those of `attn_triton`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .models import SMALL, engine, small
from .test_captured_steps import TEMPERATURES, run

FP8 = {"kv.dtype": "fp8"}
KINDS = {name: "HopperMlaFp8" if name.startswith(("deepseek", "longcat")) else "TritonAttention" for name in SMALL}


@pytest.mark.gpu(capability=(9, 0))
@pytest.mark.parametrize("name", SMALL)
def test_captured_programs_give_the_tokens_of_eager_ones(name: str, tmp_path: Path) -> None:
    folder = small(name, tmp_path)
    with engine(folder, **FP8, **{"engine.cuda_graphs": False, "engine.overlap_depth": 0}) as local:
        expected = [run(local, temperature) for temperature in TEMPERATURES]
        assert type(local.engine.executor.programs.attention).__name__ == KINDS[name]
    for depth in (0, 2):
        with engine(folder, **FP8, **{"engine.overlap_depth": depth}) as local:
            assert [run(local, temperature) for temperature in TEMPERATURES] == expected, depth
            assert len(local.engine.executor.programs._graphs), "nothing was captured"


@pytest.mark.gpu(capability=(9, 0))
@pytest.mark.parametrize("name", ["deepseek-v3-lite", "longcat-flash-lite"])
def test_drafts_over_the_same_cache(name: str, tmp_path: Path) -> None:
    """The draft layer's KV is FP8 too; every step verifies drafts, with several rows a sequence."""
    drafts = {"speculative.method": "mtp", "speculative.k": 3, "speculative.min_acceptance": 0.0}
    with engine(small(name, tmp_path), **FP8, **drafts) as local:
        assert all(run(local, 0.0))
        assert sum(local.engine.stats().speculative.drafted)


@pytest.mark.gpu(capability=(9, 0))
def test_steady_decoding_never_waits_for_the_device(tmp_path: Path) -> None:
    with engine(small("deepseek-v3-lite", tmp_path), **FP8) as local:
        run(local, 0.0)
        run(local, 0.0)
        local.engine.executor.call(lambda: torch.cuda.set_sync_debug_mode("error")).result()
        try:
            assert all(run(local, 0.0))
        finally:
            local.engine.executor.call(lambda: torch.cuda.set_sync_debug_mode("default")).result()


def test_a_token_takes_644_bytes(tmp_path: Path) -> None:
    """Latent, scale and rotary key of each layer; 1,152 in 16 bits."""
    folder = small("deepseek-v3-lite", tmp_path)
    sizes = []
    for settings in (FP8, {}):
        with engine(folder, **settings) as local:
            info = local.engine.info
            sizes.append(info.memory["kv_pool"] / (info.kv_tokens + info.page_size) / info.spec.kv.layers)
    assert sizes == [644, 1152]


def test_the_plain_one_serves_where_kernels_do_not(tmp_path: Path) -> None:
    """In float32, say."""
    with engine(small("deepseek-v3-lite", tmp_path), **FP8, **{"model.dtype": "float32"}) as local:
        assert all(len(tokens) == 40 for tokens in run(local, 0.0))
        assert type(local.engine.executor.programs.attention).__name__ == "PlainMlaFp8"
