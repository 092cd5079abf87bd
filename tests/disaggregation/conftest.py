from __future__ import annotations

import pytest
from engine.harness import Harness, write_tiny_llama


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    """Four layers, so that there are groups of them, in deterministic mode."""
    folder = write_tiny_llama(tmp_path_factory.mktemp("handoff"), num_hidden_layers=4)
    return Harness(
        folder, **{"engine.deterministic": True, "disaggregation.role": "prefill", "disaggregation.transport": "loopback"}
    )
