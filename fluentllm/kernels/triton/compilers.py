"""Kernels compiled by processes of their own, into the caches that launches look into.

    with Compilers(target, 16) as compilers:
        compilers.compile(number, launch)
        ...
    # every number has come back through `done`

Compiling holds Python's lock for a fifth of its time, so that of 16 threads four compile, and whatever else the process does
stands still: DeepSeek-V3-Lite's 106 kernels took such threads 17 s, an engine's own lists of them 15 (one H200, 16 cores).

One process, without other threads, imports what compiles and forks a child for each kernel. No GPU is touched: Triton is told
of one. What it is told comes pickled, for dtypes, layouts and descriptors are Python's objects, through a pipe that nobody but
the process which started it can write to.

Not `concurrent.futures`: there a compiler that dies takes the pool and all that waits in it along, and here it is one kernel's
error.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, cast

import torch
import triton
from triton.runtime import driver

from .launch import Launch, compile_ahead

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import IO

    from triton.backends.compiler import GPUTarget


class Compilers:
    """`processes` children at a time. `done(number, error)` is called on a thread, once for each kernel: "" where it was
    compiled. Leaving the `with` waits for all, or gives up where it is left by an error."""

    def __init__(self, target: GPUTarget, processes: int, done: Callable[[int, str], None]) -> None:
        self._done = done
        # In a session of its own, that an interrupt ends as this process does: by its end of the pipe.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        )  # fmt: skip
        self._jobs, self._results = cast("IO[bytes]", self._process.stdin), cast("IO[bytes]", self._process.stdout)
        self._open: set[int] = set()
        self._reader = threading.Thread(target=self._read, name="fluent-compiled", daemon=True)
        self._reader.start()
        self._send(pickle.dumps((target, processes)))

    def compile(self, number: int, launch: Launch) -> None:
        """A kernel as this launches it, known as `number`."""
        self._open.add(number)
        try:
            message = portable(launch)
        except Exception as error:  # whatever an argument's own pickling raises
            self._finished(number, f"{type(error).__name__}: {error}")
        else:
            self._send(pickle.dumps((number, message)))

    def close(self) -> None:
        """Wait for all."""
        with contextlib.suppress(BrokenPipeError):
            self._jobs.close()
        self._process.wait()
        self._reader.join()
        for number in list(self._open):
            self._finished(number, f"the compiling process ended with {self._process.returncode}")

    def give_up(self) -> None:
        """Compile no more."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            self.give_up()
        self.close()

    def _send(self, message: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended: `close` says so
            self._jobs.write(message)
            self._jobs.flush()

    def _read(self) -> None:
        for line in self._results:
            number, _, error = line.decode(errors="replace").rstrip("\n").partition(" ")
            self._finished(int(number), error)

    def _finished(self, number: int, error: str) -> None:
        self._open.discard(number)
        self._done(number, error)


@dataclass(frozen=True, slots=True)
class Pointer:
    """What Triton asks of a tensor."""

    dtype: torch.dtype
    address: int
    """Modulo 16."""

    def data_ptr(self) -> int:
        return self.address


class _Pickler(pickle.Pickler):
    """Kernels go by their own names in their modules, tensors as what Triton asks of them."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, triton.JITFunction):
            return value.__name__
        if isinstance(value, torch.Tensor):
            return Pointer, (value.dtype, value.data_ptr() % 16)
        return NotImplemented


def portable(launch: Launch) -> bytes:
    """For `pickle.loads` in another process. Raises what pickling raises, for a kernel too that its name does not lead to."""
    message = io.BytesIO()
    _Pickler(message).dump(launch)
    return message.getvalue()


# ----------------------------------------------------------------------------------------------------------- the other process
@triton.jit
def _nothing():
    """Compiled before the first fork: a compiler reads itself to know its version, which takes it half a second."""


class _Told:
    """In place of Triton's driver, for code that compiles and launches nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def serve() -> None:
    """Compile what comes on the standard input until it ends; a line of the standard output: a number, and what went wrong."""
    jobs, results = sys.stdin.buffer, os.dup(1)
    os.dup2(2, 1)  # what compilers print
    target, processes = pickle.load(jobs)
    driver.set_active(_Told(target))
    with contextlib.suppress(Exception):
        compile_ahead(Launch(_nothing, (1,), (), {}))
    running: dict[int, int] = {}
    while job := _next(jobs):
        number, message = job
        while len(running) >= processes:
            _wait_for_one(running, results)
        child = os.fork()
        if not child:
            _answer(results, number, _compile(message))
            os._exit(0)
        running[child] = number
    while running:
        _wait_for_one(running, results)


def _next(jobs: IO[bytes]) -> tuple[int, bytes] | None:
    try:
        return cast("tuple[int, bytes]", pickle.load(jobs))
    except EOFError:
        return None


def _compile(message: bytes) -> str:
    try:
        compile_ahead(pickle.loads(message))
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _wait_for_one(running: dict[int, int], results: int) -> None:
    child, status = os.wait()
    number = running.pop(child)
    if code := os.waitstatus_to_exitcode(status):  # it had no time to answer
        _answer(results, number, f"its process ended with {code}")


def _answer(results: int, number: int, error: str) -> None:
    """One write: no other child's line comes between."""
    os.write(results, f"{number} {' '.join(error.split())[:1000]}\n".encode())
