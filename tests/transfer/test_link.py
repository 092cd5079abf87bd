"""Control connections: messages in order, and an end for whatever is not what it should be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from fluentllm.core.errors import FluentError
from fluentllm.transfer.frames import FrameForged
from fluentllm.transfer.link import Link, LinkError
from fluentllm.transfer.messages import Attempt, Drained, Message

KEY = b"0123456789abcdef"


def numbered(number: int) -> Drained:
    """Messages that can be told apart."""
    return Drained(of=Attempt("handoff-1", 0, 1, 2), groups=number)


class End:
    """What one side hears."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.messages: list[Message] = []
        self.lost: list[FluentError] = []
        link.listen(self.messages.append, self.lost.append)

    async def until(self, count: int) -> None:
        while len(self.messages) < count:
            await asyncio.sleep(0.001)


@asynccontextmanager
async def ends() -> AsyncIterator[tuple[End, End]]:
    accepted: asyncio.Queue[End] = asyncio.Queue()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.put_nowait(End(await Link.greet(reader, writer, KEY)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    ours = End(await Link.open("127.0.0.1", port, KEY, 5))
    theirs = await accepted.get()
    yield ours, theirs
    ours.link.close()
    theirs.link.close()
    server.close()


async def test_messages_go_both_ways_in_order() -> None:
    async with ends() as (ours, theirs):
        sent = [numbered(number) for number in range(200)]
        for message in sent:
            ours.link.send(message)
            theirs.link.send(message)
        await asyncio.wait_for(asyncio.gather(ours.until(200), theirs.until(200)), 10)
        assert ours.messages == theirs.messages == sent


async def test_the_other_side_hears_of_the_end() -> None:
    async with ends() as (ours, theirs):
        ours.link.close()
        ours.link.send(numbered(1))
        while not theirs.lost:
            await asyncio.sleep(0.001)
        assert isinstance(theirs.lost[0], LinkError)
        assert theirs.link.closed
        assert ours.lost == []


async def test_what_does_not_verify_ends_the_connection() -> None:
    async with ends() as (ours, theirs):
        ours.link._session._out = bytes(32)  # another key
        ours.link.send(numbered(1))
        while not theirs.lost:
            await asyncio.sleep(0.001)
        assert isinstance(theirs.lost[0], FrameForged)
        assert theirs.messages == []


async def test_an_end_that_is_too_long_ends_the_connection() -> None:
    async with ends() as (ours, theirs):
        ours.link._writer.write(b"\xff\xff\xff\xff" + bytes(100))
        while not theirs.lost:
            await asyncio.sleep(0.001)
        assert "4,294,967,295 bytes" in str(theirs.lost[0])


async def test_who_does_not_answer_is_given_up() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(LinkError, match=r"no answer within 0\.1 s"):
        await Link.open("127.0.0.1", port, KEY, 0.1)
    server.close()
    with pytest.raises(LinkError, match="cannot be reached"):
        await Link.open("127.0.0.1", port, KEY, 1)
