"""NIXL and Mooncake, in one process and in two: needs the extras `nixl` and `mooncake`, and fails without them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fluentllm.testing import assert_kv_transport_conforms

pytestmark = pytest.mark.transports


@pytest.mark.parametrize("name", ["nixl", "mooncake"])
def test_it_conforms_in_one_process(installed: Callable[[str], str], name: str) -> None:
    assert len(assert_kv_transport_conforms(installed(name))) >= 12


@pytest.mark.parametrize("name", ["nixl", "mooncake"])
def test_it_conforms_between_two_processes(installed: Callable[[str], str], name: str) -> None:
    """With kill -9 and frozen peers."""
    assert len(assert_kv_transport_conforms(installed(name), processes=2)) >= 13
