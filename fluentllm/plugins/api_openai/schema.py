"""Request bodies, as the public OpenAI schema has them, with the extensions that serving engines share.

What is a field here is honoured, or listed in `IGNORED` (fields that mean nothing on a local server), or takes only the
values that ask for nothing (`REFUSED`). Everything else is refused by the decoder.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from fluentllm.core.types import MAX_LOGPROBS
from fluentllm.frontend.sampling import SamplingOptions

from ...frontend.messages import Message
from .handoff import DisaggregatedParams, Hosts, KVTransferParams, Port, Ports, Room, Rooms
from .structured import Choices, JsonSchema, ResponseFormat, StructuredOutputs
from .tool_schema import ToolChoice, Tools

IGNORED = {
    "user": "Names an end user of the caller's, for OpenAI's abuse monitoring.",
    "safety_identifier": "The same, hashed.",
    "metadata": "Labels of stored completions.",
    "store": "Asks OpenAI to keep the completion.",
    "service_tier": "Chooses among OpenAI's prices.",
    "prompt_cache_key": "Routes to OpenAI's caches; the prefix cache here finds prefixes by itself.",
    "prompt_cache_retention": "How long OpenAI's caches keep a prefix.",
}
"""Accepted and without effect, with the reason."""

FIXED = {
    "no_stop_trim": (False, "a stop string is never part of the text"),
    "skip_special_tokens": (True, "special tokens are never part of the text"),
    "return_hidden_states": (False, "hidden states are not returned"),
    "continue_final_message": (False, "the last message cannot be continued"),
    "stream_reasoning": (True, "reasoning is streamed as it comes"),
    "include_stop_str_in_output": (False, "a stop string is never part of the text"),
    "use_beam_search": (False, "answers are drawn, or greedy at temperature 0"),
    "spaces_between_special_tokens": (True, "special tokens are never part of the text"),
    "return_token_ids": (False, "answers are text"),
    "return_tokens_as_token_ids": (False, "tokens of log-probabilities are text"),
}
"""SGLang's routers and vLLM's clients write these out. Field → the one value that is taken, and why no other is."""

REFUSED = {
    "functions": "the older name of tools is not supported",
    "function_call": "the older name of tool_choice is not supported; only 'none' asks for nothing",
    "audio": "this server writes text only",
    "modalities": "this server writes text only: ['text']",
    "prediction": "predicted outputs are not supported",
    "reasoning_effort": "the model's reasoning cannot be steered; only 'none' asks for nothing",
    "verbosity": "the model's verbosity cannot be steered",
    "web_search_options": "this server does not search the web",
    "suffix": "filling in before a suffix is not supported",
    "best_of": "it must equal n: choices are not ranked",
}
"""Field → why no other value is taken."""

TEXT_ONLY_PARTS = {"image_url", "input_audio", "file"}


class StreamOptions(Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: Annotated[bool, Meta(description="Send a last chunk with the token counts.")] | None = None
    include_obfuscation: Annotated[bool, Meta(description="Only false: chunks are not padded.")] | None = None


TemplateVariables = Annotated[
    dict[str, Any],
    Meta(description="Variables of the chat template, such as enable_thinking; what it does not read is refused."),
]
NoItems = Annotated[list[Any], Meta(max_length=0)]
"""Clients write an empty list where they have nothing to offer."""


class GenerationRequest(SamplingOptions, kw_only=True, forbid_unknown_fields=True):
    """What chat and text completions have in common; the last seven are those of `IGNORED`."""

    model: Annotated[str, Meta(description="The served model's name; may be left out.")] | None = None
    stream: Annotated[bool, Meta(description="Send the answer as server-sent events while it is generated.")] | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Annotated[JsonSchema, Meta(description="Older name of structured_outputs.json.")] | None = None
    guided_regex: Annotated[str, Meta(description="Older name of structured_outputs.regex.")] | None = None
    guided_choice: Annotated[Choices, Meta(description="Older name of structured_outputs.choice.")] | None = None
    guided_grammar: Annotated[str, Meta(description="Older name of structured_outputs.grammar.")] | None = None
    json_schema: Annotated[JsonSchema, Meta(description="SGLang's name of structured_outputs.json.")] | None = None
    regex: Annotated[str, Meta(description="SGLang's name of structured_outputs.regex.")] | None = None
    ebnf: Annotated[str, Meta(description="SGLang's name of structured_outputs.grammar.")] | None = None
    bootstrap_host: (
        Annotated[str | Hosts, Meta(description="Where the prefill engine takes control connections; or n times the same.")]
        | None
    ) = None
    bootstrap_port: Port | Ports | None = None
    bootstrap_room: (
        Annotated[Room | Rooms, Meta(description="Names a request that goes to a prefill and a decode engine at once.")] | None
    ) = None
    kv_transfer_params: KVTransferParams | None = None
    disaggregated_params: DisaggregatedParams | None = None
    no_stop_trim: bool | None = None
    skip_special_tokens: bool | None = None
    return_hidden_states: bool | None = None
    continue_final_message: bool | None = None
    stream_reasoning: bool | None = None
    include_stop_str_in_output: bool | None = None
    use_beam_search: bool | None = None
    spaces_between_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    separate_reasoning: (
        Annotated[bool, Meta(description="Of chats: reasoning is no content, but reasoning_content. Default true.")] | None
    ) = None
    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class ChatRequest(GenerationRequest, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: (
        Annotated[int, Meta(ge=1, le=2**31 - 1, description="Most new tokens. Default: what is left of the context.")] | None
    ) = None
    logprobs: Annotated[bool, Meta(description="Return each token's log-probability.")] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS, description="And this many of the likeliest tokens.")] | None = (
        None
    )
    chat_template_kwargs: TemplateVariables | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: Annotated[bool, Meta(description="An answer may have several calls. Default true.")] | None = None
    functions: NoItems | None = None
    function_call: Literal["none"] | None = None
    audio: None = None
    modalities: list[Literal["text"]] | None = None
    prediction: None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: None = None
    web_search_options: None = None


class CompletionRequest(GenerationRequest, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /v1/completions`."""

    prompt: Annotated[
        str | list[str | int | list[int]], Meta(description="Text, token ids, or a list of one of these: a prompt each.")
    ]
    echo: Annotated[bool, Meta(description="Begin the text with the prompt; with logprobs, the prompt's too.")] | None = None
    logprobs: (
        Annotated[
            int, Meta(ge=0, le=MAX_LOGPROBS, description="Log-probabilities: the token's and this many of the likeliest.")
        ]
        | None
    ) = None
    best_of: Annotated[int, Meta(ge=1)] | None = None
    suffix: None = None


class TokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /tokenize`: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    add_special_tokens: Annotated[bool, Meta(description="Frame a prompt as the model expects. Default true.")] | None = None
    add_generation_prompt: (
        Annotated[bool, Meta(description="Of messages: end where the answer begins. Default true.")] | None
    ) = None
    chat_template_kwargs: TemplateVariables | None = None
    tools: Tools | None = None


class DetokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /detokenize`."""

    tokens: list[int]
    model: str | None = None
