"""Text in, text out, on top of an engine client: what the API, `LLM` and `fluent run|chat` have in common.

    prompt = await generation.encode("Once upon a time")
    job = generation.job([prompt], SamplingOptions(max_tokens=20, stop="."))
    async with aclosing(generation.stream(job)) as deltas:
        async for delta in deltas: ...

Leaving a stream early, by an error, a cancellation or a stop string, aborts what still runs of its job.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from msgspec import Struct

from ..core.errors import ContextTooLong, EngineDied, EngineUnavailable, InvalidRequest
from ..core.types import Handoff, HandoffReport, Request, SamplingParams, SpeculativeInfo
from .choices import Choice, Delta, Ending, TokenInfo, Verified
from .detokenizer import Detokenizer
from .merge import merge
from .sampling import SamplingOptions, check_ids, choice_seed, context_limit, sampling_params

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

    from ..core.types import ModelInfo, TokenLogprob
    from .client import EngineClient
    from .templates import ChatTemplate
    from .tokenizer import Tokenizer


T = TypeVar("T")

SHORT = 400
"""Characters (or tokens) that are worked on in the event loop."""
SLOW = 0.02
"""CPU seconds of a short text's work that send all later texts to the pool."""


class Job(Struct, kw_only=True):
    """Prompts to continue, `n` times each, all with the same options."""

    id: str
    prompts: list[list[int]]
    params: list[SamplingParams]
    """One a prompt."""
    n: int = 1
    stop: tuple[str, ...] = ()
    priority: int = 0
    keep: frozenset[int] = frozenset()
    """Special tokens that are part of the text."""
    handoff: Handoff | None = None
    """Set where prompts are computed on one engine and continued on another; each choice's has a number of its own."""


class Completion(Struct, kw_only=True):
    """A finished choice."""

    index: int
    """Prompt number × n + choice number."""
    text: str
    tokens: list[int]
    finish_reason: Ending
    stop: str | int | None = None
    logprobs: list[TokenInfo] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    new_tokens: int = 0
    cached_tokens: int = 0
    drafts: Verified = {}
    """Of all its steps that had drafts."""
    handoff: HandoffReport | None = None
    synthetic: str | None = None
    """Set where drafts are accepted at random, for a benchmark: the text means nothing (`ModelInfo.synthetic`)."""

    @property
    def drafted(self) -> int:
        """Drafts that were verified."""
        return sum(drafted * steps for (drafted, _), steps in self.drafts.items())

    @property
    def accepted(self) -> int:
        """Drafts that became tokens of the answer."""
        return sum(accepted * steps for (_, accepted), steps in self.drafts.items())


def add_drafts(to: Verified, more: Verified) -> None:
    for key, steps in more.items():
        to[key] = to.get(key, 0) + steps


