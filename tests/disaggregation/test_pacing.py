"""The size of a group of layers, and who tells when one is complete."""

from __future__ import annotations

from fluentllm.core.types import StepPlan
from fluentllm.plugins.kv_layerwise.pacing import Pacing
from fluentllm.plugins.kv_layerwise.watch import Progress, Watch


def test_groups_follow_what_was_measured() -> None:
    pacing = Pacing(40)
    assert pacing.group(1000) == 10  # nothing is known yet
    pacing.passed(0.4, 40)  # 10 ms a layer
    pacing.sent(1_000_000, 0.1)  # 1 ms for 10 kB
    pacing.cost = 0.0001
    assert pacing.group(10_000) == 1
    assert pacing.group(100) == 10  # 10 µs a layer: latency would be felt
    for _ in range(50):
        pacing.passed(0.0004, 40)  # 10 µs a layer: posting would be felt
    assert pacing.group(10_000) == 20


def test_few_layers_still_make_groups() -> None:
    for layers in (1, 2, 3):
        pacing = Pacing(layers)
        assert pacing.group(1000) == 1
        pacing.passed(1e-6, layers)
        assert 1 <= pacing.group(1000) <= layers


def test_progress_of_a_pass() -> None:
    seen: list[tuple[int, bool]] = []
    chunk = Progress()
    watch = Watch(lambda: seen.append((chunk.layers, chunk.ended)), lambda seconds, layers: seen.append((layers, seconds > 0)))
    watch.group = 2
    watch.expect(7, [chunk])
    for step in (6, 7, 8):  # the others carry nothing that is wanted elsewhere
        watch.begin(StepPlan(step=step))
        for layer in range(5):
            watch.layer(layer)
        watch.end()
    assert seen == [(2, False), (4, False), (5, True), (5, True)]
