"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import UNSET

from fluentllm.core.errors import InvalidRequest
from fluentllm.frontend.generation import Usage, new_id
from fluentllm.frontend.responses import Events, EventStream, json_response, unless_left

from .answers import AnswerMessage, ChatChoice, ChatChunk, ChatCompletion
from .bodies import check_model, read
from .chunks import chat_splicer, usage_body
from .common import check_common, services_of, wants_usage
from .handoff import handoff_of, transfer_params
from .logprobs import chat_logprobs
from .messages import to_template
from .openapi import documented
from .schema import ChatRequest
from .structured import named, naming, take_grammar

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from fluentllm.frontend.choices import Delta
    from fluentllm.frontend.generation import Job
    from fluentllm.frontend.services import Services


@documented(body=ChatRequest, answer=ChatCompletion, event=ChatChunk)
async def chat_completions(request: Request) -> Response | EventStream[Any]:
    services = services_of(request)
    body = await read(request, ChatRequest)
    check_model(body.model, services)
    check_common(body, 1, services)
    field = take_grammar(body)
    if body.stream:
        return EventStream(lambda: _events(body, services, field))
    with naming(field):
        return await unless_left(request.receive, _answer(body, services))


async def _job(body: ChatRequest, services: Services) -> Job:
    generation, handoff = services.generation, handoff_of(body, services)
    logprobs = _logprobs(body)
    options = msgspec.structs.replace(body, max_tokens=_max_tokens(body))
    messages = to_template(body.messages, generation.template)
    prompt = await generation.encode_chat(messages, variables=body.chat_template_kwargs)
    return generation.job([prompt], options, id=new_id("chatcmpl"), logprobs=logprobs, handoff=handoff, field="messages")


def _logprobs(body: ChatRequest) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise InvalidRequest(
            f"top_logprobs = {body.top_logprobs} is given, but logprobs is not true.", fix="Set logprobs.", param="top_logprobs"
        )
    return None


def _max_tokens(body: ChatRequest) -> int | None:
    """`max_tokens` is the older name of `max_completion_tokens`."""
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidRequest(
            f"max_tokens = {old} and max_completion_tokens = {new} differ.", fix="Give one of them.", param="max_tokens"
        )
    if old == 0:
        raise InvalidRequest("max_tokens = 0 asks for no answer.", fix="Ask for at least 1.", param="max_tokens")
    return old if new is None else new


async def _answer(body: ChatRequest, services: Services) -> Response:
    generation = services.generation
    job = await _job(body, services)
    usage = Usage(prompt_tokens=len(job.prompts[0]), speculative=generation.info.speculative)
    choices = []
    report = None
    for done in await generation.complete(job):
        usage.add(done, job.n)
        report = report or done.handoff
        choices.append(
            ChatChoice(
                index=done.index,
                message=AnswerMessage(content=done.text),
                finish_reason=done.finish_reason,
                logprobs=None if done.logprobs is None else chat_logprobs(done.logprobs, services.tokenizer),
            )
        )
    return json_response(
        ChatCompletion(
            id=job.id,
            created=int(time.time()),
            model=services.model,
            choices=choices,
            usage=usage_body(usage),
            kv_transfer_params=transfer_params(report) or UNSET,
        )
    )


async def _events(body: ChatRequest, services: Services, field: str) -> Events[Any]:
    generation = services.generation
    job = await _job(body, services)
    usage = Usage(prompt_tokens=len(job.prompts[0]), speculative=generation.info.speculative)
    with_usage = wants_usage(body)
    splicer = chat_splicer(id=job.id, created=int(time.time()), model=services.model, choices=job.n, with_usage=with_usage)
    items, text_of, delta_of = generation.stream_parts(job)
    items = items if body.grammar is None else named(items, field)
    chunk = splicer.chunk

    def encode(item: Any) -> bytes:
        text = text_of(item)
        if text is not None:
            return chunk(0, text) if text else b""
        delta: Delta = delta_of(item)
        usage.add(delta, job.n)
        logprobs = chat_logprobs(delta.logprobs, services.tokenizer) if delta.logprobs else None
        if delta.text or logprobs is not None or delta.finish_reason is not None:
            return chunk(delta.index, delta.text, logprobs, delta.finish_reason)
        return b""

    return Events(items, encode, lambda: splicer.end(usage if with_usage else None))
