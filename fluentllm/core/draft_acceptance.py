"""What the choice of a draft length knows of acceptance: how often drafts are offered, and how often right. Torch-free.

Kept for each class of requests: a proposer may guess greedy requests well and sampled ones, or those with a grammar, badly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping

    from .types import SamplingParams

WINDOW, STEPS, REQUESTS = 64, 8, 4
"""What a running share remembers: so many sequences' steps, or of many sequences so many steps, since one has its luck; and
requests of which it knows what is usual."""
CAUTION = 0.5
"""Standard deviations that a share is taken for less than it seems: without drafts nothing can be lost."""
DOUBT = 2.5
"""Sequences' steps that a share counts for before anything was seen of it, and what is usual when new requests come."""


@dataclass(slots=True)
class Share:
    """A running mean of yes and no: of the requests that run, beside what is usual. There every request counts the same: one
    that has few drafts has as much to say of the next as one that has many."""

    mean: float
    weight: float = DOUBT
    usual: float = field(init=False)
    requests: int = 0
    """Of which `usual` is the mean."""
    seen: bool = False
    """Anything since `usual` was told."""

    def __post_init__(self) -> None:
        self.usual = self.mean

    def add(self, yes: int, asked: int) -> None:
        self.weight = min(self.weight + asked, max(WINDOW, STEPS * asked))
        self.mean += asked / self.weight * (yes / asked - self.mean)
        self.seen = True

    def least(self) -> float:
        """The mean, less what it may well be wrong by."""
        return max(0.0, self.mean - CAUTION * sqrt(self.mean * (1 - self.mean) / self.weight))

    def renew(self, new: int, part: float) -> None:
        """So many requests have come in the place of others, this part of all: of them only what is usual is known."""
        if self.seen:
            self.requests = min(self.requests + new, max(REQUESTS, new))
            self.usual += new / self.requests * (self.mean - self.usual)
            self.seen = False
        self.mean += part * (self.usual - self.mean)
        self.weight = max(min(self.weight, DOUBT), self.weight * (1 - part))


@dataclass(slots=True)
class Seen:
    """How drafts fare in one class."""

    offered: Share = field(default_factory=lambda: Share(1.0, 0.0))
    """Sequences that have a draft: a proposer may find nothing to say."""
    right: list[Share] = field(default_factory=list)
    """For each place that was seen: drafts that are right, of those whose predecessors were."""
    _tokens: list[float] = field(default_factory=list)
    """For each K, since the shares last changed: it is asked for several times a step."""

    def tokens(self, k: int) -> float:
        """That a sequence may count on in a step with K drafts. A place that was not seen is taken for the one before. The
        first decides between drafts and none, so it needs caution: at the others that would only make them fewer."""
        if k >= len(self._tokens):
            total, survives, mean = 1.0, self.offered.mean, 0.0
            self._tokens = [total]
            for place in range(max(k, len(self.right))):
                mean = self.right[place].mean if place < len(self.right) else mean
                survives *= mean if place or not self.right else self.right[0].least()
                total += survives
                self._tokens.append(total)
        return self._tokens[k]

    def changed(self) -> None:
        self._tokens = []


class Acceptance:
    """Shares of each class."""

    def __init__(self) -> None:
        self._seen: dict[Hashable, Seen] = {}

    def add(self, kind: Hashable, rights: Iterable[tuple[int, int]], first: int = 0) -> None:
        """Of sequences of a class: (drafts, how many of these were right) of each, none where none was offered. Places before
        `first` were seen otherwise."""
        seen = self._of(kind)
        seen.changed()
        counts: dict[tuple[int, int], int] = {}
        for pair in rights:
            counts[pair] = counts.get(pair, 0) + 1
        if not first:
            seen.offered.add(sum(n for (drafts, _), n in counts.items() if drafts), sum(counts.values()))
        for place in range(first, max((drafts for drafts, _ in counts), default=0)):
            asked = sum(n for (drafts, right), n in counts.items() if drafts > place <= right)
            if not asked:
                return
            if place == len(seen.right):
                seen.right.append(Share(seen.right[-1].mean if seen.right else 0.0))
            elif place > len(seen.right):
                return
            seen.right[place].add(sum(n for (_, right), n in counts.items() if right > place), asked)

    def renew(self, kind: Hashable, new: int, running: int) -> None:
        """New requests have come to a class, of so many that run: what was seen of the others says as much less."""
        seen = self._of(kind)
        seen.changed()
        for share in (seen.offered, *seen.right):
            share.renew(new, min(1.0, new / max(1, running)))

    def tokens(self, mix: Mapping[Hashable, int], k: int) -> float:
        """Tokens that a sequence may count on in a step with K drafts, where `mix` counts the sequences of each class."""
        total = sum(mix.values())
        if not total:
            known = list(self._seen.values())
            return sum(seen.tokens(k) for seen in known) / len(known) if known else 1.0
        return sum(n * self._of(kind).tokens(k) for kind, n in mix.items()) / total

    def offered(self, mix: Mapping[Hashable, int]) -> float:
        """Share of steps in which any sequence has a draft."""
        none = 1.0
        for kind, n in mix.items():
            none *= (1 - self._of(kind).offered.mean) ** n
        return 1 - none

    def _of(self, kind: Hashable) -> Seen:
        """What is not known of a class is taken from the one seen before."""
        if kind not in self._seen:
            last = next(reversed(self._seen.values()), Seen())
            offered = Share(last.offered.mean, min(last.offered.weight, DOUBT))
            self._seen[kind] = Seen(offered, [Share(share.mean) for share in last.right])
        return self._seen[kind]


def class_of(params: SamplingParams) -> tuple[bool, bool]:
    """Sampled? With a grammar?"""
    return params.temperature > 0, params.grammar is not None
