"""The lossless matrix on trained models, on the GPU: deterministic mode, captured programs, drafts against a float32 reference
on the CPU. All cells are run by `python -m speculation.matrix --models trained-gpu`.
"""

from __future__ import annotations

import asyncio

import pytest
from speculation.lossless import Cell, Subject, covering
from speculation.trained import FEW, SUBJECTS, check_on_gpu, subject_on_gpu

from fluentllm.core.errors import FluentError

made: dict[str, Subject] = {}


@pytest.fixture
def tested(name: str) -> Subject:
    """Made once for each."""
    if name not in made:
        try:
            made[name] = subject_on_gpu(name)
        except FluentError as error:
            pytest.skip(f"{name} is not here: {error}")
    return made[name]


def run(tested: Subject, cell: Cell) -> None:
    compared = asyncio.run(check_on_gpu(tested, cell))
    print(f"{cell}: {compared} drafts had one choice")
    assert compared > 0


@pytest.mark.parametrize("cell", FEW, ids=str)
@pytest.mark.parametrize("name", SUBJECTS)
def test_a_few_cells(tested: Subject, cell: Cell) -> None:
    run(tested, cell)


@pytest.mark.full
@pytest.mark.parametrize("cell", covering(), ids=str)
@pytest.mark.parametrize("name", SUBJECTS)
def test_every_pair_of_values(tested: Subject, cell: Cell) -> None:
    run(tested, cell)
