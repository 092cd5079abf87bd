"""The lossless matrix on models that were trained: longcat-nano with its MTP layer, SmolLM2 with its EAGLE-3 head, and prompt
lookup on both.

By default a few cells are run, in which every value of every axis occurs; `-m full` runs the set of `test_lossless`, in which
every pair of two axes' values occurs. All cells are run by `python -m speculation.matrix --models trained`.
"""

from __future__ import annotations

import asyncio

import pytest

from fluentllm.core.errors import FluentError

from .lossless import ALL, STRATEGIES, Cell, Subject, check, covering
from .trained import FEW, SUBJECTS, subject

made: dict[str, Subject] = {}


@pytest.fixture
def tested(name: str) -> Subject:
    """Made once for each."""
    if name not in made:
        try:
            made[name] = subject(name)
        except FluentError as error:
            pytest.skip(f"{name} is not here: {error}")
    return made[name]


@pytest.mark.parametrize("number", range(len(FEW)), ids=[str(cell) for cell in FEW])
@pytest.mark.parametrize("name", SUBJECTS)
def test_a_few_cells(tested: Subject, name: str, number: int) -> None:
    # The first cell is dear.
    for strategy in ("own", STRATEGIES[number]) if 0 < number < 4 else ("own",):
        asyncio.run(check(tested, FEW[number], strategy))


@pytest.mark.full
@pytest.mark.parametrize("cell", covering(), ids=str)
@pytest.mark.parametrize("name", SUBJECTS)
def test_every_pair_of_values(tested: Subject, name: str, cell: Cell) -> None:
    for strategy in STRATEGIES:
        asyncio.run(check(tested, cell, strategy))


def test_every_value_occurs() -> None:
    for axis in ("k", "depth", "batch", "situation"):
        assert {getattr(cell, axis) for cell in FEW} == {getattr(cell, axis) for cell in ALL}
