"""Grammars that are compiled elsewhere: their requests wait, others go on, and what is wrong with one reaches all who asked."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import pytest
from speculation.test_grammars import PAIRS, Toy
from speculation.test_host_grammars import OPEN, Brackets

from fluentllm.core import entrance
from fluentllm.core.errors import InvalidRequest, QueueFull
from fluentllm.core.hookspecs import hookimpl
from fluentllm.core.plugins import PluginManager
from fluentllm.core.protocols import RequestEvent
from fluentllm.core.types import GrammarSpec, Refused, Request, SamplingParams

from .harness import Harness

if TYPE_CHECKING:
    from fluentllm.core.protocols import GrammarContext, Register


class Slow:
    """Compiles when it is told to: `futures`, by source."""

    def __init__(self) -> None:
        self.futures: dict[str, list[Future[Any]]] = {}
        self.ended: list[tuple[str, str]] = []
        """Of the test's own connection: ids and reasons that observers were told, in the order of ends."""

    @hookimpl
    def fluent_request(self, event: RequestEvent) -> None:
        if event.kind == "finished" and event.details["generated_tokens"] == 0:
            self.ended.append((event.id, event.details["reason"]))

    def compile(self, source: str) -> Future[Any]:
        future: Future[Any] = Future()
        self.futures.setdefault(source, []).append(future)
        return future

    @hookimpl
    def fluent_grammars(self, register: Register) -> None:
        def make(context: GrammarContext) -> Any:
            self.toy = Toy(context)
            return self

        register("slow", make)


class Brace:
    def matcher(self) -> Brackets:
        return Brackets("")


@pytest.fixture
def slow() -> Slow:
    return Slow()


def plugins_with(slow: Slow) -> PluginManager:
    return PluginManager.load({"engine", "executor"}, allow=[], deny=[], objects={"slow": slow})


def grammar(source: str) -> GrammarSpec:
    return GrammarSpec(kind="slow", source=source)


@pytest.mark.parametrize("depth", [0, 2])
async def test_others_go_on_meanwhile(tiny: Harness, slow: Slow, depth: int) -> None:
    settings = {"engine.overlap_depth": depth, "speculative.method": "pld"}
    async with tiny.engine(plugins=plugins_with(slow), **settings) as running:
        waiting = [running.submit([9, 8], max_tokens=4, grammar=grammar(source)) for source in ("a", "a", "table")]
        assert [len(futures) for futures in slow.futures.values()] == [1, 1]  # one grammar is compiled once
        assert len(await running.tokens([9, 8], max_tokens=20, ignore_eos=True)) == 20
        assert running.engine.stats().waiting == 3
        assert running.engine.has_work
        before = running.engine.last_progress
        await asyncio.sleep(0.5)  # nothing hangs, the watchdog is told
        assert running.engine.last_progress > before
        slow.futures["a"][0].set_result(Brace())
        found = [await running.rest(each) for each in waiting[:2]]
        assert found[0] == found[1]
        assert found[0][0] in OPEN
        slow.futures["table"][0].set_result(slow.toy.compile(PAIRS.source))
        assert set(await running.rest(waiting[2])) <= {5, 6}
        assert await running.tokens([9, 8], max_tokens=4, grammar=grammar("a")) == found[0]  # it was kept
        assert running.engine.stats().waiting == 0


