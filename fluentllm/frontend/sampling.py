"""What a caller may ask of one generation, with the bounds of each field, and how that becomes `SamplingParams`.

The one place of these bounds: the API's request bodies, `LLM.generate` and the job files of `fluent run` all extend or use
`SamplingOptions`. A field left out or null takes the default stated in its help text.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta, Struct

from ..core.errors import ContextTooLong, InvalidRequest
from ..core.types import MAX_LOGIT_BIAS, MAX_STOP_IDS, GrammarSpec, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..core.types import ModelInfo
    from .tokenizer import Tokenizer

MAX_STOP_STRINGS = 16
_INT32 = 2**31 - 1

StopString = Annotated[str, Meta(min_length=1, max_length=256)]
TokenId = Annotated[int, Meta(ge=0, le=_INT32)]


class SamplingOptions(Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How to draw the tokens of one request."""

    max_tokens: Annotated[int, Meta(ge=0, le=_INT32, description="Most new tokens.")] | None = None
    min_tokens: (
        Annotated[int, Meta(ge=0, le=_INT32, description="No end and no stop counts before this many new tokens. Default 0.")]
        | None
    ) = None
    temperature: Annotated[float, Meta(ge=0, le=2, description="0 takes the most likely token. Default 1.")] | None = None
    top_p: (
        Annotated[float, Meta(ge=0, le=1, description="Keep the likeliest tokens of this total probability. Default 1.")] | None
    ) = None
    top_k: (
        Annotated[int, Meta(ge=-1, le=_INT32, description="Keep this many likeliest tokens; 0 or -1: all. Default 0.")] | None
    ) = None
    min_p: (
        Annotated[
            float, Meta(ge=0, le=1, description="Keep tokens of at least this share of the likeliest's probability. Default 0.")
        ]
        | None
    ) = None
    seed: (
        Annotated[int, Meta(ge=-(2**63), le=2**63 - 1, description="Same seed, same text. A random one if left out.")] | None
    ) = None
    presence_penalty: (
        Annotated[float, Meta(ge=-2, le=2, description="Off a token's logit once it was generated. Default 0.")] | None
    ) = None
    frequency_penalty: (
        Annotated[float, Meta(ge=-2, le=2, description="Off a token's logit for each time it was generated. Default 0.")] | None
    ) = None
    repetition_penalty: (
        Annotated[float, Meta(gt=0, le=10, description="Divides the logits of tokens already there. Default 1.")] | None
    ) = None
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, Meta(ge=-100, le=100)]],
            Meta(max_length=MAX_LOGIT_BIAS, description="Token id (as text) to what is added to its logit."),
        ]
        | None
    ) = None
    stop: (
        StopString
        | Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS, description="The text ends before the first of these.")]
        | None
    ) = None
    stop_token_ids: (
        Annotated[list[TokenId], Meta(max_length=MAX_STOP_IDS // 2, description="Token ids that end the text.")] | None
    ) = None
    grammar: (
        Annotated[GrammarSpec, Meta(description="What the text must be: `kind`, one that a plugin knows, and `source`.")] | None
    ) = None
    ignore_eos: Annotated[bool, Meta(description="Go on after the model's end-of-sequence token. Default false.")] | None = None
    n: Annotated[int, Meta(ge=1, description="Choices for each prompt. Default 1.")] | None = None
    priority: Annotated[int, Meta(ge=-_INT32, le=_INT32, description="Smaller runs first. Default 0.")] | None = None

    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


def check_options(options: SamplingOptions) -> SamplingOptions:
    """The bounds, for options that were made in Python rather than decoded. Raises `InvalidRequest` naming the field."""
    for name in options.__struct_fields__:
        value = getattr(options, name)
        for number in value.values() if isinstance(value, dict) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise InvalidRequest(f"{name} is {value}.", fix="Use a finite number.", param=name)
    try:
        checked = msgspec.convert(msgspec.structs.asdict(options), type(options))
    except msgspec.ValidationError as error:
        raise InvalidRequest(str(error)) from None
    return check_answer(checked)


def check_answer(options: SamplingOptions) -> SamplingOptions:
    """Of who wants answers and scores no prompts: no tokens are none. Raises `InvalidRequest`."""
    if options.max_tokens == 0:
        raise InvalidRequest("max_tokens is 0.", fix="Ask for at least one token.", param="max_tokens")
    return options


def context_limit(info: ModelInfo) -> tuple[int, str]:
    """Most tokens of prompt and answer together, and what says so."""
    if info.kv_tokens < info.max_model_len:
        return info.kv_tokens, f"the KV pool holds {info.kv_tokens} tokens (a larger kv.memory would hold more)"
    return info.max_model_len, f"the model's context is {info.max_model_len} tokens"


def room_for_answer(prompt_tokens: int, info: ModelInfo, field: str = "prompt") -> int:
    """New tokens that fit after the prompt, at least 1. Raises `InvalidRequest`, `ContextTooLong`."""
    if prompt_tokens == 0:
        raise InvalidRequest("The prompt has no tokens.", fix="Send at least one token of text.", param=field)
    limit, why = context_limit(info)
    room = limit - prompt_tokens
    if room < 1:
        raise ContextTooLong(
            f"The prompt has {prompt_tokens} tokens, but {why}, prompt and answer together.",
            fix=f"Shorten the prompt to at most {limit - 1} tokens.",
            param=field,
        )
    return room


def sampling_params(
    options: SamplingOptions,
    prompt_tokens: int,
    info: ModelInfo,
    tokenizer: Tokenizer,
    *,
    default_max_tokens: int | None = None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    field: str = "prompt",
) -> SamplingParams:
    """`options` for a prompt of `prompt_tokens` on this model; `default_max_tokens` None means what is left of the context.
    `field`: what the caller calls the prompt, for errors.

    Raises `ContextTooLong` with the numbers, `InvalidRequest` for token ids outside the vocabulary.
    """
    room = room_for_answer(prompt_tokens, info, field)
    wanted = options.max_tokens
    if wanted is not None and wanted > room:
        raise ContextTooLong(
            f"The prompt has {prompt_tokens} tokens and max_tokens asks for {wanted} more, {prompt_tokens + wanted} in all, "
            f"but {context_limit(info)[1]}.",
            fix=f"Ask for at most {room} tokens, or shorten the prompt.",
            param="max_tokens",
        )
    max_tokens = max(1, wanted if wanted is not None else min(room, default_max_tokens or room))
    min_tokens = options.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens is {min_tokens}, above max_tokens, which is {max_tokens}.", fix="Lower it.", param="min_tokens"
        )
    vocab = info.spec.vocab_size
    stop_ids = tuple(options.stop_token_ids or ())
    for token in stop_ids:
        _check_token(token, vocab, "stop_token_ids")
    if not options.ignore_eos:
        # The engine knows the ends that config.json names; the tokenizer's and generation_config.json's may be more.
        stop_ids += tuple(i for i in tokenizer.eos_ids if i < vocab and i not in info.spec.eos_token_ids and i not in stop_ids)
    top_p = options.top_p
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=1.0 if options.temperature is None else options.temperature,
        top_k=max(0, options.top_k or 0),
        top_p=1.0 if top_p is None else max(top_p, 1e-6),  # a mass of 0 keeps the likeliest token alone
        min_p=options.min_p or 0.0,
        seed=(random.getrandbits(63) if options.seed is None else options.seed) & (2**63 - 1),
        presence_penalty=options.presence_penalty or 0.0,
        frequency_penalty=options.frequency_penalty or 0.0,
        repetition_penalty=1.0 if options.repetition_penalty is None else options.repetition_penalty,
        logit_bias=_logit_bias(options.logit_bias or {}, vocab),
        stop_token_ids=stop_ids[:MAX_STOP_IDS],
        ignore_eos=bool(options.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=options.grammar,
    )


def choice_seed(seed: int, choice: int) -> int:
    """Seed of the n-th choice: the request's own for the first, independent ones (SplitMix64) for the others."""
    if choice == 0:
        return seed
    z = (seed + choice * 0x9E3779B97F4A7C15) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (z ^ (z >> 31)) & (2**63 - 1)


def check_ids(tokens: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises `InvalidRequest` for ids that the model has no embedding for."""
    if tokens and (min(tokens) < 0 or max(tokens) >= vocab_size):
        bad = next(token for token in tokens if not 0 <= token < vocab_size)
        _check_token(bad, vocab_size, param)


def _check_token(token: int, vocab_size: int, param: str) -> None:
    if not 0 <= token < vocab_size:
        raise InvalidRequest(
            f"{param} holds token id {token}; the model's vocabulary has {vocab_size} entries.",
            fix=f"Use ids from 0 to {vocab_size - 1}.",
            param=param,
        )


def _logit_bias(bias: dict[str, float], vocab_size: int) -> dict[int, float]:
    result = {}
    for key, value in bias.items():
        if not key.isascii() or not key.isdigit() or (key[0] == "0" and key != "0"):
            raise InvalidRequest(
                f"logit_bias has the key {key!r}.", fix='Use token ids, such as {"50256": -100}.', param="logit_bias"
            )
        _check_token(int(key), vocab_size, "logit_bias")
        result[int(key)] = value
    return result
