from __future__ import annotations

import pytest

from .harness import Harness, write_tiny_llama


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    return Harness(write_tiny_llama(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    """The same in deterministic mode: what runs beside a request changes no bit of it."""
    folder = write_tiny_llama(tmp_path_factory.mktemp("exact"))
    return Harness(folder, **{"engine.deterministic": True})
