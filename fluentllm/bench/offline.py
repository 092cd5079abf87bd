"""Latency and throughput of an engine in this process: token ids in, token ids out, no HTTP and no text."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import ConfigError
from ..core.types import Request, RequestOutput, SamplingParams, SpeculativeInfo
from ..frontend.client import EngineClient
from ..local import LocalEngine
from .beside import Ask, Beside


@dataclass(slots=True)
class Drafts:
    """Of the timed requests."""

    steps: int = 0
    """Of a sequence; its first token counts as one."""
    verifications: int = 0
    """Steps of a sequence that verified drafts."""
    drafted: int = 0
    accepted: int = 0
    decodes: Counter[int] = field(default_factory=Counter)
    """Drafts verified → steps of a sequence that did, without its first token's."""
    decoded: int = 0
    """Tokens that these brought."""

    def add(self, output: RequestOutput, *, first: bool) -> None:
        """`first`: of its request, from its prompt."""
        if not first:
            self.decodes[output.drafted] += 1
            self.decoded += len(output.tokens)
        self.steps += 1
        self.verifications += output.drafted > 0
        self.drafted += output.drafted
        self.accepted += output.accepted

    def merge(self, other: Drafts) -> None:
        self.steps += other.steps
        self.verifications += other.verifications
        self.drafted += other.drafted
        self.accepted += other.accepted
        self.decodes += other.decodes
        self.decoded += other.decoded

    @property
    def mean(self) -> float:
        """Drafts that a sequence's step verified on average, its first token's left out."""
        return sum(count * steps for count, steps in self.decodes.items()) / max(1, self.decodes.total())

    @property
    def length(self) -> float | None:
        """Mean tokens a verification, the target's own included; None where nothing was verified."""
        return 1 + self.accepted / self.verifications if self.verifications else None

    def report(self, info: SpeculativeInfo) -> dict[str, Any]:
        """For the JSON."""
        figures: dict[str, Any] = {
            "method": info.method,
            "k": info.k,
            "max_k": info.max_k,
            "verifications": self.verifications,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "mean_accepted_length": self.length,
            "drafts_a_step": self.drafted / max(1, self.steps),
            "synthetic": info.synthetic_acceptance is not None,
        }
        if info.synthetic_acceptance is not None:
            figures["synthetic_acceptance"] = info.synthetic_acceptance
        return figures

    def line(self, info: SpeculativeInfo) -> str:
        """For the terminal."""
        length = f"{self.length:.2f}" if self.length is not None else "none"
        said = (
            f"{info.method}, k {info.k}: {self.drafted / max(1, self.steps):.2f} drafts a step, mean accepted length {length}"
        )
        return f"{said}  SYNTHETIC" if info.synthetic_acceptance is not None else said


@dataclass(slots=True)
class Rounds:
    """Of one batch on one engine."""

    steps: int
    firsts: list[float] = field(default_factory=list)
    """Seconds of each round to one token of everybody."""
    wholes: list[float] = field(default_factory=list)
    """And to `steps` more."""

    def add(self, times: tuple[float, float]) -> None:
        self.firsts.append(times[0])
        self.wholes.append(times[1])

    def figures(self, batch: int) -> dict[str, Any]:
        """Medians. Raises `ConfigError` where a step is too short for so few steps to show."""
        first = statistics.median(self.firsts)
        tpot = (statistics.median(self.wholes) - first) / self.steps
        if tpot <= 0:
            raise ConfigError(f"{self.steps} steps of batch {batch} are lost in the noise.", fix="Measure more --steps.")
        each = [(whole - first) / self.steps * 1e3 for first, whole in zip(self.firsts, self.wholes, strict=True)]
        return {"prefill_s": first, "tpot_ms": tpot * 1e3, "tok_s": batch / tpot, "rounds_ms": each}


def startup(local: LocalEngine) -> None:
    """One token, so that the start's timeline ends with the first token."""
    with local.timeline.stage("first token"):
        local.call(_run(local.generation.client, [_prompt(local, random.Random(0), 8)], [1]))


