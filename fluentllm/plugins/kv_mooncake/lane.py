"""A thread that does one thing after another, for calls that block. Unlike an executor's, it keeps no process from ending."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any


class Lane:
    def __init__(self) -> None:
        self._work: SimpleQueue[tuple[Future[None], Callable[[], None]] | None] = SimpleQueue()
        threading.Thread(target=self._run, name="kv-mooncake", daemon=True).start()

    def submit(self, call: Callable[..., None], *arguments: Any) -> Future[None]:
        future: Future[None] = Future()
        self._work.put((future, lambda: call(*arguments)))
        return future

    def end(self) -> None:
        """After what is queued; a future that is cancelled before its turn is skipped."""
        self._work.put(None)

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            _do(*item)
            # While this waits, nothing may be kept alive by what is done: an engine ends with its last reference.
            del item


def _do(future: Future[None], call: Callable[[], None]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        call()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(None)
