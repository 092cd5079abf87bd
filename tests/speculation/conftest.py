from __future__ import annotations

import pytest
from engine.harness import Harness, write_tiny_llama


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    folder = write_tiny_llama(tmp_path_factory.mktemp("speculation"))
    return Harness(folder, **{"engine.deterministic": True, "speculative.k": 3})
