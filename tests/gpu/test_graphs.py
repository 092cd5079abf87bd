"""Programs by key: eager once, captured, replayed; in pieces for who follows them; the one used longest ago given up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from fluentllm.core.graphs import Graphs


@pytest.fixture(autouse=True)
def stream() -> Iterator[None]:
    """The default stream cannot be captured."""
    with torch.cuda.stream(torch.cuda.Stream()):
        yield
        torch.cuda.synchronize()


def counting(calls: list[int], x: torch.Tensor, factor: int) -> torch.Tensor:
    calls.append(factor)
    return x * factor


def test_a_key_is_eager_then_captured_then_replayed() -> None:
    graphs: Graphs[torch.Tensor] = Graphs()
    calls: list[int] = []
    x = torch.ones(8, device="cuda")
    for turn in range(1, 5):
        x.fill_(turn)
        assert graphs.run("three times", partial(counting, calls, x, 3)).tolist() == [3.0 * turn] * 8
        assert len(graphs) == (turn > 1)
    assert calls == [3, 3], "by itself and captured"


def test_a_program_in_pieces_is_told_of_between_them() -> None:
    """Behind each cut the stream has what stands in front of it, and nothing of what follows."""
    graphs: Graphs[torch.Tensor] = Graphs()
    steps = torch.zeros(3, device="cuda")
    seen: list[list[float]] = []

    def program() -> torch.Tensor:
        for i in range(3):
            steps[i : i + 1] += 1
            if i < 2:
                graphs.cut(lambda: seen.append(steps.tolist()))
        return steps

    for turn in range(1, 5):
        assert graphs.run("steps", program).tolist() == [turn] * 3
        assert seen == [[turn, turn - 1, turn - 1], [turn, turn, turn - 1]]
        seen.clear()


def test_what_was_used_longest_ago_is_given_up() -> None:
    graphs: Graphs[torch.Tensor] = Graphs(most=2)
    x = torch.ones(4, device="cuda")
    calls: list[int] = []

    def run(factor: int) -> None:
        x.fill_(float(len(calls) + 1))
        expected = [factor * float(len(calls) + 1)] * 4
        assert graphs.run(factor, partial(counting, calls, x, factor)).tolist() == expected

    for factor in (2, 3, 2, 3, 2, 4, 4):
        run(factor)
    assert len(graphs) == 2
    calls.clear()
    run(2)
    run(4)
    assert calls == []
    run(3)
    assert calls == [3], "captured again at once: it has been run"
    assert len(graphs) == 2


def test_a_program_that_cannot_be_captured_goes_on_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    graphs: Graphs[list[float]] = Graphs()
    x = torch.ones(2, device="cuda")

    def waits() -> list[float]:
        return (x + 1).tolist()  # type: ignore[no-any-return]

    run: Callable[[], list[float]] = partial(graphs.run, "waits", waits)
    for _ in range(4):
        assert run() == [2.0, 2.0]
    assert len(graphs) == 0
    assert "runs eagerly" in caplog.text
    other: Graphs[torch.Tensor] = graphs  # type: ignore[assignment]
    for _ in range(3):
        assert other.run("fine", lambda: x * 2).tolist() == [2.0, 2.0]
    assert len(graphs) == 1
