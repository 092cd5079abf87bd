"""Log-probabilities of drawn tokens, from the model's own distribution (before penalties, temperature and filters)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.types import MAX_LOGPROBS, TokenLogprob


@dataclass(slots=True)
class Logprobs:
    """R rows: the chosen token's logprob and rank, and the most likely tokens with theirs."""

    tokens: Tensor
    """[R] int64."""
    chosen: Tensor
    """[R] float32."""
    rank: Tensor
    """[R] int64, 1 is the most likely."""
    top_tokens: Tensor
    """[R, MAX_LOGPROBS] int64."""
    top: Tensor
    """[R, MAX_LOGPROBS] float32."""

    def to_lists(self) -> list[TokenLogprob]:
        """All rows, each with all `MAX_LOGPROBS` alternatives. Reads the device."""
        columns = (self.tokens, self.chosen, self.rank, self.top_tokens, self.top)
        return [
            TokenLogprob(token, chosen, rank, list(zip(top_tokens, top, strict=True)))
            for token, chosen, rank, top_tokens, top in zip(*(c.tolist() for c in columns), strict=True)
        ]


def logprobs_of(logits: Tensor, tokens: Tensor) -> Logprobs:
    """logits [R, V] float32, as the model gave them; tokens [R] int64."""
    normalised = torch.log_softmax(logits, dim=1)
    chosen = normalised.gather(1, tokens.unsqueeze(1))
    rank = (normalised > chosen).sum(1) + 1
    top, top_tokens = normalised.topk(min(MAX_LOGPROBS, normalised.shape[1]), dim=1)
    return Logprobs(tokens, chosen.squeeze(1), rank, top_tokens, top)


def keep_top(logprob: TokenLogprob, count: int) -> TokenLogprob:
    """With the first `count` alternatives only."""
    return TokenLogprob(logprob.token, logprob.logprob, logprob.rank, logprob.top[:count])
