"""Grammars that are device tables: every token is the best that the grammar allows, with drafts and without, at every depth."""

from __future__ import annotations

import json
import random
from array import array
from typing import TYPE_CHECKING, Any

import pytest
import torch
from engine.harness import Harness

from fluentllm.core.errors import InvalidRequest, PluginError, QueueFull
from fluentllm.core.grammars import GrammarStore, GrammarTable
from fluentllm.core.hookspecs import hookimpl
from fluentllm.core.plugins import PluginManager
from fluentllm.core.sequence import Sequence
from fluentllm.core.types import GrammarSpec, Request, SamplingParams
from fluentllm.kernels.sampling import gumbel_noise

from . import eagle, mtp
from .pressure import all_and_again
from .proposers import Plugin as ProposerPlugin
from .watching import Drafted, WatchedPlugin, WholeSequence, unchanged, whole

if TYPE_CHECKING:
    from pathlib import Path

    from fluentllm.core.protocols import GrammarCompiler, GrammarContext, Register

EOS, VOCAB = 2, 160


class Toy:
    """Grammars written as what they are: a JSON list of states, each {token: state}."""

    def __init__(self, context: GrammarContext) -> None:
        self._vocab = context.spec.vocab_size
        assert EOS in context.spec.eos_token_ids

    def compile(self, source: str) -> GrammarTable:
        try:
            rows = [{int(token): state for token, state in row.items()} for row in json.loads(source)]
        except ValueError as error:
            raise InvalidRequest(f"The grammar is not JSON: {error}.", param="grammar") from error
        return GrammarTable.of(rows, self._vocab)


class ToyPlugin:
    @hookimpl
    def fluent_grammars(self, register: Register) -> None:
        def make(context: GrammarContext) -> GrammarCompiler:
            return Toy(context)

        register("toy", make)


def toy(*rows: dict[int, int]) -> GrammarSpec:
    return GrammarSpec(kind="toy", source=json.dumps(rows))


WORDS = toy(
    {10: 1, 11: 1, 12: 1},  # a first letter
    dict.fromkeys(range(20, 30), 1) | dict.fromkeys(range(60, 70), 2),  # letters, and spaces
    dict.fromkeys(range(80, 83), 1) | {EOS: 2},  # the next word, or the end
)
PAIRS = toy({5: 1, 6: 2}, {5: 0}, {6: 0})  # 5 5 and 6 6, for ever


def allows(spec: GrammarSpec, tokens: list[int]) -> bool:
    rows = [{int(t): s for t, s in row.items()} for row in json.loads(spec.source)]
    state = 0
    for token in tokens:
        if token not in rows[state]:
            return False
        state = rows[state][token]
    return True


