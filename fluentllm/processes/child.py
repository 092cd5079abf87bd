"""What the front end's and the engine's process have in common: arguments, logging, the control line, exit codes."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fluentllm.core.config import from_json
from fluentllm.core.errors import FluentError
from fluentllm.core.plugins import PluginManager
from fluentllm.core.timeline import Timeline

from .control import EXIT_REFUSED, ChildEnd
from .runtime import RuntimeFolder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fluentllm.core.settings import Settings
    from fluentllm.hub.files import ModelFiles

    from .control import Up

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class Child:
    """This process, as its supervisor started it."""

    def __init__(self, arguments: argparse.Namespace, process: str) -> None:
        self.runtime = RuntimeFolder(Path(arguments.runtime))
        self.generation: int = arguments.generation
        self.listen_fd: int | None = arguments.listen_fd
        self._start = self.runtime.read_start()
        self.settings: Settings = from_json(self._start.settings)
        self.files: ModelFiles = self._start.files
        # A later start has an axis of its own.
        self.timeline = Timeline(process, self._start.origin if self.generation == 1 else None)
        self.control = ChildEnd(arguments.control_fd)
        self.serving = False

    def load_plugins(self, processes: set[str], objects: Mapping[str, Any] | None = None) -> PluginManager:
        """The plugins of these processes, and `objects` (name → plugin). Settings get their types. Raises `PluginError`."""
        lists = self.settings.plugins
        with self.timeline.stage("plugins"):
            plugins = PluginManager.load(processes, lists.allow, lists.deny, objects=objects)
            self.settings = from_json(self._start.settings, plugins.config_structs())
        return plugins

    def up(self, message: Up) -> None:
        """Tell the supervisor that this process serves now. An error from here on is a crash, not a refusal to start."""
        self.serving = True
        self.control.send(message)


def run(main: Callable[[Child], None], description: str, process: str) -> None:
    """Run `main` as the whole life of a child process, which the timeline calls `process`.

    Exit code 0: it was asked to end. 2: it cannot start, and has said why on the control line. 1: it crashed. Any but 0 end
    the process at once, without waiting for threads: one may be stuck in what went wrong.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--runtime", required=True, help="the supervisor's runtime folder")
    parser.add_argument("--generation", type=int, default=1, help="counts the starts of this process")
    parser.add_argument("--control-fd", type=int, required=True, help="inherited end of the control line")
    parser.add_argument("--listen-fd", type=int, help="inherited public socket (front end)")
    arguments = parser.parse_args()
    child = Child(arguments, process)
    child.control.start(on_orphaned=child.runtime.remove)
    logging.basicConfig(level=child.settings.log.level.upper(), format=LOG_FORMAT, stream=sys.stderr)
    try:
        main(child)
    except FluentError as error:
        if not child.serving:
            child.control.refuse(error)
            _leave(EXIT_REFUSED)
        traceback.print_exc()
        _leave(1)
    except BaseException:
        traceback.print_exc()
        _leave(1)


def _leave(code: int) -> NoReturn:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
