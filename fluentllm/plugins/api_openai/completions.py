"""`POST /v1/completions`: plain text, several prompts at once, echo with the prompt's own log-probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from msgspec import UNSET

from fluentllm.core.errors import InvalidRequest
from fluentllm.frontend.generation import Usage, new_id
from fluentllm.frontend.responses import Events, EventStream, json_response, unless_left

from .answers import TextChoice, TextCompletion
from .bodies import check_model, read
from .chunks import text_splicer, usage_body
from .common import check_common, head_of, services_of, wants_usage
from .handoff import handoff_of, transfer_params
from .logprobs import prompt_infos, text_logprobs
from .openapi import documented
from .schema import CompletionRequest
from .structured import named, naming, take_grammar

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from fluentllm.frontend.choices import Delta
    from fluentllm.frontend.generation import Completion, Generation, Job
    from fluentllm.frontend.services import Services

    from .answers import TextLogprobs

DEFAULT_MAX_TOKENS = 16
"""As at OpenAI."""


@documented(body=CompletionRequest, answer=TextCompletion, event=TextCompletion)
async def completions(request: Request) -> Response | EventStream[Delta]:
    services = services_of(request)
    body = await read(request, CompletionRequest)
    check_model(body.model, services)
    prompts = _prompts(body)
    check_common(body, len(prompts), services)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequest(
            f"best_of = {body.best_of} with n = {body.n or 1} is not supported: choices are not ranked.",
            fix="Leave it out.",
            param="best_of",
        )
    if body.max_tokens == 0 and not body.echo:
        raise InvalidRequest(
            "max_tokens = 0 without echo asks for nothing.", fix="Set echo, or ask for tokens.", param="max_tokens"
        )
    field = take_grammar(body)
    if body.stream:
        return EventStream(lambda: _events(body, prompts, services, field))
    with naming(field):
        return await unless_left(request.receive, _answer(body, prompts, services))


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    """Each prompt, text or ids."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(item) for item in prompt}
    if kinds == {int}:
        return [prompt]  # type: ignore[list-item]
    if len(kinds) == 1:
        return prompt  # type: ignore[return-value]
    what = "is empty" if not prompt else "mixes text, ids and lists of ids"
    raise InvalidRequest(
        f"prompt {what}.", fix="Send a string, ids, a list of strings or a list of lists of ids.", param="prompt"
    )


async def _job(body: CompletionRequest, prompts: list[str | list[int]], services: Services) -> Job:
    generation, handoff = services.generation, handoff_of(body, services)
    encoded = [await generation.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    return generation.job(
        encoded,
        body,
        id=new_id("cmpl"),
        default_max_tokens=DEFAULT_MAX_TOKENS,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        handoff=handoff,
    )


class _Writer:
    """Puts the prompt before the answer where `echo` asks for it."""

    def __init__(self, body: CompletionRequest, job: Job, generation: Generation) -> None:
        self.job = job
        self.tokenizer = generation.tokenizer
        self.echoes = [generation.prompt_text(prompt) for prompt in job.prompts] if body.echo else None
        self.silent = body.max_tokens == 0

    def write(self, piece: Delta | Completion, *, first: bool) -> tuple[str, TextLogprobs | None]:
        """Text and logprobs of a piece of an answer; `first` if nothing of its choice was written before."""
        if self.silent:  # the engine generates at least one token; this one was not asked for
            piece.text, piece.tokens, piece.new_tokens, piece.finish_reason = "", [], 0, "length"
            piece.logprobs = None if piece.logprobs is None else []
        if self.echoes is None:
            return piece.text, None if piece.logprobs is None else text_logprobs(piece.logprobs, self.tokenizer)
        number = piece.index // self.job.n
        prompt_text, offsets = self.echoes[number]
        text = prompt_text + piece.text if first else piece.text
        if piece.logprobs is None:
            return text, None
        infos = [msgspec.structs.replace(info, offset=info.offset + len(prompt_text)) for info in piece.logprobs]
        if first:
            infos = prompt_infos(self.job.prompts[number], offsets, piece.prompt_logprobs) + infos
        return text, text_logprobs(infos, self.tokenizer)


async def _answer(body: CompletionRequest, prompts: list[str | list[int]], services: Services) -> Response:
    generation = services.generation
    job = await _job(body, prompts, services)
    writer = _Writer(body, job, generation)
    usage = Usage(prompt_tokens=sum(map(len, job.prompts)), speculative=generation.info.speculative)
    choices = []
    report = None
    for done in await generation.complete(job):
        report = report or done.handoff
        text, logprobs = writer.write(done, first=True)
        usage.add(done, job.n)
        choices.append(TextChoice(index=done.index, text=text, finish_reason=done.finish_reason, logprobs=logprobs))
    return json_response(
        TextCompletion(
            **msgspec.structs.asdict(head_of(job, services)),
            choices=choices,
            usage=usage_body(usage),
            kv_transfer_params=transfer_params(report) or UNSET,
        )
    )


async def _events(body: CompletionRequest, prompts: list[str | list[int]], services: Services, field: str) -> Events[Delta]:
    generation = services.generation
    job = await _job(body, prompts, services)
    writer = _Writer(body, job, generation)
    usage = Usage(prompt_tokens=sum(map(len, job.prompts)), speculative=generation.info.speculative)
    with_usage = wants_usage(body)
    choices = len(job.prompts) * job.n
    splicer = text_splicer(head_of(job, services), choices=choices, with_usage=with_usage)
    unwritten = set(range(choices))

    def encode(delta: Delta) -> bytes:
        text, logprobs = writer.write(delta, first=delta.index in unwritten)
        unwritten.discard(delta.index)
        usage.add(delta, job.n)
        if logprobs is not None and not logprobs.tokens:
            logprobs = None
        if text or logprobs is not None or delta.finish_reason is not None:
            return splicer.chunk(delta.index, text, logprobs, delta.finish_reason)
        return b""

    items = generation.stream(job)
    items = items if body.grammar is None else named(items, field)
    return Events(items, encode, lambda: splicer.end(usage if with_usage else None))
