"""Which choices of UCX's transports let the end of an agent stop its peers' writes."""

from __future__ import annotations

import pytest

from fluentllm.plugins.kv_nixl.wire import needs_both_ends


@pytest.mark.parametrize(
    ("chosen", "cpu", "gpu"),
    [
        ("^cma,knem,xpmem", True, False),
        ("^cma,knem,xpmem,cuda_ipc", True, True),
        ("^cma,knem", False, False),
        ("^tcp", False, False),
        ("tcp,self", True, True),
        ("tcp,posix,cuda_copy", True, True),
        ("tcp,cuda_ipc", True, False),
        ("tcp,cuda", True, False),
        ("mm,tcp", False, False),
        ("sm,tcp", False, False),
        ("all", False, False),
    ],
)
def test_who_can_be_cut_off(chosen: str, cpu: bool, gpu: bool) -> None:
    """`mm` and `sm` are UCX's names for groups that have xpmem in them, `cuda` for one that has cuda_ipc."""
    assert (needs_both_ends(chosen, "DRAM"), needs_both_ends(chosen, "VRAM")) == (cpu, gpu)
