"""The memory plan: what fits is used, what does not fit is an error whose advice works."""

from __future__ import annotations

import asyncio
import gc
import random
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine.harness import Harness, write_tiny_llama
from speculation.test_grammars import ToyPlugin

from fluentllm import memory
from fluentllm.assembly import assemble
from fluentllm.core.errors import ConfigError, OutOfMemory
from fluentllm.core.plugins import PluginManager
from fluentllm.core.protocols import WeightSlot
from fluentllm.core.slots import pages_of
from fluentllm.core.types import Feature
from fluentllm.memory import GIB, PoolShape, Room, parse_bytes, plan_pages, weight_bytes, weights_too_large
from fluentllm.rehearsal import Largest, measure, plans

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2 * GIB), ("500 MB", 500_000_000), ("1.5gib", 3 * GIB // 2), ("17", 17), ("3kb", 3000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "many", "2 XB", "-1GiB", "GiB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(repr(text))):
        parse_bytes(text)


def test_the_pool_takes_what_is_left_below_the_share() -> None:
    """80 GiB, of which 60 are free while the largest step holds 3: at a share of 0.9 the pool gets 52."""
    room = Room(60 * GIB, 80 * GIB, 3 * GIB, 0.9)
    page = 2**20
    pages = plan_pages(None, room, PoolShape(page, 64, wanted=10**9, least=10))
    assert (pages + 1) * page == pytest.approx(52 * GIB, abs=2 * page)  # with the scratch page
    assert plan_pages(None, room, PoolShape(page, 64, wanted=77, least=10)) == 77
    assert plan_pages("1GiB", room, PoolShape(page, 64, wanted=10**9, least=10)) == 1024


@dataclass
class Start:
    """What the memory plan depends on."""

    setting: str | None
    room: Room
    context: int
    page_bytes: int
    page_size: int
    drafts: int
    slots: int

    def plan(self) -> int:
        least = pages_of(self.context, self.drafts, self.page_size)
        shape = PoolShape(self.page_bytes, self.page_size, wanted=self.slots * least, least=least, drafts=self.drafts)
        pages = plan_pages(self.setting, self.room, shape)
        assert least <= pages <= shape.wanted
        assert (pages + 1) * self.page_bytes <= self.room.free
        return pages

    def with_advice(self, settings: str) -> Start:
        """`kv.memory to 3MiB or more and …`, taken by the letter."""
        changed = replace(self)
        for name, value in re.findall(r"([a-z_.]+) to (\S+)", settings):
            match name:
                case "kv.memory":
                    changed.setting = value
                case "model.max_model_len":
                    assert 8 <= int(value) < self.context
                    changed.context = int(value)
                case "engine.memory_share":
                    assert float(value) <= memory.MOST_SHARE + 0.01
                    changed.room = replace(self.room, share=float(value))
                case _:
                    raise AssertionError(settings)
        return changed


def test_every_advice_fits() -> None:
    """Whatever the error says to set, the plan made with it works, for drafts and pages of any size."""
    advised: Counter[str] = Counter()
    for _ in range(5000):
        total = random.randint(8, 90) * GIB
        workspace = random.randint(0, 4) * GIB
        free = random.randint(0, random.choice((total - workspace, 2**28)))
        gpu = Room(free, total, workspace, random.uniform(0.2, 0.95))
        room = random.choice((gpu, Room(free, limit=min(int(free * 0.4), 4 * GIB))))
        setting = random.choice((None, f"{random.randint(1, 90)}GiB", f"{random.randint(1, 400)}MiB"))
        page_size, drafts = random.choice((1, 16, 64)), random.choice((0, 0, 3, 7))
        page_bytes = random.choice((random.randint(2**10, 2**16), 2**16, 2**21, random.randint(2**21, 2**25)))
        start = Start(setting, room, random.randint(8, 2**17), page_bytes, page_size, drafts, random.choice((1, 4, 256)))
        try:
            start.plan()
        except OutOfMemory as error:
            fix = error.fix or ""
            if fix.startswith("Free memory on the device"):
                room_for = room.usable if setting is None else min(parse_bytes(setting) + page_bytes, 0.9 * free)
                assert (pages_of(8, drafts, page_size) + 1) * page_bytes > room_for  # not even the shortest context
                continue
            *alternatives, last = fix.removeprefix("Set ").split(", or ")
            assert last == "free memory."
            for settings in alternatives:
                start.with_advice(settings).plan()
                advised[" ".join(re.findall(r"([a-z_.]+) to", settings))] += 1
    names = ["kv.memory", "model.max_model_len", "model.max_model_len kv.memory", "engine.memory_share"]
    assert min(advised[name] for name in names) > 20, advised


def test_a_cpu_pool_that_is_too_small() -> None:
    with pytest.raises(
        OutOfMemory, match=r"10 MiB are free .* one full context needs 101 MiB.*model\.max_model_len to 576 or less"
    ):
        plan_pages(None, Room(10 * 2**20), PoolShape(2**20, 64, wanted=1000, least=100))
    with pytest.raises(OutOfMemory, match=r"kv\.memory 3MiB holds 3 pages .* Set kv\.memory to 100MiB"):
        plan_pages("3MiB", Room(GIB), PoolShape(2**20, 64, wanted=1000, least=100))


def test_weights_that_do_not_fit_name_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The queries of two GPUs are made up; the second has room."""
    free = {0: 20 * GIB, 1: 70 * GIB}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[getattr(device, "index", device)], 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    slots = [WeightSlot(f"w{i}", (1 << 16, 1 << 13), lambda tensor: None) for i in range(40)]
    slots += [
        WeightSlot("w0", (1 << 16, 1 << 13), lambda tensor: None),
        WeightSlot("x", (9, 9), lambda tensor: None, unused=True),
    ]
    assert weight_bytes(slots, torch.bfloat16) == 40 * GIB
    text = str(weights_too_large(slots, CUDA, torch.bfloat16, MemoryError()))
    assert "about 40.00 GiB in bfloat16, but 20.00 GiB of the 80.00 GiB of cuda:0 (H100) are free" in text
    assert "Set engine.device to cuda:1, which has room; or: End the other processes on this GPU" in text


def test_the_largest_steps_have_every_feature_and_run(tmp_path: Path) -> None:
    model = Harness(write_tiny_llama(tmp_path))
    settings = model.settings(
        **{"speculative.method": "pld", "speculative.k": 2, "model.max_model_len": 40, "grammar.states": 3}
    )
    every = sum(value for name, value in vars(Feature).items() if name.isupper())
    for grammars, left_out in ((True, 0), (False, Feature.GRAMMAR | Feature.TOKEN_MASKS)):
        plugins = PluginManager.load(
            {"engine", "executor"}, allow=[], deny=[], objects={"toys": ToyPlugin()} if grammars else {}
        )
        engine = assemble(settings, "tiny", model.loaded, plugins)
        largest = Largest(prefill_tokens=50, sequences=4, context=40, drafts=2, grammars=engine.grammars.states > 0)
        rehearsed = plans(largest)
        assert rehearsed[0].features == rehearsed[4].features == every & ~left_out
        assert [plan.features for plan in (*rehearsed[1:4], *rehearsed[5:])] == [0] * 6
        try:
            results = [engine.executor.launch(plan).result() for plan in rehearsed]
        finally:
            engine.executor.close()
        assert [len(result.slots) for result in results] == [2, 2, 2, 2, 4, 4, 4, 4]


class Card:
    """A device whose steps take so many MiB for each prompt token and each sequence. The steps are real ones, on the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, total: int, *, token: float, sequence: float) -> None:
        self.total, self.token, self.sequence, self.taken, self.tries = total * 2**20, token, sequence, 0, 0
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.total - self.taken, self.total))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: setattr(self, "taken", 0))

    def maker(self, model: Harness) -> Any:
        def make(pages: int, slots: int) -> Any:
            self.tries += 1
            executor = assemble(
                model.settings(**{"scheduler.max_running": slots}), "tiny", model.loaded, model.plugins
            ).executor
            executor.close()
            return SimpleNamespace(programs=_Counting(self, executor.programs), tables=executor.tables)

        return make


