"""What the lossless matrix is made of: proposers with tiny models, strategies, situations, and the check of one cell.

A cell is (proposer, K, overlap depth, batch, situation). It is run with the proposer's own drafts and with drafts that are
all right, all wrong, or wrong at a place that varies. Each time the tokens are those of speculation off, every step accepts
what the drafts that it verified deserve, and what the proposer itself drafted is what a reference drafts from scratch.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from engine.harness import Harness, Running

from fluentllm.kernels.prompt_lookup import prompt_lookup_reference

from . import eagle, mtp
from .watching import CLOSE, Drafted, watched
from .watching_on_device import OTHERS, Record, watched_on_device

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from fluentllm.core.types import RequestOutput

KS, DEPTHS, BATCHES = (1, 2, 3, 4, 5), (0, 1, 2), (1, 7, 32)
SITUATIONS = ("plain", "prefix hit", "preempted", "chunked prefill")
STRATEGIES = ("own", "right", "wrong", "wrong at j")
VOCAB, PAGE, MOST = 160, 8, max(KS)


@dataclass(frozen=True)
class Cell:
    k: int
    depth: int
    batch: int
    situation: str

    def __str__(self) -> str:
        return f"k{self.k}-depth{self.depth}-batch{self.batch}-{self.situation.replace(' ', '_')}"


ALL = [Cell(*values) for values in itertools.product(KS, DEPTHS, BATCHES, SITUATIONS)]


def covering() -> list[Cell]:
    """A few cells in which every pair of values of two different axes occurs."""

    def pairs(cell: Cell) -> set[tuple[int, Any, int, Any]]:
        values = (cell.k, cell.depth, cell.batch, cell.situation)
        return {(i, values[i], j, values[j]) for i in range(4) for j in range(i + 1, 4)}

    missing = set().union(*map(pairs, ALL))
    chosen = []
    while missing:
        chosen.append(max(ALL, key=lambda cell: len(pairs(cell) & missing) - cell.batch / 100))
        missing -= pairs(chosen[-1])
    return chosen


# ------------------------------------------------------------------------------------------------------------------ requests
Asked = tuple[list[int], dict[str, Any]]
"""A prompt, and its sampling parameters."""


def requests(text: list[int] | None = None, page: int = PAGE) -> list[Asked]:
    """As many as the largest batch. Prompts of three pages and 4 … 9 tokens, the pages shared by all; half of them greedy, half
    sampled. Their pieces are random tokens, or pieces of a text."""
    rng = random.Random(11)

    def piece(length: int) -> list[int]:
        if text is None:
            return rng.choices(range(3, VOCAB), k=length)
        start = rng.randrange(len(text) - length)
        return text[start : start + length]

    shared = piece(8) * (3 * page // 8)
    made = []
    for number in range(max(BATCHES)):
        own = piece(rng.randint(1, 6))
        made.append(
            (
                [*shared, *own, *shared[:3]],
                # What fills a large batch is shorter: it costs the most.
                {
                    "max_tokens": 8 + number % 4 if number < 7 else 3 + number % 3,
                    "ignore_eos": True,
                    "temperature": (0.0, 0.8)[number % 2],
                    "seed": number,
                },
            )
        )
    return made


# ----------------------------------------------------------------------------------------------------------------- proposers
class Lookup:
    """What `pld` must draft."""

    def __init__(self, vocab: int = VOCAB) -> None:
        self._vocab = vocab

    def prime(self, text: list[int]) -> None: ...

    def scores(self, history: list[int], drafts: list[int]) -> Tensor:
        found = prompt_lookup_reference(history, len(drafts), 1, 4)
        assert found, "it drafts where the reference finds nothing"
        return 1e6 * torch.nn.functional.one_hot(torch.tensor(found), self._vocab)


class Subject:
    """A proposer on a model: the answers without speculation, and what the reference says, each worked out once."""

    def __init__(
        self, method: str, model: Harness, reference: Any, work: list[Asked] | None = None, close: float = CLOSE
    ) -> None:
        """`work`: what is asked, of a large batch; of random tokens if None. `close`: see `Drafted.check`."""
        self.method, self.model, self.reference, self.close = method, model, reference, close
        self.work = requests() if work is None else work
        self.vocab = model.loaded.model.spec.vocab_size
        self.answers = asyncio.run(self._off())
        self.texts = [[*prompt, *answer] for (prompt, _), answer in zip(self.work, self.answers, strict=True)]
        for text in self.texts:
            reference.prime(text)
        self._known: dict[tuple[Any, ...], tuple[list[int], int]] = {}

    async def _off(self) -> list[list[int]]:
        settings = {"kv.prefix_cache": False, "engine.overlap_depth": 0, "speculative.method": "none"}
        async with self.model.engine(**settings) as running:
            ids = [running.submit(tokens, **params) for tokens, params in self.work]
            return [await running.rest(i) for i in ids]

    def drafted_for(self, cell: Cell) -> int:
        """Tokens for which there may be drafts: all but the first of each answer."""
        return sum(len(answer) - 1 for answer in self.answers[: cell.batch])

    def check(self, drafted: Drafted) -> int:
        """Drafts that were the only choice; raises for one that was no choice within rounding."""
        key = (tuple(drafted.history), drafted.seed if drafted.temperature else None)
        known, only = self._known.get(key, ([], 0))
        if drafted.drafts != known[: len(drafted.drafts)]:
            only = drafted.check(self.reference, self.close)
            self._known[key] = drafted.drafts, only
        return min(only, len(drafted.drafts))


def subject(folder: Path, method: str) -> Subject:
    if method == "pld":
        settings = {"model.load_format": "safetensors", "engine.deterministic": True, "kv.page_size": PAGE}
        model = Harness(mtp.write_checkpoint(folder, eagle.TARGETS["llama"]), **settings, **{"plugins.spec_pld.shortest": 1})
        return Subject("pld", model, Lookup())
    if method == "mtp":
        model = mtp.harness(folder, "deepseek_v3")
        return Subject("mtp", model, mtp.Reference(model.loaded.model))
    model = eagle.harness(folder, method, {"eagle": "llama", "eagle3": "mla"}[method])
    return Subject("eagle", model, eagle.Reference(model.loaded.model, method))


METHODS = ("pld", "mtp", "eagle", "eagle3")
"""`eagle` on grouped heads, `mtp` and `eagle3` on MLA."""


# ---------------------------------------------------------------------------------------------------------------- strategies
class Strategy:
    """A `Doctor`: what is verified instead of the proposer's drafts. Remembers it, by history."""

    def __init__(self, kind: str, k: int, texts: list[list[int]], vocab: int = VOCAB) -> None:
        self.given: dict[tuple[int, ...], list[int]] = {}
        self.kind, self._k, self._texts, self._vocab = kind, k, texts, vocab

    def __call__(self, history: list[int], own: list[int]) -> list[int]:
        drafts = self._drafts(history, own)
        self.given[tuple(history)] = drafts
        return drafts

    def _drafts(self, history: list[int], own: list[int]) -> list[int]:
        if self.kind == "own":
            return own
        if self.kind == "repeat":
            return history[-1:] * self._k
        text = next((text for text in self._texts if text[: len(history)] == history), history)
        right = (text + [0] * self._k)[len(history) : len(history) + self._k]
        wrong = [(token + 1) % self._vocab for token in right]
        if self.kind == "right":
            return right
        if self.kind == "wrong":
            return wrong
        place = len(history) % self._k
        return [*right[:place], wrong[place], *right[place + 1 :]]

    def check(self, prompt: list[int], answer: list[int], outputs: list[RequestOutput]) -> int:
        """Every step verified what it was given, and accepted what of it is right → drafts accepted in all."""
        done = accepted = 0
        for output in outputs:
            drafts = self.given.get(tuple(prompt + answer[:done]), []) if output.drafted else []
            assert output.drafted == len(drafts)
            follow = answer[done:]
            right = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(drafts, follow, strict=False))))
            assert len(output.tokens) == min(right + 1, len(follow))
            assert output.accepted == min(right, len(output.tokens) - 1)
            assert output.tokens == follow[: len(output.tokens)]
            done += len(output.tokens)
            accepted += output.accepted
        assert done == len(answer)
        return accepted


