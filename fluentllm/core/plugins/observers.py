"""Calls into plugins: timed, counted, traced and, for observers, contained one by one.

`core/plugins/manager.py` makes every call to a plugin through a `Ledger`; the engine's loop calls `Observers` once a step, once
for each event of a request, and once for a batch of cache events.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ..protocols import RequestEvent
    from ..types import KVEvent, StepPlan, StepResult

from ..types import PluginCalls

log = logging.getLogger("fluentllm.plugins")
trace_log = logging.getLogger("fluentllm.plugins.trace")

OBSERVER_HOOKS = ("fluent_step", "fluent_request", "fluent_kv_events")
FAILURE_LIMIT = 5
"""An observer is switched off when its strain reaches this. A failure adds 1 to the strain."""
FORGIVENESS = 0.01
"""A success takes this off the strain: one failure in a hundred calls is borne for ever."""


@dataclass(slots=True)
class CallStats:
    """What one hook of one plugin has cost so far. Times in seconds."""

    calls: int = 0
    failures: int = 0
    seconds: float = 0.0
    longest: float = 0.0


@dataclass(frozen=True, slots=True)
class Call:
    """One finished call, for `fluent plugins trace`."""

    plugin: str
    hook: str
    """A hook's name, or `import`."""
    seconds: float
    error: str | None = None


@dataclass(slots=True)
class Ledger:
    """Who was called, how often, how long; who is being called right now."""

    sink: Callable[[Call], None] | None = None
    stats: dict[tuple[str, str], CallStats] = field(default_factory=dict)
    """(plugin, hook) → what it has cost."""
    active: tuple[str, str, float] | None = None
    """(plugin, hook, since, on the monotonic clock): what a watchdog names when the process hangs."""

    disabled: set[tuple[str, str]] = field(default_factory=set)
    """(plugin, hook) of observers that are switched off."""

    def report(self) -> list[PluginCalls]:
        return [
            PluginCalls(
                plugin=plugin,
                hook=hook,
                calls=stats.calls,
                failures=stats.failures,
                seconds=stats.seconds,
                longest=stats.longest,
                enabled=(plugin, hook) not in self.disabled,
            )
            for (plugin, hook), stats in sorted(self.stats.items())
        ]

    def account(self, plugin: str, hook: str) -> CallStats:
        return self.stats.setdefault((plugin, hook), CallStats())

    def call(self, plugin: str, hook: str, function: Callable[..., Any], *args: Any) -> Any:
        """Call and record. What the plugin raises passes through."""
        stats = self.account(plugin, hook)
        started = time.monotonic()
        outer, self.active = self.active, (plugin, hook, started)
        error: str | None = None
        try:
            return function(*args)
        except BaseException as raised:
            stats.failures += 1
            error = f"{type(raised).__name__}: {raised}"
            raise
        finally:
            self.active = outer
            seconds = time.monotonic() - started
            stats.calls += 1
            stats.seconds += seconds
            stats.longest = max(stats.longest, seconds)
            if self.sink is not None:
                self.sink(Call(plugin, hook, seconds, error))
            if trace_log.isEnabledFor(logging.DEBUG):
                trace_log.debug("%s.%s %.1f µs%s", plugin, hook, seconds * 1e6, f" raised {error}" if error else "")


@dataclass(slots=True)
class Observer:
    """One plugin's implementation of one observing hook."""

    plugin: str
    hook: str
    function: Callable[..., Any]
    strain: float = 0.0
    enabled: bool = True


class Observers:
    """Tells every observer, each on its own: one that raises stops no other and not the engine."""

    def __init__(self, ledger: Ledger | None = None, observers: Mapping[str, Sequence[Observer]] | None = None) -> None:
        self.ledger = ledger or Ledger()
        self._step, self._request, self._kv_events = (list((observers or {}).get(hook, ())) for hook in OBSERVER_HOOKS)

    def step(self, plan: StepPlan, result: StepResult) -> None:
        if self._step:
            self._tell(self._step, plan, result)

    def request(self, event: RequestEvent) -> None:
        if self._request:
            self._tell(self._request, event)

    def kv_events(self, events: list[KVEvent]) -> None:
        if self._kv_events and events:
            self._tell(self._kv_events, events)

    @property
    def watches_kv(self) -> bool:
        return bool(self._kv_events)

    def _tell(self, observers: list[Observer], *args: Any) -> None:
        for observer in tuple(observers):
            try:
                self.ledger.call(observer.plugin, observer.hook, observer.function, *args)
            except (Exception, SystemExit) as error:  # whoever calls sys.exit ends itself
                self._failed(observer, error)
                if not observer.enabled:
                    observers.remove(observer)
            else:
                if observer.strain:
                    observer.strain = max(0.0, observer.strain - FORGIVENESS)

    def _failed(self, observer: Observer, error: BaseException) -> None:
        first = observer.strain == 0.0
        observer.strain += 1
        observer.enabled = observer.strain < FAILURE_LIMIT
        if not observer.enabled:
            self.ledger.disabled.add((observer.plugin, observer.hook))
        log.warning(
            "plugin %s: observer %s raised %s: %s%s",
            observer.plugin,
            observer.hook,
            type(error).__name__,
            error,
            "" if observer.enabled else f" ({FAILURE_LIMIT} failures: it is switched off until the next start)",
            exc_info=error if first else None,
        )
