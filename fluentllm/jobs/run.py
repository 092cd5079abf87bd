"""Run a job: keep `concurrency` lines with the engine, write results in order."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from msgspec import structs

from ..core.errors import ConfigError, EngineDied, EngineUnavailable, FluentError
from ..frontend.generation import Generation
from ..frontend.messages import chat_of
from ..frontend.sampling import SamplingOptions
from .job import Choice, Job, Line, Result, parse_line
from .output import OutputFile

Told = Callable[[int, int], None]
"""Called with (lines done, new tokens) after each line."""


def count_lines(path: str) -> int:
    """Raises `ConfigError` if the input cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return sum(1 for line in file if line.strip())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.", fix="Set `input` to a JSONL file.") from None


async def run_job(job: Job, output: OutputFile, generation: Generation, told: Told, *, queue: int = 4096) -> None:
    """From the first line without a result to the last. A line that cannot be run has its error for a result; an engine
    that ends (`EngineDied`) ends the run, and the next one goes on from there. `queue`: `scheduler.max_waiting`, which the
    lines' choices together must not exceed."""
    window = asyncio.Semaphore(job.concurrency)
    room = _Room(queue)

    async def one(index: int, line: Line, options: SamplingOptions, choices: int) -> None:
        result, tokens = await _generate(index, line, options, generation)
        room.leave(choices)
        finish(result, tokens)

    def finish(result: Result, tokens: int = 0) -> None:
        for _ in range(output.put(result)):
            window.release()
        told(1, tokens)

    try:
        async with asyncio.TaskGroup() as group:
            for index, text in islice(_lines(job.input), output.done, None):
                await window.acquire()
                try:
                    line, options = parse_line(text, job.sampling)
                except FluentError as error:
                    finish(Result(index=index, error=str(error)))
                    continue
                if options.seed is None:
                    # The same line gets the same text, also when it is run again after a kill.
                    options = structs.replace(options, seed=_seed(index, text))
                choices = options.n or 1
                await room.enter(choices)
                group.create_task(one(index, line, options, choices))
    except* FluentError as errors:
        raise errors.exceptions[0] from None


class _Room:
    """Bounds what is with the engine at once. More than fits may enter an empty room alone: the engine then says no."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._taken = 0
        self._left = asyncio.Event()

    async def enter(self, count: int) -> None:
        """For one caller at a time."""
        while self._taken and self._taken + count > self._size:
            self._left.clear()
            await self._left.wait()
        self._taken += count

    def leave(self, count: int) -> None:
        self._taken -= count
        self._left.set()


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    with Path(path).open("rb") as file:
        yield from enumerate(line for line in file if line.strip())


def _seed(index: int, text: bytes) -> int:
    return int.from_bytes(hashlib.sha256(b"%d " % index + text).digest()[:7])


async def _generate(index: int, line: Line, options: SamplingOptions, generation: Generation) -> tuple[Result, int]:
    """The line's result and how many tokens it took."""
    try:
        prompt = await _prompt(line, generation)
        completions = await generation.complete(generation.job([prompt], options))
    except (EngineDied, EngineUnavailable):
        raise
    except FluentError as error:
        return Result(index=index, id=line.id, error=str(error)), 0
    new = sum(completion.new_tokens for completion in completions)
    cached = completions[0].cached_tokens
    usage = {"prompt_tokens": len(prompt), "completion_tokens": new, "cached_tokens": cached}
    choices = [Choice(text=c.text, finish_reason=c.finish_reason) for c in completions]
    return Result(index=index, id=line.id, choices=choices, usage=usage, synthetic=completions[0].synthetic), new


async def _prompt(line: Line, generation: Generation) -> list[int]:
    if line.messages is not None:
        return await generation.encode_chat(chat_of(line.messages, generation.template))
    if isinstance(line.prompt, str):
        return await generation.encode(line.prompt)
    assert line.prompt is not None
    return line.prompt
