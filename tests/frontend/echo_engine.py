"""A plain test double of the engine client, for what a real engine cannot be made to do on demand.

It answers with a text given beforehand, in steps of given sizes, or with an error where told to; so tests can put token
borders, stop strings and failures where they want them. What sampling, caching or aborting *do* is tested on a real engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fluentllm.core.errors import EngineUnavailable, FluentError
from fluentllm.core.types import EngineStats, KVSpec, ModelInfo, ModelSpec, Request, RequestOutput, TokenLogprob


def model_info(vocab_size: int, max_model_len: int = 256, eos: tuple[int, ...] = ()) -> ModelInfo:
    kv = KVSpec(kind="gqa", layers=1, heads=1, head_dim=8, v_head_dim=8)
    spec = ModelSpec(
        architecture="EchoForCausalLM",
        vocab_size=vocab_size,
        hidden_size=8,
        layers=1,
        heads=1,
        max_position=max_model_len,
        kv=kv,
        eos_token_ids=eos,
    )
    return ModelInfo(
        name="echo",
        spec=spec,
        max_model_len=max_model_len,
        device="cpu",
        dtype="float32",
        memory={},
        kv_tokens=4096,
        page_size=16,
        slots=8,
    )


class EchoEngine:
    """`reply`: the tokens of every answer; then `eos`, or what `max_tokens` cuts off. `steps`: tokens of each step,
    the last one repeating. `fail_after` tokens it raises `failure`."""

    def __init__(self, info: ModelInfo | None, reply: Sequence[int] = (), *, eos: int | None = None) -> None:
        self.info = info
        self.state: Any = "starting" if info is None else "ready"
        self.reply = list(reply)
        self.eos = eos
        self.steps: Sequence[int] = (1,)
        self.pause = 0.0
        self.cached_tokens = 0
        self.failure: FluentError | None = None
        self.fail_after = 0
        self.requests: list[Request] = []
        self.running: set[str] = set()
        self.aborted: list[str] = []
        self.completed: list[str] = []

    async def submit(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        if self.state != "ready":
            raise EngineUnavailable(f"The engine is {self.state}.")
        self.requests.append(request)
        self.running.add(request.id)
        finished = False
        try:
            async for output in self._outputs(request):
                finished = output.finish_reason is not None
                yield output
        finally:
            self.running.discard(request.id)
            if not finished and self.failure is None and request.id not in self.completed:
                self.aborted.append(request.id)

    async def _outputs(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        params = request.params
        tokens = self.reply + ([] if self.eos is None or params.ignore_eos else [self.eos])
        while len(tokens) < params.max_tokens and tokens[-1:] != [self.eos]:
            tokens = tokens + (self.reply or [0])
        tokens = tokens[: params.max_tokens]
        ends = tokens[-1] == self.eos and not params.ignore_eos
        done = step = 0
        while done < len(tokens):
            await asyncio.sleep(self.pause)
            if self.failure is not None and done >= self.fail_after:
                raise self.failure
            size = self.steps[min(step, len(self.steps) - 1)]
            part = tokens[done : done + size]
            last = done + size >= len(tokens)
            reason = None if not last else "stop" if ends else "length"
            yield RequestOutput(
                id=request.id,
                tokens=part,
                logprobs=None if params.logprobs is None else [self._logprob(t, params.logprobs) for t in part],
                prompt_logprobs=self._prompt_logprobs(request) if done == 0 else None,
                finish_reason=reason,
                stop_token=self.eos if reason == "stop" else None,
                cached_tokens=self.cached_tokens,
            )
            done += size
            step += 1

    def _prompt_logprobs(self, request: Request) -> list[TokenLogprob | None] | None:
        wanted = request.params.prompt_logprobs
        if wanted is None:
            return None
        return [None, *(self._logprob(token, wanted) for token in request.prompt[1:])]

    def _logprob(self, token: int, top: int) -> TokenLogprob:
        assert self.info is not None
        ranked = [((token + i) % self.info.spec.vocab_size, -0.5 - i) for i in range(top)]
        return TokenLogprob(token, -0.5, 1, ranked)

    def complete(self, request_id: str) -> None:
        self.completed.append(request_id)

    async def stats(self) -> EngineStats:
        return EngineStats(
            waiting=0, running=len(self.running), pages_total=0, pages_free=0, pages_cached=0, pages_leased=0, steps=0,
            prompt_tokens=0, cached_tokens=0, generated_tokens=0, preemptions=0,
        )  # fmt: skip

    async def clear_cache(self) -> None:
        return None
