"""The engine's figures as metric families: what `EngineStats` counts, and the latencies that were observed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric

    from fluentllm.core.session import Engine
    from fluentllm.core.types import EngineStats, ModelInfo, SpeculativeStats

    from .requests import Latencies


def scrape(engine: Engine, latencies: Latencies) -> bytes:
    """Everything, in the text format."""
    registry = CollectorRegistry()
    registry.register(EngineCollector(engine, latencies))
    return generate_latest(registry)


class EngineCollector(Collector):
    def __init__(self, engine: Engine, latencies: Latencies) -> None:
        self._engine = engine
        self._latencies = latencies

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        yield from _load(stats)
        yield _cache(self._engine.info)
        yield from _counts(stats)
        yield from _histograms(self._latencies)
        yield _labelled(
            "fluent_requests_finished", "Requests that ended, by reason.", "finish_reason", self._latencies.finished
        )
        yield _labelled("fluent_requests_refused", "Requests that did not enter, by error code.", "code", stats.refused)
        if stats.handoff:
            yield from _handoffs(stats.handoff)
        if stats.speculative is not None:
            yield from _speculation(stats.speculative)


def _cache(info: ModelInfo) -> GaugeMetricFamily:
    about = GaugeMetricFamily("fluent_kv_cache_info", "Always 1; how KV is kept.", labels=["dtype", "page_size"])
    about.add_metric([info.kv_dtype, str(info.page_size)], 1.0)
    return about


def _handoffs(counters: dict[str, int]) -> Iterator[Metric]:
    now = {"open": "Handoffs that are not over.", "quarantined_pages": "KV pages that a late writer may still write to."}
    for name, text in now.items():
        yield _gauge(f"fluent_handoffs_{name}", text, counters.get(name, 0))
    events = {name: count for name, count in counters.items() if name not in now}
    yield _labelled("fluent_handoffs", "Events, bytes and failures of handoffs between engines, by name.", "counter", events)


def _load(stats: EngineStats) -> Iterator[Metric]:
    yield _gauge("fluent_num_requests_running", "Requests on the device.", stats.running)
    yield _gauge("fluent_num_requests_waiting", "Requests in the queue.", stats.waiting)
    total = stats.pages_total
    yield _gauge("fluent_kv_cache_usage_ratio", "Share of KV pages that requests hold, 0 to 1.", stats.pages_leased / total)
    text = "Pages of the KV pool, by state; some are cached and leased."
    pages = GaugeMetricFamily("fluent_kv_cache_pages", text, labels=["state"])
    for state, count in (
        ("total", total),
        ("free", stats.pages_free),
        ("cached", stats.pages_cached),
        ("leased", stats.pages_leased),
    ):
        pages.add_metric([state], count)
    yield pages


def _counts(stats: EngineStats) -> Iterator[Metric]:
    for name, text, count in (
        ("fluent_steps", "Steps launched.", stats.steps),
        ("fluent_prompt_tokens", "Prompt tokens of requests that got their first token.", stats.prompt_tokens),
        ("fluent_generation_tokens", "Tokens generated.", stats.generated_tokens),
        ("fluent_prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prompt_tokens),
        ("fluent_prefix_cache_hits", "Prompt tokens whose KV was in the prefix cache.", stats.cached_tokens),
        ("fluent_num_preemptions", "Times that a running request had to wait again.", stats.preemptions),
    ):
        yield CounterMetricFamily(name, text, value=count)


def _histograms(latencies: Latencies) -> Iterator[Metric]:
    for name, text, histogram in (
        ("fluent_request_queue_time_seconds", "From arrival to the first step.", latencies.queue),
        ("fluent_time_to_first_token_seconds", "From arrival to the first token.", latencies.first_token),
        (
            "fluent_inter_token_latency_seconds",
            "Between outputs of a request, for each token of the later one.",
            latencies.between_tokens,
        ),
        ("fluent_e2e_request_latency_seconds", "From arrival to the end, without aborted requests.", latencies.whole),
        ("fluent_request_prompt_tokens", "Prompt tokens of ended requests.", latencies.prompt_tokens),
        ("fluent_request_generation_tokens", "Generated tokens of ended requests.", latencies.generated_tokens),
        ("fluent_step_duration_seconds", "Of the step's programs on the device.", latencies.step_seconds),
    ):
        yield histogram.family(name, text)


def _speculation(stats: SpeculativeStats) -> Iterator[Metric]:
    proposer = stats.info.method
    synthetic = stats.info.synthetic_acceptance is not None
    text = "1: drafts are accepted at random, and answers mean nothing."
    yield _gauge("fluent_spec_decode_synthetic", text, float(synthetic))
    enabled = GaugeMetricFamily("fluent_spec_decode_enabled", "1 while the proposer may draft.", labels=["proposer"])
    enabled.add_metric([proposer], float(stats.error is None and not stats.collapsed))
    yield enabled
    yield _labelled(
        "fluent_spec_decode_collapses",
        "Times that acceptance collapsed and the proposer was switched off for a while.",
        "proposer",
        {proposer: stats.collapses},
    )
    text = "Times that a request's drafts were verified."
    yield _labelled("fluent_spec_decode_verifications", text, "proposer", {proposer: stats.verifications})
    labels = ["proposer", "position"]
    drafted = CounterMetricFamily("fluent_spec_decode_draft_tokens", "Drafts verified, by position from 0.", labels=labels)
    accepted = CounterMetricFamily("fluent_spec_decode_accepted_tokens", "Of these, accepted.", labels=labels)
    for position, (wanted, right) in enumerate(zip(stats.drafted, stats.accepted, strict=True)):
        drafted.add_metric([proposer, str(position)], wanted)
        accepted.add_metric([proposer, str(position)], right)
    yield drafted
    yield accepted


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _labelled(name: str, text: str, label: str, counts: dict[str, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in counts.items():
        family.add_metric([value], count)
    return family
