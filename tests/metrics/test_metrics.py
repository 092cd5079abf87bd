"""`GET /metrics` of a real engine, read with prometheus_client's own parser."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any

import pytest
from api.conftest import TINY, serving_real
from frontend.checkpoints import write_chat_folder
from prometheus_client.parser import text_string_to_metric_families

from fluentllm.core.protocols import RequestEvent
from fluentllm.core.types import SlotResult, StepResult
from fluentllm.plugins.metrics_prometheus.histogram import Histogram
from fluentllm.plugins.metrics_prometheus.requests import Latencies

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from api.conftest import Api

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


async def scraped(api: Api) -> Samples:
    response = await api.http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    return parsed(response.text)


def parsed(text: str) -> Samples:
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(names) == len(set(names)), "each family once"
    assert all(family.documentation and family.name.startswith("fluent_") for family in families)
    samples: Samples = {}
    for family in families:
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in samples
            samples[key] = sample.value
    return samples


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, tuple(sorted(labels.items()))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import json

    folder = write_chat_folder(tmp_path_factory.mktemp("metrics"))
    (folder / "config.json").write_text(json.dumps(TINY))
    return folder


async def test_what_a_server_did(folder: Path) -> None:
    settings = {
        "speculative.method": "pld",
        "speculative.k": 3,
        "plugins.spec_pld.shortest": 1,
        "kv.page_size": 4,
        "kv.dtype": "fp8",
    }
    async with serving_real(folder, **settings) as api:
        before = await scraped(api)
        assert value(before, "fluent_engine_up") == 1
        assert value(before, "fluent_build_info", version=__import__("fluentllm").__version__, model="tiny") == 1
        assert value(before, "fluent_kv_cache_info", dtype="float8_e4m3fn", page_size="4") == 1
        assert value(before, "fluent_generation_tokens_total") == 0
        prompt = [5, 6, 7, 5, 6, 7, 5, 8, 9]
        usages = []
        for _ in range(2):
            answer = await api.complete(prompt, max_tokens=20, temperature=0, ignore_eos=True)
            usages.append(answer["usage"])
        await api.error("/v1/completions", status=400, prompt=[], max_tokens=4)
        after = await scraped(api)

        for name in ("fluent_prompt_tokens_total", "fluent_prefix_cache_queries_total"):
            assert value(after, name) == 18
        cached = sum((usage["prompt_tokens_details"] or {}).get("cached_tokens", 0) for usage in usages)
        assert value(after, "fluent_prefix_cache_hits_total") == cached == 8
        assert value(after, "fluent_generation_tokens_total") == 40
        assert value(after, "fluent_requests_finished_total", finish_reason="length") == 2
        assert value(after, "fluent_requests_finished_total", finish_reason="abort") == 0
        assert value(after, "fluent_num_requests_running") == value(after, "fluent_num_requests_waiting") == 0
        assert value(after, "fluent_num_preemptions_total") == 0
        assert 0 < value(after, "fluent_kv_cache_pages", state="free") < value(after, "fluent_kv_cache_pages", state="total")
        for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
            assert value(after, f"fluent_{name}_count") == 2
            assert 0 <= value(after, f"fluent_{name}_sum") < 60
        # The first token has none before it.
        assert value(after, "fluent_inter_token_latency_seconds_count") == 38
        assert value(after, "fluent_request_generation_tokens_bucket", le="32.0") == 2
        assert value(after, "fluent_request_generation_tokens_bucket", le="16.0") == 0
        assert value(after, "fluent_step_duration_seconds_count") == value(after, "fluent_steps_total") > 0

        details = [usage["completion_tokens_details"] for usage in usages]
        labels = [{"proposer": "pld", "position": str(position)} for position in range(3)]
        accepted = [value(after, "fluent_spec_decode_accepted_tokens_total", **at) for at in labels]
        drafted = [value(after, "fluent_spec_decode_draft_tokens_total", **at) for at in labels]
        assert sum(accepted) == sum(d["accepted_prediction_tokens"] for d in details) > 0
        assert drafted == [sum(column) for column in zip(*(d["verified_by_position"] for d in details), strict=True)]
        assert drafted[0] == value(after, "fluent_spec_decode_verifications_total", proposer="pld")
        assert accepted == sorted(accepted, reverse=True)
        assert value(after, "fluent_spec_decode_enabled", proposer="pld") == 1
        assert value(after, "fluent_spec_decode_collapses_total", proposer="pld") == 0
        assert value(after, "fluent_spec_decode_synthetic") == 0


async def test_aborted_and_refused_requests(folder: Path) -> None:
    body: dict[str, Any] = {"prompt": [5, 6], "max_tokens": 500, "ignore_eos": True}
    async with serving_real(folder, **{"scheduler.max_running": 1, "scheduler.max_waiting": 1}) as api:
        clients = []
        for running, waiting in ((1, 0), (1, 1)):
            clients.append(asyncio.create_task(api.http.post("/v1/completions", json=body)))
            during = await until(api, lambda s, waiting=waiting: value(s, "fluent_num_requests_waiting") == waiting)
            assert value(during, "fluent_num_requests_running") == running
        assert value(during, "fluent_kv_cache_usage_ratio") > 0
        await api.error("/v1/completions", status=429, **body)
        for client in clients:
            client.cancel()
        after = await until(api, lambda s: value(s, "fluent_requests_finished_total", finish_reason="abort") == 2)
        assert value(after, "fluent_requests_refused_total", code="queue_full") == 1
        assert value(after, "fluent_e2e_request_latency_seconds_count") == 0
        assert value(after, "fluent_requests_finished_total", finish_reason="length") == 0


async def until(api: Api, right: Callable[[Samples], bool]) -> Samples:
    async with asyncio.timeout(20):
        while True:
            samples = await scraped(api)
            if value(samples, "fluent_num_requests_running") + value(samples, "fluent_num_requests_waiting") and right(samples):
                return samples
            if value(samples, "fluent_requests_finished_total", finish_reason="abort") and right(samples):
                return samples


async def test_without_speculation_nothing_is_said_of_it(folder: Path) -> None:
    async with serving_real(folder) as api:
        assert not any("spec_decode" in name for name, _ in await scraped(api))


async def test_an_engine_that_is_away(folder: Path) -> None:
    async with serving_real(folder) as api:
        api.services.client.stopped()  # type: ignore[attr-defined]
        await api.http.get("/live")
        samples = await scraped(api)
        assert value(samples, "fluent_engine_up") == 0
        assert not any(name.startswith("fluent_kv") for name, _ in samples)


# -------------------------------------------------------------------------------------------------------------------- by hand
def test_histogram() -> None:
    histogram = Histogram((1.0, 2.0, 4.0))
    for seen in (0.5, 1.0, 1.5, 4.0, 9.0):
        histogram.observe(seen)
    histogram.observe(3.0, times=2)
    family = histogram.family("fluent_x", "About x.")
    buckets = {sample.labels["le"]: sample.value for sample in family.samples if sample.name.endswith("_bucket")}
    assert buckets == {"1.0": 2, "2.0": 3, "4.0": 6, "+Inf": 7}
    totals = {sample.name: sample.value for sample in family.samples if not sample.labels}
    assert totals == {"fluent_x_count": 7, "fluent_x_sum": 22.0}
    assert math.isclose(sum(histogram.counts), 7)


def event(kind: Any, at: float, **details: Any) -> RequestEvent:
    return RequestEvent(kind, "r", at, details)


def test_a_preempted_request_queues_once() -> None:
    latencies = Latencies()
    for each in (event("queued", 1.0), event("scheduled", 3.0), event("first_token", 4.0), event("scheduled", 9.0)):
        latencies.request(each)
    latencies.request(event("finished", 11.0, reason="stop", prompt_tokens=3, generated_tokens=7))
    assert (latencies.queue.sum, sum(latencies.queue.counts)) == (2.0, 1)
    assert latencies.first_token.sum == 3.0
    assert latencies.whole.sum == 10.0
    assert latencies.finished["stop"] == 1
    # What began before anyone looked is left alone.
    latencies.request(event("first_token", 12.0))
    assert sum(latencies.first_token.counts) == 1


def test_a_request_that_was_refused_while_it_waited_did_not_finish() -> None:
    latencies = Latencies()
    latencies.request(event("queued", 1.0))
    latencies.request(event("finished", 2.0, reason="refused", prompt_tokens=3, generated_tokens=0))
    assert not any(latencies.finished.values())
    assert not any(latencies.whole.counts)
    latencies.request(event("first_token", 3.0))  # it is known no more
    assert not any(latencies.first_token.counts)


def test_tokens_of_another_request_in_the_same_slot_are_not_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    from fluentllm.plugins.metrics_prometheus import requests

    now = 0.0
    monkeypatch.setattr(requests.time, "monotonic", lambda: now)
    latencies = Latencies()

    def step(at: float, *slots: SlotResult) -> None:
        nonlocal now
        now = at
        latencies.step(StepResult(step=0, slots=list(slots), seconds=0.1))

    step(1.0, SlotResult(0, 1, [5], None), SlotResult(1, 1, [], None))
    step(2.0, SlotResult(0, 1, [5, 6], None), SlotResult(1, 1, [4], None))
    step(4.0, SlotResult(0, 1, [7], "stop"))
    step(5.0, SlotResult(0, 2, [8], None))
    step(9.0, SlotResult(1, 2, [8], None))
    assert sum(latencies.between_tokens.counts) == 3
    assert latencies.between_tokens.sum == pytest.approx(0.5 * 2 + 2.0)
    assert latencies.steps == 5