def latency(
    local: LocalEngine,
    batches: list[int],
    context: int,
    steps: int,
    rounds: int = 3,
    tell: Callable[[str], None] = print,
    drafts: Drafts | None = None,
    beside: Beside | None = None,
) -> list[dict[str, Any]]:
    """For each batch: time a step takes, by (time of steps + 1 new tokens − time of 1) / steps; medians of `rounds` after a
    warm-up, and after what an idle engine captures for such batches. Every prompt is fresh, so nothing comes from the prefix
    cache. Beside it the floor (`floor.py`) of the step in their middle, with drafts by the tokens that steps brought, and its
    share of the time; both None where it is not known what must be read.

    `beside`: the same of this engine, in turns, a round each, and by how many times deterministic mode is slower: one of the
    two engines must be in it.

    Raises `ConfigError` for a batch that cannot run at once, and where a step is too short for so few steps to show.
    """
    from .floor import Floor  # torch, which an engine must have prepared for

    _check_fits(local, max(batches), context + steps + 1)
    rng = random.Random(time.time_ns())
    floor = Floor.of(local.engine)
    if floor is not None:
        tell(f"floors are at {floor.bytes_s / 1e9:.1f} GB/s, which a copy reads and writes here")
    rows = []
    for batch in batches:
        ours, theirs = Rounds(steps), Rounds(steps)
        own = Drafts()
        timed_round(local, rng, batch, context, steps)
        # As an engine would have that had nothing to do for a while. Of two each one has not, while the other is timed.
        local.call(local.engine.preparation.all(batch if beside is None else local.engine.info.slots))
        if beside is not None:
            beside.round(Ask(batch, context, steps, prepare=True))
        for _ in range(rounds):
            ours.add(timed_round(local, rng, batch, context, steps, own))
            if beside is not None:
                theirs.add(beside.round(Ask(batch, context, steps)))
        row: dict[str, Any] = {"batch": batch, "ctx": context, **ours.figures(batch)}
        tpot = row["tpot_ms"] / 1e3
        # The first step reads the prompt's KV and that of its own token, the last that of `steps` tokens.
        least = floor.seconds_a_token(batch, context + (steps + 1) / 2, own) if floor is not None else None
        row["floor_ms"] = least * 1e3 if least is not None else None
        row["share"] = least / tpot if least is not None else None
        if drafts is not None:
            drafts.merge(own)
        line = (
            f"batch {batch:>3}  ctx {context}  prefill {row['prefill_s']:.3f} s  "
            f"TPOT {row['tpot_ms']:.2f} ms  {row['tok_s']:.1f} tok/s"
        )
        info = local.engine.info.speculative
        if least is not None:
            line += f"  floor {row['floor_ms']:.2f} ms ({row['share']:.0%})"
        if info is not None:
            row["tokens_a_step"] = own.decoded / sum(own.decodes.values())
            line += f", {row['tokens_a_step']:.2f} tokens a step" if least is not None else ""
            row["speculative"] = own.report(info)
            line += f"\n           {own.line(info)}"
        if beside is not None:
            line += f"\n           {_slowdown(row, theirs, beside)}"
        tell(line)
        rows.append(row)
    return rows


def _slowdown(row: dict[str, Any], theirs: Rounds, beside: Beside) -> str:
    """Adds what the other engine took, and by how many times deterministic mode is slower; → the line for the terminal."""
    row["beside"] = {"deterministic": beside.about.deterministic, **theirs.figures(row["batch"])}
    plain, fixed = (row, row["beside"]) if beside.about.deterministic else (row["beside"], row)
    row["slowdown"] = fixed["tpot_ms"] / plain["tpot_ms"]
    row["prefill_slowdown"] = fixed["prefill_s"] / plain["prefill_s"]
    return (
        f"deterministic mode: TPOT {fixed['tpot_ms']:.2f} ms instead of {plain['tpot_ms']:.2f} ({row['slowdown']:.2f} ×), "
        f"prefill {fixed['prefill_s']:.3f} s instead of {plain['prefill_s']:.3f} ({row['prefill_slowdown']:.2f} ×)"
    )


