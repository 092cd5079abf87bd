"""Helpers for the tests of plugins: conformance suites that any plugin of a kind can run.

from fluentllm.testing import assert_kv_transport_conforms

def test_my_transport():
    assert_kv_transport_conforms("acme_kv.plugin:create")
"""

from .transports import assert_kv_transport_conforms

__all__ = ["assert_kv_transport_conforms"]
