"""Work on a second stream of the GPU, beside what the current stream does meanwhile; inside a CUDA graph, a second branch.

Memory. The allocator gives freed memory to later allocations of the stream that it was allocated on, without waiting for other
streams. What the work reads stays referenced here until its result is asked for, after which the current stream waits for it.
What the work made may be freed at any time after that: the next work begins by waiting for all that the current stream has been
given, readers of the result included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ..kernels.residual import Rows


class SideStream:
    """One piece of work at a time. On a device that is no GPU the work is done at once, in place."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._inputs: Rows | None = None
        self._result: Tensor | None = None

    def start(self, work: Callable[[Rows], Tensor], x: Rows) -> None:
        """Enqueue work(x) behind all that the current stream has been given. It may not change what others read meanwhile.
        Work whose result was never asked for, because the pass failed, is forgotten."""
        self._inputs = self._result = None
        device = x.device
        if device.type != "cuda":
            self._result = work(x)
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._inputs = x
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            self._result = work(x)

    def result(self) -> Tensor:
        """What the work gives; what the current stream is given from now on waits for it."""
        result = self._result
        assert result is not None, "no work was started"
        if self._stream is not None and result.device.type == "cuda":
            torch.cuda.current_stream(result.device).wait_stream(self._stream)
        self._inputs = self._result = None
        return result
