"""The base of everything a model is made of: a plain Python object that can list its weight slots and be finalised.

Not an `nn.Module`: nothing is trained, and a call costs no more than a Python call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ..core.protocols import WeightSlot
    from ..kernels.moe import LiveRows
    from ..kernels.residual import Addend, Rows
    from ..kernels.weights import Weight


class Block(Protocol):
    """A feed-forward block."""

    def later(self, x: Rows, live: LiveRows | None = None) -> Addend:
        """x [T, hidden], normed → [T, hidden], for the residual stream. Of rows that are not `live` anything finite will do."""
        ...


class Held(NamedTuple):
    """What modules keep, each memory once: a packed matrix and the tensor it was made of may lie in the same one."""

    matrices: list[Weight]
    tensors: list[torch.Tensor]
    """Those that no matrix lies in."""


class Module:
    """Children are the attributes that are modules, or lists, tuples and dicts of modules, in the order they were set."""

    every_row = True
    """Is each row of a pass multiplied with its matrices? Not with those of experts."""

    def weight_slots(self) -> Iterator[WeightSlot]:
        """Its own, then its children's. A module that stands in two places is listed once."""
        for module in self.modules():
            yield from module.own_slots()

    def own_slots(self) -> Iterator[WeightSlot]:
        """What this module itself expects from a checkpoint."""
        return iter(())

    def finalize(self) -> None:
        """After loading, children first."""
        for module in reversed(list(self.modules())):
            module.own_finalize()

    def own_finalize(self) -> None:
        """Pack, fuse, free what loading alone needed."""

    def nbytes(self) -> int:
        """Bytes of all tensors and packed matrices held below, each once."""
        matrices, tensors = held(self.modules())
        return sum(matrix.nbytes for matrix in matrices) + sum(tensor.nbytes for tensor in tensors)

    def matrices(self) -> list[Weight]:
        """The packed matrices below that every row of a pass is multiplied with, each once."""
        return held(module for module in self.modules() if module.every_row).matrices

    def modules(self) -> Iterator[Module]:
        """This one and all below it, parents first, each once."""
        seen: set[int] = set()
        stack: list[Module] = [self]
        while stack:
            module = stack.pop()
            if id(module) in seen:
                continue
            seen.add(id(module))
            yield module
            stack.extend(reversed(list(_children(module))))


def _children(module: Module) -> Iterator[Module]:
    for value in vars(module).values():
        if isinstance(value, Module):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (item for item in value if isinstance(item, Module))
        elif isinstance(value, dict):
            yield from (item for item in value.values() if isinstance(item, Module))


def held(modules: Iterable[Module]) -> Held:
    """Of the modules' own attributes, and of the lists, tuples and dicts among them; not of the modules below."""
    every = {id(item): item for module in modules for value in vars(module).values() for item in _items(value)}
    matrices = [item for item in every.values() if hasattr(item, "product") and hasattr(item, "nbytes")]
    packed = {_place(part) for matrix in matrices for part in vars(matrix).values() if isinstance(part, torch.Tensor)}
    tensors = [item for item in every.values() if isinstance(item, torch.Tensor) and _place(item) not in packed]
    return Held(matrices, tensors)


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, (list, tuple)) else (value,)


def _place(tensor: torch.Tensor) -> int:
    """The same for views of one memory; unlike an address it also tells tensors on the device "meta" apart."""
    if tensor.layout != torch.strided:
        return id(tensor)  # a library's own layout, whose memory nobody is shown
    place: int = tensor.untyped_storage()._cdata
    return place


def join(*parts: str) -> str:
    """Checkpoint name from its non-empty parts."""
    return ".".join(part for part in parts if part)
