"""Transports by name, from the plugins that offer them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fluentllm.core.plugins import PluginManager
from fluentllm.core.plugins.registry import Registry
from fluentllm.core.transport import TransportSpec


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def transports() -> Registry:
    return PluginManager.load({"executor"}).registry("kv_transports")


@pytest.fixture(scope="module")
def installed(transports: Registry) -> Callable[[str], str]:
    """`installed("nixl")` → the factory's `module:attribute`. Fails, never skips, where the library is missing."""

    def factory(name: str) -> str:
        entry = transports.get(name)
        reason = entry.reason_against(TransportSpec("cpu"))
        if reason is not None:
            pytest.fail(f"The transport {name} cannot be tested: {reason}", pytrace=False)
        return f"{entry.factory.__module__}:{entry.factory.__qualname__}"

    return factory