# ---------------------------------------------------------------------------------------------------------------- situations
def settings_of(cell: Cell) -> dict[str, Any]:
    return {
        "speculative.method": "watched",
        "speculative.k": cell.k,
        "speculative.max_k": cell.k,
        "speculative.min_acceptance": 0.0,
        "engine.overlap_depth": cell.depth,
        "model.max_model_len": 64,
        "kv.prefix_cache": cell.situation != "plain",
        "scheduler.prefill_tokens": 16 if cell.situation == "chunked prefill" else 2048,
        "scheduler.max_running": cell.batch,
    }


class Urgent:
    """Requests of higher priority, that come as soon as all others run: some of these must make room."""

    def __init__(self, running: Running, ids: list[str]) -> None:
        self._running, self._waiting = running, set(ids)
        self._deliver = running.connection.deliver
        self.ids: list[str] = []
        running.connection.deliver = self._watch

    def _watch(self, message: Any) -> None:
        self._deliver(message)
        self._waiting -= {output.id for output in message.outputs}
        if not self._waiting and not self.ids:
            self.ids = [self._running.submit([OTHERS, 8, 9 + i], priority=-1, max_tokens=2, ignore_eos=True) for i in range(3)]


async def ask(running: Running, cell: Cell, work: list[Asked]) -> list[list[RequestOutput]]:
    """What each of the cell's requests gets, in its situation."""
    if cell.situation == "prefix hit":
        await running.tokens(work[0][0], max_tokens=1, seed=0)
    ids = [running.submit(prompt, **params) for prompt, params in work]
    urgent = Urgent(running, ids) if cell.situation == "preempted" else None
    outputs = [await running.outputs(i) for i in ids]
    for other in urgent.ids if urgent is not None else []:
        await running.outputs(other)
    return outputs


