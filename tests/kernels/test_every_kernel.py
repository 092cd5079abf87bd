"""Every kernel that a launcher launches is compiled ahead of time by some test: no GPU is needed to see that it compiles."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton")

from test_mla_decode_triton import AROUND, CACHE, DECODE

import fluentllm.kernels
from fluentllm.kernels.triton.examples import example_launches

CUDA = {"linear_cluster", "mla_decode_cluster"}
"""In cuda/test_cuda_compile.py."""


def launched(source: Path) -> Iterator[str]:
    """Names of kernels in calls of `launch`."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "launch":
            kernel = node.args[0]
            yield kernel.attr if isinstance(kernel, ast.Attribute) else ast.unparse(kernel)


def test_every_kernel_is_compiled_by_a_test() -> None:
    room = Path(fluentllm.kernels.__path__[0])
    found = {name for source in room.rglob("*.py") for name in launched(source)}
    examples = {one.kernel.__name__ for _, one in example_launches()}
    assert len(found) > 50
    assert found <= examples | DECODE | CACHE | AROUND | CUDA
