"""Checks and steps that chat and text completions share."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from msgspec import UNSET

from fluentllm.core.errors import InvalidRequest

from .answers import Head
from .schema import FIXED

if TYPE_CHECKING:
    from starlette.requests import Request

    from fluentllm.frontend.generation import Job
    from fluentllm.frontend.services import Services

    from .schema import GenerationRequest


def services_of(request: Request) -> Services:
    services: Services = request.app.state.fluent
    return services


def check_common(body: GenerationRequest, prompts: int, services: Services) -> None:
    """Raises `InvalidRequest`."""
    settings = services.settings
    n = body.n or 1
    if n > settings.server.max_choices:
        raise InvalidRequest(
            f"n = {n} is above this server's limit of {settings.server.max_choices} choices.",
            fix="Ask for fewer, or start the server with a larger server.max_choices.",
            param="n",
        )
    if prompts * n > settings.scheduler.max_waiting:
        raise InvalidRequest(
            f"{prompts} prompts with n = {n} are {prompts * n} sequences; the queue takes {settings.scheduler.max_waiting}.",
            fix="Send them in several requests.",
            param="prompt",
        )
    options = body.stream_options
    if options is not None:
        if not body.stream:
            raise InvalidRequest(
                "stream_options is given, but stream is not true.", fix="Leave it out.", param="stream_options"
            )
        if options.include_obfuscation:
            raise InvalidRequest(
                "stream_options.include_obfuscation = true is not supported.", fix="Leave it out.", param="stream_options"
            )
    for field, (value, reason) in FIXED.items():
        if getattr(body, field) not in (None, value):
            seen = str(not value).lower()
            raise InvalidRequest(f"{field} = {seen} is not supported: {reason}.", fix="Leave it out.", param=field)


def head_of(job: Job, services: Services) -> Head:
    synthetic = services.generation.info.synthetic
    return Head(id=job.id, created=int(time.time()), model=services.model, synthetic=synthetic or UNSET)


def wants_usage(body: GenerationRequest) -> bool:
    return bool(body.stream_options is not None and body.stream_options.include_usage)
