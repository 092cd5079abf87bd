"""Work beside the current stream: on a CPU in place, on a GPU in parallel, with the same values."""

from __future__ import annotations

import pytest
import torch
from driver import Driver
from engine.test_every_model import LONGCAT
from oracle import family_of

from fluentllm.core.protocols import BuildContext, Model
from fluentllm.kernels import choose_ops
from fluentllm.layers.side_stream import SideStream


def test_on_a_cpu_the_work_is_done_in_place() -> None:
    side, x = SideStream(), torch.randn(3, 5)
    side.start(lambda x: x * 2, x)
    assert torch.equal(side.result(), x * 2)
    with pytest.raises(AssertionError, match="no work was started"):
        side.result()
    side.start(torch.neg, x)  # a pass that fails before it asks
    side.start(torch.exp, x)
    assert torch.equal(side.result(), x.exp())


def longcat(overlap: bool) -> Model:
    family = family_of(LONGCAT)
    device = torch.device("cpu")
    context = BuildContext(device, torch.float32, choose_ops(device, False), "float32", 128, moe_overlap=overlap)
    with torch.inference_mode():
        model = family.build(LONGCAT, context)
        generator = torch.Generator().manual_seed(2)
        for slot in model.weight_slots():
            if not slot.unused:
                slot.load(torch.randn(slot.shape, generator=generator) * 0.2)
        model.finalize()
    return model


def test_longcat_gives_the_same_beside_and_in_turn() -> None:
    tokens = [[5, 9, 7, 3, 8, 6], [4, 4, 9, 3, 2]]
    logits = []
    for overlap in (False, True):
        driver = Driver(longcat(overlap), tokens)
        driver.run([(0, 0, 4), (1, 0, 3)])
        logits.append(torch.cat(driver.run([(0, 4, 2), (1, 3, 2)], decode=True)))
    assert logits[0].isfinite().all()
    assert torch.equal(*logits)


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("slow", ["work", "rest"])
def test_neither_stream_overtakes_the_other(captured: bool, slow: str) -> None:
    """One of the two is held up by far; memory is freed and taken again as early as may be; values stay right."""
    device, side = torch.device("cuda"), SideStream()
    hold = 2_000_000
    start = torch.randn(64, 512, device=device)

    def work(x: torch.Tensor) -> torch.Tensor:
        if slow == "work":
            torch.cuda._sleep(hold)
        return (x * 2 + 1).sin() * 3

    def program() -> torch.Tensor:
        x = start * 1
        for _ in range(6):
            side.start(work, x)
            y = x.cos()
            del x
            for _ in range(3):
                y = y * 0.5  # takes what was freed
            if slow == "rest":
                torch.cuda._sleep(hold)
            x = y + side.result()
        return x

    expected = start
    for _ in range(6):
        expected = expected.cos() * 0.125 + (expected * 2 + 1).sin() * 3
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = program()
        if captured:
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")
            out = program()
            graph.capture_end()
            for _ in range(3):
                graph.replay()
        stream.synchronize()
    torch.testing.assert_close(out, expected)
