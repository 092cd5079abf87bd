"""Launching a kernel again without what Triton does before each launch: one look-up among the kinds that were launched before.

`kernel[grid](…)` binds the arguments by name, describes each for the compiler, prints the options to make a key, checks
globals and makes facts for hooks. Here a kind of launch is known by a key of its own: the first of a kind goes through Triton,
later ones call what that compiled. The key is at least as fine as Triton's: what Triton would compile apart is never launched
as one. Where the key cannot tell (values of other types, the interpreter, other backends), or where somebody looks on (Triton's
hooks and debugging), Triton launches. Triton's check that globals have not changed is made for the first of a kind alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from .cache_key import settle_key

if TYPE_CHECKING:
    from collections.abc import Callable

CONSTANTS = frozenset({int, bool, str, type(None), triton.language.dtype})
"""Types of options whose values are equal only if they compile equally, given that their types are."""


class _Kind:
    """What a launch of a kind ran."""

    __slots__ = ("constants", "function", "kept", "metadata", "run")

    def __init__(self, kernel: Any, compiled: Any, constants: tuple[Any, ...]) -> None:
        self.kept = kernel, compiled
        """So that the kernel's id stays its own, and what was compiled stays loaded."""
        self.run: Callable[..., None] = compiled.run
        self.function, self.metadata = compiled.function, compiled.packed_metadata
        self.constants = constants
        """Of parameters behind the positional ones."""


_kinds: dict[tuple[Any, ...], _Kind] = {}


def relaunch(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """As `kernel[grid](*args, **options)`."""
    values = list(args)
    own = None if _watched(kernel) else key_of(values, options)
    if own is None:
        settle_key(kernel)
        kernel[grid](*args, **options)
        return
    device = driver.active.get_current_device()
    key = (id(kernel), device, own)
    kind = _kinds.get(key)
    if kind is None:
        settle_key(kernel)
        _remember(key, kernel, kernel[grid](*args, **options), args, options)
        return
    stream = driver.active.get_current_stream(device)
    x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
    kind.run(x, y, z, stream, kind.function, kind.metadata, None, None, None, *values, *kind.constants)


def key_of(args: list[Any], options: dict[str, Any]) -> tuple[Any, ...] | None:
    """Equal only for launches of one kernel that Triton compiles equally; None where that cannot be told. CUDA tensors among
    `args` become addresses, which spares the launcher asking for them, and the driver whether they are its own."""
    types = tuple(map(type, options.values()))
    if not CONSTANTS.issuperset(types):
        return None
    found: list[Any] = []
    tensor = torch.Tensor
    for i, value in enumerate(args):
        kind = type(value)
        if kind is int:
            if -0x80000000 <= value < 0x80000000:
                found.append("i16" if value & 15 == 0 else "1" if value == 1 else "i")
            elif -(1 << 63) <= value < 1 << 63:
                found.append("l16" if value & 15 == 0 else "l")
            else:
                return None
        elif value is None:
            found.append(None)
        elif kind is tensor or isinstance(value, tensor):
            address = value.data_ptr()
            if value.is_cuda:
                found.append(value.dtype if address & 15 == 0 else (value.dtype,))
                args[i] = address
            else:
                found.append((value.dtype, value.device.type, address & 15 == 0))
        elif kind is float:
            found.append("f")
        elif kind is bool:
            found.append(value)
        elif kind is TensorDescriptor or kind is GluonDescriptor:
            rounded, layout = getattr(value, "round_f32_to_tf32", False), getattr(value, "layout", None)
            found.append((value.base.dtype, value.padding, rounded, layout, *value.block_shape))
        else:
            return None
    return (tuple(found), types, tuple(options.items()))


def _watched(kernel: Any) -> bool:
    """Is it no compiled kernel, or does somebody look on, or ask for another compilation?"""
    runtime, compilation = knobs.runtime, knobs.compilation
    return bool(
        not isinstance(kernel, JITFunction)
        or kernel.pre_run_hooks
        or _calls(runtime.launch_enter_hook)
        or _calls(runtime.launch_exit_hook)
        or runtime.debug
        or compilation.instrumentation_mode
        or runtime.add_stages_inspection_hook
    )


def _calls(hook: Any) -> Any:
    """Who is called: a chain's members, or the function that was put in its place."""
    return getattr(hook, "calls", hook)


def _remember(key: tuple[Any, ...], kernel: Any, compiled: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Only kernels for CUDA, and only where positional parameters come first and options give all others."""
    rest = kernel.params[len(args) :]
    constants = all(parameter.is_constexpr and parameter.name in options for parameter in rest)
    if constants and isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == "cuda":
        _kinds[key] = _Kind(kernel, compiled, tuple(options[parameter.name] for parameter in rest))
