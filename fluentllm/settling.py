"""After a start in a process of its own."""

from __future__ import annotations

import gc


def settle() -> None:
    """What lives now lives for good, so the garbage collector need not look at it again: looking at all that torch, the model
    and its programs are made of takes 0.2 s, in the middle of the steps."""
    gc.collect()
    gc.freeze()
