"""The compiled C kernels for tests; where they cannot be had, the test is skipped with the reason."""

from __future__ import annotations

import pytest

from fluentllm.hub.cache import cache_folder
from fluentllm.kernels.native.library import Library, NotAvailable, load


def native_library() -> Library:
    try:
        return load(cache_folder() / "kernels")
    except NotAvailable as reason:
        pytest.skip(str(reason))
