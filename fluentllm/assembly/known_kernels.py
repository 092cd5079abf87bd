"""Starts whose kernels were all compiled are remembered beside the compiler's cache: the next one like it need not list them.

Listing runs the step on tensors without memory, and what PyTorch imports for that takes seconds. What the mark promises is no
more than speed: a kernel that is missing after all is compiled when it is launched.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from msgspec import to_builtins

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..core.settings import Settings

log = logging.getLogger(__name__)

PACKAGE = Path(__file__).parents[1]
ELSEWHERE = ("log", "server", "plugins")
"""Settings that no kernel depends on."""


def mark_of(settings: Settings, config: Mapping[str, Any], device: torch.device, plugins: Mapping[str, str]) -> Path:
    """The file that is there once all kernels of such a start have been compiled. plugins: name → version."""
    import triton
    from triton import knobs

    from ..kernels.cuda.compile import compiler_version

    asked = {name: value for name, value in to_builtins(settings, enc_hook=str).items() if name not in ELSEWHERE}
    properties = torch.cuda.get_device_properties(device)
    facts = [
        asked,
        config,
        plugins,
        [torch.__version__, triton.__version__, compiler_version(), properties.name, properties.major, properties.minor],
        _sources(PACKAGE),
    ]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    return Path(knobs.cache.dir) / f"fluent-{digest[:32]}"


def remember(mark: Path) -> None:
    """All are compiled."""
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:
        log.debug("%s cannot be written: %s", mark, error)


def _sources(package: Path) -> list[list[object]]:
    """Name, size and time of each file that a kernel, or its launch, may be made from."""
    found = []
    for path in sorted(path for path in package.rglob("*") if path.suffix in (".py", ".cu", ".cuh")):
        stat = path.stat()
        found.append([path.relative_to(package).as_posix(), stat.st_size, stat.st_mtime_ns])
    return found
