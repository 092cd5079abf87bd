"""Load on a server's OpenAI-compatible API: requests arrive at random, whether or not earlier ones are done (open loop)."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from ..core.errors import ConfigError
from .report import percentiles

SAFE_VOCABULARY = 1000
"""Token ids below this are sent to a server that does not tell the size of its vocabulary."""


@dataclass(slots=True)
class Sample:
    """One request: when it was sent, and when each chunk of tokens came. Seconds."""

    sent: float
    chunks: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str | None = None
    synthetic: str | None = None
    """What the answer says of itself, if drafts were accepted at random."""

    @property
    def ttft(self) -> float:
        return self.chunks[0] - self.sent

    @property
    def tpot(self) -> float:
        """Time per output token after the first."""
        return (self.chunks[-1] - self.chunks[0]) / max(1, self.tokens - 1)

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.chunks, self.chunks[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Load:
    url: str
    requests: int
    rate: float
    """Requests a second, Poisson; 0 sends all at once."""
    inputs: tuple[int, int]
    outputs: tuple[int, int]
    seed: int
    ttft_goal: float
    """Seconds. With `tpot_goal`: a request that meets both counts as good, and good ones a second are the goodput."""
    tpot_goal: float
    api_key: str | None = None


async def measure(load: Load) -> dict[str, Any]:
    """Raises `ConfigError` if the server cannot be reached, has no OpenAI API or refuses such requests."""
    headers = {"Authorization": f"Bearer {load.api_key}"} if load.api_key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=load.url, headers=headers, timeout=None, limits=limits) as client:
        model, vocab = await _model(client, load)
        rng = random.Random(load.seed)
        bodies = [
            _body(model, rng.choices(range(vocab), k=rng.randint(*load.inputs)), rng.randint(*load.outputs))
            for _ in range(load.requests)
        ]
        warm = await _one(client, _body(model, bodies[0]["prompt"][:8], 2))
        if warm.error is not None:
            raise ConfigError(f"{load.url} refused a first request: {warm.error}.", fix="Mend that first.")
        started = arrival = time.perf_counter()
        tasks = []
        for body in bodies:
            await asyncio.sleep(max(0.0, arrival - time.perf_counter()))
            tasks.append(asyncio.create_task(_one(client, body)))
            arrival += rng.expovariate(load.rate) if load.rate else 0.0
        samples = await asyncio.gather(*tasks)
        seconds = time.perf_counter() - started
    return summary(samples, seconds, load)


def summary(samples: list[Sample], seconds: float, load: Load) -> dict[str, Any]:
    done = [s for s in samples if s.error is None and s.chunks]
    good = [s for s in done if s.ttft <= load.ttft_goal and s.tpot <= load.tpot_goal]
    tokens = sum(s.tokens for s in done)
    return {
        "requests": len(samples),
        "failed": len(samples) - len(done),
        "errors": sorted({s.error for s in samples if s.error})[:5],
        "s": seconds,
        "synthetic": next((s.synthetic for s in samples if s.synthetic), None),
        "out_tokens": tokens,
        "tok_s": tokens / seconds,
        "requests_s": len(done) / seconds,
        "goodput_requests_s": len(good) / seconds,
        "ttft_ms": {k: v * 1e3 for k, v in percentiles([s.ttft for s in done]).items()},
        "tpot_ms": {k: v * 1e3 for k, v in percentiles([s.tpot for s in done if s.tokens > 1]).items()},
        "itl_ms": {k: v * 1e3 for k, v in percentiles([gap for s in done for gap in s.gaps]).items()},
    }


async def _model(client: httpx.AsyncClient, load: Load) -> tuple[str, int]:
    """Name of the first model served, and how many token ids are safe to send."""
    try:
        answer = await client.get("/v1/models")
        answer.raise_for_status()
        model = answer.json()["data"][0]
        name, vocab, longest = model["id"], model.get("vocab_size"), model.get("max_model_len")
    except httpx.HTTPStatusError as error:
        raise ConfigError(
            f"{load.url} refused /v1/models: {_told(error.response)}.",
            fix="Give the --url, and the --api-key, of a server with OpenAI's API.",
        ) from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConfigError(f"{load.url} does not answer: {error}.", fix="Start `fluent serve`, or give its --url.") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ConfigError(f"{load.url}/v1/models is not OpenAI's API.", fix="Give the --url of a server that has it.") from None
    if longest is not None and load.inputs[1] + load.outputs[1] > longest:
        raise ConfigError(
            f"{load.inputs[1]} prompt tokens and {load.outputs[1]} new ones exceed the server's context of {longest} tokens.",
            fix="Lower --input-len or --output-len.",
        )
    return name, vocab or SAFE_VOCABULARY


def _told(refusal: httpx.Response) -> str:
    """The message of an error in OpenAI's format, else the status."""
    try:
        return str(refusal.json()["error"]["message"]).rstrip(".")
    except (ValueError, LookupError, TypeError):
        return f"status {refusal.status_code}"


def _body(model: str, prompt: list[int], budget: int) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": budget,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def _one(client: httpx.AsyncClient, body: dict[str, Any]) -> Sample:
    sample = Sample(time.perf_counter())
    try:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                sample.error = f"{answer.status_code}: {(await answer.aread())[:200].decode(errors='replace')}"
                return sample
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    sample.error = str(event["error"])
                sample.synthetic = sample.synthetic or event.get("synthetic")
                if event.get("choices"):
                    sample.chunks.append(time.perf_counter())
                if event.get("usage"):
                    sample.tokens = event["usage"]["completion_tokens"]
            sample.tokens = sample.tokens or len(sample.chunks)
    except httpx.HTTPError as error:
        sample.error = f"{type(error).__name__}: {error}"
    return sample
