"""A second engine in a process of its own, timed in turns with this process's: `fluent bench latency --compare-deterministic`.

Not in this process: there the threads of two engines would be more than the cores of a CPU, and both slower for it
(`assembly/engine.py`). While one is timed the other has nothing to do.

This end asks over the standard streams of `python -m fluentllm.bench.beside`: a line of JSON each way.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from typing import IO, TYPE_CHECKING

import msgspec
from msgspec import structs

from ..core.config import from_json
from ..core.errors import EngineUnavailable, FluentError

if TYPE_CHECKING:
    from types import TracebackType

    from ..core.settings import Settings


class Ask(msgspec.Struct):
    """For one round: `batch` prompts of `context` tokens each, answers of one token and of `steps` + 1."""

    batch: int
    context: int
    steps: int
    prepare: bool = False
    """Afterwards capture what an idle engine would, so that it does not while the other one is timed."""


class About(msgspec.Struct, tag=True):
    """The engine is up."""

    deterministic: bool
    weight_precision: str


class Timed(msgspec.Struct, tag=True):
    first: float
    """Seconds to the first token of all."""
    whole: float
    """And to the last."""


class Failed(msgspec.Struct, tag=True):
    message: str
    fix: str | None = None


class Beside:
    """`with Beside(settings) as other: first, whole = other.round(Ask(8, 128, 64))`

    Raises `FluentError` for what the other engine cannot do, and `EngineUnavailable` if its process ends.
    """

    def __init__(self, settings: Settings) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fluentllm.bench.beside"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            about = self._answer(settings)
            assert isinstance(about, About)
            self.about = about
        except BaseException:
            self.close()
            raise

    def round(self, ask: Ask) -> tuple[float, float]:
        timed = self._answer(ask)
        assert isinstance(timed, Timed)
        return timed.first, timed.whole

    def close(self) -> None:
        """The process ends when nothing more can be asked."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _answer(self, asked: msgspec.Struct) -> About | Timed:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, which the empty line says too
            stdin.write(msgspec.json.encode(asked) + b"\n")
            stdin.flush()
        said = stdout.readline()
        if not said:
            code = self._process.wait()
            raise EngineUnavailable(f"The second engine ended with exit status {code}.", fix="See what it printed above.")
        answer: About | Timed | Failed = msgspec.json.decode(said, type=About | Timed | Failed)
        if isinstance(answer, Failed):
            raise FluentError(f"The second engine: {answer.message}", fix=answer.fix)
        return answer


def pair(settings: Settings, batch: int) -> tuple[Settings, Settings]:
    """The settings of this process's engine, and of one beside it that differs in `engine.deterministic`.

    Where nothing was said of slots, both have `batch`: an idle engine captures programs for all that it has. Where nothing was
    said of `kv.memory`, this engine has half of `engine.memory_share` of a GPU, and leaves the other one the rest.
    """
    engine, scheduler = settings.engine, settings.scheduler
    if scheduler.max_running is None:
        settings = structs.replace(settings, scheduler=structs.replace(scheduler, max_running=batch))
    other = structs.replace(settings, engine=structs.replace(engine, deterministic=not engine.deterministic))
    if settings.kv.memory is None:
        settings = structs.replace(settings, engine=structs.replace(engine, memory_share=engine.memory_share / 2))
    return settings, other


def main() -> None:
    """The other end: settings first, then rounds, until there are no more lines."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is printed here is no answer
    try:
        _serve(answers)
    except FluentError as error:
        _say(answers, Failed(error.message, error.fix))
    except KeyboardInterrupt:
        pass  # Ctrl-C is for both


def _serve(answers: IO[bytes]) -> None:
    from ..local import LocalEngine
    from ..settling import settle
    from .offline import startup, timed_round

    with LocalEngine(from_json(sys.stdin.buffer.readline())) as local:
        startup(local)
        settle()
        _say(answers, About(local.settings.engine.deterministic, local.engine.info.weight_precision))
        rng = random.Random(time.time_ns())
        for line in sys.stdin.buffer:
            ask = msgspec.json.decode(line, type=Ask)
            times = timed_round(local, rng, ask.batch, ask.context, ask.steps)
            if ask.prepare:
                local.call(local.engine.preparation.all(local.engine.info.slots))
            _say(answers, Timed(*times))


def _say(answers: IO[bytes], message: msgspec.Struct) -> None:
    answers.write(msgspec.json.encode(message) + b"\n")
    answers.flush()


if __name__ == "__main__":
    main()
