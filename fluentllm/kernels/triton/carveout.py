"""One division of every multiprocessor's memory into L1 cache and shared memory, for all kernels.

A kernel that needs more shared memory than the division in force has is not placed beside those that run: the multiprocessor
must be empty before it is divided anew. The driver divides for the kernel at hand, so a kernel that is set up under another
(programmatic launches) would wait for its last program in spite of it. Hence all ask for the largest share.

CUDA driver API, `CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT`.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

_CARVEOUT = 9
"""The attribute's number in `CUfunction_attribute`."""
LARGEST, BY_DRIVER = 100, -1
"""Per cent of the memory, or the driver's choice for each kernel."""

SHARE = LARGEST


def divide(function: int, share: int | None = None) -> None:
    """Ask for `share` (`SHARE` unless given) whenever this CUfunction is launched. A wish: the driver may do otherwise, and an
    older one that knows no such attribute goes on without."""
    driver = _driver()
    if driver is not None:
        driver.cuFuncSetAttribute(
            ctypes.c_void_p(function), ctypes.c_int(_CARVEOUT), ctypes.c_int(SHARE if share is None else share)
        )


@cache
def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
