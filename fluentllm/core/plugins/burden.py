"""Torch in the front end: the process does without it, and a plugin that imports it there is named."""

from __future__ import annotations

import logging
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from .discovery import PluginInfo

log = logging.getLogger("fluentllm.plugins")

FIX = "Import it inside the functions that compute, or name the processes in the entry point, such as [engine]."


class TorchWatch:
    """Around every call that loads a plugin. Who was first is blamed: what comes later finds torch there."""

    def __init__(self, processes: Collection[str] | None) -> None:
        self._in_front_end = processes is not None and set(processes) == {"frontend"}

    @contextmanager
    def blaming(self, info: PluginInfo) -> Iterator[None]:
        free = "torch" not in sys.modules
        try:
            yield
        finally:
            if free and "torch" in sys.modules and info.runs_in({"frontend"}):
                info.burden = "it imports torch in the front end, which then takes seconds longer to start and hundreds of MB"
                if self._in_front_end:
                    log.warning("%s is a burden: %s. %s", info, info.burden, FIX)
