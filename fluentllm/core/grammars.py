"""Grammars that are device tables: (state, token) → state. They stay in the step program, at every overlap depth.

A plugin compiles a request's grammar to a `GrammarTable` on the host; the store gives it rows of one table on the device, which
all grammars share (`SlotTables.grammar_next`), and puts what is to be written there into the next plan. A slot keeps its row;
row 0 allows everything and leads to itself, for requests without a grammar. A grammar that is no table has a matcher on the
host instead (`core.host_grammars`).

Rows are reused only by a later plan, whose writes come after the steps launched before it on their stream.
"""

from __future__ import annotations

import logging
from array import array
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from msgspec import structs

from .errors import FluentError, InvalidRequest, PluginError, QueueFull
from .host_grammars import HostMatchers
from .types import GrammarLoad

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence as SequenceOf

    from .protocols import GrammarCompiler, HostGrammar, Scheduler
    from .sequence import Sequence
    from .types import GrammarSpec, StepPlan

log = logging.getLogger(__name__)

FORBIDDEN = -1
HOST_GRAMMARS = 64
"""Compiled grammars that are no tables: how many are kept."""


@dataclass(frozen=True, slots=True)
class GrammarTable:
    """A deterministic automaton over token ids. Ends are part of it: a state in which the text may end allows the model's
    end-of-sequence ids."""

    start: int
    states: int
    next: bytes
    """int32 [states, vocab] in the machine's byte order: the state after each token, or `FORBIDDEN`."""

    @classmethod
    def of(cls, rows: SequenceOf[Mapping[int, int]], vocab_size: int, start: int = 0) -> GrammarTable:
        """`rows`: for each state, token → state. Raises `InvalidRequest` for a state that allows nothing: a text could not go
        on from there, nor end."""
        table = array("i", [FORBIDDEN]) * (len(rows) * vocab_size)
        for state, row in enumerate(rows):
            if not row:
                raise InvalidRequest(f"State {state} of the grammar allows no token.", param="grammar")
            for token, after in row.items():
                if not (0 <= token < vocab_size and 0 <= after < len(rows)):
                    raise InvalidRequest(f"The grammar leads from state {state} by token {token} to {after}.", param="grammar")
                table[state * vocab_size + token] = after
        return cls(start, len(rows), table.tobytes())

    def fault(self, vocab_size: int) -> str | None:
        """What is wrong with it, if anything: it goes to the device, where nobody looks any more."""
        import numpy as np

        if self.states < 1 or len(self.next) != 4 * self.states * vocab_size:
            return f"its table has {len(self.next)} bytes; {self.states} states × {vocab_size} tokens are 4 bytes each"
        if not 0 <= self.start < self.states:
            return f"its start is state {self.start} of {self.states}"
        rows = np.frombuffer(self.next, np.int32).reshape(self.states, vocab_size)
        highest = rows.max(1, initial=FORBIDDEN)
        if highest.max() >= self.states:
            return f"it leads to state {highest.max()} of {self.states}"
        if vocab_size and highest.min() < 0:
            return f"its state {highest.argmin()} allows no token"
        return None

    def after(self, tokens: Iterable[int]) -> int:
        """The state after these tokens, all of which it allows."""
        table = memoryview(self.next).cast("i")
        vocab, state = len(table) // self.states, self.start
        for token in tokens:
            state = table[state * vocab + token]
        return state


@dataclass(slots=True)
class _Held:
    table: GrammarTable
    first: int
    """Its first row on the device."""
    users: int = 0


