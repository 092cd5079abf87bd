"""The bytes of one server-sent event, spliced: all that is constant in an answer is encoded once, before its first chunk.

A chunk costs one JSON encoding of its text and one concatenation. `answers.ChatChunk` and `answers.TextCompletion` are the
schema of what comes out; the tests decode every chunk as these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from fluentllm.frontend.responses import DONE

from .answers import AnswerDelta, CompletionTokensDetails, KVTransferUsage, PromptTokensDetails, UsageBody

if TYPE_CHECKING:
    from collections.abc import Sequence

    from msgspec import Struct

    from fluentllm.frontend.generation import Usage

    from .answers import Head

_encode = msgspec.json.Encoder().encode
_NULL = b"null"
_REASONS = {None: b"null", "stop": b'"stop"', "length": b'"length"', "tool_calls": b'"tool_calls"'}


class Splicer:
    """Makes the events of one answer."""

    def __init__(self, head: Head, *, kind: str, choices: int, text: tuple[bytes, bytes, bytes], with_usage: bool) -> None:
        """`text`: what comes before the text in a choice's first chunk, in the others, and after it.
        `with_usage`: the answer will end in a chunk with usage, so the others say that theirs is null."""
        self._open = b"data: " + _encode(head)[:-1] + b',"object":"%b","choices":[' % kind.encode()
        first, later, self._text_end = text
        self._first = [self._open + b'{"index":%d,' % index + first for index in range(choices)]
        self._later: Sequence[bytes] = [self._open + b'{"index":%d,' % index + later for index in range(choices)]
        self._end = b'}],"usage":null}\n\n' if with_usage else b"}]}\n\n"
        self._plain_end = self._text_end + b',"logprobs":null,"finish_reason":null' + self._end

    def chunk(self, index: int, text: str, logprobs: Struct | None = None, finish_reason: str | None = None) -> bytes:
        head = self._first[index]
        if head is not self._later[index]:
            self._first[index] = self._later[index]
        if logprobs is None and finish_reason is None:
            return head + _encode(text) + self._plain_end
        tail = b',"logprobs":%b,"finish_reason":%b' % (_encode(logprobs) if logprobs else _NULL, _REASONS[finish_reason])
        return head + _encode(text) + self._text_end + tail + self._end

    def delta(self, index: int, delta: AnswerDelta, logprobs: Struct | None = None, finish_reason: str | None = None) -> bytes:
        """An event of a chat that brings something else than text."""
        if self._first[index] is not self._later[index]:
            self._first[index] = self._later[index]
            delta.role = "assistant"
        tail = b',"logprobs":%b,"finish_reason":%b' % (_encode(logprobs) if logprobs else _NULL, _REASONS[finish_reason])
        return self._open + b'{"index":%d,"delta":%b' % (index, _encode(delta)) + tail + self._end

    def end(self, usage: Usage | None) -> bytes:
        """The last events of the answer."""
        if usage is None:
            return DONE
        return self._open + b'],"usage":' + _encode(usage_body(usage)) + b"}\n\n" + DONE


def chat_splicer(head: Head, *, choices: int, with_usage: bool) -> Splicer:
    text = (b'"delta":{"role":"assistant","content":', b'"delta":{"content":', b"}")
    return Splicer(head, kind="chat.completion.chunk", choices=choices, text=text, with_usage=with_usage)


def text_splicer(head: Head, *, choices: int, with_usage: bool) -> Splicer:
    text = (b'"text":', b'"text":', b"")
    return Splicer(head, kind="text_completion", choices=choices, text=text, with_usage=with_usage)


def usage_body(usage: Usage) -> UsageBody:
    return UsageBody(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
        completion_tokens_details=_drafts(usage),
        kv_transfer=_transferred(usage),
    )


def _transferred(usage: Usage) -> KVTransferUsage | None:
    if not usage.received_bytes and not usage.saved_bytes:
        return None
    return KVTransferUsage(received_bytes=usage.received_bytes, saved_bytes=usage.saved_bytes)


def _drafts(usage: Usage) -> CompletionTokensDetails | None:
    if usage.speculative is None:
        return None
    info, positions = usage.speculative, range(usage.speculative.max_k)
    verified = [sum(n for (drafted, _), n in usage.drafts.items() if drafted > j) for j in positions]
    accepted = [sum(n for (_, right), n in usage.drafts.items() if right > j) for j in positions]
    return CompletionTokensDetails(
        accepted_prediction_tokens=sum(accepted),
        rejected_prediction_tokens=sum(verified) - sum(accepted),
        proposer=info.method,
        verified_by_position=verified,
        accepted_by_position=accepted,
        synthetic_acceptance=info.synthetic_acceptance,
    )
