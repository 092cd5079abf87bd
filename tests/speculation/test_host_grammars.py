"""Grammars whose matchers run on the host: every token is the best that is allowed, and only their requests wait for it."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from engine.harness import Harness

from fluentllm.core.errors import PluginError
from fluentllm.core.hookspecs import hookimpl
from fluentllm.core.plugins import PluginManager
from fluentllm.core.types import GrammarSpec, Refused, Request, SamplingParams
from fluentllm.kernels.sampling import gumbel_noise

from .pressure import all_and_again
from .proposers import Plugin as ProposerPlugin
from .test_grammars import EOS, VOCAB, WORDS, ToyPlugin, allows as table_allows, drafting
from .watching import WholeSequence, whole

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fluentllm.core.protocols import GrammarCompiler, GrammarContext, GrammarMatcher, HostGrammar, Register
    from fluentllm.core.types import StepPlan

OPEN, CLOSE, LETTERS = range(10, 20), range(20, 30), range(30, 60)


def allowed(text: list[int]) -> set[int]:
    """What may follow in a text of brackets that close in order, with letters inside; no finite table says that."""
    stack: list[int] = []
    for token in text:
        if token in OPEN:
            stack.append(token)
        elif token in CLOSE:
            stack.pop()
    if not stack:
        return {*OPEN, EOS} if text else set(OPEN)
    return {*OPEN, *LETTERS, stack[-1] + 10}


class Brackets:
    """A matcher that keeps the text, and works out what is allowed anew each time. `broken`: what is wrong with it."""

    def __init__(self, broken: str) -> None:
        self._text: list[int] = []
        self._broken = broken

    def fill(self, mask: memoryview) -> None:
        assert len(mask) == VOCAB // 32
        assert not any(mask)
        late = len(self._text) >= 3
        if self._broken == "raises" and late:
            raise RuntimeError("out of brackets")
        if self._broken == "allows nothing" and late:
            return
        for token in allowed(self._text):
            word = (mask[token // 32] & 0xFFFFFFFF) | 1 << token % 32
            mask[token // 32] = word - (1 << 32 if word >> 31 else 0)

    def accept(self, token: int) -> bool:
        if token not in allowed(self._text) or len(self._text) == {"refuses": 3, "never accepts": 0}.get(self._broken):
            return False
        self._text.append(token)
        return True

    def rollback(self, count: int) -> None:
        assert 0 <= count <= 5  # the largest K of these tests
        del self._text[len(self._text) - count :]


class Plugin:
    @hookimpl
    def fluent_grammars(self, register: Register) -> None:
        class Grammar:
            def __init__(self, broken: str) -> None:
                self._broken = broken

            def matcher(self) -> GrammarMatcher:
                if self._broken == "never starts":
                    raise RuntimeError("no brackets today")
                return Brackets(self._broken)

        class Compiler:
            def __init__(self, context: GrammarContext) -> None: ...

            def compile(self, source: str) -> HostGrammar:
                return Grammar(source)

        def make(context: GrammarContext) -> GrammarCompiler:
            return Compiler(context)

        register("brackets", make)


BRACKETS = GrammarSpec(kind="brackets", source="")


def work() -> list[tuple[list[int], dict[str, Any]]]:
    rng = random.Random(7)
    grammars = [BRACKETS, None, BRACKETS, WORDS, BRACKETS]
    return [
        (
            [9, 8, 7, 6, 5, 4, 3, 9, 8, 7, *rng.choices(range(3, VOCAB), k=6 + i)],
            {
                "max_tokens": 12 + 3 * i,
                "seed": i,
                "temperature": (0.0, 0.9)[i % 2 ^ i // 4],
                "grammar": grammar,
                # Random weights would open and open.
                "repetition_penalty": 1.3 if grammar is BRACKETS else 1.0,
                "logit_bias": {**dict.fromkeys(CLOSE, 1.5), EOS: 1.0 if i == 2 else -9.0} if grammar is BRACKETS else {},
            },
        )
        for i, grammar in enumerate(grammars)
    ]


@torch.inference_mode()
def alone(harness: Harness, prompt: list[int], params: dict[str, Any]) -> list[int]:
    """Token by token, from scratch, with masks applied to the logits of one position."""
    model: Any = harness.loaded.model
    out: list[int] = []
    while len(out) < params["max_tokens"] and EOS not in out:
        history = prompt + out
        logits = model.logits(model.forward(whole(history), WholeSequence())[-1:])[0]
        seen = list(set(history))
        if params["repetition_penalty"] != 1:
            logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 1.3, logits[seen] * 1.3)
        for token, bias in params["logit_bias"].items():
            logits[token] += bias
        if params["grammar"] is BRACKETS:
            mask = torch.full((VOCAB,), float("-inf"))
            mask[list(allowed(out))] = 0
            logits = logits + mask
        elif params["grammar"] is not None:
            wrong = [token for token in range(VOCAB) if not table_allows(params["grammar"], [*out, token])]
            logits[wrong] = float("-inf")
        if params["temperature"]:
            noise = gumbel_noise(torch.tensor([params["seed"]]), torch.tensor([len(history)]), VOCAB)[0]
            logits = logits / params["temperature"] + noise
        out.append(int(logits.argmax()))
    return out


@pytest.fixture(scope="module")
def expected(tiny: Harness) -> list[list[int]]:
    return [alone(tiny, *each) for each in work()]


def plugins_with(*proposers: Any) -> PluginManager:
    objects = {"toys": ToyPlugin(), "brackets": Plugin(), **{f"testing{i}": each for i, each in enumerate(proposers)}}
    return PluginManager.load({"engine", "executor"}, allow=[], deny=[], objects=objects)


class Flights:
    """Which slots were named by a step that was launched while another that names them was in flight."""

    def __init__(self, engine: Any) -> None:
        self.overlapped: set[str] = set()
        self._flying: list[set[str]] = []
        self._scheduler, self._launch, self._collected = engine.scheduler, engine.executor.launch, engine.scheduler.collected
        engine.executor.launch, engine.scheduler.collected = self.launch, self.collected

    def _named(self, slots: Iterable[int]) -> set[str]:
        return {self._scheduler.sequence(slot).request.id for slot in slots}

    def launch(self, plan: StepPlan) -> Any:
        named = self._named([*plan.decode, *(chunk.slot for chunk in plan.prefill if chunk.last)])
        self.overlapped |= named & set().union(*self._flying)
        self._flying.append(named)
        return self._launch(plan)

    def collected(self, plan: StepPlan, finished: Any) -> None:
        self._flying.pop(0)
        self._collected(plan, finished)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize(
    ("kind", "k"), [("none", 0), ("right", 1), ("right", 3), ("wrong", 2), ("half", 2), ("half", 3), ("pld", 3)]
)
async def test_tokens_are_the_best_that_are_allowed(
    tiny: Harness, expected: list[list[int]], kind: str, k: int, depth: int
) -> None:
    for (_, params), answer in zip(work(), expected, strict=True):
        if params["grammar"] is BRACKETS:
            assert all(token in allowed(answer[:i]) for i, token in enumerate(answer))
            assert set(answer) & set(CLOSE), "a stack is needed"
    assert any(EOS in answer for answer in expected)
    texts = [[*prompt, *answer] for (prompt, _), answer in zip(work(), expected, strict=True)]
    settings = {
        "speculative.method": kind if kind in ("none", "pld") else "test",
        "speculative.k": k,
        "speculative.max_k": max(1, k),
        "speculative.min_acceptance": 0.0,
        "engine.overlap_depth": depth,
        "kv.page_size": 8,
        "model.max_model_len": 64,
        "scheduler.prefill_tokens": 20,
        "kv.memory": str(11 * tiny.page_bytes(8)),
    }
    async with tiny.engine(plugins=plugins_with(ProposerPlugin(drafting(texts, kind))), **settings) as running:
        flights = Flights(running.engine)
        outputs = await all_and_again(running, work(), expected, again=0, cached=1)
    on_host = {i for i, (_, params) in zip(outputs, work(), strict=True) if params["grammar"] is BRACKETS}
    assert flights.overlapped == (outputs.keys() - on_host if depth else set())
    most = max(o.accepted for i in on_host for o in outputs[i])
    assert most == {"none": 0, "right": k, "wrong": 0, "half": 1}.get(kind, most)


async def test_a_slot_forgets_its_masks(tiny: Harness) -> None:
    """Whoever comes next into it may say anything."""
    settings = {"scheduler.max_running": 1, "speculative.method": "pld", "speculative.k": 2}
    params = {"max_tokens": 8, "temperature": 0.0, "repetition_penalty": 1.0, "logit_bias": {}}
    async with tiny.engine(plugins=plugins_with(), **settings) as running:
        await running.tokens([9, 8], max_tokens=5, grammar=BRACKETS)
        assert await running.tokens([9, 8], max_tokens=8) == alone(tiny, [9, 8], {**params, "grammar": None})


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("broken", ["raises", "allows nothing", "refuses"])
async def test_a_matcher_that_fails_ends_its_request_alone(tiny: Harness, broken: str, depth: int) -> None:
    settings = {"engine.overlap_depth": depth, "speculative.method": "pld", "speculative.k": 3, "speculative.max_k": 3}
    async with tiny.engine(plugins=plugins_with(), **settings) as running:
        other = running.submit([9, 8, 7], max_tokens=20, ignore_eos=True)
        refused: list[Any] = []
        connection = running.engine.connect(lambda message: refused.append(message) if isinstance(message, Refused) else None)
        grammar = GrammarSpec(kind="brackets", source=broken)
        connection.submit(
            Request(id="x", prompt=[9, 8], params=SamplingParams(max_tokens=20, temperature=0.0, grammar=grammar))
        )
        assert len(await running.rest(other)) == 20
        assert not connection.sequences
    (message,) = refused
    assert (message.id, message.status) == ("x", 500)
    said = {"raises": "out of brackets", "allows nothing": "allows no token", "refuses": "refused token"}[broken]
    assert "The matcher of the grammar of kind 'brackets' failed" in message.message
    assert said in message.message


async def test_a_matcher_that_fails_at_once_leaves_nothing(tiny: Harness) -> None:
    """Not even log-probabilities of a prompt that no token follows."""
    grammar = GrammarSpec(kind="brackets", source="never accepts")
    async with tiny.engine(plugins=plugins_with()) as running:
        refused: list[Any] = []
        connection = running.engine.connect(refused.append)
        params = SamplingParams(max_tokens=20, temperature=0.0, grammar=grammar, prompt_logprobs=1)
        connection.submit(Request(id="x", prompt=[9, 8, 7], params=params))
        assert len(await running.tokens([9, 8, 7], max_tokens=20, ignore_eos=True)) == 20
        assert [type(message) for message in refused] == [Refused]
        assert not running.engine._prompt_logprobs


async def test_a_scheduler_that_fails_keeps_no_matcher(tiny: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(sequence: Any) -> None:
        raise RuntimeError("no queue")

    async with tiny.engine(plugins=plugins_with()) as running:
        monkeypatch.setattr(running.engine.scheduler, "add", broken)
        with pytest.raises(RuntimeError, match="no queue"):
            running.submit([9, 8], grammar=BRACKETS)
        assert not running.engine.grammars.matchers._open


async def test_a_matcher_that_cannot_start_is_refused(tiny: Harness) -> None:
    async with tiny.engine(plugins=plugins_with()) as running:
        with pytest.raises(PluginError, match="no brackets today"):
            running.submit([9, 8], grammar=GrammarSpec(kind="brackets", source="never starts"))
        assert await running.tokens([9, 8], max_tokens=3, grammar=BRACKETS)