def timed_round(
    local: LocalEngine, rng: random.Random, batch: int, context: int, steps: int, drafts: Drafts | None = None
) -> tuple[float, float]:
    """Seconds of `batch` fresh prompts with one new token each, and of as many others with `steps` + 1."""
    times = []
    for new in (1, steps + 1):
        prompts = [_prompt(local, rng, context) for _ in range(batch)]
        times.append(local.call(_run(local.generation.client, prompts, [new] * batch, drafts))[0])
    return times[0], times[1]


def throughput(
    local: LocalEngine,
    requests: int,
    inputs: tuple[int, int],
    outputs: tuple[int, int],
    seed: int,
    drafts: Drafts | None = None,
    rounds: int = 1,
) -> dict[str, Any]:
    """All requests at once, lengths uniform in the given ranges, end of sequence ignored; `rounds` times with other prompts of
    the same lengths. The figures are the last round's: in the first a GPU captures a program for each number of sequences."""
    rng = random.Random(seed)
    warm = [_prompt(local, rng, inputs[0]) for _ in range(4)]
    local.call(_run(local.generation.client, warm, [4] * 4))
    lengths = [rng.randint(*inputs) for _ in range(requests)]
    budgets = [rng.randint(*outputs) for _ in range(requests)]
    rates = []
    for left in reversed(range(rounds)):
        prompts = [_prompt(local, rng, length) for length in lengths]
        seconds, tokens = local.call(_run(local.generation.client, prompts, budgets, None if left else drafts))
        rates.append(tokens / seconds)
    return {
        "requests": requests,
        "in_tokens": sum(lengths),
        "out_tokens": tokens,
        "s": seconds,
        "tok_s": rates[-1],
        "rounds_tok_s": rates,
    }


def _check_fits(local: LocalEngine, batch: int, tokens: int) -> None:
    """Sequences that wait or are preempted would be timed with the ones that run."""
    info = local.engine.info
    if batch > info.slots:
        fix = f"Add --set scheduler.max_running={batch}."
        raise ConfigError(f"A batch of {batch} does not run at once: scheduler.max_running is {info.slots}.", fix=fix)
    pages = batch * -(-tokens // info.page_size)
    if pages * info.page_size > info.kv_tokens:
        raise ConfigError(
            f"A batch of {batch} with {tokens} tokens each needs a KV pool of {pages * info.page_size} tokens; "
            f"it has {info.kv_tokens}.",
            fix="Raise kv.memory, or measure smaller batches or contexts.",
        )


def _prompt(local: LocalEngine, rng: random.Random, length: int) -> list[int]:
    return rng.choices(range(local.engine.info.spec.vocab_size), k=length)


async def _run(
    client: EngineClient, prompts: list[list[int]], budgets: list[int], drafts: Drafts | None = None
) -> tuple[float, int]:
    """Seconds from the first submit to the last token, and how many tokens came. `drafts` are added up."""

    async def one(number: int, prompt: list[int], budget: int) -> int:
        # The seed matters to synthetic acceptance only: sequences must not win and lose all together.
        params = SamplingParams(max_tokens=budget, temperature=0.0, ignore_eos=True, seed=number)
        request = Request(id=f"bench-{started}-{number}", prompt=prompt, params=params)
        tokens = 0
        async for output in client.submit(request):
            if drafts is not None:
                drafts.add(output, first=not tokens)
            tokens += len(output.tokens)
        return tokens

    started = time.perf_counter()
    counts = await asyncio.gather(*(one(i, p, b) for i, (p, b) in enumerate(zip(prompts, budgets, strict=True))))
    return time.perf_counter() - started, sum(counts)
