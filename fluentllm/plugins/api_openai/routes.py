"""Every route of this plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .chat import chat_completions
from .completions import completions
from .openapi import openapi
from .system import detokenize, health, live, model, models, plugins, startup, tokenize, version

if TYPE_CHECKING:
    from fluentllm.core.protocols import RegisterRoute


def register_all(register: RegisterRoute) -> None:
    post = ("POST",)
    register("/v1/chat/completions", chat_completions, methods=post, summary="Answer a chat.")
    register("/v1/completions", completions, methods=post, summary="Continue text.")
    register("/v1/models", models, summary="The served model.")
    register("/v1/models/{model:path}", model, summary="The served model, by name.")
    register("/health", health, summary="200 if a request would be served now, else 503.")
    register("/live", live, summary="200 as long as the front end runs.")
    register("/version", version, summary="Version of the server.")
    register("/startup", startup, summary="How the engine's start passed: a timeline of its stages.")
    register("/plugins", plugins, summary="Calls into each plugin, their times and failures.")
    register("/tokenize", tokenize, methods=post, summary="Token ids of a prompt or of messages.")
    register("/detokenize", detokenize, methods=post, summary="Text of token ids.")
    register("/openapi.json", openapi, summary="This API as an OpenAPI 3.1 document.")