class Usage(Struct):
    """Tokens of one job. A prompt counts once, however many choices continue it."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    drafts: Verified = {}
    speculative: SpeculativeInfo | None = None
    """Who drafts, if anything does."""
    received_bytes: int = 0
    """KV that came from the engine that computed the prompts."""
    saved_bytes: int = 0
    """KV that did not have to."""

    def add(self, delta: Delta | Completion, n: int) -> None:
        self.completion_tokens += delta.new_tokens
        if delta.drafts:
            add_drafts(self.drafts, delta.drafts)
        if delta.handoff is not None:
            self.received_bytes += delta.handoff.received_bytes
            self.saved_bytes += delta.handoff.saved_bytes
        if delta.cached_tokens and delta.index % n == 0:
            self.cached_tokens += delta.cached_tokens


def new_id(prefix: str) -> str:
    """A request id that no other request has: `chatcmpl-3f2a…`."""
    return f"{prefix}-{uuid.uuid4().hex}"


class Generation:
    """A front end's way to its engine. Used in one event loop."""

    def __init__(self, client: EngineClient, tokenizer: Tokenizer, template: ChatTemplate | None, *, threads: int = 2) -> None:
        """`threads`: of the pool that renders and tokenizes."""
        self.client = client
        self.tokenizer = tokenizer
        self.template = template
        self._slow = False
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tokenizer")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def info(self) -> ModelInfo:
        """Raises `EngineUnavailable` before the engine was first ready."""
        info = self.client.info
        if info is None:
            raise EngineUnavailable(
                f"The engine is {self.client.state}.", fix="Try again in a moment; /health says when it is ready."
            )
        return info

    # ------------------------------------------------------------------------------------------------------------- prompts
    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of plain text. Raises `ContextTooLong` without reading a text that cannot fit, `InvalidRequest`."""
        return await self._off_loop(len(text), self._encode, text, add_special_tokens)

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Ids of the rendered chat. `variables` of the template; `tools` that the answer may call. Raises `InvalidRequest` if
        the model has no template or it refuses the messages."""
        if self.template is None:
            raise InvalidRequest(
                "The model has no chat template.", fix="Use /v1/completions, or name a template with model.chat_template."
            )
        render = partial(
            self.template.render, messages, add_generation_prompt=add_generation_prompt, variables=variables, tools=tools
        )
        size = sum(len(message.get("content") or "") for message in messages) + (SHORT * len(tools) if tools else 0)
        return await self._off_loop(size, lambda: self._encode(render(), False, "messages"))

    async def decode(self, tokens: Sequence[int]) -> str:
        """Text of a whole sequence, special tokens spelt out. Raises `InvalidRequest` for ids outside the vocabulary."""
        check_ids(tokens, self.info.spec.vocab_size, "tokens")
        return await self._off_loop(len(tokens), lambda: self.tokenizer.decode(tokens, skip_special_tokens=False))

    def prompt_text(self, prompt: Sequence[int]) -> tuple[str, list[int]]:
        """Text of a prompt, special tokens but a leading bos spelt out, and the offset of each token in it."""
        detokenizer = Detokenizer(self.tokenizer, skip_special_tokens=False)
        pieces: list[str] = []
        offsets: list[int] = []
        seen = 0
        for position, token in enumerate(prompt):
            offsets.append(seen)
            if position == 0 and token == self.tokenizer.bos_id:
                continue
            piece = detokenizer.push(token)
            if self.tokenizer.trims_first_space and not pieces:
                piece = piece.removeprefix(" ")
            pieces.append(piece)
            seen += len(piece)
        pieces.append(detokenizer.flush())
        return "".join(pieces), offsets

    def _encode(self, text: str, add_special_tokens: bool, field: str = "prompt") -> list[int]:
        limit, why = context_limit(self.info)
        least = self.tokenizer.least_tokens(text)
        if least > limit:
            raise ContextTooLong(
                f"The prompt has {len(text)} characters, at least {least} tokens, but {why}.",
                fix=f"Shorten the prompt to at most {limit - 1} tokens.",
                param=field,
            )
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    async def _off_loop(self, size: int, call: Callable[..., T], *args: Any) -> T:
        """Run in the pool; but a short text takes less time than the way there and back, unless a template is slow."""
        if size > SHORT or self._slow:
            return await asyncio.get_running_loop().run_in_executor(self._pool, call, *args)
        started = time.thread_time()
        try:
            return call(*args)
        finally:
            self._slow = time.thread_time() - started > SLOW

    # ---------------------------------------------------------------------------------------------------------- generation
    def job(
        self,
        prompts: Sequence[list[int]],
        options: SamplingOptions,
        *,
        id: str | None = None,
        default_max_tokens: int | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        keep: frozenset[int] = frozenset(),
        handoff: Handoff | None = None,
        field: str = "prompt",
    ) -> Job:
        """Check everything that can be checked before the engine sees it.

        `default_max_tokens` holds where the options have no max_tokens; None means what is left of the context. `keep`: special
        tokens that are part of the text. `field`: what the caller calls the prompt, for errors. Raises `InvalidRequest`,
        `ContextTooLong`, `EngineUnavailable`.
        """
        info = self.info
        params = []
        for prompt in prompts:
            check_ids(prompt, info.spec.vocab_size, field)
            params.append(
                sampling_params(
                    options,
                    len(prompt),
                    info,
                    self.tokenizer,
                    default_max_tokens=default_max_tokens,
                    logprobs=logprobs,
                    prompt_logprobs=prompt_logprobs,
                    field=field,
                )
            )
        return Job(
            id=id or new_id("req"),
            prompts=list(prompts),
            params=params,
            n=options.n or 1,
            stop=options.stop_strings(),
            priority=options.priority or 0,
            keep=keep,
            handoff=handoff,
        )

    def stream(self, job: Job) -> AsyncGenerator[Delta, None]:
        """Deltas of all choices as they come. Close it (`contextlib.aclosing`) if you leave early.

        Raises what the engine refuses or ends a choice with (`QueueFull`, `EngineDied` …); the other choices are aborted.
        """
        choices = [self._choice(job, index) for index in range(len(job.prompts) * job.n)]
        return choices[0] if len(choices) == 1 else merge(choices)

    def stream_parts(self, job: Job) -> tuple[AsyncGenerator[Any, None], Callable[[Any], str | None], Callable[[Any], Delta]]:
        """`stream` in parts, for the server, which does this for every step and stream: items; what gives an item's text if
        text is all that it brings a job of one choice, else None; what then makes a delta of it. Where the engine's outputs
        need no looking after, they are the items themselves."""
        if len(job.prompts) * job.n == 1 and not job.stop:
            request, choice = self._begin(job, 0)
            return self.client.submit(request), choice.text, choice.take
        return self.stream(job), _more_than_text, _itself

    async def complete(self, job: Job) -> list[Completion]:
        """All choices, finished, in order."""
        count, mark = len(job.prompts) * job.n, self.info.synthetic
        results = [Completion(index=i, text="", tokens=[], finish_reason="length", synthetic=mark) for i in range(count)]
        pieces: list[list[str]] = [[] for _ in results]
        async with aclosing(self.stream(job)) as deltas:
            async for delta in deltas:
                result = results[delta.index]
                pieces[delta.index].append(delta.text)
                result.tokens += delta.tokens
                result.new_tokens += delta.new_tokens
                result.cached_tokens += delta.cached_tokens
                if delta.drafts:
                    add_drafts(result.drafts, delta.drafts)
                result.handoff = result.handoff or delta.handoff
                if delta.logprobs is not None:
                    result.logprobs = (result.logprobs or []) + delta.logprobs
                if delta.prompt_logprobs is not None:
                    result.prompt_logprobs = delta.prompt_logprobs
                if delta.finish_reason is not None:
                    result.finish_reason, result.stop = delta.finish_reason, delta.stop
        for result, text in zip(results, pieces, strict=True):
            result.text = "".join(text)
        return results

    def _begin(self, job: Job, index: int) -> tuple[Request, Choice]:
        number, which = divmod(index, job.n)
        params = job.params[number]
        if which:
            params = msgspec.structs.replace(params, seed=choice_seed(params.seed, which))
        choice = Choice(
            index,
            self.tokenizer,
            job.stop,
            min_tokens=params.min_tokens,
            logprobs=params.logprobs is not None,
            keep=job.keep,
        )
        handoff = job.handoff and msgspec.structs.replace(job.handoff, id=f"{job.handoff.id}/{index}")
        request = Request(
            id=f"{job.id}-{index}", prompt=job.prompts[number], params=params, priority=job.priority, handoff=handoff
        )
        return request, choice

    async def _choice(self, job: Job, index: int) -> AsyncGenerator[Delta, None]:
        request, choice = self._begin(job, index)
        async with aclosing(self.client.submit(request)) as outputs:
            async for output in outputs:
                delta = choice.take(output)
                if delta.finish_reason is not None and output.finish_reason is None:
                    self.client.complete(request.id)  # a stop string, which the engine knows nothing of
                yield delta
                if delta.finish_reason is not None:
                    return
        raise EngineDied("The engine ended the request without a reason.", fix="Send it again.")


def _more_than_text(delta: Delta) -> None:
    return None


def _itself(delta: Delta) -> Delta:
    return delta
