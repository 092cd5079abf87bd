"""A decode program filled up with slots of nobody: rows that nobody needs take no experts, and change no other."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from engine.harness import Harness
from engine.test_every_model import MODELS
from gpu.models import engine, small
from speculation.mtp import write_checkpoint

from fluentllm.core.buckets import bucket_of
from fluentllm.core.types import Drafting, PrefillChunk, SamplingParams, SlotInit, StepPlan
from fluentllm.kernels.moe import LiveRows, Routing
from fluentllm.kernels.plain import PlainOps
from fluentllm.layers.moe import Experts
from fluentllm.step.commit import leave_drafts
from fluentllm.step.decode import decode

if TYPE_CHECKING:
    from torch import Tensor

    from fluentllm.step.programs import StepPrograms

K = 3
LENGTHS = [11, 5, 22, 7, 16]
LEFT = [3, 3, 0, 2, 1]
"""Drafts, all right, that stand behind each slot's history."""
FINISHED = 1
ORDER = [3, 0, 1, 2, 4]
ROWS = 3 + 4 + 0 + 1 + 2
"""Of these somebody needs; of 8 slots × 4 in all."""
PASSES = {"qwen3_moe": [ROWS, ROWS], "deepseek_v3": [ROWS, 4, 4, 4], "longcat": [ROWS, ROWS]}
"""Needed rows of each pass through a layer with experts. DeepSeek's draft layer has one, and computes the newest row of a slot,
then one row a draft but the last."""


def enter(programs: StepPrograms) -> None:
    """Requests in all slots, through prefill."""
    tables, rng, page = programs.tables, random.Random(5), 1
    for slot, length in enumerate(LENGTHS):
        count = -(-(length + 20) // tables.page_size)
        pages, page = list(range(page, page + count)), page + count
        params = SamplingParams(max_tokens=15, temperature=0.0)
        prompt = rng.choices(range(3, 160), k=length)
        tables.admit(SlotInit(slot, 1, prompt, length, 0, pages, params, []), 0)
    programs.run(StepPlan(step=0, prefill=[PrefillChunk(slot, 0, length, True) for slot, length in enumerate(LENGTHS)]))


def step(programs: StepPrograms, slots: list[int], drafting: Drafting) -> None:
    """As a GPU runs it, padded to its bucket."""
    if programs.captures:
        programs.run(StepPlan(step=0, decode=slots, drafting=drafting))
        return
    padded = slots + [programs.tables.padding_slot] * (bucket_of(len(slots)) - len(slots))
    decode(torch.tensor(padded), drafting, 0, programs)


def answers(programs: StepPrograms) -> list[list[int]]:
    """The 8 tokens that follow in each slot, one at a time, each slot alone."""
    tables, start = programs.tables, programs.tables.length.tolist()
    for slot in range(len(LENGTHS)):
        for _ in range(8):
            step(programs, [slot], Drafting())
    return [tables.history[slot, start[slot] : start[slot] + 8].tolist() for slot in range(len(LENGTHS))]


class Spy:
    """Who chose which experts, and which were computed for how many rows."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        """Needed rows of each pass through a router."""
        self.chosen, self.all_chosen = Counter[int](), Counter[int]()
        """Experts of needed rows, and of all as if they were."""
        self.computed = Counter[int]()
        route, call = PlainOps.route, Experts.__call__

        def routed(ops: Any, logits: Tensor, routing: Routing, bias: Tensor | None, live: LiveRows | None = None) -> Any:
            assert live is not None
            _, everyone = route(ops, logits, routing, bias)
            needed = ~live.inert()
            self.rows.append(int(needed.sum()))
            for counter, ids in ((self.chosen, everyone[needed]), (self.all_chosen, everyone)):
                counter.update(number for number in ids.flatten().tolist() if number < routing.experts)
            return route(ops, logits, routing, bias, live)

        def called(experts: Experts, number: int, rows: Tensor) -> Tensor:
            self.computed[number] += len(rows)
            return call(experts, number, rows)

        patch.setattr(PlainOps, "route", routed)
        patch.setattr(Experts, "__call__", called)


@torch.inference_mode()
def check(programs: StepPrograms, patch: pytest.MonkeyPatch | None = None) -> Spy | None:
    """A step in which some are needed, thrice: by itself, captured, replayed; each time followed by one from the KV that it has
    left. `patch`: to spy on the first."""
    tables, slots, spy = programs.tables, torch.arange(len(LENGTHS)), None
    enter(programs)
    kept = [tensor.clone() for tensor in (tables.history, tables.ints, tables.finished)]
    start, expected = tables.length.tolist(), answers(programs)
    drafts = torch.tensor(expected)[:, :K].contiguous()
    for number in range(3):
        for tensor, before in zip((tables.history, tables.ints, tables.finished), kept, strict=True):
            tensor.copy_(before)
        leave_drafts(*(tensor.to(tables.device) for tensor in (drafts, torch.tensor(LEFT), slots)), tables)
        tables.finished[FINISHED] = True
        if patch is None or number:
            step(programs, ORDER, Drafting(K, K))
        else:
            with patch.context() as only:
                spy = Spy(only)
                step(programs, ORDER, Drafting(K, K))
        step(programs, ORDER, Drafting())
        for slot, left in enumerate(LEFT):
            got = 0 if slot == FINISHED else left + 2
            assert int(tables.length[slot]) == start[slot] + got
            assert tables.history[slot, start[slot] : start[slot] + got].tolist() == expected[slot][:got], (number, slot)
    return spy


@pytest.mark.parametrize("kind", PASSES)
async def test_rows_that_nobody_needs(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = "pld" if kind == "qwen3_moe" else "mtp"
    settings = {"model.load_format": "safetensors", "engine.deterministic": True, "kv.page_size": 8}
    settings |= {"speculative.method": method, "speculative.max_k": K, "scheduler.max_running": len(LENGTHS)}
    model = Harness(write_checkpoint(tmp_path, {**MODELS[kind], "num_nextn_predict_layers": 1}), **settings)
    async with model.engine() as running:
        executor = running.engine.executor
        spy = executor.call(lambda: check(executor.programs, monkeypatch)).result()
    assert spy.rows == PASSES[kind]
    assert spy.computed == spy.chosen
    assert spy.chosen.total() < spy.all_chosen.total() / 2


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["deepseek-v3-lite", "longcat-flash-lite"])
def test_rows_that_nobody_needs_in_a_captured_step(name: str, tmp_path: Path) -> None:
    settings = {"engine.deterministic": True, "engine.capture_when_idle": False}
    settings |= {"speculative.method": "mtp", "speculative.max_k": K, "scheduler.max_running": len(LENGTHS)}
    with engine(small(name, tmp_path), **settings) as local:
        executor = local.engine.executor
        assert executor.programs.captures
        executor.call(lambda: check(executor.programs)).result()
