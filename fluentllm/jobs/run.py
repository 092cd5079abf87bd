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


async def run_job(job: Job, output: OutputFile, generation: Generation, told: Told) -> None:
    """From the first line without a result to the last. A line that cannot be run has its error for a result; an engine
    that ends (`EngineDied`) ends the run, and the next one goes on from there."""
    window = asyncio.Semaphore(job.concurrency)

    async def one(index: int, text: bytes) -> None:
        result, tokens = await _result(index, text, job.sampling, generation)
        for _ in range(output.put(result)):
            window.release()
        told(1, tokens)

    try:
        async with asyncio.TaskGroup() as group:
            for index, text in islice(_lines(job.input), output.done, None):
                await window.acquire()
                group.create_task(one(index, text))
    except* FluentError as errors:
        raise errors.exceptions[0] from None


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    with Path(path).open("rb") as file:
        yield from enumerate(line for line in file if line.strip())


async def _result(index: int, text: bytes, defaults: SamplingOptions, generation: Generation) -> tuple[Result, int]:
    line = Line()
    try:
        line, options = parse_line(text, defaults)
        if options.seed is None:
            # The same line gets the same text, also when it is run again after a kill.
            options = structs.replace(options, seed=int.from_bytes(hashlib.sha256(b"%d " % index + text).digest()[:7]))
        prompt = await _prompt(line, generation)
        job = generation.job([prompt], options)
        completions = await generation.complete(job)
    except (EngineDied, EngineUnavailable):
        raise
    except FluentError as error:
        return Result(index=index, id=line.id, error=str(error)), 0
    new = sum(completion.new_tokens for completion in completions)
    cached = completions[0].cached_tokens
    usage = {"prompt_tokens": len(prompt), "completion_tokens": new, "cached_tokens": cached}
    choices = [Choice(text=c.text, finish_reason=c.finish_reason) for c in completions]
    return Result(index=index, id=line.id, choices=choices, usage=usage), new


async def _prompt(line: Line, generation: Generation) -> list[int]:
    if line.messages is not None:
        return await generation.encode_chat(line.messages)
    if isinstance(line.prompt, str):
        return await generation.encode(line.prompt)
    assert line.prompt is not None
    return line.prompt
