"""Penalties, bias and min_tokens against the same rules written for one row in plain Python."""

from __future__ import annotations

import torch

from fluentllm.core.sequence import features_of
from fluentllm.core.slots import SlotTables
from fluentllm.core.types import Feature, SamplingParams, SlotInit
from fluentllm.step.processors import process_logits

VOCAB = 40


def admit(
    tables: SlotTables, slot: int, tokens: list[int], prompt_length: int, params: SamplingParams, stops: list[int]
) -> None:
    init = SlotInit(slot, 1, tokens, prompt_length, 0, [1], params, stops)
    tables.admit(init, features_of(params))


def plain(logits: list[float], prompt: list[int], output: list[int], params: SamplingParams, stops: list[int]) -> list[float]:
    out = list(logits)
    for token in set(prompt) | set(output):
        out[token] = out[token] / params.repetition_penalty if out[token] > 0 else out[token] * params.repetition_penalty
    for token in set(output):
        out[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    for token, bias in params.logit_bias.items():
        out[token] += bias
    if len(output) < params.min_tokens:
        for token in stops:
            out[token] = float("-inf")
    return out


def test_every_row_sees_its_own_history_and_the_drafts_before_it() -> None:
    generator = torch.Generator().manual_seed(0)
    tables = SlotTables(4, 64, 16, VOCAB, torch.device("cpu"), max_drafts=3)
    cases = {
        0: ([3, 3, 5, 9], [7, 7, 3], SamplingParams(max_tokens=9, repetition_penalty=1.3, frequency_penalty=0.4), [2]),
        2: (
            [1],
            [],
            SamplingParams(max_tokens=9, presence_penalty=-0.7, logit_bias={0: 2.0, 11: -100.0}, min_tokens=2),
            [0, 5],
        ),
        3: ([8, 9], [9], SamplingParams(max_tokens=9), []),
    }
    for slot, (prompt, output, params, stops) in cases.items():
        admit(tables, slot, prompt + output, len(prompt), params, stops)
    slots = torch.tensor(list(cases))
    drafts = torch.randint(0, VOCAB, (3, 3), generator=generator)
    row_slots = slots.repeat_interleave(4)
    positions = (tables.length[slots].unsqueeze(1) + torch.arange(4)).view(-1)
    logits = torch.randn(12, VOCAB, generator=generator)
    features = Feature.PENALTIES | Feature.BIAS | Feature.MIN_TOKENS
    # Slot 3 has no penalties: its counts are never kept, and its row must come out as it went in.
    got = process_logits(logits.clone(), row_slots, positions, drafts, tables, features)
    for i, (prompt, output, params, stops) in enumerate(cases.values()):
        for j in range(4):
            seen = output + drafts[i, :j].tolist()
            expected = torch.tensor(plain(logits[4 * i + j].tolist(), prompt, seen, params, stops))
            torch.testing.assert_close(got[4 * i + j], expected)


def test_a_slot_reused_forgets_the_request_before() -> None:
    tables = SlotTables(1, 64, 16, VOCAB, torch.device("cpu"))
    first = SamplingParams(max_tokens=4, repetition_penalty=2.0, logit_bias={1: 50.0})
    admit(tables, 0, [1, 2, 3], 3, first, [])
    second = SamplingParams(max_tokens=4, repetition_penalty=2.0, logit_bias={2: 1.0})
    admit(tables, 0, [5], 1, second, [])
    logits = torch.ones(1, VOCAB)
    features = Feature.PENALTIES | Feature.BIAS
    none = torch.empty(1, 0, dtype=torch.int64)
    got = process_logits(logits.clone(), torch.tensor([0]), torch.tensor([1]), none, tables, features)
    torch.testing.assert_close(got[0], torch.tensor(plain([1.0] * VOCAB, [5], [], second, [])))
