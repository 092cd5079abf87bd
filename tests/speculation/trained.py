"""Trained models with their proposers, for the lossless matrix: drafts of these are often right, and sampled tokens are seldom
ties."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.harness import Harness
from safetensors.torch import load_file

from fluentllm.frontend.tokenizer import load_tokenizer
from fluentllm.hub import DEFAULTS, resolve

from . import eagle, mtp
from .lossless import PAGE, Cell, Lookup, Subject, check_captured, requests

if TYPE_CHECKING:
    from torch import Tensor

SETTINGS: dict[str, Any] = {
    "model.load_format": "auto",
    "model.weight_precision": "float32",
    "engine.deterministic": True,
    "kv.page_size": PAGE,
    "kv.memory": "256MiB",
    "model.max_model_len": 64,
    "plugins.spec_pld.shortest": 1,
}
PAGE_ON_GPU = 64
LONG = {"model.max_model_len": 320}
ON_GPU = {"engine.device": "cuda", "model.weight_precision": "auto", "kv.page_size": PAGE_ON_GPU, **LONG}
CLOSE_ON_GPU = 0.5
"""The engine's activations are BF16 there, so its drafts may be another than the reference's first choice where logits are so
close; they have a standard deviation of 2 to 3."""
FEW = [
    Cell(5, 2, 32, "chunked prefill"),
    Cell(4, 1, 7, "preempted"),
    Cell(3, 2, 7, "prefix hit"),
    Cell(2, 0, 7, "plain"),
    Cell(1, 1, 1, "chunked prefill"),
]
"""Cells in which every value of every axis occurs."""
SUBJECTS = ("longcat-nano: mtp", "longcat-nano-ngram: mtp", "longcat-nano: pld", "smollm2: eagle", "smollm2: pld")


def text_of(name: str) -> list[int]:
    """Tokens of a file that nobody trained on."""
    source = (Path(sysconfig.get_path("stdlib")) / "html/parser.py").read_text(encoding="utf-8")
    return load_tokenizer(resolve(name).path).encode(source)[:600]


def harness(target: str, method: str, **settings: Any) -> Harness:
    """Raises `FluentError` for a model that is not here."""
    return Harness(target, **{**SETTINGS, "speculative.method": method, "speculative.max_k": 5, **settings})


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
    """One of `SUBJECTS`. Raises as `harness`."""
    target, method = name.split(": ")
    model = harness(target, method)
    return Subject(method, model, reference(target, method, model), requests(text_of(target)))


def subject_on_gpu(name: str) -> Subject:
    """The same on a GPU, for `check_on_gpu`, with the reference of the CPU. Raises as `harness`."""
    target, method = name.split(": ")
    right = reference(target, method, harness(target, method, **LONG))
    return Subject(method, harness(target, method, **ON_GPU), right, requests(text_of(target), PAGE_ON_GPU), CLOSE_ON_GPU)


async def check_on_gpu(subject: Subject, cell: Cell) -> int:
    """A cell with every kind of drafts, in captured programs → drafts of which there was one choice."""
    settings: dict[str, Any] = dict(LONG)
    if cell.situation != "chunked prefill":
        # All begin at once: the first must not be done before the last has come.
        settings["scheduler.prefill_tokens"] = 16384
    return await check_captured(subject, cell, **settings)
