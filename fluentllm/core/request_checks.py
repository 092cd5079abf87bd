"""What the front end checks for its users is checked again by the engine: nothing else guards the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import ContextTooLong, InvalidRequest
from .types import MAX_STOP_IDS

if TYPE_CHECKING:
    from .kv.cache import KVCache
    from .types import ModelInfo, ModelSpec, Request


def check_request(request: Request, stops: list[int], info: ModelInfo, kv: KVCache, drafts: int) -> None:
    """drafts: tokens past the end that a step may write KV for. Raises `InvalidRequest`, `ContextTooLong`."""
    length, limit = len(request.prompt), info.max_model_len
    if length == 0:
        raise InvalidRequest("The prompt is empty.", fix="Send at least one token.", param="prompt")
    if length + request.params.max_tokens > limit:
        raise ContextTooLong(
            f"{length} prompt tokens and {request.params.max_tokens} new ones exceed the context of {limit} tokens.",
            fix="Shorten the prompt or lower max_tokens.",
            param="max_tokens" if length < limit else "prompt",
        )
    if not kv.can_ever_fit(length + request.params.max_tokens + drafts):
        raise ContextTooLong(
            f"{length + request.params.max_tokens} tokens exceed the KV pool of {info.kv_tokens} tokens.",
            fix="Lower max_tokens, or start the server with a larger kv.memory.",
        )
    if request.handoff is not None and info.handoff is None:
        raise InvalidRequest(
            "The request asks for prefill and decode on different engines, but this one does both.",
            fix="Start it with --role prefill or --role decode.",
        )
    vocab = info.spec.vocab_size
    bad = next((token for token in request.prompt if not 0 <= token < vocab), None)
    if bad is not None:
        raise InvalidRequest(f"Token id {bad} is outside the vocabulary.", fix=f"Ids are 0 … {vocab - 1}.", param="prompt")
    if request.params.grammar is not None and request.params.min_tokens:
        raise InvalidRequest(
            "min_tokens forbids the end where the grammar may allow nothing else.",
            fix="Leave min_tokens out, and let the grammar ask for as much.",
            param="min_tokens",
        )
    if len(stops) > MAX_STOP_IDS:
        raise InvalidRequest("Too many stop token ids.", fix=f"Send at most {MAX_STOP_IDS}.", param="stop_token_ids")


def stop_ids(request: Request, spec: ModelSpec) -> list[int]:
    """The request's own, and the model's unless it ignores these."""
    ids = set(request.params.stop_token_ids)
    if not request.params.ignore_eos:
        ids.update(spec.eos_token_ids)
    return sorted(ids)
