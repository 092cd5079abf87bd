"""Tensors that are read ahead, many at a time: the same as those that are read one by one."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from fluentllm.core.errors import CheckpointError
from fluentllm.core.protocols import WeightSlot
from fluentllm.layers.loading import FiniteSums, load_weights
from fluentllm.plugins.weights_dummy import checkpoint as drawing
from fluentllm.plugins.weights_dummy.checkpoint import DummyCheckpoint
from fluentllm.plugins.weights_safetensors import places, staging
from fluentllm.plugins.weights_safetensors.checkpoint import SafetensorsCheckpoint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which small tensors meet every border."""
    monkeypatch.setattr(places, "SPAN_BYTES", 1000)
    monkeypatch.setattr(places, "ALONE_BYTES", 400)
    monkeypatch.setattr(staging, "PIECE_BYTES", 256)
    monkeypatch.setattr(staging, "AHEAD_BYTES", 1500)


def write(folder: Path, rng: random.Random, files: int = 3, tensors: int = 40) -> SafetensorsCheckpoint:
    """Tensors of random dtypes and sizes, empty and ragged ones too, with a quantised matrix among them."""
    for number in range(files):
        parts = {}
        for i in range(tensors):
            shape = tuple(rng.choice((0, 1, 3, 7, 16, 40)) for _ in range(rng.randint(1, 3)))
            parts[f"t{rng.random():.6f}.{number}.{i}"] = torch.randint(0, 100, shape).to(rng.choice(DTYPES))
        parts[f"q{number}.weight"] = torch.randn(40, 70).to(torch.float8_e4m3fn)
        parts[f"q{number}.weight_scale_inv"] = torch.rand(2, 3)
        save_file(parts, folder / f"model-{number}.safetensors")
    quantisation = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (folder / "config.json").write_text(json.dumps({"architectures": ["Any"], "quantization_config": quantisation}))
    return SafetensorsCheckpoint(folder)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_reading_ahead_gives_what_reading_one_by_one_gives(tmp_path: Path, device: str, inference: bool) -> None:
    """`inference`: as an engine loads."""
    rng = random.Random()
    checkpoint = write(tmp_path, rng)
    every = list(checkpoint.shapes())
    for names in (every, every[1::3], rng.sample(every, 20), []):
        with torch.inference_mode(inference):
            got = dict(zip(names, checkpoint.stream(names, torch.device(device)), strict=True))
        for name, tensor in got.items():
            read = checkpoint.read(name, CPU)
            assert (tensor.device.type, tensor.dtype, tensor.shape) == (device, read.dtype, read.shape)
            assert torch.equal(tensor.cpu(), read), name


@pytest.mark.usefixtures("small_pieces")
def test_neighbours_are_read_together_and_large_tensors_alone(tmp_path: Path) -> None:
    save_file({f"{i:02}": torch.zeros(10 if i != 5 else 200) for i in range(12)}, tmp_path / "model.safetensors")
    spans = list(places.spans_of(places.places_of(tmp_path / "model.safetensors").values()))
    assert [[place.name for place in span.places] for span in spans] == [
        ["00", "01", "02", "03", "04"],
        ["05"],
        ["06", "07", "08", "09", "10", "11"],
    ]


@pytest.mark.usefixtures("small_pieces")
def test_a_reader_that_is_given_up_closes_its_files_and_threads(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, random.Random())
    stream = checkpoint.stream(list(checkpoint.shapes()), CPU)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert list(stream) == []


def test_a_file_that_shrank_after_it_was_opened_is_an_error(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, random.Random(), files=1)
    file = tmp_path / "model-0.safetensors"
    places_there = list(places.places_of(file).values())
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 50)
    with pytest.raises(CheckpointError, match=r"model-0\.safetensors: it ends too early"):
        list(staging.stream(places_there, CPU, 2, 1 << 20))
    checkpoint.close()


