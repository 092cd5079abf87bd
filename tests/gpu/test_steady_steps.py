"""Steady decoding, with and without speculation: one graph a step, nothing that waits for the device, and no idle device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from .models import engine, small
from .watching import watch

DRAFTING: dict[str, dict[str, Any]] = {
    "none": {},
    "pld": {"speculative.method": "pld", "speculative.k": 3, "speculative.min_acceptance": 0.0},
    "mtp": {"speculative.method": "mtp", "speculative.k": 3, "speculative.min_acceptance": 0.0},
}
STEPS = 20


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("method", DRAFTING)
def test_a_step_is_one_graph_and_waits_for_nothing(
    method: str, depth: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "fluentllm.step.decode")  # where a proposer waits for the device
    folder = small("deepseek-v3-lite", tmp_path, num_nextn_predict_layers=1)
    with engine(folder, **{"engine.overlap_depth": depth, **DRAFTING[method]}) as local:
        watch(local, 3, 4)
        local.engine.executor.call(lambda: torch.cuda.set_sync_debug_mode("error")).result()
        seen = watch(local, 3, STEPS)
        local.engine.executor.call(lambda: torch.cuda.set_sync_debug_mode("default")).result()
        assert method == "none" or sum(local.engine.stats().speculative.drafted)
    print(*sorted({tuple(sorted(counted.items())) for counted in seen.calls}), sep="\n")
    assert len(seen.calls) >= STEPS
    for counted in seen.calls:
        assert counted["cudaGraphLaunch"] == 1, counted
    assert seen.waiting() == {}
    # Results too come out of the graph. A page that a sequence comes to is granted by a copy.
    copied = [sum(count for name, count in counted.items() if "Memcpy" in name) for counted in seen.calls]
    assert copied.count(0) >= STEPS // 2, copied


def test_the_device_is_not_idle_between_steps(tmp_path: Path) -> None:
    """At depth 1, with steps of some 5 ms: longer than the host needs for one, under the profiler too."""
    shape = {"num_hidden_layers": 28, "hidden_size": 4096, "intermediate_size": 14336}
    with engine(small("qwen3-0.6b", tmp_path, **shape), **{"engine.overlap_depth": 1}) as local:
        watch(local, 8, 4)
        idle = sorted(watch(local, 8, 40).idle())
    print(f"idle between steps, µs: median {idle[len(idle) // 2]:.1f}, most {idle[-1]:.1f}")
    assert idle[len(idle) // 2] <= 20
