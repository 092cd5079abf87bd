"""The base of everything a model is made of: a plain Python object that can list its weight slots and be finalised.

Not an `nn.Module`: nothing is trained, and a call costs no more than a Python call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from ..core.protocols import WeightSlot
    from ..kernels.residual import Addend, Rows
    from ..kernels.weights import Weight


class Block(Protocol):
    """A feed-forward block."""

    def later(self, x: Rows) -> Addend:
        """x [T, hidden], normed → [T, hidden], for the residual stream."""
        ...


class Module:
    """Children are the attributes that are modules, or lists, tuples and dicts of modules, in the order they were set."""

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
        held = {id(value): value for module in self.modules() for value in _held(module)}
        return sum(value.nbytes for value in held.values())

    def matrices(self) -> list[Weight]:
        """All packed matrices below, each once."""
        held = {id(value): value for module in self.modules() for value in _held(module) if hasattr(value, "product")}
        return list(held.values())

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


def _held(module: Module) -> Iterator[Any]:
    """Tensors and `kernels.weights.Weight`s: whatever knows its bytes."""
    for value in vars(module).values():
        items = value if isinstance(value, (list, tuple)) else (value,)
        yield from (item for item in items if hasattr(item, "nbytes") and not isinstance(item, Module))


def join(*parts: str) -> str:
    """Checkpoint name from its non-empty parts."""
    return ".".join(part for part in parts if part)