# ------------------------------------------------------------------------------------------------------------ NaN, at the end
def test_sums_that_are_read_once_name_every_tensor_that_is_not_finite() -> None:
    tensors: dict[str, torch.Tensor] = {f"t{i}": torch.randn(3, 5) for i in range(20)}
    tensors |= {"empty": torch.zeros(0, 3), "whole": torch.tensor([1, 2]), "large": torch.full((4, 4), 3e38)}
    tensors["t3"][1, 2] = float("nan")
    tensors["t7"] = torch.full((2, 2), float("-inf"), dtype=torch.bfloat16)
    tensors["t9"][0, :2] = torch.tensor([float("inf"), float("-inf")])
    sums = FiniteSums(CPU, len(tensors))
    for name, tensor in tensors.items():
        sums.add(name, tensor)
    assert sums.suspects() == ["t3", "t7", "t9", "large"]  # the last is looked at again, and is well


class OneTensor:
    def __init__(self) -> None:
        self.place = torch.zeros(30, 40, device="cuda")

    def weight_slots(self) -> Iterator[WeightSlot]:
        yield WeightSlot("w.weight", (30, 40), self.place.copy_)

    def finalize(self) -> None: ...


@pytest.mark.gpu
def test_on_a_gpu_too_nan_names_its_tensor(tmp_path: Path) -> None:
    values = torch.randn(30, 40)
    (tmp_path / "config.json").write_text('{"architectures": ["One"]}')
    save_file({"w.weight": values}, tmp_path / "model.safetensors")
    model: Any = OneTensor()
    load_weights(model, SafetensorsCheckpoint(tmp_path), torch.device("cuda"))
    assert torch.equal(model.place.cpu(), values)
    values[2, 3] = float("nan")
    save_file({"w.weight": values}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"w\.weight \[30, 40\] holds 1 values that are NaN"):
        load_weights(model, SafetensorsCheckpoint(tmp_path), torch.device("cuda"))


# ---------------------------------------------------------------------------------------------------------- many small draws
def dummy(folder: Path, slots: list[WeightSlot], *, drafts: bool = False) -> DummyCheckpoint:
    (folder / "config.json").write_text('{"architectures": ["Any"]}')
    return DummyCheckpoint(folder, slots, "float32", 0, drafts=drafts)


def slot(name: str, *shape: int, **options: Any) -> WeightSlot:
    return WeightSlot(name, shape, lambda tensor: None, **options)


def test_random_weights_do_not_depend_on_the_order_of_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "SLAB_VALUES", 500)
    monkeypatch.setattr(drawing, "ALONE_VALUES", 300)
    slots = [slot(f"w{i}", random.randint(1, 20), random.randint(1, 20)) for i in range(40)]
    in_order = dummy(tmp_path, slots)
    values = {name: in_order.read(name, CPU).clone() for name in in_order.shapes()}
    shuffled = dummy(tmp_path, slots)
    for name in random.sample(list(values), len(values)):
        assert torch.equal(shuffled.read(name, CPU), values[name]), name
    assert torch.cat([tensor.flatten() for tensor in values.values()]).unique().numel() > 0.99 * sum(
        map(torch.numel, values.values())
    )


def test_random_weights_of_the_target_are_the_same_with_draft_layers_and_without(tmp_path: Path) -> None:
    target = [slot(f"w{i}", 7, 9) for i in range(9)]
    draft = [slot(f"d{i}", 5, 3, optional=True, drafts=True) for i in range(4)]
    alone, both = dummy(tmp_path, target + draft), dummy(tmp_path, draft + target, drafts=True)
    assert (len(alone.shapes()), len(both.shapes())) == (9, 13)
    assert all(torch.equal(alone.read(name, CPU), both.read(name, CPU)) for name in alone.shapes())


def test_thousands_of_small_tensors_are_few_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = dummy(tmp_path, [slot(f"layers.{i // 192}.experts.{i % 192}", 64, 32) for i in range(5000)])
    draws: list[int] = []
    normal = torch.Tensor.normal_

    def counted(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        draws.append(tensor.numel())
        return normal(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "normal_", counted)
    for name in checkpoint.shapes():
        checkpoint.read(name, CPU)
    assert draws == [5000 * 64 * 32]
