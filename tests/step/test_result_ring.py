"""Results of steps in a ring: each is read as it was written, and one that was overwritten is told."""

from __future__ import annotations

import pytest
import torch

from fluentllm.core.buckets import bucket_of
from fluentllm.core.types import MAX_LOGPROBS
from fluentllm.step.result_ring import ENTRIES, ResultRing, row_words

SLOTS, ROWS, PADDING = 11, 4, 11


def results(batch: int, rows: int, *, logprobs: bool) -> list[torch.Tensor]:
    wide = batch * rows, MAX_LOGPROBS
    columns = [
        torch.randint(99, wide[:1]),
        torch.rand(wide[0]),
        torch.randint(99, wide[:1]),
        torch.randint(99, wide),
        torch.rand(wide),
    ]
    return [torch.randint(99, (batch, rows + 4)), *(columns if logprobs else [])]


def ring() -> ResultRing:
    return ResultRing(SLOTS, ROWS, 1000, PADDING, torch.device("cpu"))


def test_every_step_is_read_as_it_was_written() -> None:
    taker, waiting = ring(), []
    for step in range(5 * ENTRIES):
        batch, rows = 1 + step % bucket_of(SLOTS), 1 + step % ROWS
        wanted = results(batch, rows, logprobs=bool(step % 3))
        if step % 5 == 0:
            # Prepared for nobody in between.
            taker.publish(results(2, 1, logprobs=True), torch.tensor([PADDING, PADDING]))
        taker.publish(wanted, torch.tensor([step % SLOTS, *[PADDING] * (batch - 1)]))
        waiting.append((wanted, taker.taken(wanted)))
        if len(waiting) == ENTRIES:
            first, published = waiting.pop(0)
            published.check()
            assert all(torch.equal(*pair) for pair in zip(first, published.views, strict=True))


@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_every_row_lies_where_64_bits_may(slots: int, rows: int) -> None:
    for vocab in (5, 160, 8192):
        assert row_words(slots, rows, vocab) % 2 == 0
        taker = ResultRing(slots, rows, vocab, slots, torch.device("cpu"))
        for _ in range(2):
            wanted = results(slots, rows, logprobs=False)
            taker.publish(wanted, torch.zeros(slots, dtype=torch.int64))
            assert torch.equal(taker.taken(wanted).views[0], wanted[0])


def test_the_largest_step_fits() -> None:
    batch = bucket_of(SLOTS)
    wanted = results(batch, ROWS, logprobs=True)
    taker = ring()
    taker.publish(wanted, torch.arange(batch))
    assert torch.equal(taker.taken(wanted).views[-1], wanted[-1])
    assert row_words(SLOTS, ROWS, 1000) < sum(t.numel() * t.itemsize for t in wanted) // 4 + 16


def test_what_was_overwritten_is_told() -> None:
    taker = ring()
    wanted = results(1, 1, logprobs=False)
    taker.publish(wanted, torch.tensor([0]))
    first = taker.taken(wanted)
    for _ in range(ENTRIES):
        taker.publish(wanted, torch.tensor([0]))
    with pytest.raises(RuntimeError, match="step program 0 are gone: their place in the ring has those of 8"):
        first.check()
