"""Torch in the front end: the process does without it, and a plugin that imports it there is named, at the start or later."""

from __future__ import annotations

import logging
import sys
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from importlib.machinery import ModuleSpec
    from types import FrameType, ModuleType

    from .discovery import PluginInfo

log = logging.getLogger("fluentllm.plugins")

FIX = "Import it inside the functions that compute, or name the processes in the entry point, such as [engine]."
LATE_FIX = "Compute in the engine, which a front end asks by the hook fluent_calls."


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


class LateTorch(MetaPathFinder):
    """For a front end that serves: its log says who imports torch after all, before the import takes its seconds.

    Python asks it for modules that are not there yet, so a request costs nothing that imports none.
    """

    def __init__(self, infos: Collection[PluginInfo]) -> None:
        self._infos = [info for info in infos if info.state == "loaded"]

    def install(self) -> None:
        """For the rest of this process."""
        sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == "torch" else None
        if spec is None or spec.loader is None:
            return None
        # Who only asks whether there is a torch imports nothing.
        load = spec.loader.exec_module

        def told(module: ModuleType) -> None:
            self._tell()
            load(module)

        spec.loader.exec_module = told  # type: ignore[method-assign]
        return spec

    def _tell(self) -> None:
        frames = [frame for frame in _stack() if not _module(frame).startswith(("importlib", __name__))]
        found = ((info, frame) for frame in frames for info in self._infos if _belongs(_module(frame), info))
        info, frame = next(found, (None, frames[0]))
        who = f"{info} is a burden: it" if info is not None else "Something"
        where = f"{frame.f_code.co_filename}, line {frame.f_lineno}"
        cost = "which answers nobody meanwhile, and takes hundreds of MB more from then on"
        log.warning("%s imports torch in the front end (%s), %s. %s", who, where, cost, LATE_FIX)


def _stack() -> Iterator[FrameType]:
    """The innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _belongs(module: str, info: PluginInfo) -> bool:
    """A distribution's other modules are the plugin's too; ours has one package a plugin."""
    home = info.value.partition(":")[0].strip()
    home = home if info.builtin else home.partition(".")[0]
    return f"{module}.".startswith(f"{home}.")
