"""Before torch is imported: how its threads wait for each other."""

from __future__ import annotations

import os

SPINS = "10000"
"""Turns of libgomp's waiting loop before a thread sleeps; by itself it makes 300,000. A pass through a model has hundreds of
places where threads wait. Where another program has taken a core, each costs what the wait may last, and the waiting thread
keeps a core from the one it waits for: on two cores of which others used one or both, a token of `longcat-nano` took 65 to
140 ms, and 2 to 41 ms with this number. On an idle machine a token of SmolLM2 took 4.42 and 4.60 ms with it, 4.23 and 4.50
without, at batch 8 9.9 and 10.4 against 10.0 and 10.2 (2026-11-29, 2 cores); with 2,000 turns some 5 % more."""


def spin_briefly() -> None:
    """Let threads that wait, in this process and its children, soon give up their core, unless the user has chosen how they
    wait. libgomp reads it when it is loaded, with torch."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