class _Counting:
    def __init__(self, card: Card, programs: Any) -> None:
        self._card, self._programs = card, programs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._programs, name)

    def run(self, plan: Any) -> Any:
        card = self._card
        needs = card.token * sum(chunk.count for chunk in plan.prefill) + card.sequence * len(plan.decode)
        card.taken = max(card.taken, int(needs * 2**20))
        if card.taken > card.total:
            raise torch.OutOfMemoryError("this card is full")
        return self._programs.run(plan)


def advised(error: OutOfMemory, largest: Largest) -> Largest:
    """With the settings that the error says."""
    for name, field in (("scheduler.prefill_tokens", "prefill_tokens"), ("scheduler.max_running", "sequences")):
        if said := re.search(rf"{re.escape(name)} to (\d+)", error.fix or ""):
            largest = replace(largest, **{field: int(said[1])})
    return largest


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    return Harness(write_tiny_llama(tmp_path_factory.mktemp("tiny")), **{"model.max_model_len": 80})


@pytest.mark.parametrize(
    ("token", "sequence", "advice"),
    [
        (1.0, 1.0, "Set scheduler.prefill_tokens to 64."),
        (0.1, 8.0, "Set scheduler.max_running to 8."),
        (4.0, 8.0, "Set scheduler.prefill_tokens to 16 and scheduler.max_running to 8."),
    ],
)
def test_steps_that_do_not_fit_name_settings_that_do(
    tiny: Harness, monkeypatch: pytest.MonkeyPatch, token: float, sequence: float, advice: str
) -> None:
    """The advice is taken: the largest steps run, the pool is planned beside them, and an engine made with it answers."""
    card = Card(monkeypatch, 100, token=token, sequence=sequence)
    largest = Largest(prefill_tokens=256, sequences=16, context=80)
    with pytest.raises(OutOfMemory, match="do not fit beside the weights on cuda:0") as raised:
        measure(card.maker(tiny), largest, CUDA, 0.9)
    assert raised.value.fix == advice
    assert card.tries < 10

    smaller = advised(raised.value, largest)
    room = measure(card.maker(tiny), smaller, CUDA, 0.9)
    assert 0 < room.workspace <= 100 * 2**20
    settings = {"scheduler.prefill_tokens": smaller.prefill_tokens, "scheduler.max_running": smaller.sequences}

    async def serve() -> None:
        async with tiny.engine(**settings) as running:
            assert running.engine.info.slots == smaller.sequences
            assert len(await running.tokens([1, 2, 3], max_tokens=4, ignore_eos=True)) == 4

    asyncio.run(serve())