async def test_what_is_wrong_reaches_everyone_who_asked(tiny: Harness, slow: Slow, caplog: pytest.LogCaptureFixture) -> None:
    async with tiny.engine(plugins=plugins_with(slow)) as running:
        told: list[Refused] = []
        connection = running.engine.connect(lambda message: told.append(message) if isinstance(message, Refused) else None)
        for number, source in enumerate(["bad", "bad", "odd", "none"]):
            params = SamplingParams(max_tokens=3, grammar=grammar(source))
            connection.submit(Request(id=str(number), prompt=[9, 8], params=params))
        slow.futures["bad"][0].set_exception(InvalidRequest("No such rule.", fix="Correct it.", param="grammar"))
        slow.futures["odd"][0].set_exception(ZeroDivisionError("oops"))
        slow.futures["none"][0].set_result(None)
        assert len(await running.tokens([9, 8], max_tokens=5, ignore_eos=True)) == 5
        assert [(each.id, each.status, each.message) for each in told[:2]] == [
            (number, 400, "No such rule. Correct it.") for number in "01"
        ]
        assert [(each.id, each.status) for each in told[2:]] == [("2", 500), ("3", 500)]
        assert "ZeroDivisionError: oops" in told[2].message
        assert "it returned None" in told[3].message
        assert len(slow.futures["bad"]) == 1
        assert running.engine.stats().refused == {"invalid_request": 2, "plugin_error": 2}
        assert not connection.sequences
        assert not running.engine.has_work
    # What a client got wrong is no error of the server's.
    assert dict(slow.ended) == {"0": "refused", "1": "refused", "2": "error", "3": "error"}


async def test_who_leaves_while_it_waits_leaves_nothing(tiny: Harness, slow: Slow) -> None:
    async with tiny.engine(plugins=plugins_with(slow)) as running:
        left = running.submit([9, 8], grammar=grammar("a"))
        stays = running.submit([9, 8], max_tokens=4, grammar=grammar("a"))
        running.connection.abort([left])
        assert running.engine.stats().waiting == 1
        slow.futures["a"][0].set_result(Brace())
        assert len(await running.rest(stays)) == 4
        alone = running.submit([9, 8], grammar=grammar("b"))
        running.connection.abort([alone])
        assert not running.engine.has_work
        slow.futures["b"][0].set_result(slow.toy.compile(PAIRS.source))
        await asyncio.sleep(0)
        assert await running.tokens([9, 8], max_tokens=2, grammar=grammar("b")) in ([5, 5], [6, 6])
        assert len(slow.futures["b"]) == 1  # what nobody waited for any more was not lost


async def test_a_queue_that_is_full_by_then_refuses(tiny: Harness, slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    async with tiny.engine(plugins=plugins_with(slow), **{"scheduler.max_waiting": 1, "scheduler.max_running": 1}) as running:
        told: list[Any] = []
        connection = running.engine.connect(told.append)
        connection.submit(Request(id="x", prompt=[9, 8], params=SamplingParams(max_tokens=3, grammar=grammar("a"))))
        await running.first(running.submit([9, 8], max_tokens=100, ignore_eos=True))
        running.submit([9, 8], max_tokens=3, ignore_eos=True)
        slow.futures["a"][0].set_result(Brace())
        while not told:
            await asyncio.sleep(0)
        assert (told[0].id, told[0].status, told[0].code) == ("x", 429, "queue_full")
        assert not running.engine.grammars.matchers._open
        monkeypatch.setattr(entrance, "MOST", 1)
        running.submit([9, 8], grammar=grammar("b"))
        with pytest.raises(QueueFull, match="wait for their grammars"):
            running.submit([9, 8], grammar=grammar("b"))


async def test_futures_that_are_done_at_once_and_those_that_are_forgotten(
    tiny: Harness, slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with tiny.engine(plugins=plugins_with(slow)) as running:
        monkeypatch.setattr("fluentllm.core.grammars.HOST_GRAMMARS", 2)
        for source in "abcd":
            running.connection.abort([running.submit([9, 8], grammar=grammar(source))])
            slow.futures[source][0].set_exception(InvalidRequest("No."))
        assert [spec.source for spec in running.engine.grammars._compiling] == ["c", "d"]
        with pytest.raises(InvalidRequest, match=r"No\."):
            running.submit([9, 8], grammar=grammar("d"))
        done: Future[Any] = Future()
        done.set_result(Brace())
        monkeypatch.setattr(slow, "compile", lambda source: done)
        assert (await running.tokens([9, 8], max_tokens=2, grammar=grammar("e")))[0] in OPEN
