"""Who looks prompts up: on a GPU two kernels, and nothing that reads or copies whole histories."""

from __future__ import annotations

import torch

from fluentllm.core.slots import SlotTables
from fluentllm.kernels.triton.launch import recording
from fluentllm.plugins.spec_pld.proposer import PromptLookup


def test_a_gpu_has_two_launches_a_step() -> None:
    meta = torch.device("meta")
    tables = SlotTables(9, 1000, 16, 50, meta, max_drafts=3)
    proposer = PromptLookup(tables, 2, 4)
    slots = torch.empty(5, dtype=torch.int64, device=meta)
    with recording() as launches, torch.profiler.profile() as profiler:
        drafts, valid = proposer.resume(None, slots, 3)  # type: ignore[arg-type]
    assert (drafts.shape, valid.shape) == ((5, 3), (5,))
    assert [launch.kernel.__name__ for launch in launches] == ["_scan_kernel", "_take_kernel"]
    assert {event.key for event in profiler.key_averages()} <= {"aten::empty"}
    assert proposer.resume(None, slots, 0)[0].shape == (5, 0)  # type: ignore[arg-type]
