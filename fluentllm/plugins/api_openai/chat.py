"""`POST /v1/chat/completions`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import UNSET

from fluentllm.core.errors import InvalidRequest
from fluentllm.frontend.generation import Usage, new_id
from fluentllm.frontend.responses import Events, EventStream, json_response, unless_left

from ...frontend.messages import to_template
from .answers import AnswerMessage, ChatChoice, ChatChunk, ChatCompletion
from .bodies import check_model, read
from .chunks import chat_splicer, usage_body
from .common import check_common, head_of, services_of, wants_usage
from .handoff import handoff_of, transfer_params
from .logprobs import chat_logprobs
from .openapi import documented
from .parts import PROMPT_END, PartsWriter, Reader, message_of
from .schema import ChatRequest
from .structured import named, naming, take_grammar
from .tools import take_tools

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request
    from starlette.responses import Response

    from fluentllm.core.protocols import AnswerFormat, Where
    from fluentllm.frontend.choices import Delta
    from fluentllm.frontend.generation import Job
    from fluentllm.frontend.services import Services

    from .tools import Calling


@documented(body=ChatRequest, answer=ChatCompletion, event=ChatChunk)
async def chat_completions(request: Request) -> Response | EventStream[Any]:
    services = services_of(request)
    body = await read(request, ChatRequest)
    check_model(body.model, services)
    check_common(body, 1, services)
    field = take_grammar(body)
    calling = take_tools(body, services, field)
    if calling is not None:
        field = calling.field
    if body.stream:
        return EventStream(lambda: _events(body, services, calling, field))
    with naming(field):
        return await unless_left(request.receive, _answer(body, services, calling))


async def _job(body: ChatRequest, services: Services, calling: Calling | None) -> tuple[Job, Callable[[], Reader] | None]:
    """And what takes each choice's answer apart, if there is more in it than text."""
    generation, handoff = services.generation, handoff_of(body, services)
    logprobs = _logprobs(body)
    options = msgspec.structs.replace(body, max_tokens=_max_tokens(body))
    messages = to_template(body.messages, generation.template)
    prompt = await generation.encode_chat(
        messages, variables=body.chat_template_kwargs, tools=None if calling is None else calling.offered
    )
    start = None
    if services.answers is not None and (calling is not None or body.grammar is None):  # which leaves no room for reasoning
        where = services.answers.where(services.tokenizer.decode(prompt[-PROMPT_END:], skip_special_tokens=False))
        if calling is not None:
            with naming(calling.field):
                options.grammar = calling.grammar(where)
        start = _reading(services.answers, where, body, calling)
    job = generation.job(
        [prompt],
        options,
        id=new_id("chatcmpl"),
        logprobs=logprobs,
        keep=services.markers,
        handoff=handoff,
        field="messages",
    )
    return job, start


def _reading(answers: AnswerFormat, where: Where, body: ChatRequest, calling: Calling | None) -> Callable[[], Reader] | None:
    """None if there is nothing but text to expect."""
    tools, separate = () if calling is None else calling.tools, body.separate_reasoning is not False
    parallel, required = body.parallel_tool_calls is not False, calling is not None and calling.required

    def start() -> Reader:
        parser = answers.parser(tools, where=where, separate_reasoning=separate)
        return Reader(parser, parallel=parallel, required=required)

    return None if start().parser.plain else start


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


async def _answer(body: ChatRequest, services: Services, calling: Calling | None) -> Response:
    generation = services.generation
    job, start = await _job(body, services, calling)
    usage = Usage(prompt_tokens=len(job.prompts[0]), speculative=generation.info.speculative)
    choices = []
    report = None
    for done in await generation.complete(job):
        usage.add(done, job.n)
        report = report or done.handoff
        reader = None if start is None else start()
        choices.append(
            ChatChoice(
                index=done.index,
                message=AnswerMessage(content=done.text) if reader is None else message_of(done.text, reader),
                finish_reason=done.finish_reason if reader is None else reader.reason(done.finish_reason),
                logprobs=None if done.logprobs is None else chat_logprobs(done.logprobs, services.tokenizer),
            )
        )
    return json_response(
        ChatCompletion(
            **msgspec.structs.asdict(head_of(job, services)),
            choices=choices,
            usage=usage_body(usage),
            kv_transfer_params=transfer_params(report) or UNSET,
        )
    )


async def _events(body: ChatRequest, services: Services, calling: Calling | None, field: str) -> Events[Any]:
    generation = services.generation
    job, start = await _job(body, services, calling)
    usage = Usage(prompt_tokens=len(job.prompts[0]), speculative=generation.info.speculative)
    with_usage = wants_usage(body)
    splicer = chat_splicer(head_of(job, services), choices=job.n, with_usage=with_usage)
    items, text_of, delta_of = generation.stream_parts(job)
    items = items if job.params[0].grammar is None else named(items, field)
    chunk = splicer.chunk
    parts = None if start is None else PartsWriter(splicer, start, job.n)

    def encode(item: Any) -> bytes:
        text = text_of(item)
        if text is not None:
            if parts is not None and not parts.plain(0):
                return parts.write(0, text) if text else b""
            return chunk(0, text) if text else b""
        delta: Delta = delta_of(item)
        usage.add(delta, job.n)
        logprobs = chat_logprobs(delta.logprobs, services.tokenizer) if delta.logprobs else None
        if parts is not None and not parts.plain(delta.index):
            return parts.write(delta.index, delta.text, logprobs, delta.finish_reason)
        if delta.text or logprobs is not None or delta.finish_reason is not None:
            return chunk(delta.index, delta.text, logprobs, delta.finish_reason)
        return b""

    return Events(items, encode, lambda: splicer.end(usage if with_usage else None))
