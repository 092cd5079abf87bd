"""Observers: each told on its own, timed, counted, switched off when it keeps failing."""

from __future__ import annotations

import logging
import sys
import time

import pytest

from fluentllm.core.hookspecs import hookimpl
from fluentllm.core.plugins import PluginManager
from fluentllm.core.plugins.observers import FAILURE_LIMIT, Call, Ledger, Observer, Observers
from fluentllm.core.protocols import RequestEvent
from fluentllm.core.types import KVEvent, StepPlan, StepResult

PLAN, RESULT = StepPlan(step=7), StepResult(step=7, slots=[], seconds=0.25)


class Counter:
    """Takes all of the hooks, with some of their arguments."""

    def __init__(self) -> None:
        self.seen: list = []

    @hookimpl
    def fluent_step(self, result):
        self.seen.append(result.step)

    @hookimpl
    def fluent_request(self, event):
        self.seen.append(event.kind)

    @hookimpl
    def fluent_kv_events(self, events):
        self.seen.extend(event.kind for event in events)


class Faulty:
    calls = 0

    @hookimpl
    def fluent_step(self, plan, result):
        self.calls += 1
        raise ValueError("faulty by design")


def test_observers_are_told_what_happens():
    counter = Counter()
    observers = PluginManager.load({"engine"}, objects={"counter": counter}).observers
    observers.step(PLAN, RESULT)
    observers.request(RequestEvent("finished", "a", 1.0))
    observers.kv_events([KVEvent(kind="cleared")])
    observers.kv_events([])
    assert counter.seen == [7, "finished", "cleared"]
    assert observers.watches_kv


def test_observers_are_engine_side_only():
    counter = Counter()
    observers = PluginManager.load({"frontend"}, objects={"counter": counter}).observers
    observers.step(PLAN, RESULT)
    assert counter.seen == []
    assert not observers.watches_kv


@pytest.mark.parametrize("order", [("counter", "faulty"), ("faulty", "counter")])
def test_one_that_raises_stops_no_other_and_is_switched_off(order, caplog):
    plugins = {"counter": Counter(), "faulty": Faulty()}
    manager = PluginManager.load({"engine"}, objects={name: plugins[name] for name in order})
    for _ in range(20):
        manager.observers.step(PLAN, RESULT)
    assert len(plugins["counter"].seen) == 20
    assert plugins["faulty"].calls == FAILURE_LIMIT
    stats = manager.ledger.stats["faulty", "fluent_step"]
    assert (stats.calls, stats.failures) == (FAILURE_LIMIT, FAILURE_LIMIT)
    assert "plugin faulty: observer fluent_step raised ValueError: faulty by design" in caplog.text
    assert "switched off" in caplog.text


def test_one_that_exits_ends_nobody_but_itself(caplog):
    class Leaving:
        @hookimpl
        def fluent_request(self, event):
            sys.exit(3)

    counter = Counter()
    manager = PluginManager.load({"engine"}, objects={"leaving": Leaving(), "counter": counter})
    for _ in range(FAILURE_LIMIT + 1):
        manager.observers.request(RequestEvent("finished", "a", 1.0))
    assert counter.seen == ["finished"] * (FAILURE_LIMIT + 1)
    assert "plugin leaving: observer fluent_request raised SystemExit: 3" in caplog.text
    assert manager.ledger.stats["leaving", "fluent_request"].calls == FAILURE_LIMIT


def test_rare_failures_are_forgiven():
    calls = 0

    def sometimes(plan, result):
        nonlocal calls
        calls += 1
        if calls % 150 == 0:
            raise ValueError("one in 150")

    observers = Observers(observers={"fluent_step": [Observer("rare", "fluent_step", sometimes)]})
    logging.getLogger("fluentllm.plugins").disabled = True
    try:
        for _ in range(3000):
            observers.step(PLAN, RESULT)
    finally:
        logging.getLogger("fluentllm.plugins").disabled = False
    assert calls == 3000  # 20 failures, never switched off


def test_the_ledger_measures_and_traces():
    traced: list[Call] = []
    ledger = Ledger(traced.append)
    assert ledger.call("slow", "fluent_step", lambda seconds: time.sleep(seconds) or "answer", 0.02) == "answer"
    with pytest.raises(ZeroDivisionError):
        ledger.call("slow", "fluent_step", lambda: 1 / 0)
    stats = ledger.stats["slow", "fluent_step"]
    assert (stats.calls, stats.failures) == (2, 1)
    assert 0.02 <= stats.longest <= stats.seconds
    assert [call.error for call in traced] == [None, "ZeroDivisionError: division by zero"]


def test_the_ledger_names_who_is_being_called():
    """What a watchdog reads when the process hangs."""
    ledger = Ledger()
    seen = []
    ledger.call("outer", "import", lambda: ledger.call("inner", "fluent_step", lambda: seen.append(ledger.active)))
    assert seen[0][:2] == ("inner", "fluent_step")
    assert ledger.active is None


def test_nobody_watching_costs_next_to_nothing():
    observers = Observers()
    started = time.process_time()
    for _ in range(10_000):
        observers.step(PLAN, RESULT)
    assert (time.process_time() - started) / 10_000 < 20e-6


def test_debug_logging_prints_each_call(caplog):
    with caplog.at_level(logging.DEBUG, "fluentllm.plugins.trace"):
        Ledger().call("acme", "fluent_step", lambda: None)
    assert "acme.fluent_step" in caplog.text
