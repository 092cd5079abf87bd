"""Whole engines on a GPU: captured programs against eager ones, and what the host does meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == HERE and item.get_closest_marker("gpu") is None:
            item.add_marker(pytest.mark.gpu)
