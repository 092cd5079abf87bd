"""Bytes from files to the device: several threads read ahead, through pinned buffers of bounded size, while others are copied.

    disk or page cache → pinned buffer → (copy stream) → span on the device → views, one a tensor

No tensor ever exists in host memory as a whole; on a CPU the span is read in place.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .places import cut_off, spans_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from .places import Place, Span

PIECE_BYTES = 16 << 20
"""What one thread reads at a time; the size of a pinned buffer."""
AHEAD_BYTES = 512 << 20
"""Spans that are on their way beside the one in use: what loading needs on the device on top of the model."""


@dataclass(slots=True)
class _Coming:
    """A span on its way."""

    span: Span
    bytes: Tensor
    """uint8 on the device."""
    pieces: list[Future[Any]]
    """What each gives is the CUDA event after its copy; None on a CPU."""


def stream(places: Sequence[Place], device: torch.device, threads: int, staging_bytes: int) -> Iterator[Tensor]:
    """The tensors of `places`, in order, on `device`, each ready for the current stream. Small neighbours are views of one
    span. Raises `CheckpointError` for a file that is cut off, `OSError`."""
    reader = _Reader(device, threads, max(2, staging_bytes // PIECE_BYTES))
    try:
        waiting = spans_of(places)
        coming: deque[_Coming] = deque()
        ahead = 0
        while True:
            while ahead < AHEAD_BYTES and (span := next(waiting, None)) is not None:
                coming.append(reader.send_for(span))
                ahead += span.nbytes
            if not coming:
                return
            first = coming.popleft()
            ahead -= first.span.nbytes
            reader.wait_for(first)
            for place in first.span.places:
                start = place.start - first.span.start
                yield first.bytes[start : start + place.nbytes].view(place.dtype).view(place.shape)
    finally:
        reader.close()


class _Reader:
    """Threads, buffers, open files, and a copy stream a thread."""

    def __init__(self, device: torch.device, threads: int, buffers: int) -> None:
        self._device = device
        self._files: dict[Path, int] = {}
        self._own = threading.local()
        self._buffers: queue.SimpleQueue[tuple[Tensor | None, torch.cuda.Event | None]] = queue.SimpleQueue()
        """Buffer, allocated when it is first taken, and the event after which it may be written again."""
        for _ in range(buffers):
            self._buffers.put((None, None))
        self._threads = ThreadPoolExecutor(threads, "fluent-weights")

    def send_for(self, span: Span) -> _Coming:
        target = torch.empty(span.nbytes, dtype=torch.uint8, device=self._device)
        file = self._file(span.file)
        free = None
        if self._device.type == "cuda":
            # The allocator may have handed out memory that the current stream still reads.
            free = torch.cuda.Event()  # type: ignore[no-untyped-call]
            free.record(torch.cuda.current_stream(self._device))
        pieces = []
        for start in range(0, span.nbytes, PIECE_BYTES):
            part = target[start : start + PIECE_BYTES]
            pieces.append(self._threads.submit(self._bring, span, file, span.start + start, part, free))
        return _Coming(span, target, pieces)

    def wait_for(self, coming: _Coming) -> None:
        for piece in coming.pieces:
            copied = piece.result()
            if copied is not None:
                torch.cuda.current_stream(self._device).wait_event(copied)

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # copies into spans that a caller gave up half-way
        for file in self._files.values():
            os.close(file)

    def _file(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        return self._files[path]

    # ----------------------------------------------------------------------------------------------------- on the threads
    def _bring(self, span: Span, file: int, start: int, target: Tensor, free: torch.cuda.Event | None) -> Any:
        if free is None:
            _read(span.file, file, start, target)
            return None
        buffer, used = self._buffers.get()
        try:
            if used is not None:
                used.synchronize()
            if buffer is None:
                buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
            part = buffer[: target.numel()]
            _read(span.file, file, start, part)
            used = self._copy(part, target, free)
        finally:
            self._buffers.put((buffer, used))
        return used

    def _copy(self, part: Tensor, target: Tensor, free: torch.cuda.Event) -> torch.cuda.Event:
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            torch.cuda.set_device(self._own.stream.device)  # `cuda` has a number there
        # A model's weights are inference tensors, and each thread has to say so for itself.
        with torch.cuda.stream(self._own.stream), torch.inference_mode():
            self._own.stream.wait_event(free)
            target.copy_(part, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        return copied


def _read(path: Path, file: int, start: int, target: Tensor) -> None:
    """Fill `target`, uint8 on the host, from `start` on; other threads run meanwhile."""
    view = target.numpy().data
    while view:
        count = os.preadv(file, [view], start)
        if count == 0:
            raise cut_off(path)
        view, start = view[count:], start + count
