"""Tokens that went through drafts and verification are distributed as the target says, jointly: chi-square over many seeds.

The step program runs in earnest on slot tables, with a Markov chain over a small vocabulary for a model, and drafts that are
right at times. What it must give is worked out token by token in plain Python.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fluentllm.core.sequence import features_of
from fluentllm.core.slots import SlotTables
from fluentllm.core.types import SamplingParams, SlotInit
from fluentllm.step import decode
from fluentllm.step.commit import Committed, commit, leave_drafts

VOCAB, K, SLOTS, ROUNDS = 5, 2, 5000, 20
PROMPT = [0, 3, 0]
LOGITS = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(7)) * 1.2

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.75},
    "min_p": {"min_p": 0.3, "temperature": 1.4},
    "repetition": {"repetition_penalty": 1.6},
    "presence_frequency": {"presence_penalty": 0.9, "frequency_penalty": 0.5},
    "bias": {"logit_bias": {1: 1.5, 4: -2.0}},
    "min_tokens": {"min_tokens": 2},
    "all": {"temperature": 0.8, "top_k": 4, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.2, "presence_penalty": 0.3},
}
STOP = 2
"""The stop id of `min_tokens`."""


# -------------------------------------------------------------------------------------------------------- what must come out
def next_token(params: SamplingParams, generated: list[int]) -> list[float]:
    """Probabilities of the token after the prompt and `generated`."""
    logits = [float(x) for x in LOGITS[(PROMPT + generated)[-1]]]
    for token in range(VOCAB):
        count = generated.count(token)
        if token in PROMPT or count:
            rate = params.repetition_penalty
            logits[token] = logits[token] / rate if logits[token] > 0 else logits[token] * rate
        logits[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
        logits[token] += params.logit_bias.get(token, 0.0)
        if params.min_tokens > len(generated) and token == STOP:
            logits[token] = -math.inf
    weights = [math.exp(x / params.temperature) for x in logits]
    whole = [w / sum(weights) for w in weights]
    order = sorted(range(VOCAB), key=lambda t: -whole[t])[: params.top_k or VOCAB]
    kept, total, inside = [], 0.0, sum(whole[t] for t in order)
    for token in order:
        if total < params.top_p and whole[token] >= params.min_p * whole[order[0]]:
            kept.append(token)
        total += whole[token] / inside
    mass = sum(whole[t] for t in kept)
    return [whole[t] / mass if t in kept else 0.0 for t in range(VOCAB)]


def joint(params: SamplingParams) -> Tensor:
    """[VOCAB ** (K + 1)] float64."""
    out = []
    for tokens in itertools.product(range(VOCAB), repeat=K + 1):
        chances = [next_token(params, list(tokens[:i]))[token] for i, token in enumerate(tokens)]
        out.append(math.prod(chances))
    return torch.tensor(out, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------- what comes out
def sample(params: SamplingParams, rounds: int = ROUNDS) -> tuple[Tensor, float]:
    """K + 1 tokens of SLOTS × `rounds` requests, as cells of `joint`, and the share of drafts that were accepted."""
    tables = SlotTables(SLOTS, 32, 8, VOCAB, torch.device("cpu"), max_drafts=K)
    features = features_of(params)
    tables.admit(SlotInit(0, 1, PROMPT, len(PROMPT), 0, [1], params, [STOP] if params.min_tokens else []), features)
    for table in vars(tables).values():
        if isinstance(table, Tensor) and table.dim() > 1:
            table[:SLOTS] = table[0].clone()
    entered, seen = tables.ints.clone(), tables.output_counts.clone()
    generator = torch.Generator().manual_seed(11)
    slots = torch.arange(SLOTS)
    cells, drafted, accepted = [], 0, 0
    for _ in range(rounds):
        tables.ints.copy_(entered)
        tables.output_counts.copy_(seen)
        tables.finished[:SLOTS] = False
        tables.seed[:SLOTS] = torch.randint(0, 2**62, (SLOTS,), generator=generator)
        drafts = 0
        while int((tables.length[slots] - len(PROMPT)).min()) <= K and not bool(tables.finished[slots].all()):
            batch = decode.decode_batch(slots, drafts, tables)
            committed, _ = decode.draw_and_commit(LOGITS[batch.tokens].clone(), batch, features, tables)
            drafted += int(committed.drafted.sum())
            accepted += int(committed.accepted.sum())
            drafts = K
            guesses = LOGITS[tables.history[slots, tables.length[slots] - 1].long()].softmax(1)
            leave_drafts(torch.multinomial(guesses, K, True, generator=generator), torch.full((SLOTS,), K), slots, tables)
        tokens = tables.history[slots, len(PROMPT) : len(PROMPT) + K + 1].long()
        cells.append((tokens * VOCAB ** torch.arange(K, -1, -1)).sum(1))
    return torch.cat(cells), accepted / drafted


def p_value(cells: Tensor, expected: Tensor) -> float:
    """Of Pearson's chi-square; cells that expect fewer than 5 are put together. Wilson and Hilferty's approximation (1931)."""
    found = torch.bincount(cells, minlength=len(expected)).double()
    wanted = expected * len(cells)
    assert not found[wanted == 0].any(), "a token that has no probability"
    small = wanted < 5
    found = torch.cat((found[~small], found[small].sum().view(1)))
    wanted = torch.cat((wanted[~small], wanted[small].sum().view(1)))
    found, wanted = found[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    statistic = float(((found - wanted) ** 2 / wanted).sum())
    spread = 2 / (9 * freedom)
    z = ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return 0.5 * math.erfc(z / math.sqrt(2))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The tensors are small: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", CASES)
def test_joint_distribution(case: str) -> None:
    params = SamplingParams(max_tokens=8, **CASES[case])
    if params.min_tokens:
        # A sequence ends at the stop id, which has a chance from the third token on only: all have three tokens.
        assert params.min_tokens == K
    cells, share = sample(params)
    assert len(cells) == 100_000
    assert 0.1 < share < 0.9
    assert p_value(cells, joint(params)) > 1e-3


def accepting(rule: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Committed]:
    """`commit` with another rule of acceptance: (drawn, drafts) → which are right. An accepted draft becomes the token."""

    def biased(drawn: Tensor, drafts: Tensor, *others: Any) -> Committed:
        right = rule(drawn[:, :-1], drafts)
        return commit(torch.cat((torch.where(right, drafts, drawn[:, :-1]), drawn[:, -1:]), 1), drafts, *others[:3], right)

    return biased


BIASED = {
    "likes_drafts": accepting(lambda drawn, drafts: (drawn == drafts) | ((drawn + drafts) % 5 == 4)),
    "believes_all": accepting(lambda drawn, drafts: torch.ones_like(drafts, dtype=torch.bool)),
}


@pytest.mark.parametrize("case", ["plain", "repetition"])
@pytest.mark.parametrize("bias", BIASED)
def test_a_biased_verifier_is_found_out(case: str, bias: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "commit", BIASED[bias])
    params = SamplingParams(max_tokens=8, **CASES[case])
    try:
        assert p_value(sample(params, 5)[0], joint(params)) < 1e-6
    except AssertionError as error:
        assert "no probability" in str(error)  # noqa: PT017  (both are found out)


def test_noise_that_forgets_the_position_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token alone would be distributed right."""
    draw = decode.draw
    monkeypatch.setattr(decode, "draw", lambda logits, slots, positions, *rest: draw(logits, slots, positions * 0, *rest))
    params = SamplingParams(max_tokens=8)
    assert p_value(sample(params, 5)[0], joint(params)) < 1e-6
