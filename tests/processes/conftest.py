from __future__ import annotations

from pathlib import Path

import pytest

from .server import write_tiny_llama


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with the config.json of a tiny Llama, for dummy weights."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))
