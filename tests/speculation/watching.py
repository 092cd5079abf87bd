"""Watching a proposer in a running engine: what it drafted, against what it must draft; and drafts put in place of its own."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fluentllm.core.batch import Batch
from fluentllm.core.draft_length import Choice
from fluentllm.core.plugins import PluginManager
from fluentllm.kernels.sampling import gumbel_noise

from .proposers import Offering, plugins_offering

if TYPE_CHECKING:
    from torch import Tensor

    from fluentllm.core.protocols import Proposer, ProposerContext

CLOSE = 1e-4
"""Two tokens whose scores differ by less may change places by rounding."""

Doctor = Callable[[list[int], list[int]], list[int]]
"""(history, the proposer's drafts) → drafts to verify instead."""


def anything(rng: random.Random, most: int) -> Callable[[int], Choice]:
    """For `DraftLength.choose`: any number up to `most`, looks at one more, and in between a page's length of steps without."""

    def choices() -> Iterator[Choice]:
        while True:
            for _ in range(rng.randint(4, 16)):
                k = rng.choice((most, rng.randint(0, most)))
                yield Choice(k, look=k < most and rng.random() < 0.5)
            for _ in range(rng.choice((1, 12))):
                yield Choice(0)

    endless = choices()
    return lambda batch: next(endless)


class Reference(Protocol):
    def scores(self, history: list[int], drafts: list[int]) -> Tensor:
        """[drafts, vocab] float32: logits that each draft was to be drawn from, given the drafts before it."""
        ...


class Primed:
    """For references: the target's states of a text, which depend on nothing behind, each computed once."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], Tensor] = {}

    def compute(self, tokens: list[int]) -> Tensor:
        """[tokens, …]."""
        raise NotImplementedError

    def prime(self, text: list[int]) -> None:
        """Of a text and all that it begins with at once."""
        states = self.states(text)
        self._known.update({tuple(text[:end]): states[:end] for end in range(1, len(text))})

    @torch.inference_mode()
    def states(self, tokens: list[int]) -> Tensor:
        key = tuple(tokens)
        if key not in self._known:
            self._known[key] = self.compute(tokens)
        return self._known[key]


class WholeSequence:
    """An attention backend that keeps nothing: every pass is one sequence from its first token on."""

    def begin(self, batch: Batch) -> None: ...

    def gqa(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch, scale: float) -> Tensor:
        group = q.shape[1] // k.shape[1]
        scores = torch.einsum("qhd,thd->hqt", q, k.repeat_interleave(group, 1)) * scale
        future = torch.ones(scores.shape[1:]).triu(1).bool()
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        return torch.einsum("hqt,thd->qhd", weights, v.repeat_interleave(group, 1))

    def mla(
        self,
        layer: int,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        up_k: Tensor,
        up_v: Tensor,
        batch: Batch,
        scale: float,
    ) -> Tensor:
        keys = torch.einsum("tc,hnc->thn", latent, up_k)
        scores = torch.einsum("qhn,thn->hqt", q_nope, keys) + torch.einsum("qhr,tr->hqt", q_rope, k_rope)
        future = torch.ones(scores.shape[1:]).triu(1).bool()
        weights = (scores * scale).masked_fill(future, float("-inf")).softmax(-1)
        return torch.einsum("hqt,tc,hvc->qhv", weights, latent, up_v)


def whole(tokens: list[int]) -> Batch:
    """All tokens of one sequence as the rows of a pass."""
    count = len(tokens)
    return Batch(
        tokens=torch.tensor(tokens),
        positions=torch.arange(count),
        sequences=torch.zeros(count, dtype=torch.int64),
        slots=torch.tensor([0]),
        query_start=torch.tensor([0, count], dtype=torch.int32),
        kv_lengths=torch.tensor([count], dtype=torch.int32),
        page_table=torch.zeros(1, 1, dtype=torch.int32),
        kv_rows=torch.arange(1, count + 1),
        history=torch.tensor([tokens], dtype=torch.int32),
        page_size=1,
        query_length=None,
        query_lengths=(count,),
        kv_lengths_host=(count,),
    )


class Drafted:
    """One call's drafts for one slot."""

    def __init__(self, history: list[int], drafts: list[int], seed: int, temperature: float) -> None:
        self.history, self.drafts, self.seed, self.temperature = history, drafts, seed, temperature

    def check(self, reference: Reference, close: float = CLOSE) -> int:
        """How many of the drafts were the only choice; all must be a choice within rounding, which moves scores by less than
        `close`."""
        if not self.drafts:
            return 0
        scores = reference.scores(self.history, self.drafts)
        if self.temperature:
            positions = len(self.history) + torch.arange(len(self.drafts))
            noise = gumbel_noise(torch.full_like(positions, self.seed), positions, scores.shape[1])
            scores = scores / self.temperature + noise
        chosen = scores.gather(1, torch.tensor(self.drafts).unsqueeze(1))
        best, second = scores.topk(2, dim=1).values.unbind(1)
        assert (best - chosen.squeeze(1) < close).all(), (len(self.history), self.drafts, scores.argmax(1).tolist())
        return int((best - second > 2 * close).sum())


class Watched:
    """A proposer whose own drafts are recorded, and replaced by what `doctor` says before they are verified."""

    def __init__(self, own: Proposer, context: ProposerContext, record: list[Drafted], doctor: Doctor) -> None:
        self._own = own
        self._tables = context.tables
        self._record = record
        self._doctor = doctor

    def draft(self, batch: Batch, hidden: Tensor, slots: Tensor, count: int) -> tuple[Tensor, Tensor]:
        drafts, valid = self._own.draft(batch, hidden, slots, count)
        assert drafts.shape == (len(slots), count)
        drafts, valid = drafts.clone(), valid.clone()
        tables = self._tables
        for row, slot in enumerate(slots.tolist()):
            if tables.finished[slot]:
                continue
            history = tables.history[slot, : tables.length[slot]].tolist()
            own = drafts[row, : valid[row]].tolist()
            self._record.append(Drafted(history, own, int(tables.seed[slot]), float(tables.temperature[slot])))
            chosen = self._doctor(history, own)
            if chosen is not own:
                chosen = chosen[:count]
                drafts[row, : len(chosen)] = torch.tensor(chosen, dtype=torch.int64)
                valid[row] = len(chosen)
        return drafts, valid


class Around:
    """A factory around another, whose `memory` and `load` it has: `make(proposer, context)` is what it makes."""

    def __init__(self, own: Any, make: Callable[[Proposer, ProposerContext], Proposer]) -> None:
        self._own, self._make = own, make

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def __call__(self, context: ProposerContext) -> Proposer:
        return self._make(self._own(context), context)


class WatchedPlugin(Offering):
    """The proposer `watched`, around that which the factory `own` makes."""

    def __init__(self, own: Any, record: list[Drafted], doctor: Doctor) -> None:
        super().__init__(Around(own, lambda made, context: Watched(made, context, record, doctor)), "watched")


def plugins_around(method: str, make: Callable[[Proposer, ProposerContext], Proposer]) -> PluginManager:
    """Plugins with the proposer `watched`: that of `method`, with what `make` puts around it."""
    own = PluginManager.load({"engine", "executor"}, allow=[], deny=[]).registry("proposers").get(method).factory
    return plugins_offering(Around(own, make), "watched")


def watched(method: str, record: list[Drafted], doctor: Doctor) -> PluginManager:
    """Plugins with the proposer `watched`, which is that of `method`."""
    return plugins_around(method, lambda made, context: Watched(made, context, record, doctor))


def unchanged(history: list[int], own: list[int]) -> list[int]:
    return own


def half_right(texts: list[list[int]]) -> Doctor:
    """Drafts that are right up to a place that varies with the history, so that every number of them is accepted at times;
    the proposer's own from there on."""

    def doctor(history: list[int], own: list[int]) -> list[int]:
        text = next((t for t in texts if t[: len(history)] == history), history)
        right = text[len(history) : len(history) + len(history) * 7 % (len(own) + 1)]
        return [*right, *own[len(right) :]]

    return doctor
