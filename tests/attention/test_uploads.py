"""What attention plans on the host goes to the device in the type that it has there: a copy that changes it takes more bytes
over the bus, and a launch besides. Looked at on a device without memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fluentllm.core.slots import SlotTables
from fluentllm.core.types import PrefillChunk
from fluentllm.kernels.triton.fixed_attention import plan_prefill
from fluentllm.kernels.triton.gqa_prefill_plan import PaddedPlans, PrefillPlan
from fluentllm.plugins.attn_flashinfer.prefill import key_rows
from fluentllm.plugins.attn_mla_fp8.prefix import plan_workspace
from fluentllm.plugins.attn_triton.expand import expand_pages
from fluentllm.step.prefill import prefill_batch

if TYPE_CHECKING:
    from collections.abc import Callable

    from fluentllm.core.batch import Batch

META = torch.device("meta")
COPIES = torch.ops.aten._to_copy, torch.ops.aten.copy_
PASSES = [
    [PrefillChunk(slot=0, start=0, count=9, last=True)],
    [PrefillChunk(slot=2, start=16, count=20, last=True), PrefillChunk(slot=1, start=0, count=1, last=False)],
]


class Uploads(TorchDispatchMode):
    """Types of each copy from the host to the device: there and here."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.dtype, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if func._overloadpacket in COPIES and (tensors[-1].device.type, result.device.type) == ("cpu", "meta"):
            self.seen.append((tensors[-1].dtype, result.dtype))
        return result


def prefill_tiles(batch: Batch) -> Any:
    assert batch.query_lengths is not None
    assert batch.kv_lengths_host is not None
    PaddedPlans(4, 2, META).plan(batch.query_lengths, batch.kv_lengths_host, 64)
    return PrefillPlan(batch.query_lengths, batch.kv_lengths_host, META).tiles(4, 2)


def fixed_tiles(batch: Batch) -> Any:
    assert batch.query_lengths is not None
    return plan_prefill(batch.query_start, batch.kv_lengths, batch.query_lengths, 2, 128, 256)


@pytest.mark.parametrize("plan", [expand_pages, plan_workspace, key_rows, prefill_tiles, fixed_tiles, None])
@pytest.mark.parametrize("chunks", PASSES)
def test_uploads_keep_their_type(plan: Callable[[Batch], Any] | None, chunks: list[PrefillChunk]) -> None:
    """None: the pass itself."""
    tables = SlotTables(4, 64, 16, 50, META, max_drafts=0)
    batch = prefill_batch(chunks, tables)
    with Uploads() as uploads:
        prefill_batch(chunks, tables) if plan is None else plan(batch)
    assert uploads.seen
    assert [pair for pair in uploads.seen if pair[0] != pair[1]] == []