class GrammarStore:
    """Compiles, and hands out rows 1 … `states`. What nobody uses stays until its rows are needed."""

    def __init__(
        self,
        states: int,
        compilers: Mapping[str, Callable[[], GrammarCompiler]],
        vocab_size: int = 0,
        why_not: Mapping[str, str] | None = None,
    ) -> None:
        """`compilers`: kind → makes its compiler, once it is needed. `why_not`: of kinds whose plugins are here and cannot
        compile them, the reason."""
        self.states = states
        self.matchers = HostMatchers(vocab_size)
        self._vocab_size = vocab_size
        self._makers = compilers
        self._why_not = why_not or {}
        self._compilers: dict[str, GrammarCompiler] = {}
        self._held: dict[GrammarSpec, _Held] = {}
        """The least recently used first."""
        self._loads: list[GrammarLoad] = []
        self._host: dict[GrammarSpec, HostGrammar] = {}
        """The least recently used first."""
        self._compiling: dict[GrammarSpec, Future[GrammarTable | HostGrammar]] = {}
        self._in_tables: set[Sequence] = set()
        """Those that count among the users of a table."""

    @property
    def offered(self) -> bool:
        """May requests have grammars?"""
        return bool(self._makers)

    def begin(self, sequence: Sequence) -> Future[GrammarTable | HostGrammar] | None:
        """For a request that enters. If its grammar is being compiled elsewhere, the future of that: it has not entered, and
        is to come again once that is done. Raises `InvalidRequest` for a grammar that cannot be had, `QueueFull` without room,
        `PluginError` for a compiler or matcher that fails."""
        spec = sequence.request.params.grammar
        if spec is None:
            return None
        held, on_host = self._held.pop(spec, None), self._host.pop(spec, None)
        if held is None and on_host is None:
            compiled = self._compile(spec)
            if isinstance(compiled, Future):
                return compiled
            if isinstance(compiled, GrammarTable):
                held = self._load(spec, compiled)
            else:
                on_host = compiled
        if held is not None:
            held.users += 1
            self._held[spec] = held
            self._in_tables.add(sequence)
        elif on_host is not None:
            self.matchers.begin(sequence, spec.kind, on_host)
            self._host[spec] = on_host
            if len(self._host) > HOST_GRAMMARS:
                del self._host[next(iter(self._host))]
        return None

    def end(self, sequence: Sequence) -> None:
        """The request needs it no more, if it ever had one."""
        spec = sequence.request.params.grammar
        if sequence.on_host:
            self.matchers.end(sequence)
        elif spec is not None and sequence in self._in_tables:
            self._in_tables.remove(sequence)
            self._held[spec].users -= 1

    def prepare(self, plan: StepPlan, scheduler: Scheduler) -> None:
        """Give a plan the tables that were made since the last, states for the slots it fills, and masks of host matchers."""
        plan.grammars.extend(self._loads)
        self._loads = []
        for number, init in enumerate(plan.admit):
            spec = init.params.grammar
            if spec is not None and spec in self._held:
                plan.admit[number] = structs.replace(init, grammar_state=self._state(spec, scheduler.sequence(init.slot)))
        self.matchers.prepare(plan, scheduler)

    def _state(self, spec: GrammarSpec, sequence: Sequence) -> int:
        held = self._held[spec]
        return held.first + held.table.after(sequence.tokens[sequence.prompt_length :])

    def _compile(self, spec: GrammarSpec) -> GrammarTable | HostGrammar | Future[GrammarTable | HostGrammar]:
        maker = self._makers.get(spec.kind)
        if maker is None and spec.kind in self._why_not:
            raise InvalidRequest(
                f"Grammars of the kind {spec.kind!r} are not available on this server: {self._why_not[spec.kind]}.",
                fix="Leave grammar out, or ask whoever runs the server.",
                param="grammar",
            )
        if maker is None:
            known = ", ".join(sorted(self._makers)) or "none"
            raise InvalidRequest(
                f"No plugin here knows grammars of the kind {spec.kind!r}; known: {known}.",
                fix="Leave grammar out, or install a plugin for it.",
                param="grammar",
            )
        failure: Exception | None = None
        try:
            if spec.kind not in self._compilers:
                self._compilers[spec.kind] = maker()
            compiled = self._compiling.get(spec) or self._compilers[spec.kind].compile(spec.source)
            if isinstance(compiled, Future):
                if not compiled.done():
                    self._remember(spec, compiled)
                    return compiled
                compiled = compiled.result()
                self._compiling.pop(spec, None)
            wrong = self._fault(compiled)
        except FluentError:
            raise
        except Exception as error:
            failure, wrong = error, f"{type(error).__name__}: {error}"
        if wrong is not None:
            log.warning("the compiler of grammars of kind %r failed: %s", spec.kind, wrong, exc_info=failure)
            raise PluginError(f"The compiler of grammars of kind {spec.kind!r} failed: {wrong}.", param="grammar")
        if isinstance(compiled, GrammarTable) and compiled.states > self.states:
            raise InvalidRequest(
                f"The grammar needs {compiled.states} states, and the table on the device has {self.states}.",
                fix="Simplify it, or start the server with a larger grammar.states.",
                param="grammar",
            )
        return compiled

    def _remember(self, spec: GrammarSpec, compiling: Future[GrammarTable | HostGrammar]) -> None:
        """Those that failed stay too, so that each of the requests that wait for one is told; not for ever."""
        self._compiling[spec] = compiling
        if len(self._compiling) > HOST_GRAMMARS:
            done = next((other for other, future in self._compiling.items() if future.done()), None)
            if done is not None:
                del self._compiling[done]

    def _fault(self, compiled: object) -> str | None:
        if isinstance(compiled, GrammarTable):
            return compiled.fault(self._vocab_size)
        return None if hasattr(compiled, "matcher") else f"it returned {compiled!r}, neither a GrammarTable nor a HostGrammar"

    def _load(self, spec: GrammarSpec, table: GrammarTable) -> _Held:
        first = self._gap(table.states)
        while first is None:
            unused = next((other for other, held in self._held.items() if not held.users), None)
            if unused is None:
                raise QueueFull(
                    "The grammars of running requests fill the table on the device.",
                    fix="Try again later, or start the server with a larger grammar.states.",
                )
            del self._held[unused]
            first = self._gap(table.states)
        self._loads.append(GrammarLoad(first, table.states, table.next))
        return _Held(table, first)

    def _gap(self, states: int) -> int | None:
        """First row of the first gap that is wide enough."""
        first = 1
        for held in sorted(self._held.values(), key=lambda held: held.first):
            if held.first - first >= states:
                break
            first = held.first + held.table.states
        return first if first + states <= self.states + 1 else None
