"""What is worth its price: in how many groups the layers of a pass go, and whether to fetch KV or to compute it again.

A pass of C seconds, whose KV takes S seconds to send, in n groups of layers of equal size: the first is sent when 1 / n of
the pass is over, the last arrives 1 / n of the sending after it, and each group but the last costs the pass some c seconds of
the host. So the pass and its sending take about max(C, S) + min(C, S) / n + (n - 1) · c, which is least for

    n = sqrt(min(C, S) / c)

One group is sending after the pass. More are made only where they save at least `WORTH` of it: what is gained on a fast
network is soon less than what the estimates are wrong by.
"""

from __future__ import annotations

import math

WORTH = 0.02
"""Share of the pass that cutting it must save."""
WEIGHT = 0.2
"""Of a new reading in the running averages."""
MAX_GROUPS = 64
CAUTION = 0.5
"""Fetching must take less than this of the time that computing takes: it also takes time of the one who sends."""


class Line:
    """y = fixed + slope · x through what was read, the newest counting most. Of readings that are all alike, y / x."""

    def __init__(self) -> None:
        self._x = self._y = self._xx = self._xy = 0.0
        self.readings = 0

    def add(self, x: float, y: float) -> None:
        weight = WEIGHT if self.readings else 1.0
        self._x += weight * (x - self._x)
        self._y += weight * (y - self._y)
        self._xx += weight * (x * x - self._xx)
        self._xy += weight * (x * y - self._xy)
        self.readings += 1

    @property
    def slope(self) -> float:
        spread = self._xx - self._x**2
        if spread > 0.01 * self._xx:
            found = (self._xy - self._x * self._y) / spread
            # Noise can tilt it: neither side of the mean is ever below nothing.
            return min(max(found, 0.0), self._y / self._x)
        return self._y / self._x if self._x else 0.0

    def at(self, x: float) -> float:
        return max(0.0, self._y - self.slope * self._x) + self.slope * x


class Pacing:
    """Running averages of one engine's passes and transfers."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.passes = Line()
        """Tokens → seconds."""
        self.transfers = Line()
        """Bytes → seconds."""
        self.cost = 0.001
        """Seconds that a group takes from the pass: posting it, and the threads that it wakes."""

    def passed(self, seconds: float, tokens: int) -> None:
        """A pass took so long for so many tokens of prompts."""
        if tokens:
            self.passes.add(tokens, seconds)

    def sent(self, size: int, seconds: float) -> None:
        """So many bytes took so long on the way, nothing else being sent."""
        if size and seconds > 0:
            self.transfers.add(size, seconds)

    def posted(self, seconds: float) -> None:
        """The engine's loop took so long for a group; the transport's thread takes about as long again."""
        self.cost += WEIGHT * (2 * seconds - self.cost)

    def group(self, tokens: int, size: int) -> int:
        """Layers a group, for a pass over so many tokens that has `size` bytes to send."""
        if not (self.passes.readings and self.transfers.readings):
            return max(1, self.layers // 4)
        compute = self.passes.at(tokens)
        shorter = min(compute, self.transfers.at(size))
        count = max(1, min(self.layers, MAX_GROUPS, round(math.sqrt(shorter / self.cost))))
        saved = shorter * (1 - 1 / count) - (count - 1) * self.cost
        if saved <= WORTH * compute:
            return self.layers
        return -(-self.layers // count)

    def fetching_pays(self, tokens: int, size: int) -> bool:
        """Whether KV of `size` bytes for so many tokens is brought from another engine sooner than computed. Not before both
        were measured."""
        if not (self.passes.readings and self.transfers.readings):
            return False
        return self.transfers.at(size) + self.cost < CAUTION * self.passes.slope * tokens
