"""One child of the supervisor, kept alive: started, watched, restarted with back-off, given up after too many crashes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
from collections import deque
from typing import TYPE_CHECKING

from fluentllm.core.errors import FluentError

from .control import EXIT_HANG, EXIT_REFUSED, EngineIs, Failed, Linked, Progress, SupervisorEnd, Up

if TYPE_CHECKING:
    from collections.abc import Callable

    from .runtime import RuntimeFolder

log = logging.getLogger("fluentllm.supervisor")

CRASH_WINDOW = 600.0
"""Seconds over which crashes are counted."""
FIRST_DELAY, LONGEST_DELAY = 0.1, 10.0
"""Seconds before a restart; each crash within the window doubles them."""


class ServiceFailed(FluentError):
    """A child cannot be kept alive; the server stops."""

    code = "start_failed"


class Service:
    """`keep` runs it until `stop`, or raises `ServiceFailed`."""

    def __init__(
        self,
        name: str,
        module: str,
        runtime: RuntimeFolder,
        *,
        max_restarts: int,
        public: socket.socket | None = None,
        on_up: Callable[[Up], None],
        on_linked: Callable[[], None] = lambda: None,
        on_down: Callable[[], None],
        on_progress: Callable[[str], None],
    ) -> None:
        self.name = name
        self.generation = 0
        """Counts starts."""
        self.up: Up | None = None
        """What the running child said when it began to serve."""
        self.linked = False
        """Has the running child reached the engine? (front end)"""
        self._module = module
        self._runtime = runtime
        self._max_restarts = max_restarts
        self._public = public
        self._on_up, self._on_linked, self._on_down, self._on_progress = on_up, on_linked, on_down, on_progress
        self._process: asyncio.subprocess.Process | None = None
        self._line: SupervisorEnd | None = None
        self._failed: Failed | None = None
        self._stopping = asyncio.Event()
        self._crashes: deque[float] = deque()

    @property
    def pid(self) -> int | None:
        """Of the running child."""
        return None if self._process is None or self._process.returncode is not None else self._process.pid

    async def keep(self) -> None:
        """Returns once stopped. Raises `ServiceFailed`: it refused to start, or crashed too often."""
        ever_up = False
        while not self._stopping.is_set():
            code = await self._live()
            was_up, self.up, self.linked = self.up is not None, None, False
            ever_up |= was_up
            if self._stopping.is_set():
                return
            self._judge(code, ever_up)
            self._on_down()
            delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** (len(self._crashes) - 1))
            log.error("The %s %s; it is restarted in %.1f s.", self.name, _how(code), delay)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)

    async def stop(self, timeout: float) -> None:
        """Ask it to end; kill it after `timeout` seconds."""
        self._stopping.set()
        process = self._process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), timeout)
        except TimeoutError:
            log.warning("The %s did not stop within %.0f s and is killed.", self.name, timeout)
            self.kill()
            await process.wait()

    def kill(self) -> None:
        self._stopping.set()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    def tell(self, message: EngineIs) -> None:
        """Say something to the running child, if there is one."""
        if self._line is not None:
            self._line.send(message)

    # ------------------------------------------------------------------------------------------------------------- one life
    async def _live(self) -> int:
        """Start the child and wait for its end → exit code, negative for a signal."""
        self.generation += 1
        self._failed = None
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = ["--runtime", str(self._runtime.path), "--generation", str(self.generation)]
            arguments += ["--control-fd", str(theirs.fileno())]
            inherited = [theirs.fileno()]
            if self._public is not None:
                arguments += ["--listen-fd", str(self._public.fileno())]
                inherited.append(self._public.fileno())
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", self._module, *arguments),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=inherited,
                start_new_session=True,  # Ctrl-C is for the supervisor, which stops its children in order
            )
        self._line = await SupervisorEnd.open(ours)
        listening = asyncio.create_task(self._listen(self._line))
        if self._stopping.is_set():
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
        code = await self._process.wait()
        await asyncio.wait({listening}, timeout=1)  # for what it said last; a grandchild may hold the line open
        listening.cancel()
        self._line.close()
        self._line = None
        return code

    async def _listen(self, line: SupervisorEnd) -> None:
        while (message := await line.receive()) is not None:
            if isinstance(message, Progress):
                self._on_progress(message.line)
            elif isinstance(message, Up):
                self.up = message
                self._on_up(message)
            elif isinstance(message, Linked):
                self.linked = True
                self._on_linked()
            else:
                self._failed = message

    def _judge(self, code: int, ever_up: bool) -> None:
        """Raises `ServiceFailed` where another start would not help."""
        if self._failed is not None:
            raise ServiceFailed(self._failed.message, fix=self._failed.fix, param=self._failed.param)
        if not ever_up and code in (1, EXIT_REFUSED):
            raise ServiceFailed(
                f"The {self.name} crashed while it started; its error is above.",
                fix="If it is not a plugin's, please report it: it is a bug.",
            )
        now = time.monotonic()
        self._crashes.append(now)
        while self._crashes[0] < now - CRASH_WINDOW:
            self._crashes.popleft()
        if len(self._crashes) > self._max_restarts:
            raise ServiceFailed(
                f"The {self.name} {_how(code)}. That was crash {len(self._crashes)} within {CRASH_WINDOW / 60:.0f} minutes, "
                f"and engine.max_restarts is {self._max_restarts}.",
                fix="See its errors above.",
            )


def _how(code: int) -> str:
    if code == EXIT_HANG:
        return "hung and ended itself"
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        hint = " (by hand, or because the system ran out of memory)" if -code == signal.SIGKILL else ""
        return f"was ended by {name}{hint}"
    return f"ended with exit code {code}"
