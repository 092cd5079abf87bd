"""The size of a group of layers, and who tells when one is complete."""

from __future__ import annotations

import pytest

from fluentllm.core.types import PrefillChunk, StepPlan
from fluentllm.plugins.kv_layerwise.pacing import Line, Pacing
from fluentllm.plugins.kv_layerwise.watch import Progress, Watch

MS = 1e-3


def paced(layers: int, *, pass_ms: float, send_ms: float, cost_ms: float) -> Pacing:
    """Of passes over 1,000 tokens, whose KV is 1,000,000 bytes."""
    pacing = Pacing(layers)
    for part in (1.0, 0.5):
        pacing.passed(part * pass_ms * MS, int(1000 * part))
        pacing.sent(int(1_000_000 * part), part * send_ms * MS)
    pacing.cost = cost_ms * MS
    return pacing


def duration(pacing: Pacing, groups: int) -> float:
    """The model in the module's docstring, for 1,000 tokens."""
    compute, send = pacing.passes.at(1000), pacing.transfers.at(1_000_000)
    return max(compute, send) + min(compute, send) / groups + (groups - 1) * pacing.cost


@pytest.mark.parametrize("layers", [1, 2, 16, 61])
@pytest.mark.parametrize("send_ms", [0.1, 2, 30, 300, 3000])
def test_groups_cost_less_than_any_other_number_of_them(layers: int, send_ms: float) -> None:
    pacing = paced(layers, pass_ms=300, send_ms=send_ms, cost_ms=0.8)
    size = pacing.group(1000, 1_000_000)
    assert 1 <= size <= layers
    count = -(-layers // size)
    best = min(duration(pacing, n) for n in range(1, layers + 1))
    # Groups are of whole layers, so that their number is not always free to choose; and what saves little is not done.
    assert duration(pacing, count) <= best * 1.03


def test_a_slow_network_gets_small_groups_and_a_fast_one_a_single_group() -> None:
    assert paced(16, pass_ms=300, send_ms=300, cost_ms=0.8).group(1000, 1_000_000) == 1
    assert paced(16, pass_ms=300, send_ms=3, cost_ms=0.8).group(1000, 1_000_000) == 16
    assert Pacing(40).group(1000, 1_000_000) == 10  # nothing is known yet


def test_fetching_is_weighed_against_computing() -> None:
    assert not Pacing(16).fetching_pays(1000, 1_000_000)  # nothing is known yet
    assert paced(16, pass_ms=300, send_ms=3, cost_ms=0.8).fetching_pays(1000, 1_000_000)
    assert not paced(16, pass_ms=300, send_ms=290, cost_ms=0.8).fetching_pays(1000, 1_000_000)


def test_a_line_through_readings() -> None:
    line = Line()
    for x in (10, 1000, 300, 50, 800):
        line.add(x, 5 + 0.1 * x)
    assert (line.slope, line.at(500)) == (pytest.approx(0.1), pytest.approx(55))
    alike = Line()
    for _ in range(5):
        alike.add(200, 30)
    assert (alike.slope, alike.at(400)) == (0.15, 60)


def test_progress_of_a_pass() -> None:
    seen: list[tuple[int, bool]] = []
    chunk = Progress()
    watch = Watch(lambda: seen.append((chunk.layers, chunk.ended)), lambda seconds, tokens: seen.append((tokens, seconds > 0)))
    watch.group = 2
    watch.expect(7, [chunk])
    for step in (6, 7, 8):  # the others carry nothing that is wanted elsewhere
        watch.begin(StepPlan(step=step, prefill=[PrefillChunk(0, 0, 7, True), PrefillChunk(1, 0, 2, True)]))
        for layer in range(5):
            watch.layer(layer)
        watch.end()
    assert seen == [(2, False), (4, False), (5, True), (9, True)]
