"""Log-probabilities in OpenAI's two shapes: chat completions' list of tokens, text completions' parallel lists."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fluentllm.frontend.choices import TokenInfo

from .answers import ChatLogprobs, TextLogprobs, TokenLogprobBody, TopLogprob

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fluentllm.core.types import TokenLogprob
    from fluentllm.frontend.tokenizer import Tokenizer

LEAST = -9999.0
"""Stands for minus infinity, which JSON does not have."""


def chat_logprobs(infos: Sequence[TokenInfo], tokenizer: Tokenizer) -> ChatLogprobs:
    content = []
    for info in infos:
        spelt = tokenizer.token_bytes(info.token)
        tops = []
        for token, logprob in info.top:
            bytes_ = tokenizer.token_bytes(token)
            tops.append(TopLogprob(token=bytes_.decode("utf-8", "replace"), logprob=max(logprob, LEAST), bytes=list(bytes_)))
        logprob = LEAST if info.logprob is None else max(info.logprob, LEAST)
        content.append(
            TokenLogprobBody(token=spelt.decode("utf-8", "replace"), logprob=logprob, bytes=list(spelt), top_logprobs=tops)
        )
    return ChatLogprobs(content=content)


def text_logprobs(infos: Sequence[TokenInfo], tokenizer: Tokenizer, shift: int = 0) -> TextLogprobs:
    """`shift`: characters of text before the infos' own, the echoed prompt's."""
    result = TextLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for info in infos:
        name = _name(info.token, tokenizer)
        result.tokens.append(name)
        result.text_offset.append(info.offset + shift)
        if info.logprob is None:
            result.token_logprobs.append(None)
            result.top_logprobs.append(None)
            continue
        logprob = max(info.logprob, LEAST)
        result.token_logprobs.append(logprob)
        top = {_name(token, tokenizer): max(value, LEAST) for token, value in info.top}
        top.setdefault(name, logprob)
        result.top_logprobs.append(top)
    return result


def prompt_infos(
    prompt: Sequence[int], offsets: Sequence[int], logprobs: Sequence[TokenLogprob | None] | None
) -> list[TokenInfo]:
    """A prompt's tokens as if they had been generated."""
    known = list(logprobs or ())
    known += [None] * (len(prompt) - len(known))
    return [
        TokenInfo(token, offset, None if one is None else one.logprob, [] if one is None else one.top)
        for token, offset, one in zip(prompt, offsets, known, strict=True)
    ]


def _name(token: int, tokenizer: Tokenizer) -> str:
    """The token's text; for bytes that are no whole characters `bytes:\\xe2\\x82`, so that no two look alike."""
    spelt = tokenizer.token_bytes(token)
    try:
        return spelt.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelt)
