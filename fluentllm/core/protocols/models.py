"""Checkpoints, and the networks that are filled from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

    from ..batch import Batch
    from ..settings import Settings
    from ..types import ModelSpec
    from .attention import AttentionBackend


@dataclass(slots=True)
class WeightSlot:
    """One tensor that a model expects from a checkpoint, by its checkpoint name."""

    name: str
    shape: tuple[int, ...]
    load: Callable[[Tensor], object]
    """Take the tensor, of exactly `shape`, any float dtype, on any device: copy it into place."""
    load_packed: Callable[[PackedTensor], bool] | None = None
    """Take block-quantised rows as they are; False if this place cannot (the caller then dequantises)."""
    optional: bool = False
    init: Literal["normal", "ones", "zeros"] = "normal"
    """How `--load-format dummy` fills it: normal is N(0, 0.02²)."""
    unused: bool = False
    """Accepted where a checkpoint has it, and dropped: never read."""
    drafts: bool = False
    """Of the model's own draft layers: random weights hold it where the model's own layers draft."""


@dataclass(slots=True)
class PackedTensor:
    """A weight [rows, columns] quantised in blocks, as a checkpoint ships it."""

    kind: str
    """`q4_1`: value = d · q + m, blocks of 32 of a row, q in 0 … 15. `q8_0`: value = d · q, blocks of 32, q in -128 … 127.
    `fp8_block`: value = scale · q, blocks of 128 × 128, q in E4M3."""
    shape: tuple[int, int]
    parts: dict[str, Tensor]
    """q4_1: `q` uint8 [rows, columns], `d`, `m` float32 [rows, columns / 32]. q8_0: `q` int8, `d`, of the same shapes.
    fp8_block: `q` float8_e4m3fn [rows, columns], `scale` float32 [⌈rows / 128⌉, ⌈columns / 128⌉]."""


class Checkpoint(Protocol):
    """An open checkpoint. Shapes and names are Hugging Face's, whatever the file's own."""

    config: Mapping[str, Any]
    """As `config.json` has it."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor, in file order (the cheapest order to read them in)."""
        ...

    def read(self, name: str, device: torch.device) -> Tensor:
        """The tensor, dequantised where its format asks for it."""
        ...

    def packed(self, name: str) -> PackedTensor | None:
        """Its blocks as they are, if the checkpoint stores it in a kind that `PackedTensor` knows."""
        ...

    def close(self) -> None: ...


class StreamingCheckpoint(Checkpoint, Protocol):
    """One that can read ahead. Loading to a GPU uses it where a checkpoint has the method."""

    def stream(self, names: SequenceOf[str], device: torch.device) -> Iterator[Tensor]:
        """What `read` gives for each of `names`, in their order, ready for the device's current stream."""
        ...

    def stream_packed(self, names: SequenceOf[str], device: torch.device) -> Iterator[PackedTensor | None]:
        """What `packed` gives for each of `names`, on the device. Asked for where a checkpoint has the method."""
        ...


@dataclass(frozen=True, slots=True)
class WeightsContext:
    path: Path
    """Folder or file."""
    settings: Settings
    slots: Iterable[WeightSlot] | None = None
    """For readers that make weights up (dummy): what the model expects."""


@dataclass(slots=True)
class BuildContext:
    """How to build a model: shared by all its layers."""

    device: torch.device
    dtype: torch.dtype
    """Of activations and of weights that are not packed."""
    ops: Any
    """`fluentllm.kernels.ops.Ops`: the tensor operations, fast or in fixed order (deterministic mode)."""
    weight_precision: str = "float32"
    """What matrix weights are packed to after loading: one of `kernels.weights.PRECISIONS`."""
    max_positions: int = 0
    """Rotary tables need no more rows than this."""
    moe_overlap: bool = False
    """Experts on a shortcut may run on a second stream of the GPU (`fluentllm.layers.side_stream`)."""


class Model(Protocol):
    """A loaded network."""

    spec: ModelSpec

    def weight_slots(self) -> Iterator[WeightSlot]: ...

    def finalize(self) -> None:
        """After loading: pack, fuse, free what is no longer needed."""
        ...

    def matrices(self) -> list[Any]:
        """Its packed matrices (`fluentllm.kernels.weights.Weight`), without those of experts."""
        ...

    def nbytes(self) -> int:
        """Bytes that its weights take on the device."""
        ...

    def forward(self, batch: Batch, attention: AttentionBackend) -> Tensor:
        """Hidden states after the final norm, [T, hidden]. Calls `attention.begin(batch)` before its first layer."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden] → [R, vocab] float32."""
        ...

    def tap(self, layers: SequenceOf[int]) -> None:
        """From now on a pass leaves the hidden states at the input of these layers, before their norm, in
        `Batch.layer_inputs` (`fluentllm.layers.trunk`). Proposers ask for it when they are made; a model that cannot may lack
        the method, and then refuses them."""
        ...


class ModelFamily(Protocol):
    """One architecture: reads its config, builds its network."""

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        """Raises `CheckpointError` for what it cannot honour (a rope scaling it does not know, by name)."""
        ...

    def build(self, config: Mapping[str, Any], context: BuildContext) -> Model: ...
