"""Answer bodies, as the public OpenAI schema has them."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from fluentllm.core.types import PluginCalls, Stage

from .handoff import KVTransferParams

FinishReason = Literal["stop", "length"]
ChatFinishReason = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(Struct, kw_only=True):
    cached_tokens: int
    """Whose KV came from the prefix cache."""


class CompletionTokensDetails(Struct, kw_only=True, omit_defaults=True):
    """Of speculative decoding; absent where it is off."""

    accepted_prediction_tokens: int
    """Drafts that became tokens of the answer; those behind a stop string did not."""
    rejected_prediction_tokens: int
    """Drafts that were verified and did not."""
    proposer: str
    """Who drafted: `speculative.method`."""
    verified_by_position: list[int]
    """Verified drafts, first ones, second ones, …"""
    accepted_by_position: list[int]
    """And accepted ones: their mean length is 1 + all accepted ÷ verified first ones."""
    synthetic_acceptance: float | None = None
    """Drafts were accepted at random, for a benchmark: the answer means nothing."""


class KVTransferUsage(Struct, kw_only=True):
    """Of a request whose prompt was computed on another engine."""

    received_bytes: int
    saved_bytes: int
    """Not sent, since this engine had them cached."""


class UsageBody(Struct, kw_only=True, omit_defaults=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = None
    kv_transfer: KVTransferUsage | None = None


class TopLogprob(Struct, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobBody(Struct, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, kw_only=True):
    content: list[TokenLogprobBody]
    refusal: None = None


class CalledFunction(Struct, kw_only=True):
    name: str
    arguments: str
    """As the model wrote them: a JSON object, unless the answer was cut off or the model erred."""


class Call(Struct, kw_only=True):
    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class AnswerMessage(Struct, kw_only=True):
    content: str | None
    """None if there are only calls of tools, or only reasoning."""
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[Call] | UnsetType = UNSET


class ChatChoice(Struct, kw_only=True):
    index: int
    message: AnswerMessage
    finish_reason: ChatFinishReason
    logprobs: ChatLogprobs | None = None


class Head(Struct, kw_only=True):
    """What every answer, whole or an event of a stream, says of where it comes from."""

    id: str
    created: int
    """Seconds since 1970."""
    model: str
    synthetic: str | UnsetType = UNSET
    """There where drafts are accepted at random, for a benchmark: the answer means nothing."""


class ChatCompletion(Head, kw_only=True):
    """Answer of `POST /v1/chat/completions`."""

    choices: list[ChatChoice]
    usage: UsageBody
    object: Literal["chat.completion"] = "chat.completion"
    kv_transfer_params: KVTransferParams | UnsetType = UNSET
    """Of a prefill engine: what the router passes on to a decode engine."""


class FunctionDelta(Struct, kw_only=True, omit_defaults=True):
    name: str | UnsetType = UNSET
    """With a call's first delta."""
    arguments: str
    """What comes next of them."""


class CallDelta(Struct, kw_only=True, omit_defaults=True):
    index: int
    """Of the call in the answer, from 0."""
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionDelta


class AnswerDelta(Struct, kw_only=True, omit_defaults=True):
    role: Literal["assistant"] | None = None
    """With a choice's first chunk."""
    content: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[CallDelta] | UnsetType = UNSET


class ChunkChoice(Struct, kw_only=True):
    index: int
    delta: AnswerDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason | None = None


class ChatChunk(Head, kw_only=True):
    """One event of a streamed chat completion. `chunks` splices these; this Struct is their schema."""

    choices: list[ChunkChoice]
    usage: UsageBody | None = None
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class TextLogprobs(Struct, kw_only=True):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    """Where each token begins in the text, in characters."""


class TextChoice(Struct, kw_only=True):
    index: int
    text: str
    finish_reason: FinishReason | None
    logprobs: TextLogprobs | None = None


class TextCompletion(Head, kw_only=True):
    """Answer of `POST /v1/completions`, and each event of a streamed one."""

    choices: list[TextChoice]
    usage: UsageBody | None = None
    object: Literal["text_completion"] = "text_completion"
    kv_transfer_params: KVTransferParams | UnsetType = UNSET
    """Of a prefill engine: what the router passes on to a decode engine."""


class ModelCard(Struct, kw_only=True):
    id: str
    created: int
    max_model_len: int | None
    """Longest context, prompt and answer; null before the engine was first ready."""
    vocab_size: int | None
    """Token ids are 0 … vocab_size - 1; null likewise."""
    owned_by: str = "fluentllm"
    object: Literal["model"] = "model"


class ModelList(Struct, kw_only=True):
    data: list[ModelCard]
    object: Literal["list"] = "list"


class Tokenized(Struct, kw_only=True):
    tokens: list[int]
    count: int
    max_model_len: int


class Detokenized(Struct, kw_only=True):
    prompt: str


class Health(Struct, kw_only=True):
    status: Literal["starting", "ready", "restarting", "failed"]


class Live(Struct, kw_only=True):
    status: Literal["live"] = "live"


class Startup(Struct, kw_only=True):
    stages: list[Stage]
    """Empty until the engine has started."""


class Version(Struct, kw_only=True):
    version: str


class PluginReport(Struct, kw_only=True):
    """What each plugin was called for since its process started, how often, how long, and how often it failed."""

    frontend: list[PluginCalls]
    engine: list[PluginCalls] | None
    """None while there is no engine."""


class ErrorDetail(Struct, kw_only=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Struct, kw_only=True):
    """Every answer with a status of 400 and above."""

    error: ErrorDetail
