"""Filling a model: a small model with slots of its own, checkpoints that fit and that do not."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import save_file

from fluentllm.core.errors import CheckpointError
from fluentllm.core.protocols import PackedTensor, WeightsContext, WeightSlot
from fluentllm.core.settings import ModelSettings, Settings
from fluentllm.layers.loading import load_weights
from fluentllm.plugins.weights_dummy import DummySettings, plugin as dummy, supports as dummy_supports
from fluentllm.plugins.weights_gguf import plugin as gguf
from fluentllm.plugins.weights_gguf.checkpoint import GGUFCheckpoint
from fluentllm.plugins.weights_safetensors import plugin as safetensors
from fluentllm.plugins.weights_safetensors.checkpoint import SafetensorsCheckpoint

from .conftest import FFN, HIDDEN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from .conftest import SmallGGUF

CPU = torch.device("cpu")


class TwoTensors:
    """A model of a matrix and a norm, and whatever further slots a test adds."""

    def __init__(self, *extra: WeightSlot, shape: tuple[int, int] = (6, 4)) -> None:
        self.taken: dict[str, torch.Tensor] = {}
        self.packed: dict[str, PackedTensor] = {}
        self.order: list[str] = []
        self.finalized = 0
        self.slots = [self.slot("up.weight", shape), self.slot("norm.weight", shape[1:], init="ones"), *extra]

    def slot(self, name: str, shape: tuple[int, ...], **options: Any) -> WeightSlot:
        return WeightSlot(name, shape, partial(self.take, name), **options)

    def take(self, name: str, tensor: torch.Tensor) -> None:
        self.taken[name] = tensor
        self.order.append(name)

    def weight_slots(self) -> Iterator[WeightSlot]:
        yield from self.slots

    def finalize(self) -> None:
        self.finalized += 1


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., SafetensorsCheckpoint]:
    """A checkpoint of the given tensors over the two that the model needs; None leaves one out."""

    def save(config: dict[str, Any] | None = None, **tensors: torch.Tensor | None) -> SafetensorsCheckpoint:
        parts = {"up.weight": torch.randn(6, 4), "norm.weight": torch.randn(4)}
        parts |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        save_file({name: tensor for name, tensor in parts.items() if tensor is not None}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Two"], **(config or {})}))
        return SafetensorsCheckpoint(tmp_path)

    return save


def test_every_slot_is_filled_in_file_order_then_finalized(saved: Callable[..., SafetensorsCheckpoint]) -> None:
    checkpoint, model = saved(), TwoTensors()
    report = load_weights(model, checkpoint, CPU)
    assert model.order == list(checkpoint.shapes())
    assert all(torch.equal(model.taken[name], checkpoint.read(name, CPU)) for name in model.order)
    assert model.finalized == 1
    assert (report.tensors, report.bytes, report.packed) == (2, 4 * (6 * 4 + 4), 0)
    assert report.seconds > 0


def test_everything_that_does_not_fit_is_listed_at_once(saved: Callable[..., SafetensorsCheckpoint]) -> None:
    checkpoint = saved(up__weight=torch.zeros(6, 5), norm__weight=None, gate__weight=torch.zeros(2, 3))
    model = TwoTensors()
    with pytest.raises(CheckpointError) as raised:
        load_weights(model, checkpoint, CPU)
    text = raised.value.message
    assert "1 missing: norm.weight [4]" in text
    assert "1 extra: gate.weight [2, 3]" in text
    assert "1 misshapen: up.weight [6, 5] instead of [6, 4]" in text
    assert not model.taken
    assert not model.finalized


def test_a_transposed_matrix_is_misshapen(saved: Callable[..., SafetensorsCheckpoint]) -> None:
    with pytest.raises(CheckpointError, match=r"up\.weight \[4, 6\] instead of \[6, 4\]"):
        load_weights(TwoTensors(), saved(up__weight=torch.zeros(4, 6)), CPU)


def test_long_lists_are_cut(saved: Callable[..., SafetensorsCheckpoint]) -> None:
    with pytest.raises(CheckpointError, match=r"20 extra: .* and 8 more"):
        load_weights(TwoTensors(), saved(**{f"x{i}": torch.zeros(1) for i in range(20)}), CPU)


def test_old_buffers_are_not_extra(saved: Callable[..., SafetensorsCheckpoint]) -> None:
    names = ["model__layers__0__self_attn__rotary_emb__inv_freq", "h__0__attn__masked_bias"]
    load_weights(TwoTensors(), saved(**{name: torch.zeros(2) for name in names}), CPU)


def test_a_head_that_is_tied_is_not_extra(saved: Callable[..., SafetensorsCheckpoint]) -> None:
    head = torch.zeros(2, 2)
    load_weights(TwoTensors(), saved({"tie_word_embeddings": True}, lm_head__weight=head), CPU)
    with pytest.raises(CheckpointError, match=r"1 extra: lm_head\.weight"):
        load_weights(TwoTensors(), saved({"tie_word_embeddings": False}, lm_head__weight=head), CPU)


def test_optional_and_unused_slots(saved: Callable[..., SafetensorsCheckpoint]) -> None:
    model = TwoTensors()
    model.slots += [model.slot("up.bias", (6,), optional=True), model.slot("old.weight", (1,), unused=True)]
    load_weights(model, saved(), CPU)
    assert set(model.taken) == {"up.weight", "norm.weight"}
    load_weights(model, saved(up__bias=torch.ones(6), old__weight=torch.full((3, 3), float("nan"))), CPU)
    assert set(model.taken) == {"up.weight", "norm.weight", "up.bias"}


def test_one_tensor_can_fill_two_slots(saved: Callable[..., SafetensorsCheckpoint]) -> None:
    model = TwoTensors()
    twice: list[torch.Tensor] = []
    model.slots.append(WeightSlot("up.weight", (6, 4), twice.append))
    load_weights(model, saved(), CPU)
    assert torch.equal(twice[0], model.taken["up.weight"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_value_that_is_not_finite_names_its_tensor(
    saved: Callable[..., SafetensorsCheckpoint], bad: float, dtype: torch.dtype
) -> None:
    up = torch.randn(6, 4).to(dtype)
    up[3, 2] = bad
    with pytest.raises(CheckpointError, match=r"up\.weight \[6, 4\] holds 1 values that are NaN or infinite"):
        load_weights(TwoTensors(), saved(up__weight=up), CPU)


def test_infinities_that_cancel_are_found_and_large_sums_are_not_errors(saved: Callable[..., SafetensorsCheckpoint]) -> None:
    up = torch.zeros(6, 4)
    up[0, 0], up[0, 1] = float("inf"), -float("inf")
    with pytest.raises(CheckpointError, match="holds 2 values"):
        load_weights(TwoTensors(), saved(up__weight=up), CPU)
    load_weights(TwoTensors(), saved(up__weight=torch.full((6, 4), 3e38)), CPU)


# ---------------------------------------------------------------------------------------------------------------- packed
class OneBlock(TwoTensors):
    """Takes the feed-forward matrices of a small GGUF, packed if it is told to."""

    def __init__(self, *, packed: bool) -> None:
        super().__init__()
        self.slots = []
        for name, shape in (("gate", (FFN, HIDDEN)), ("up", (FFN, HIDDEN)), ("down", (HIDDEN, FFN))):
            for layer in range(2):
                full = f"model.layers.{layer}.mlp.{name}_proj.weight"
                self.slots.append(self.slot(full, shape, load_packed=partial(self.take_packed, packed, full)))

    def take_packed(self, willing: bool, name: str, packed: PackedTensor) -> bool:
        if willing:
            self.packed[name] = packed
        return willing


@pytest.mark.parametrize("willing", [True, False])
def test_blocks_are_offered_before_values(small_gguf: Callable[..., SmallGGUF], willing: bool) -> None:
    checkpoint = GGUFCheckpoint(small_gguf("llama", Type.Q4_1).write())
    model = OneBlock(packed=willing)
    model.slots += [
        model.slot(name, shape)
        for name, shape in checkpoint.shapes().items()
        if name not in {slot.name for slot in model.slots}
    ]
    report = load_weights(model, checkpoint, CPU)
    assert report.packed == len(model.packed) == (6 if willing else 0)
    assert report.tensors == len(checkpoint.shapes())
    assert set(model.packed) | set(model.taken) == set(checkpoint.shapes())


# ----------------------------------------------------------------------------------------------------------------- dummy
def open_dummy(model: TwoTensors, path: Path, seed: int | None = None, dtype: str = "float32") -> Any:
    """Through the plugin's own hook, as assembly does."""
    (path / "config.json").write_text(json.dumps({"architectures": ["Two"]}))
    settings = Settings(model=ModelSettings(dtype=dtype))
    if seed is not None:
        settings.plugin["weights_dummy"] = DummySettings(seed=seed)
    return factories_of(dummy)["dummy"](WeightsContext(path, settings, list(model.weight_slots())))


