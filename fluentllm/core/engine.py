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
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from .draft_counts import DraftCounts
from .draft_length import DraftLength
from .errors import ContextTooLong, InvalidRequest
from .executor import Executor
from .kv.cache import KVCache
from .plugins.observers import Observers
from .protocols import RequestEvent, Scheduler
from .sequence import Phase, Sequence
from .types import (
    MAX_STOP_IDS,
    Drafting,
    EngineStats,
    FinishReason,
    FromEngine,
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
        observers: Observers | None = None,
    ) -> None:
        self.info = info
        self.scheduler = scheduler
        self.executor = executor
        self.kv = kv
        self.overlap_depth = overlap_depth
        self.draft_length = draft_length
        """None where nothing drafts."""
        self.draft_counts = DraftCounts(info.speculative) if info.speculative is not None else None
        self._left_drafts = 0
        """Drafts that the last launched step leaves for the next to verify."""
        self.observers = observers or Observers()
        self.last_progress = time.monotonic()
        """When a step was last collected or the loop last idled, for the watchdog."""
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
        self._check(connection, request)
        sequence = Sequence(request, self._stop_ids(request), self._arrivals)
        self.scheduler.add(sequence)
        self._arrivals += 1
        self._owners[sequence] = connection
        connection.sequences[request.id] = sequence
        self._observe("queued", sequence)
        self._wake.set()

    def abort(self, sequence: Sequence, reason: FinishReason = "abort") -> None:
        if self._owners.pop(sequence, None) is None:
            return
        self._prompt_logprobs.pop(sequence, None)
        self._finish(sequence, reason)
        self.scheduler.abort(sequence)
        self._wake.set()

    def _check(self, connection: Connection, request: Request) -> None:
        """What the front end checks for its users is checked again here: nothing else guards the device."""
        length, limit = len(request.prompt), self.info.max_model_len
        if request.id in connection.sequences:
            raise InvalidRequest(f"Request id {request.id!r} is in use.", fix="Use a new id for each request.")
        if length == 0:
            raise InvalidRequest("The prompt is empty.", fix="Send at least one token.", param="prompt")
        if length + request.params.max_tokens > limit:
            raise ContextTooLong(
                f"{length} prompt tokens and {request.params.max_tokens} new ones exceed the context of {limit} tokens.",
                fix="Shorten the prompt or lower max_tokens.",
                param="max_tokens" if length < limit else "prompt",
            )
        drafts = 2 * self.draft_length.max_k if self.draft_length is not None else 0
        if not self.kv.can_ever_fit(length + request.params.max_tokens + drafts):
            raise ContextTooLong(
                f"{length + request.params.max_tokens} tokens exceed the KV pool of {self.info.kv_tokens} tokens.",
                fix="Lower max_tokens, or start the server with a larger kv.memory.",
            )
        bad = next((t for t in request.prompt if not 0 <= t < self.info.spec.vocab_size), None)
        if bad is not None:
            vocab = self.info.spec.vocab_size
            raise InvalidRequest(f"Token id {bad} is outside the vocabulary.", fix=f"Ids are 0 … {vocab - 1}.", param="prompt")
        if len(self._stop_ids(request)) > MAX_STOP_IDS:
            raise InvalidRequest("Too many stop token ids.", fix=f"Send at most {MAX_STOP_IDS}.", param="stop_token_ids")

    def _stop_ids(self, request: Request) -> list[int]:
        ids = set(request.params.stop_token_ids)
        if not request.params.ignore_eos:
            ids.update(self.info.spec.eos_token_ids)
        return sorted(ids)

    # ---------------------------------------------------------------------------------------------------------------- loop
    async def run(self) -> None:
        """Serve until `stop`. What a step raises ends the loop and reaches the caller: the device's state is unknown then."""
        try:
            while not self._stopping or self._launched:
                await self._turn()
        finally:
            self._launched.clear()
            self.executor.close()

    def stop(self) -> None:
        """End `run` after the steps in flight."""
        self._stopping = True
        self._wake.set()

    async def _turn(self) -> None:
        plan = None if self._stopping else self.scheduler.plan(self._steps, self._drafting())
        if plan is not None:
            self._left_drafts = plan.drafting.draft
            self._steps += 1
            self._launched.append((plan, self.executor.launch(plan)))
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
            await self._wake.wait()
        else:
            # Let connections in between two launches.
            await asyncio.sleep(0)

    def _drafting(self) -> Drafting:
        """Launches chain: what a step drafts is what the next verifies."""
        if self.draft_length is None:
            return Drafting()
        return Drafting(self._left_drafts, self.draft_length.choose(self.scheduler.running))

    @property
    def has_work(self) -> bool:
        return bool(self._launched or self.scheduler.waiting or self.scheduler.running)

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
            output = self._advance(sequence, slot)
            if output is not None:
                outputs.setdefault(owner, []).append(output)
            if slot.finished is not None:
                finished.append(sequence)
                del self._owners[sequence], owner.sequences[sequence.request.id]
                self._finish(sequence, slot.finished)
        self.scheduler.collected(plan, finished)
        if self.draft_length is not None:
            self._learn(self.draft_length, plan, result)
        for connection, batch in outputs.items():
            connection.deliver(Outputs(batch))
        self.observers.step(plan, result)
        self._flush_kv_events()

    def _learn(self, draft_length: DraftLength, plan: StepPlan, result: StepResult) -> None:
        """From a step with speculation on. What the proposer's failure left undone, the target has done already."""
        draft_length.collected(plan, result)
        counts = self.draft_counts
        if counts is not None:
            for slot in result.slots:
                counts.add(slot)
        if result.drafting_error is not None:
            draft_length.stop()
            if counts is not None:
                counts.error = result.drafting_error

    def _advance(self, sequence: Sequence, slot: SlotResult) -> RequestOutput | None:
        """Append what a slot brought to its sequence; None while there is nothing to tell."""
        if slot.prompt_logprobs is not None:
            self._prompt_logprobs.setdefault(sequence, [None]).extend(slot.prompt_logprobs)
        if not slot.tokens:
            return None
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

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.phase = Phase.FINISHED
        sequence.finish_reason = reason
        self._observe(
            "finished",
            sequence,
            reason=reason,
            prompt_tokens=sequence.prompt_length,
            cached_tokens=sequence.cached_tokens,
            generated_tokens=sequence.generated,
        )

    # ------------------------------------------------------------------------------------------------------------- control
    def stats(self) -> EngineStats:
        return EngineStats(
            waiting=self.scheduler.waiting,
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
            plugins=self.observers.ledger.report(),
            speculative=self.draft_counts.stats() if self.draft_counts is not None else None,
        )

    def clear_cache(self) -> None:
        """Forget the prefix cache; pages that requests hold stay theirs."""
        self.kv.clear()

    def _observe(self, kind: Any, sequence: Sequence, **details: Any) -> None:
        self.observers.request(RequestEvent(kind, sequence.request.id, time.monotonic(), details))

    def _flush_kv_events(self) -> None:
        events = self.kv.take_events()
        if events:
            self.observers.kv_events(events)
