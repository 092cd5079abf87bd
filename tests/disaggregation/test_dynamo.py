"""Dynamo's real front end in front of prefill and decode workers: the answers of one worker, and the bytes that they take."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from processes.server import START_TIMEOUT, TINY_LLAMA

from .dynamo import Dynamo, dynamo, free_port

pytestmark = pytest.mark.dynamo
PROMPTS = ["hi", "Once upon a time " * 12, "Once upon a time " * 12 + "there was a page more to say about it."]
OPTIONS: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 0.9, "seed": 3}]
BYTES = int(TINY_LLAMA["num_hidden_layers"] * 2 * TINY_LLAMA["num_key_value_heads"] * TINY_LLAMA["head_dim"] * 4)  # type: ignore[call-overload,operator]
"""Of one token's KV in float32."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Dynamo, dict[str, str]]]:
    """Models: `whole` by one worker, `random` likewise, whose drafts are accepted at random, `push` and `pull` by two each;
    metrics of the decode workers, and of `random`."""
    with dynamo(tmp_path_factory.mktemp("dynamo")) as front:
        metrics = {}
        for name, options in (("push", ()), ("pull", ("--pull",))):
            port = free_port()
            front.worker(name, "prefill", "--set", f"plugins.kv_layerwise.port={port}", *options)
            metrics[name] = front.worker(name, "decode", "--set", f'plugins.kv_layerwise.peers=["127.0.0.1:{port}"]')
        front.worker("whole", "both")
        metrics["random"] = front.worker("random", "both", *(f"--set={key}={value}" for key, value in SYNTHETIC.items()))
        front.wait_for("whole", "random", "push", "pull")
        yield front, metrics


SYNTHETIC = {
    "speculative.method": "pld",
    "speculative.k": 2,
    "plugins.spec_pld.shortest": 1,
    "speculative.synthetic_acceptance": 2.0,
}
MARK = "SYNTHETIC: drafts are accepted at random, 2.0 tokens a step, so answers mean nothing"


def counters(url: str) -> dict[str, float]:
    """`fluent_handoffs_total` by counter, and `open`."""
    found = {}
    for line in httpx.get(url, timeout=10).text.splitlines():
        if line.startswith('fluent_handoffs_total{counter="'):
            found[line.split('"')[1]] = float(line.rpartition(" ")[2])
        elif line.startswith("fluent_handoffs_open"):
            found["open"] = float(line.rpartition(" ")[2])
    return found


def ask(front: Dynamo, model: str, prompt: str, **options: Any) -> dict[str, Any]:
    body = {"model": model, "max_tokens": 12, "ignore_eos": True, "messages": [{"role": "user", "content": prompt}], **options}
    answer = front.client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.parametrize("name", ["push", "pull"])
def test_the_answers_of_one_worker(cluster: tuple[Dynamo, dict[str, str]], name: str) -> None:
    front, metrics = cluster
    before = counters(metrics[name])
    taken = 0
    for options in OPTIONS:
        for prompt in PROMPTS:
            whole, handed = (ask(front, model, prompt, **options) for model in ("whole", name))
            assert handed["choices"] == whole["choices"]
            assert handed["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
            taken += handed["usage"]["prompt_tokens"] * BYTES
    after = counters(metrics[name])
    assert after.get("local_prefills", 0) == after.get("retries", 0) == 0
    assert after["handoffs_received"] - before.get("handoffs_received", 0) == len(OPTIONS) * len(PROMPTS)
    sent = {key: after[key] - before.get(key, 0) for key in ("received_bytes", "saved_bytes")}
    assert sent["received_bytes"] + sent["saved_bytes"] == taken
    assert sent["saved_bytes"] > 0  # the third prompt begins as the second


@pytest.mark.parametrize("name", ["push", "pull"])
def test_a_client_that_leaves(cluster: tuple[Dynamo, dict[str, str]], name: str) -> None:
    front, metrics = cluster
    body = {"model": name, "max_tokens": 4000, "ignore_eos": True, "stream": True, "prompt": "left"}
    with front.client.stream("POST", "/v1/completions", json=body) as events:
        next(events.iter_lines())
    deadline = time.monotonic() + START_TIMEOUT
    while not figure(metrics[name], 'fluent_requests_finished_total{finish_reason="abort"}') or counters(metrics[name])["open"]:
        assert time.monotonic() < deadline


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_drafts_that_were_accepted_at_random(cluster: tuple[Dynamo, dict[str, str]], path: str) -> None:
    """A client that asks for the engine's own data has the mark in every chunk that has tokens; the worker's log and metrics
    have it, whoever asks."""
    front, metrics = cluster
    asked = {"messages": [{"role": "user", "content": "ab"}]} if path.startswith("chat") else {"prompt": "ababab"}
    body = {
        "model": "random",
        "max_tokens": 96,
        "temperature": 0,
        "ignore_eos": True,
        "nvext": {"extra_fields": ["engine_data"]},
        **asked,
    }
    whole = front.client.post(f"/v1/{path}", json=body).json()
    assert whole["nvext"]["engine_data"]["synthetic"] == MARK
    drafts = whole["usage"]["completion_tokens_details"]
    assert drafts["accepted_prediction_tokens"] + drafts["rejected_prediction_tokens"] > 0
    text = front.client.post(f"/v1/{path}", json={**body, "stream": True}).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    marks = [event["nvext"]["engine_data"]["synthetic"] for event in events if event["choices"]]
    assert len(marks) > 1
    assert set(marks) == {MARK}
    assert figure(metrics["random"], "fluent_spec_decode_synthetic") == 1
    assert MARK in (front.folder / "random-both.log").read_text()


def figure(url: str, name: str) -> float:
    lines = httpx.get(url, timeout=10).text.splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(name)), 0.0)
