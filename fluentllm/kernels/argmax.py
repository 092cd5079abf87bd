"""The largest value of each row, as greedy drawing needs it for rows as long as a vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_GROUPS = (256, 128, 64, 32)


def argmax_rows(x: Tensor) -> Tensor:
    """x [R, V] → [R] int64, the first of each row's largest values.

    torch's argmax on a CPU compares one value at a time; its amax many. So the best of the groups' maxima is found first, and
    then the place within that group.
    """
    rows, width = x.shape
    group = next((size for size in _GROUPS if width % size == 0), None)
    if x.device.type != "cpu" or group is None or not rows:
        return x.argmax(1)
    groups = x.view(rows, -1, group)
    best = groups.amax(-1).argmax(1)
    values = groups.gather(1, best.view(rows, 1, 1).expand(rows, 1, group)).squeeze(1)
    return values.argmax(1).add_(best, alpha=group)
