"""The OpenAI-compatible HTTP API: chat and text completions, models, health, tokenizing, and its own OpenAPI document."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fluentllm.core.hookspecs import hookimpl

if TYPE_CHECKING:
    from fluentllm.core.protocols import RegisterRoute


class ApiOpenAI:
    """Registers the routes; their code is imported when a front end asks for them."""

    @hookimpl
    def fluent_routes(self, register: RegisterRoute) -> None:
        from .routes import register_all

        register_all(register)


plugin = ApiOpenAI()
