"""Notices that the engine hangs: work is there, and no step has been collected for too long.

What hangs inside a kernel or a plugin cannot be interrupted, so the process says where it hangs and ends; the supervisor
starts another. A thread of its own watches; where even threads stand still (C code that keeps Python's lock), the
interpreter's own timer, which needs no lock, prints the stacks and ends the process a little later.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from typing import TYPE_CHECKING

from .control import EXIT_HANG

if TYPE_CHECKING:
    from types import FrameType

    from fluentllm.core.plugins.observers import Ledger
    from fluentllm.core.session import Engine

GRACE = 5.0
"""Seconds that the lock-free timer gives this thread."""


class Watchdog:
    """`start` it once the engine serves; `stop` it before the engine ends on purpose."""

    def __init__(self, engine: Engine, timeout: float, ledger: Ledger | None = None) -> None:
        """`timeout` in seconds; `ledger` knows which plugin is being called."""
        self._engine = engine
        self._timeout = timeout
        self._ledger = ledger
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        interval = min(1.0, self._timeout / 4)
        busy_since: float | None = None
        faulthandler.dump_traceback_later(self._timeout + GRACE, exit=True)
        while not self._stop.wait(interval):
            faulthandler.dump_traceback_later(self._timeout + GRACE, exit=True)
            now = time.monotonic()
            if not self._engine.has_work:
                busy_since = None
                continue
            if busy_since is None:
                busy_since = now
            stuck = now - max(busy_since, self._engine.last_progress)
            if stuck > self._timeout:
                self._end(stuck)
        faulthandler.cancel_dump_traceback_later()

    def _end(self, stuck: float) -> None:
        print(self.report(stuck), file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr)
        os._exit(EXIT_HANG)

    def report(self, stuck: float) -> str:
        """Where everything stands, the plugin being called first."""
        stats = self._engine.stats()
        lines = [
            f"The engine hangs: no step was finished for {stuck:.1f} s (engine.hang_timeout {self._timeout:g} s), "
            f"with {stats.running} requests running and {stats.waiting} waiting."
        ]
        active = self._ledger.active if self._ledger is not None else None
        if active is not None:
            plugin, hook, since = active
            lines.append(f"  plugin {plugin!r} has been in {hook} for {time.monotonic() - since:.1f} s")
        frames = sys._current_frames()
        for thread in threading.enumerate():
            frame = frames.get(thread.ident or 0)
            if frame is not None and thread is not self._thread and thread.name != "control line":
                lines.append(f"  thread {thread.name!r} is in {_place(frame)}")
        return "\n".join(lines)


def _place(frame: FrameType) -> str:
    """The innermost line that belongs to no standard library: ours, a plugin's, or a package's."""
    standard = os.path.dirname(threading.__file__)
    at: FrameType | None = frame
    while at is not None:
        file = at.f_code.co_filename
        if "site-packages" in file or not file.startswith((standard, "<frozen")):
            break
        at = at.f_back
    at = at or frame
    return f"{at.f_code.co_qualname} ({at.f_code.co_filename}:{at.f_lineno})"
