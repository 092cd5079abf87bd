"""What Dynamo's requests become, and what it is answered; the dictionaries are those that Dynamo 1.6.1 sent."""

from __future__ import annotations

from typing import Any

import pytest

from fluentllm.core.errors import InvalidRequest
from fluentllm.core.types import (
    GrammarSpec,
    Handoff,
    HandoffReport,
    RequestOutput,
    SamplingParams,
    SpeculativeInfo,
    TokenLogprob,
)
from fluentllm.dynamo.requests import chunk_of, count, ended, request_of, transfer_params
from fluentllm.frontend import structured
from fluentllm.frontend.generation import Usage

BODY: dict[str, Any] = {
    "token_ids": [5, 6, 7],
    "model": "tiny",
    "stop_conditions": {"max_tokens": 12, "stop": None, "stop_token_ids_hidden": [1], "min_tokens": None, "ignore_eos": None},
    "sampling_options": {"n": None, "temperature": 0.0, "top_p": None, "top_k": -1, "seed": 7, "guided_decoding": None},
    "output_options": {"logprobs": 2, "prompt_logprobs": None},
}
MET = {"bootstrap_host": "10.0.0.5", "bootstrap_port": 8998, "bootstrap_room": 77}


def of(role: str = "both", **more: Any) -> Any:
    return request_of({**BODY, **more}, "a", max_model_len=100, role=role)


def test_sampling() -> None:
    expected = SamplingParams(max_tokens=12, temperature=0.0, seed=7, stop_token_ids=(1,), logprobs=2)
    assert of().params == expected
    assert (of().id, of().prompt, of().handoff) == ("a", [5, 6, 7], None)


def test_what_is_not_given() -> None:
    params = of(stop_conditions=None, sampling_options={}, output_options=None).params
    assert params == SamplingParams(max_tokens=97, seed=params.seed)
    assert of(sampling_options={}).params.seed != of(sampling_options={}).params.seed


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"n": 2}, "n is above 1"),
        ({"guided_decoding": {"whitespace_pattern": " "}}, "whitespace_pattern"),
        ({"guided_decoding": {"json": "{"}}, "JSON"),
    ],
)
def test_what_is_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        of(sampling_options=options)


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"json": SCHEMA}, structured.json_schema(SCHEMA)),
        ({"json": '{"type": "string"}', "regex": None, "backend": "xgrammar"}, structured.json_schema({"type": "string"})),
        ({"regex": "a+"}, structured.regex("a+")),
        ({"choice": ["x", "y"]}, structured.choice(["x", "y"])),
        ({"grammar": "root ::= 'a'", "choice": []}, structured.grammar("root ::= 'a'")),
        ({"structural_tag": {"format": {}}}, structured.structural_tag('{"format": {}}')),
        ({"backend": "xgrammar"}, None),
        ({}, None),
    ],
)
def test_grammars(given: dict[str, Any], expected: GrammarSpec | None) -> None:
    assert of(sampling_options={"guided_decoding": given}).params.grammar == expected


def test_both_at_once() -> None:
    assert of("prefill", bootstrap_info=MET).handoff == Handoff(id="room-77", concurrent=True)
    assert of("decode", bootstrap_info=MET).handoff == Handoff(id="room-77", host="10.0.0.5", port=8998, concurrent=True)
    assert transfer_params(HandoffReport(id="room-77"), {"bootstrap_info": MET}) == MET


def test_one_after_the_other() -> None:
    """What prefill answers is what decode understands."""
    first = of("prefill").handoff
    assert first == Handoff(id="a")
    told = transfer_params(HandoffReport(id=first.id, host="10.0.0.5", port=8998), BODY)
    assert of("decode", prefill_result={"disaggregated_params": told}).handoff == Handoff(id="a", host="10.0.0.5", port=8998)
    assert of("decode").handoff is None  # no prefill worker: computed where it decodes


def test_answers() -> None:
    logprobs = [TokenLogprob(3, -0.5, 1, [(3, -0.5), (4, -1.5)])]
    output = RequestOutput(id="a", tokens=[3], logprobs=logprobs, finish_reason="length")
    chunk = chunk_of(output, None)
    assert (chunk["token_ids"], chunk["index"], chunk["log_probs"]) == ([3], 0, [-0.5])
    assert [(top["rank"], top["token_id"], top["logprob"]) for top in chunk["top_logprobs"][0]] == [(1, 3, -0.5), (2, 4, -1.5)]
    assert "engine_data" not in chunk
    usage = Usage(prompt_tokens=3)
    for step in (RequestOutput(id="a", tokens=[5, 6, 7], cached_tokens=2), output):
        count(usage, step)
    last = ended(output, usage)
    assert last["finish_reason"] == "length"
    assert last["completion_usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_answers_of_drafts() -> None:
    """Counted as `fluent serve` counts them."""
    usage = Usage(prompt_tokens=3, speculative=SpeculativeInfo(method="pld", k=2, max_k=2, synthetic_acceptance=2.0))
    steps = [([5], 0, 0), ([6, 7, 8], 2, 2), ([9, 4], 2, 1), ([2], 2, 2)]
    outputs = [RequestOutput(id="a", tokens=tokens, drafted=d, accepted=a) for tokens, d, a in steps]
    for output in outputs:
        count(usage, output)
    assert ended(outputs[-1], usage)["completion_usage"]["completion_tokens_details"] == {
        "accepted_prediction_tokens": 3,
        "rejected_prediction_tokens": 3,
        "proposer": "pld",
        "verified_by_position": [3, 3],
        "accepted_by_position": [2, 1],
        "synthetic_acceptance": 2.0,
    }


def test_drafts_that_were_accepted_at_random_are_told_in_every_chunk() -> None:
    mark = SpeculativeInfo(method="pld", k=2, max_k=2, synthetic_acceptance=2.0).synthetic
    assert mark is not None
    for output in (RequestOutput(id="a", tokens=[3]), RequestOutput(id="a", finish_reason="stop")):
        assert chunk_of(output, mark)["engine_data"] == {"synthetic": mark}
