"""Several async streams as one, in the order in which their items come: the choices of one request."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

T = TypeVar("T")


async def merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Items of all streams as they come. The first error ends all of them; so does leaving."""
    queue: asyncio.Queue[tuple[T] | Exception | None] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[T, None]) -> None:
        end: Exception | None = None
        try:
            async with aclosing(stream) as items:
                async for item in items:
                    queue.put_nowait((item,))
        except Exception as error:  # handed to the reader, who raises it
            end = error
        queue.put_nowait(end)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        running = len(tasks)
        while running:
            came = await queue.get()
            if isinstance(came, tuple):
                yield came[0]
            elif came is None:
                running -= 1
            else:
                raise came
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
