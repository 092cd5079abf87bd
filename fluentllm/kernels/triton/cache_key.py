"""A kernel's key in Triton's cache, the same in every process.

The key has in it the constants of all functions that a kernel calls. Triton 3.6 asks each function for its constants before it
has read the function, unless something else had it read before: so the key depended on what a process had compiled until then,
and a kernel was compiled again and again. Triton 3.9 reads first. Here all functions are read before their callers.
"""

from __future__ import annotations

from typing import Any

from triton.runtime.jit import JITCallable


def settle_key(kernel: Any) -> None:
    """Before the first use of a kernel; nothing to do for what is no function of Triton's."""
    _settle(kernel, set())


def _settle(function: Any, begun: set[int]) -> None:
    if not isinstance(function, JITCallable) or function.hash is not None or id(function) in begun:
        return
    begun.add(id(function))
    for name in function.fn.__code__.co_names:
        _settle(function.__globals__.get(name), begun)
    _ = function.cache_key