def test_dummy_weights_fill_any_model_and_come_again(tmp_path: Path) -> None:
    models = []
    for seed in (None, 0, 1):
        model = TwoTensors(shape=(300, 200))
        model.slots += [model.slot("bias", (6,), init="zeros"), model.slot("gate.weight", (300, 200))]
        model.slots += [model.slot("maybe", (6,), optional=True), model.slot("old", (6,), unused=True)]
        load_weights(model, open_dummy(model, tmp_path, seed), CPU)
        models.append(model.taken)
    default, zero, one = models
    assert set(default) == {"up.weight", "norm.weight", "bias", "gate.weight"}
    assert all(torch.equal(default[name], zero[name]) for name in default)
    assert not torch.equal(zero["up.weight"], one["up.weight"])
    assert not torch.equal(zero["up.weight"], zero["gate.weight"])
    assert torch.equal(zero["norm.weight"], torch.ones(200))
    assert torch.equal(zero["bias"], torch.zeros(6))
    assert zero["up.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert zero["up.weight"].mean().abs().item() < 2e-4


def test_dummy_weights_have_the_models_dtype(tmp_path: Path) -> None:
    model = TwoTensors()
    load_weights(model, open_dummy(model, tmp_path, dtype="bfloat16"), CPU)
    assert {tensor.dtype for tensor in model.taken.values()} == {torch.bfloat16}


def test_dummy_weights_are_never_chosen_by_themselves(tmp_path: Path) -> None:
    assert "load_format: dummy" in (dummy_supports(tmp_path) or "")


# ------------------------------------------------------------------------------------------------------- chosen by its name
def factories_of(plugin: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    plugin.fluent_weights(lambda name, factory, supports: found.__setitem__(name, factory))
    return found


def test_a_reader_that_was_chosen_wrongly_says_so(small_gguf: Callable[..., SmallGGUF], tmp_path: Path) -> None:
    path = small_gguf("llama").write()
    with pytest.raises(CheckpointError, match=r"safetensors reader cannot open it: llama\.gguf is not a folder"):
        factories_of(safetensors)["safetensors"](WeightsContext(path, Settings()))
    with pytest.raises(CheckpointError, match=r"gguf reader cannot open it: .* is not a file"):
        factories_of(gguf)["gguf"](WeightsContext(tmp_path, Settings()))
    assert factories_of(gguf)["gguf"](WeightsContext(path, Settings())).config["model_type"] == "llama"
