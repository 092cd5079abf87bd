"""Writing KV without attending leaves the pool as attending does."""

from __future__ import annotations

import pytest
import torch
from speculation.watching import whole

from fluentllm.core.kv.pool import KVPool
from fluentllm.core.protocols import Appending, AttentionContext, AttentionSpec
from fluentllm.core.settings import Settings
from fluentllm.core.types import KVSpec, ModelSpec
from fluentllm.plugins.attn_mla_fp8.plain import PlainMlaFp8
from fluentllm.plugins.attn_torch.backend import TorchAttention
from fluentllm.plugins.attn_torch.fixed import FixedOrderAttention

PAGES, PAGE, CPU = 4, 16, torch.device("cpu")
GROUPED = KVSpec(kind="gqa", layers=2, heads=2, head_dim=16, v_head_dim=16)
LATENT = KVSpec(kind="mla", layers=2, latent_dim=32, rope_dim=16)
KINDS = [
    (TorchAttention, GROUPED, torch.float32, torch.float32),
    (TorchAttention, GROUPED, torch.bfloat16, torch.float8_e4m3fn),
    (TorchAttention, LATENT, torch.float32, torch.float32),
    (FixedOrderAttention, GROUPED, torch.float32, torch.float32),
    (FixedOrderAttention, LATENT, torch.bfloat16, torch.bfloat16),
    (PlainMlaFp8, LATENT, torch.float32, torch.float8_e4m3fn),
]


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("rows", [0, 1, 21])
@pytest.mark.parametrize(("kind", "kv", "dtype", "kept"), KINDS)
def test_the_pool_is_the_same(kind: type, kv: KVSpec, dtype: torch.dtype, kept: torch.dtype, rows: int) -> None:
    model = ModelSpec(architecture="x", vocab_size=9, hidden_size=64, layers=2, heads=4, max_position=64, kv=kv)
    spec = AttentionSpec(model=model, device="cpu", dtype=name(dtype), kv_dtype=name(kept), page_size=PAGE, deterministic=False)
    pools = [KVPool(kv, PAGES, PAGE, kept, CPU) for _ in range(2)]
    attending, appending = (kind(AttentionContext(spec, pool, Settings())) for pool in pools)
    assert isinstance(appending, Appending)
    batch = whole(list(range(rows)))
    batch.page_size, batch.page_table = PAGE, torch.arange(PAGES + 1, dtype=torch.int32).unsqueeze(0)
    batch.kv_rows = torch.arange(rows)
    for backend in (attending, appending):
        backend.begin(batch)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(rows, *shape).to(dtype)

    for layer in range(2):
        if kv.kind == "gqa":
            k, v = random(2, 16), random(2, 16)
            attending.gqa(layer, random(4, 16), k, v, batch, 0.25)
            appending.append_gqa(layer, k, v, batch)
        else:
            latent, rope, up = random(32), random(16), torch.randn(4, 8, 32).to(dtype)
            attending.mla(layer, random(4, 8), random(4, 16), latent, rope, up, up, batch, 0.25)
            appending.append_mla(layer, latent, rope, batch)
    for left, right in zip(*((pool.k, pool.v, pool.latent) for pool in pools), strict=True):
        assert torch.equal(left.view(torch.uint8), right.view(torch.uint8))
        assert bool(left.view(torch.uint8).any()) == bool(rows and left.numel())