def work() -> list[tuple[list[int], dict[str, Any]]]:
    rng = random.Random(5)
    grammars = [WORDS, None, PAIRS, WORDS, None, WORDS]
    return [
        (
            [9, 8, 7, 6, 5, 4, 3, 9, 8, 7, *rng.choices(range(3, VOCAB), k=6 + i)],
            {"max_tokens": 16 + i, "seed": i, "temperature": (0.0, 0.9)[i // 3], "grammar": grammar},
        )
        for i, grammar in enumerate(grammars)
    ]


class Alone:
    """Token by token, from scratch: the model's logits, what the grammar forbids struck out, the best of the rest."""

    def __init__(self, harness: Harness) -> None:
        self._model: Any = harness.loaded.model

    @torch.inference_mode()
    def tokens(self, prompt: list[int], params: dict[str, Any]) -> list[int]:
        out: list[int] = []
        grammar = params["grammar"]
        rows = [{int(t): s for t, s in row.items()} for row in json.loads(grammar.source)] if grammar else None
        state = 0
        while len(out) < params["max_tokens"] and EOS not in out:
            history = prompt + out
            logits = self._model.logits(self._model.forward(whole(history), WholeSequence())[-1:])[0]
            if rows is not None:
                allowed = torch.full((VOCAB,), float("-inf"))
                allowed[list(rows[state])] = 0
                logits = logits + allowed
            if params["temperature"]:
                noise = gumbel_noise(torch.tensor([params["seed"]]), torch.tensor([len(history)]), VOCAB)[0]
                logits = logits / params["temperature"] + noise
            out.append(int(logits.argmax()))
            if rows is not None:
                state = rows[state][out[-1]]
        return out


@pytest.fixture(scope="module")
def expected(tiny: Harness) -> list[list[int]]:
    return [Alone(tiny).tokens(*each) for each in work()]


def drafting(texts: list[list[int]], kind: str) -> Any:
    """Drafts that are right, wrong but allowed by no grammar, or right at first."""

    def draft(tables: Any, batch: Any, hidden: Any, slots: torch.Tensor, count: int) -> Any:
        drafts = torch.zeros(len(slots), count, dtype=torch.int64)
        for row, slot in enumerate(slots.tolist()):
            history = tables.history[slot, : tables.length[slot]].tolist()
            text = next((t for t in texts if t[: len(history)] == history), history) + [0] * count
            follow = text[len(history) : len(history) + count]
            drafts[row] = torch.tensor(
                {"right": follow, "wrong": [159] * count, "half": [*follow[:1], *[159] * (count - 1)]}[kind]
            )
        return drafts, torch.full((len(slots),), count)

    return draft


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("kind", ["none", "right", "wrong", "half", "pld"])
async def test_tokens_are_the_best_that_are_allowed(tiny: Harness, expected: list[list[int]], kind: str, depth: int) -> None:
    assert all(allows(p["grammar"], answer) for (_, p), answer in zip(work(), expected, strict=True) if p["grammar"])
    assert any(EOS in answer for answer in expected)
    texts = [[*prompt, *answer] for (prompt, _), answer in zip(work(), expected, strict=True)]
    objects = {"toys": ToyPlugin(), "testing": ProposerPlugin(drafting(texts, kind))}
    plugins = PluginManager.load({"engine", "executor"}, allow=[], deny=[], objects=objects)
    settings = {
        "speculative.method": kind if kind in ("none", "pld") else "test",
        "engine.overlap_depth": depth,
        "kv.page_size": 8,
        "model.max_model_len": 64,
        "scheduler.prefill_tokens": 20,
        "kv.memory": str(15 * tiny.page_bytes(8)),
        "grammar.states": 7,
    }
    async with tiny.engine(plugins=plugins, **settings) as running:
        outputs = await all_and_again(running, work(), expected, again=0, cached=1)
    most = max(o.accepted for found in outputs.values() for o in found)
    assert most == {"none": 0, "right": 3, "wrong": 0, "half": 1}.get(kind, most)
    # What a grammar forbids is not even verified.
    tried = max(
        o.drafted for (_, params), found in zip(work(), outputs.values(), strict=True) if params["grammar"] for o in found
    )
    assert tried == {"none": 0, "right": 3, "wrong": 0, "half": 1}.get(kind, tried)


@pytest.mark.parametrize("method", ["mtp", "eagle3"])
async def test_chains_draft_what_the_grammar_allows(tmp_path: Path, method: str) -> None:
    model = mtp.harness(tmp_path, "deepseek_v3") if method == "mtp" else eagle.harness(tmp_path, method, "mla")
    own = model.plugins.registry("proposers").get(method.rstrip("3")).factory
    record: list[Drafted] = []
    objects = {"toys": ToyPlugin(), "watched": WatchedPlugin(own, record, unchanged)}
    plugins = PluginManager.load({"engine", "executor"}, allow=[], deny=[], objects=objects)
    settings = {"speculative.method": "watched", "speculative.k": 3, "speculative.min_acceptance": 0.0, "grammar.states": 7}
    prompts = {(9, 8): WORDS, (7, 6): PAIRS}
    async with model.engine(plugins=plugins, **settings) as running:
        ids = [
            running.submit(list(prompt), max_tokens=12, temperature=0.7 * i, seed=i, grammar=grammar)
            for i, (prompt, grammar) in enumerate(prompts.items())
        ]
        for i in ids:
            await running.rest(i)
    assert sum(len(each.drafts) for each in record) > 20
    forbidden = 0
    for each in record:
        text = each.history[2:]
        forbidden += not allows(prompts[each.history[0], each.history[1]], text + each.drafts)
    # A reduced vocabulary may hold nothing that is allowed.
    assert forbidden == 0 or (method == "eagle3" and forbidden < len(record))


async def test_rows_are_used_again(tiny: Harness) -> None:
    """More grammars, one after the other, than the table holds at once; logprobs are the model's own."""
    plugins = PluginManager.load({"engine", "executor"}, allow=[], deny=[], objects={"toys": ToyPlugin()})
    reference = Alone(tiny)
    async with tiny.engine(plugins=plugins, **{"grammar.states": 4, "speculative.method": "pld"}) as running:
        for first in range(20, 26):
            spec = toy({first: 1}, dict.fromkeys(range(30, 90), 2), {first: 0, EOS: 2})
            params = {"max_tokens": 9, "temperature": 0.0, "grammar": spec, "seed": 0}
            outputs = await running.outputs(running.submit([9, 8], **params, logprobs=1))
            assert [t for o in outputs for t in o.tokens] == reference.tokens([9, 8], params)
            chosen = [lp for o in outputs for lp in o.logprobs or []]
            assert all(lp.logprob <= lp.top[0][1] for lp in chosen)
            assert any(lp.rank > 1 for lp in chosen)
        held = running.submit([9, 8], max_tokens=200, grammar=toy({5: 1}, {5: 2}, {5: 0}))
        with pytest.raises(QueueFull, match=r"grammar\.states"):
            running.submit([9, 8], grammar=toy({6: 1}, {6: 0}))
        running.connection.abort([held])
        assert await running.tokens([9, 8], max_tokens=4, grammar=toy({6: 1}, {6: 0})) == [6] * 4
        refused = [
            ({"grammar": GrammarSpec(kind="cobol", source="a*")}, "kind 'cobol'; known: .*toy"),
            ({"grammar": GrammarSpec(kind="toy", source="[")}, "not JSON"),
            ({"grammar": toy({5: 0}, {})}, "State 1 of the grammar allows no token"),
            ({"grammar": toy(*({5: 0},) * 5)}, "needs 5 states, and the table on the device has 4"),
            ({"grammar": PAIRS, "min_tokens": 2}, "Leave min_tokens out"),
        ]
        for params, said in refused:
            with pytest.raises(InvalidRequest, match=said):
                running.submit([9, 8], **params)
        assert running.engine.stats().refused == {"invalid_request": 5, "queue_full": 1}


async def test_without_a_plugin_grammars_are_refused(tiny: Harness) -> None:
    plugins = PluginManager.load({"engine", "executor"}, allow=[], deny=["grammar_xgrammar"])
    async with tiny.engine(plugins=plugins) as running:
        with pytest.raises(InvalidRequest, match=r"No plugin here knows grammars of the kind 'toy'; known: none"):
            running.submit([9, 8], grammar=PAIRS)


def ints(*values: int) -> bytes:
    return array("i", values).tobytes()


BROKEN: dict[str, tuple[Any, str]] = {
    "none": (None, "it returned None, neither a GrammarTable nor a HostGrammar"),
    "short": (GrammarTable(0, 2, ints(0, 1)), "its table has 8 bytes; 2 states × 160 tokens"),
    "stateless": (GrammarTable(0, 0, b""), "its table has 0 bytes; 0 states"),
    "outside": (GrammarTable(1, 1, ints(*[0] * VOCAB)), "its start is state 1 of 1"),
    "astray": (GrammarTable(0, 1, ints(*[0] * (VOCAB - 1), 1)), "it leads to state 1 of 1"),
    "stuck": (GrammarTable(0, 2, ints(*[1] * VOCAB, *[-1] * VOCAB)), "its state 1 allows no token"),
    "raises": (ValueError("out of grammars"), "ValueError: out of grammars"),
}


class BrokenPlugin:
    @hookimpl
    def fluent_grammars(self, register: Register) -> None:
        class Compiler:
            def compile(self, source: str) -> Any:
                found, _ = BROKEN[source]
                if isinstance(found, Exception):
                    raise found
                return found

        register("broken", lambda context: Compiler())


async def test_what_a_compiler_breaks_ends_its_request_alone(tiny: Harness) -> None:
    plugins = PluginManager.load(
        {"engine", "executor"}, allow=[], deny=[], objects={"toys": ToyPlugin(), "broken": BrokenPlugin()}
    )
    async with tiny.engine(plugins=plugins) as running:
        for source, (_, said) in BROKEN.items():
            with pytest.raises(PluginError, match=f"The compiler of grammars of kind 'broken' failed: {said}"):
                running.submit([9, 8], grammar=GrammarSpec(kind="broken", source=source))
        assert await running.tokens([9, 8], max_tokens=2, grammar=toy({6: 1}, {6: 0})) == [6, 6]
        assert not running.connection.sequences


async def test_a_scheduler_that_raises_leaves_no_grammar_in_use(tiny: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = PluginManager.load({"engine", "executor"}, allow=[], deny=[], objects={"toys": ToyPlugin()})
    async with tiny.engine(plugins=plugins, **{"grammar.states": 3}) as running:
        with monkeypatch.context() as patch:
            patch.setattr(running.engine.scheduler, "add", lambda sequence: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                running.submit([9, 8], grammar=toy({5: 1}, {5: 0}))
        assert await running.tokens([9, 8], max_tokens=2, grammar=toy({6: 1}, {6: 0})) == [6, 6]  # there is room for one


def test_gaps_between_rows_are_found() -> None:
    table = {n: GrammarTable.of([{0: 0}] * n, 4) for n in (2, 3, 4)}

    class Sizes:
        def compile(self, source: str) -> GrammarTable:
            return table[int(source[0])]

    store = GrammarStore(9, {"n": Sizes}, 4)
    specs = {name: GrammarSpec(kind="n", source=name) for name in ("2a", "3a", "4a", "3b", "2b", "4b")}
    firsts = lambda: {spec.source: held.first for spec, held in store._held.items()}  # noqa: E731
    asking = {
        name: Sequence(Request(id=name, prompt=[1], params=SamplingParams(max_tokens=1, grammar=spec)), [])
        for name, spec in specs.items()
    }
    for name in ("2a", "3a", "4a"):
        store.begin(asking[name])
    assert firsts() == {"2a": 1, "3a": 3, "4a": 6}
    with pytest.raises(QueueFull):
        store.begin(asking["2b"])
    store.end(asking["3a"])
    store.begin(asking["3b"])
    assert firsts() == {"2a": 1, "4a": 6, "3b": 3}
    store.end(asking["2a"])
    store.end(asking["3b"])
    store.begin(asking["4b"])  # both have to go for it
    assert firsts() == {"4a": 6, "4b": 1}
