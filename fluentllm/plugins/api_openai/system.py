"""Models, health, version, tokenizing: what is answered without generating."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fluentllm import __version__
from fluentllm.core.errors import FluentError, InvalidRequest
from fluentllm.frontend.responses import json_response

from ...frontend.messages import to_template
from .answers import Detokenized, Health, Live, ModelCard, ModelList, PluginReport, Startup, Tokenized, Version
from .bodies import check_model, read
from .common import services_of
from .openapi import documented
from .schema import DetokenizeRequest, TokenizeRequest
from .tools import check_tools, template_tools

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from fluentllm.frontend.generation import Generation
    from fluentllm.frontend.services import Services


def _card(services: Services) -> ModelCard:
    info = services.client.info
    return ModelCard(
        id=services.model,
        created=services.created,
        max_model_len=None if info is None else info.max_model_len,
        vocab_size=None if info is None else info.spec.vocab_size,
    )


@documented(answer=ModelList)
async def models(request: Request) -> Response:
    return json_response(ModelList(data=[_card(services_of(request))]))


@documented(answer=ModelCard)
async def model(request: Request) -> Response:
    services = services_of(request)
    check_model(request.path_params["model"], services)
    return json_response(_card(services))


@documented(answer=Health)
async def health(request: Request) -> Response:
    """200 only if a request would be served now."""
    state = services_of(request).client.state
    return json_response(Health(status=state), 200 if state == "ready" else 503)


@documented(answer=Live)
async def live(request: Request) -> Response:
    """200 as long as this process answers, whatever the engine does."""
    return json_response(Live())


@documented(answer=Version)
async def version(request: Request) -> Response:
    return json_response(Version(version=__version__))


@documented(answer=Startup)
async def startup(request: Request) -> Response:
    info = services_of(request).client.info
    return json_response(Startup(stages=[] if info is None else list(info.startup)))


@documented(answer=PluginReport)
async def plugins(request: Request) -> Response:
    """What plugins cost in this server so far; `fluent plugins trace --url` prints it."""
    services = services_of(request)
    try:
        engine = (await services.client.stats()).plugins
    except FluentError:
        engine = None
    return json_response(PluginReport(frontend=services.ledger.report(), engine=engine))


def _tools(body: TokenizeRequest, generation: Generation) -> list[dict[str, Any]] | None:
    if not body.tools:
        return None
    check_tools(body.tools)
    return template_tools(body.tools, generation.template)


@documented(body=TokenizeRequest, answer=Tokenized)
async def tokenize(request: Request) -> Response:
    services = services_of(request)
    body = await read(request, TokenizeRequest)
    check_model(body.model, services)
    generation = services.generation
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("Give either prompt or messages.", fix="Send one of them.", param="prompt")
    if body.prompt is not None:
        if body.add_generation_prompt is not None:
            raise InvalidRequest(
                "add_generation_prompt is for messages.", fix="Leave it out with a prompt.", param="add_generation_prompt"
            )
        if body.chat_template_kwargs is not None:
            raise InvalidRequest(
                "chat_template_kwargs is for messages.", fix="Leave it out with a prompt.", param="chat_template_kwargs"
            )
        if body.tools:
            raise InvalidRequest("tools are for messages.", fix="Leave them out with a prompt.", param="tools")
        tokens = await generation.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    else:
        if body.add_special_tokens is not None:
            raise InvalidRequest(
                "add_special_tokens is for a prompt; a chat template writes its own.",
                fix="Leave it out.",
                param="add_special_tokens",
            )
        messages = to_template(body.messages or [], generation.template)
        tokens = await generation.encode_chat(
            messages,
            add_generation_prompt=body.add_generation_prompt is not False,
            variables=body.chat_template_kwargs,
            tools=_tools(body, generation),
        )
    return json_response(Tokenized(tokens=tokens, count=len(tokens), max_model_len=generation.info.max_model_len))


@documented(body=DetokenizeRequest, answer=Detokenized)
async def detokenize(request: Request) -> Response:
    services = services_of(request)
    body = await read(request, DetokenizeRequest)
    check_model(body.model, services)
    return json_response(Detokenized(prompt=await services.generation.decode(body.tokens)))
