"""Keys in Triton's cache depend on a kernel and what it calls, and not on what was compiled before."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from triton.runtime.jit import JITCallable

from fluentllm.kernels.triton.cache_key import settle_key
from fluentllm.kernels.triton.examples import example_launches


def functions() -> list[Any]:
    """Triton's functions in the rooms of kernels, those that were imported by others once."""
    rooms = [vars(module) for name, module in sys.modules.items() if name.startswith("fluentllm.kernels")]
    return list({id(value): value for room in rooms for value in room.values() if isinstance(value, JITCallable)}.values())


@pytest.fixture
def unread() -> Iterator[None]:
    """As in a new process; afterwards what was known is known again."""
    known = [(function, function.hash, function.used_global_vals) for function in functions()]
    yield
    for function, key, values in known:
        function.hash, function.used_global_vals = key, values


def forget() -> None:
    for function in functions():
        function.hash, function.used_global_vals = None, {}


@pytest.mark.parametrize("seed", range(5))
def test_the_order_in_which_kernels_are_met_changes_no_key(seed: int, unread: None) -> None:
    kernels = list(
        {id(one.kernel): one.kernel for _, one in example_launches() if isinstance(one.kernel, JITCallable)}.values()
    )
    assert len(kernels) > 30
    found: list[dict[str, str]] = []
    for _ in range(2):
        forget()
        keys: dict[str, str] = {}
        for kernel in kernels:
            settle_key(kernel)
            keys[f"{kernel.__module__}.{kernel.__name__}"] = kernel.cache_key
        found.append(keys)
        random.Random(seed).shuffle(kernels)
    assert found[0] == found[1]


def test_what_is_no_function_of_tritons_is_left_alone() -> None:
    settle_key(None)
    settle_key(len)
