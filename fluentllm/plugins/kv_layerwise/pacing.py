"""How many layers go in one write: few, so that sending begins early and ends soon after the last layer; but not so few that
the price of a write is paid too often.

A group costs the host `cost` seconds, whatever its size, and the network `latency`. With t seconds to compute a layer and s
to send one, g layers a group:

- the host spends cost / (g · t) of the pass on posting: at most `HOST_SHARE`;
- the network spends latency / (g · s) of its time on latency: at most `NETWORK_SHARE`;
- what is left to send after the last layer is at least g · s, so g is at most a quarter of the layers (a half where so few
  layers are computed so fast that posting would be felt).
"""

from __future__ import annotations

HOST_SHARE = 0.02
NETWORK_SHARE = 0.2
WEIGHT = 0.2
"""Of a new reading in the running averages."""


class Pacing:
    """Running averages of one engine's passes and transfers."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.layer_seconds = 0.0
        """To compute one layer; 0: not measured yet."""
        self.bytes_per_second = 0.0
        self.cost = 0.0002
        """Host seconds of a group."""

    def passed(self, seconds: float, layers: int) -> None:
        """A pass took so long for so many layers."""
        if layers:
            self.layer_seconds = _average(self.layer_seconds, seconds / layers)

    def sent(self, size: int, seconds: float) -> None:
        """So many bytes took so long on the way, nothing else being sent."""
        if size and seconds > 0:
            self.bytes_per_second = _average(self.bytes_per_second, size / seconds)

    def posted(self, seconds: float) -> None:
        self.cost = _average(self.cost, seconds)

    def group(self, layer_bytes: int) -> int:
        """Layers a group where one layer has so many bytes to send."""
        quarter, half = max(1, self.layers // 4), max(1, self.layers // 2)
        if not self.layer_seconds:
            return quarter
        by_host = self.cost / (HOST_SHARE * self.layer_seconds)
        by_network = 0.0
        if self.bytes_per_second and layer_bytes:
            by_network = self.cost / (NETWORK_SHARE * layer_bytes / self.bytes_per_second)
        limit = half if by_host > quarter else quarter
        return max(1, min(limit, round(max(by_host, by_network))))


def _average(old: float, new: float) -> float:
    return new if not old else old + WEIGHT * (new - old)
