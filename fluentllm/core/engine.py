"""The event loop: plan, launch, collect.

Up to `overlap_depth` steps are launched ahead of the one being collected; at depth 0 a step is read before the next is
planned. The path is the same at every depth, and so are the tokens: what a step needs from the one before it is already on
the device.

    submit → scheduler.add … plan → executor.launch … collect → one `Outputs` a step and connection
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from .draft_counts import DraftCounts
from .draft_length import DraftLength
from .entrance import Entrance
from .errors import FluentError, InvalidRequest
from .executor import Executor
from .grammars import GrammarStore
from .handoff import Handoffs
from .handoff_host import EngineHost, woken
from .kv.cache import KVCache
from .plugins.observers import Observers
from .prefill_budget import PrefillBudget
from .preparation import Preparation
from .protocols import EngineCall, RequestEvent, Scheduler
from .request_checks import check_request, stop_ids
from .sequence import Sequence
from .session import refusal
from .types import (
    Drafting,
    EngineStats,
    FinishReason,
    FromEngine,
    HandoffReport,
    ModelInfo,
    Outputs,
    Request,
    RequestOutput,
    SlotResult,
    StepPlan,
    StepResult,
    TokenLogprob,
)

log = logging.getLogger(__name__)

Deliver = Callable[[FromEngine], None]


class Connection:
    """One client of the engine: its requests, and where their tokens go."""

    def __init__(self, engine: Engine, deliver: Deliver) -> None:
        self._engine = engine
        self.deliver = deliver
        self.sequences: dict[str, Sequence] = {}

    def submit(self, request: Request) -> None:
        """Queue a request. Raises `ContextTooLong`, `InvalidRequest`, `QueueFull`; then nothing is kept of it."""
        self._engine.submit(self, request)

    def abort(self, ids: list[str], reason: FinishReason = "abort") -> None:
        """Stop these; no more output comes for them. Unknown ids are ignored: they may just have finished."""
        for request_id in ids:
            sequence = self.sequences.pop(request_id, None)
            if sequence is not None:
                self._engine.abort(sequence, reason)

    def close(self) -> None:
        self.abort(list(self.sequences))


class Engine:
    """One model on one executor, serving any number of connections. Everything but `launch` runs in its event loop."""

    def __init__(
        self,
        *,
        info: ModelInfo,
        scheduler: Scheduler,
        executor: Executor,
        kv: KVCache,
        overlap_depth: int,
        draft_length: DraftLength | None = None,
        prefill_budget: PrefillBudget | None = None,
        observers: Observers | None = None,
        calls: Mapping[str, EngineCall] | None = None,
        grammars: GrammarStore | None = None,
        handoffs: Handoffs | None = None,
        preparation: Preparation | None = None,
    ) -> None:
        self.info = info
        self.scheduler = scheduler
        self.executor = executor
        self.kv = kv
        self.overlap_depth = overlap_depth
        self.prefill_budget = prefill_budget
        self.draft_length = draft_length
        """None where nothing drafts."""
        watch = draft_length.watch if draft_length is not None else None
        self.draft_counts = DraftCounts(info.speculative, watch) if info.speculative is not None else None
        self.observers = observers or Observers()
        self.calls: Mapping[str, EngineCall] = calls or {}
        """What plugins offer to front ends."""
        self.grammars = grammars or GrammarStore(0, {})
        self._entrance = Entrance(self)
        self._refused: dict[str, int] = {}
        self.handoffs = handoffs
        """None where prefill and decode are both here."""
        self.preparation = preparation or Preparation(executor.prepare, 0, ())
        self._failure: Exception | None = None
        self.last_progress = time.monotonic()
        """When a step was last collected, or the loop last idled or was seen to wait for others, for the watchdog."""
        self._owners: dict[Sequence, Connection] = {}
        self._prompt_logprobs: dict[Sequence, list[TokenLogprob | None]] = {}
        self._launched: deque[tuple[StepPlan, Future[StepResult]]] = deque()
        self._wake = asyncio.Event()
        self._stopping = False
        self._steps = 0
        self._arrivals = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._generated_tokens = 0

    # ------------------------------------------------------------------------------------------------------------ requests
    def connect(self, deliver: Deliver) -> Connection:
        """`deliver` is called in the engine's loop, at most once a step, and must not block."""
        return Connection(self, deliver)

    def submit(self, connection: Connection, request: Request) -> None:
        try:
            sequence = self._admit(connection, request)
        except FluentError as error:
            self.count_refusal(error)
            raise
        self._arrivals += 1
        self._owners[sequence] = connection
        connection.sequences[request.id] = sequence
        self._observe("queued", sequence)

    def count_refusal(self, error: FluentError) -> None:
        self._refused[error.code] = self._refused.get(error.code, 0) + 1

    def _admit(self, connection: Connection, request: Request) -> Sequence:
        """Checked, and with those who will run it, or waiting for its grammar."""
        if request.id in connection.sequences:
            raise InvalidRequest(f"Request id {request.id!r} is in use.", fix="Use a new id for each request.")
        stops = stop_ids(request, self.info.spec)
        check_request(request, stops, self.info, self.kv, 2 * self.draft_length.max_k if self.draft_length is not None else 0)
        if request.handoff is not None and self.handoffs is not None:
            request = self.handoffs.prepare(request)
        sequence = Sequence(request, stops, self._arrivals)
        self._entrance.enter(sequence)
        return sequence

    def abort(self, sequence: Sequence, reason: FinishReason = "abort") -> None:
        if self._owners.pop(sequence, None) is None:
            return
        self._finish(sequence, reason)
        waited = self._entrance.leave(sequence) or (self.handoffs is not None and self.handoffs.abort(sequence))
        if not waited:
            self.scheduler.abort(sequence)
        self._wake.set()

    # ---------------------------------------------------------------------------------------------------------------- loop
    async def run(self) -> None:
        """Serve until `stop`. What a step raises ends the loop and reaches the caller: the device's state is unknown then."""
        try:
            if self.handoffs is not None:
                self.handoffs.start(EngineHost(self))
            while not self._stopping or self._launched:
                await self._turn()
        finally:
            self._launched.clear()
            self.executor.close()
            if self.handoffs is not None:
                self.handoffs.close()

    def stop(self) -> None:
        """End `run` after the steps in flight."""
        self._stopping = True
        self._wake.set()

    def wake(self) -> None:
        """Let the loop turn once more."""
        self._wake.set()

    def fail(self, error: Exception) -> None:
        """End `run` with this error."""
        self._failure = error
        self._wake.set()

    async def _turn(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self.handoffs is not None:
            self.handoffs.turn()
        plan = None if self._stopping else self.scheduler.plan(self._steps, self._drafting())
        if plan is not None:
            if self.draft_length is not None:
                self.draft_length.planned(plan)
            self.grammars.prepare(plan, self.scheduler)
            self._steps += 1
            if self.handoffs is not None and plan.prefill:
                self.handoffs.planned(plan, [self.scheduler.sequence(chunk.slot) for chunk in plan.prefill])
            self._launched.append((plan, self.executor.launch(plan)))
            self.preparation.saw(plan)
            for init in plan.admit:
                self._observe("scheduled", self.scheduler.sequence(init.slot))
        if self._launched and (plan is None or len(self._launched) > self.overlap_depth):
            launched, future = self._launched.popleft()
            result = await asyncio.wrap_future(future)
            self._collect(launched, result)
        elif plan is None:
            self._wake.clear()
            self.last_progress = time.monotonic()
            self._flush_kv_events()
            if not self.has_work:
                # A page that nobody can give back is a bug: better found now than as a server that slowly fills.
                self.kv.check_idle()
                await self.preparation.until(self._wake)
            await woken(self, self._wake)
        else:
            # Let connections in between two launches.
            await asyncio.sleep(0)

    def _drafting(self) -> Drafting:
        """A step verifies as many drafts as it leaves. If the one before left fewer, the others do not count; if more, they
        are forgotten."""
        if self.draft_length is None:
            return Drafting()
        choice = self.draft_length.choose(self.scheduler.running)
        return Drafting(choice.k, choice.drafts, choice.look)

    @property
    def has_work(self) -> bool:
        handed_over = self.handoffs.open if self.handoffs is not None else 0
        return bool(self._launched or self.scheduler.waiting or self.scheduler.running or self._entrance or handed_over)

    # ------------------------------------------------------------------------------------------------------------- collect
    def _collect(self, plan: StepPlan, result: StepResult) -> None:
        """Hand a step's tokens to their owners, and what it freed to the scheduler."""
        self.last_progress = time.monotonic()
        outputs: dict[Connection, list[RequestOutput]] = {}
        finished: list[Sequence] = []
        for slot in result.slots:
            sequence = self.scheduler.sequence(slot.slot)
            owner = self._owners.get(sequence)
            if owner is None or sequence.generation != slot.generation:
                continue
            report = None
            if self.handoffs is not None and sequence.request.handoff is not None and sequence.generated == 0 and slot.tokens:
                report = self.handoffs.drew(sequence, slot)
            try:
                output = self._advance(sequence, slot)
            except FluentError as error:
                finished.append(sequence)
                self.refuse(sequence, error)
                continue
            if output is not None:
                output.handoff = report
                outputs.setdefault(owner, []).append(output)
            if slot.finished is not None:
                finished.append(sequence)
                self._retire(sequence, slot.finished)
        self.scheduler.collected(plan, finished)
        if self.prefill_budget is not None:
            self.prefill_budget.collected(plan, result)
        if self.draft_length is not None:
            self._learn(self.draft_length, plan, result)
        for connection, batch in outputs.items():
            connection.deliver(Outputs(batch))
        self.observers.step(plan, result)
        self._flush_kv_events()

    def bring(self, sequence: Sequence, result: SlotResult, report: HandoffReport) -> None:
        """Tokens of a running request that came outside of a step. Raises `FluentError` if it cannot go on."""
        owner = self._owners[sequence]
        output = self._advance(sequence, result)
        if result.finished is not None:
            self._retire(sequence, result.finished)
        if output is not None:
            output.handoff = report
            owner.deliver(Outputs([output]))

    def resume(self, sequence: Sequence) -> None:
        """The KV of its prompt is in its pages: let it decode."""
        self.scheduler.resume(sequence)

    def refuse(self, sequence: Sequence, error: FluentError) -> None:
        """End a request that is not in the scheduler's hands, or just taken out of them, with an error."""
        owner = self._owners[sequence]
        # What a client should not have asked for is no failure of the engine's.
        self._retire(sequence, "error", told="refused" if error.status < 500 else "error")
        owner.deliver(refusal(sequence.request.id, error))

    def _retire(self, sequence: Sequence, reason: FinishReason, told: str | None = None) -> None:
        owner = self._owners.pop(sequence)
        del owner.sequences[sequence.request.id]
        self._finish(sequence, reason, told)

    def _learn(self, draft_length: DraftLength, plan: StepPlan, result: StepResult) -> None:
        """From a step with speculation on. What the proposer's failure left undone, the target has done already."""
        draft_length.collected(plan, result)
        counts = self.draft_counts
        if counts is not None:
            for slot in result.slots:
                counts.add(slot)
        if result.drafting_error is not None and not draft_length.stopped:
            draft_length.stop()
            self.preparation.start_over([Drafting()])  # all that was captured has gone with the proposer
            if counts is not None:
                counts.error = result.drafting_error

    def _advance(self, sequence: Sequence, slot: SlotResult) -> RequestOutput | None:
        """Append what a slot brought to its sequence; None while there is nothing to tell. Raises `FluentError` where its
        grammar's matcher fails."""
        if slot.prompt_logprobs is not None:
            self._prompt_logprobs.setdefault(sequence, [None]).extend(slot.prompt_logprobs)
        if not slot.tokens:
            return None
        if slot.finished is None:
            self.grammars.matchers.advance(sequence, slot.tokens, slot.drafts)
        first = sequence.generated == 0
        sequence.tokens.extend(slot.tokens)
        self._generated_tokens += len(slot.tokens)
        output = RequestOutput(
            id=sequence.request.id,
            tokens=slot.tokens,
            logprobs=slot.logprobs,
            finish_reason=slot.finished,
            stop_token=slot.tokens[-1] if slot.finished == "stop" else None,
            drafted=slot.drafted,
            accepted=slot.accepted,
        )
        if first:
            output.cached_tokens = sequence.cached_tokens
            self._prompt_tokens += sequence.prompt_length
            self._cached_tokens += sequence.cached_tokens
            if sequence.request.params.prompt_logprobs is not None:
                output.prompt_logprobs = self._prompt_logprobs.pop(sequence, [None])
            self._observe("first_token", sequence)
        return output

    def _finish(self, sequence: Sequence, reason: FinishReason, told: str | None = None) -> None:
        """`told`: the reason for observers, if it is another."""
        sequence.finish_reason = reason
        self._prompt_logprobs.pop(sequence, None)
        self.grammars.end(sequence)
        self._observe(
            "finished",
            sequence,
            reason=told or reason,
            prompt_tokens=sequence.prompt_length,
            cached_tokens=sequence.cached_tokens,
            generated_tokens=sequence.generated,
        )

    # ------------------------------------------------------------------------------------------------------------- control
    def stats(self) -> EngineStats:
        return EngineStats(
            waiting=self.scheduler.waiting + len(self._entrance),
            running=self.scheduler.running,
            pages_total=self.kv.pages_total,
            pages_free=self.kv.pages_free,
            pages_cached=self.kv.pages_cached,
            pages_leased=self.kv.pages_leased,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=self.scheduler.preemptions,
            refused=dict(self._refused),
            plugins=self.observers.ledger.report(),
            speculative=self.draft_counts.stats() if self.draft_counts is not None else None,
            handoff=dict(self.handoffs.stats()) if self.handoffs is not None else {},
        )

    def clear_cache(self) -> None:
        """Forget the prefix cache; pages that requests hold stay theirs."""
        self.kv.clear()

    def _observe(self, kind: Any, sequence: Sequence, **details: Any) -> None:
        self.observers.request(RequestEvent(kind, sequence.request.id, time.monotonic(), details))

    def _flush_kv_events(self) -> None:
        if events := self.kv.take_events():
            self.observers.kv_events(events)
