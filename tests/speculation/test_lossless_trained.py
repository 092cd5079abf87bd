"""The lossless matrix on models that were trained: longcat-nano with its MTP layer, SmolLM2 with its EAGLE-3 head, and prompt
lookup on both. Drafts of these are often right, and sampled tokens are seldom ties.

By default a few cells are run, in which every value of every axis occurs; `-m full` runs the set of `test_lossless`, in which
every pair of two axes' values occurs.
"""

from __future__ import annotations

import asyncio
import json
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from engine.harness import Harness
from safetensors.torch import load_file

from fluentllm.core.errors import FluentError
from fluentllm.frontend.tokenizer import load_tokenizer
from fluentllm.hub import DEFAULTS, resolve

from . import eagle, mtp
from .lossless import ALL, PAGE, STRATEGIES, Cell, Lookup, Subject, check, covering, requests

if TYPE_CHECKING:
    from torch import Tensor

FEW = [
    Cell(5, 2, 32, "chunked prefill"),
    Cell(4, 1, 7, "preempted"),
    Cell(3, 2, 7, "prefix hit"),
    Cell(2, 0, 7, "plain"),
    Cell(1, 1, 1, "chunked prefill"),
]
SETTINGS: dict[str, Any] = {
    "model.load_format": "auto",
    "model.weight_precision": "float32",
    "engine.deterministic": True,
    "kv.page_size": PAGE,
    "kv.memory": "256MiB",
    "model.max_model_len": 64,
    "plugins.spec_pld.shortest": 1,
}
SUBJECTS = ("longcat-nano: mtp", "longcat-nano-ngram: mtp", "longcat-nano: pld", "smollm2: eagle", "smollm2: pld")
made: dict[str, Subject] = {}


def text_of(name: str) -> list[int]:
    """Tokens of a file that nobody trained on."""
    source = (Path(sysconfig.get_path("stdlib")) / "html/parser.py").read_text(encoding="utf-8")
    return load_tokenizer(resolve(name).path).encode(source)[:600]


def harness(target: str, method: str, **settings: Any) -> Harness:
    try:
        return Harness(target, **{**SETTINGS, "speculative.method": method, "speculative.max_k": 5, **settings})
    except FluentError as error:
        pytest.skip(f"{target} is not here: {error}")


def reference(target: str, method: str, model: Harness) -> Any:
    """What must be drafted for a model in float32 on the CPU."""
    network = model.loaded.model
    if method == "pld":
        return Lookup(network.spec.vocab_size)
    if method == "mtp":
        return mtp.Reference(network)
    folder = DEFAULTS[target].drafts[method]
    weights: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        weights |= {key: value.float() if value.is_floating_point() else value for key, value in load_file(file).items()}
    config = json.loads((folder / "config.json").read_text())
    return eagle.Reference(network, "eagle3", weights, config)


def subject(name: str) -> Subject:
    target, method = name.split(": ")
    model = harness(target, method)
    return Subject(method, model, reference(target, method, model), requests(text_of(target)))


@pytest.fixture
def tested(name: str) -> Subject:
    """Made once for each."""
    if name not in made:
        made[name] = subject(name)
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
