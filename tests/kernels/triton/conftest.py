"""Triton's kernels against their plain references: on a GPU where there is one, else under Triton's interpreter.

The interpreter is chosen when a kernel's module is imported, so on a machine without a GPU the tests of a file run in a process
of their own, started by `interpreted.py` with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreted import InterpretedFile

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = not INTERPRETED and torch.cuda.is_available()
HERE = Path(__file__).parent
HERE_ONLY = ["test_triton_compile.py", "test_relaunch.py"]

if INTERPRETED:
    collect_ignore = HERE_ONLY


def of_kernels(path: Path) -> bool:
    return path.parent == HERE and path.name.startswith("test_kernel_")


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if INTERPRETED or ON_GPU or not of_kernels(module_path):
        return None
    return InterpretedFile.from_parent(parent, path=module_path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if ON_GPU and of_kernels(item.path):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """Leaves out what Triton's interpreter does for nothing, here more than half of its time.

    It looks through all of `triton.language` for what to replace, at every call of a function inside of a kernel, and puts it
    back behind a launch: the first call of each function is enough, since nothing in a process of these tests wants the
    originals. And it computes every integer operation again in 64 bits to see whether it overflows, and throws the finding
    away: it asserts nothing unless its option `debug` is set, which it never is."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    patch_lang = interpreter._patch_lang

    @functools.cache
    def once(function: Any) -> Any:
        patch_lang(function)
        return interpreter._LangPatchScope()  # with nothing to put back

    builder = interpreter.interpreter_builder
    assert not builder.options.debug, "overflows are asserted: let them be looked for"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", once)
        patch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
        yield


@pytest.fixture(scope="module")
def ordered_dots() -> Iterator[None]:
    """Under the interpreter a product is numpy's library's, where the order of a value's additions depends on its place in the
    tile. Matrix instructions have one order for all places: so has this."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if 8 in (a.dtype.primitive_bitwidth, b.dtype.primitive_bitwidth):
            return plain(self, a, b, d, *options)
        # Along an axis that is not the last, numpy adds one slice after the other.
        return interpreter.TensorHandle((a.data[:, :, None] * b.data).sum(1) + d.data, d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        yield


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    """Fresh random inputs in every run; the seed is printed where a test fails."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)