def test_steps_that_fit_in_no_size(tiny: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch, 100, token=0.1, sequence=101.0)
    with pytest.raises(OutOfMemory, match=r"Set model\.max_model_len lower, free memory .* smaller steps do not fit either"):
        measure(card.maker(tiny), Largest(prefill_tokens=256, sequences=16, context=80), CUDA, 0.9)


@pytest.mark.parametrize(
    ("token", "sequence", "advice"), [(0.3, 0.1, "prefill_tokens to 128"), (0.01, 5.5, "max_running to 8")]
)
def test_steps_that_leave_no_room_for_a_context_name_settings_that_do(
    tiny: Harness, monkeypatch: pytest.MonkeyPatch, token: float, sequence: float, advice: str
) -> None:
    """The largest steps fit, and take what one context needs."""
    card, page, least = Card(monkeypatch, 100, token=token, sequence=sequence), 2**20, 39
    largest = Largest(prefill_tokens=256, sequences=16, context=80)
    room = measure(card.maker(tiny), largest, CUDA, 0.9, (least + 1) * page)
    with pytest.raises(OutOfMemory) as raised:
        plan_pages(None, room, PoolShape(page, 16, wanted=10**6, least=least))
    assert f"or scheduler.{advice}, or free memory" in (raised.value.fix or "")
    better = measure(card.maker(tiny), advised(raised.value, largest), CUDA, 0.9, (least + 1) * page)
    assert plan_pages(None, better, PoolShape(page, 16, wanted=10**6, least=least)) >= least


def test_steps_are_not_tried_where_smaller_ones_would_not_help(tiny: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch, 100, token=0.1, sequence=0.1)
    room = measure(card.maker(tiny), Largest(prefill_tokens=256, sequences=16, context=80), CUDA, 0.9, 200 * 2**20)
    assert (room.smaller, card.tries) == ("", 1)


@pytest.mark.gpu
def test_on_a_gpu_the_advice_for_steps_that_do_not_fit_starts(tmp_path: Path) -> None:
    """Logits of many sequences are what is large here: fewer prompt tokens help nothing."""
    gc.collect()
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    given = {"engine.device": "cuda", "model.max_model_len": 64, "scheduler.max_running": 4096, "scheduler.prefill_tokens": 64}
    harness = Harness(write_tiny_llama(tmp_path / "wide", vocab_size=100_000), **given)
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**30) / total)
    try:
        with pytest.raises(OutOfMemory, match="do not fit beside the weights") as raised:
            assemble(harness.settings(), "wide", harness.loaded, harness.plugins)
        said = re.fullmatch(r"Set scheduler\.max_running to (\d+)\.", raised.value.fix or "")
        assert said is not None, raised.value.fix
        fitting = harness.settings(**{"scheduler.max_running": int(said[1]), "kv.memory": "16MiB"})
        engine = assemble(fitting, "wide", harness.loaded, harness.plugins)
        assert engine.info.slots == int(said[1]) >= 16
        engine.executor.close()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_on_a_gpu_the_pool_is_planned_beside_the_largest_steps(tmp_path: Path, share: float) -> None:
    from engine.harness import Harness

    from fluentllm.assembly import assemble

    harness = Harness(write_tiny_llama(tmp_path / "tiny", max_position_embeddings=4096), **{"engine.device": "cuda"})
    engine = assemble(harness.settings(**{"engine.memory_share": share}), "tiny", harness.loaded, harness.plugins)
    assert engine.info.memory["workspace"] > 0
    free, total = torch.cuda.mem_get_info()
    assert total - free <= share * total + GIB
    engine.executor.close()


@pytest.mark.gpu
def test_on_a_gpu_memory_that_runs_out_while_loading_is_an_error_with_numbers(tmp_path: Path) -> None:
    # Torch's limit is asked only where its cache has nothing: engines of tests before must have given theirs back.
    gc.collect()
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    large = write_tiny_llama(tmp_path / "large", hidden_size=4096, intermediate_size=16384)
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 64 * 2**20) / total)
    try:
        with pytest.raises(OutOfMemory, match=r"The weights need about .* [GM]iB in bfloat16, but .* are free"):
            Harness(large, **{"engine.device": "cuda"})
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