def see(
    subject: Subject, cell: Cell, doctor: Strategy, outputs: list[list[RequestOutput]], running: Running, preempted: int = 0
) -> int:
    """Answers are those of speculation off, each step accepted what it should, and the situation was what it is called → drafts
    accepted. `preempted`: preemptions before."""
    stats, page = running.engine.stats(), running.engine.info.page_size
    assert stats.speculative is not None
    assert stats.speculative.error is None
    assert bool(stats.preemptions - preempted) == (cell.situation == "preempted")
    accepted = 0
    for (prompt, _), answer, found in zip(subject.work, subject.answers, outputs, strict=False):
        assert [token for output in found for token in output.tokens] == answer
        accepted += doctor.check(prompt, answer, found)
        if cell.situation == "prefix hit":
            assert found[0].cached_tokens >= 3 * page
        elif cell.situation == "plain":
            assert found[0].cached_tokens == 0
    if doctor.kind == "wrong":
        assert accepted == 0
    elif doctor.kind == "right":
        assert accepted >= subject.drafted_for(cell) * cell.k // (cell.k + 1) - cell.batch
    return accepted


async def check(subject: Subject, cell: Cell, strategy: str) -> None:
    """Run one cell with one strategy, and see that it accepted and compared what it should."""
    record: list[Drafted] = []
    doctor = Strategy(strategy, cell.k, subject.texts, subject.vocab)
    async with subject.model.engine(plugins=watched(subject.method, record, doctor), **settings_of(cell)) as running:
        outputs = await ask(running, cell, subject.work[: cell.batch])
        accepted = see(subject, cell, doctor, outputs, running)
    compared = sum(subject.check(drafted) for drafted in record if drafted.history[:1] != [OTHERS])
    if subject.method != "pld" and strategy in ("own", "wrong"):
        assert compared > 0.7 * (subject.drafted_for(cell) - accepted) * cell.k


async def check_captured(subject: Subject, cell: Cell, **settings: Any) -> int:
    """One cell with every strategy, in one engine whose programs may be captured → drafts that were compared."""
    device = torch.device(subject.model.overrides["engine.device"])
    record = Record(cell.k, subject.texts, subject.vocab, device)
    compared = preempted = 0
    plugins = watched_on_device(subject.method, record)
    async with subject.model.engine(plugins=plugins, **{**settings_of(cell), **settings}) as running:
        for number, strategy in enumerate(STRATEGIES):
            doctor = Strategy(strategy, cell.k, subject.texts, subject.vocab)
            running.engine.executor.call(lambda number=number: record.begin(number)).result()
            outputs = await ask(running, cell, subject.work[: cell.batch])
            while running.engine.has_work:
                await asyncio.sleep(0.002)
            for entry in running.engine.executor.call(record.entries).result():
                history = subject.texts[entry.number][: entry.length]
                doctor.given[tuple(history)] = entry.given
                params = subject.work[entry.number][1]
                compared += subject.check(Drafted(history, entry.own, params["seed"], params["temperature"]))
            see(subject, cell, doctor, outputs, running, preempted)
            preempted = running.engine.stats().preemptions
            running.engine.clear_cache()
    return compared
