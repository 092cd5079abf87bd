"""Triton's kernels against their plain references: on a GPU where there is one, else under Triton's interpreter.

The interpreter is chosen when a kernel's module is imported, so on a machine without a GPU these tests run in a process of
their own, started by `test_triton_interpreted.py` with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE = Path(__file__).parent
HERE_ONLY = ["test_triton_interpreted.py", "test_triton_compile.py", "test_relaunch.py"]

if INTERPRETED:
    collect_ignore = HERE_ONLY
elif not torch.cuda.is_available():
    collect_ignore_glob = ["test_kernel_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not INTERPRETED and item.path.parent == HERE and item.path.name.startswith("test_kernel_"):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    """Fresh random inputs in every run; the seed is printed where a test fails."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)
