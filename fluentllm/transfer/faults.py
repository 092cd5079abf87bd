"""A transport that goes wrong on purpose: around any other, by chances that a seed fixes, counting what it did.

For chaos tests and for benchmarks of slow networks. Faults strike on the sending side, one draw for each kind and transfer, so
that the same seed and the same transfers give the same faults.
"""

from __future__ import annotations

import heapq
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta, Struct

from ..core.transport import (
    KVTransport,
    Peer,
    PeerDied,
    PeerGone,
    TransferDone,
    TransportCounters,
    TransportError,
    TransportEvent,
)
from .rows import check_rows

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Chance = Annotated[float, Meta(ge=0, le=1)]
REORDER_WITHIN = 0.1
"""Seconds that a transfer waits at most for another to overtake it."""
SPOT = 16
"""Bytes at most that a corruption changes."""
SPOTS = 4096


class FaultPlan(Struct, kw_only=True, forbid_unknown_fields=True):
    """Chances for each transfer."""

    seed: int = 0
    drop: Chance = 0
    """Never sent, though the sender is told that it is done."""
    delay: Chance = 0
    """Sent up to `delay_seconds` later."""
    delay_seconds: Annotated[float, Meta(ge=0)] = 0.05
    duplicate: Chance = 0
    """Sent twice, notification and all."""
    reorder: Chance = 0
    """Sent after the next transfer."""
    corrupt: Chance = 0
    """A few bytes arrive changed."""
    corrupt_note: Chance = 0
    """A byte of the notification arrives changed."""
    disconnect: Chance = 0
    """The connection is lost instead."""
    bytes_per_second: Annotated[float, Meta(ge=0)] = 0
    """Send no faster, one transfer after another; 0 is as fast as it goes. Not a fault: it is not counted."""


@dataclass(slots=True, order=True)
class _Held:
    due: float
    number: int
    peer: Peer = field(compare=False)
    rows: Any = field(compare=False)
    note: bytes | None = field(compare=False)
    copies: int = field(compare=False)
    overtaken_by: bool = field(compare=False, default=False)
    """It waits for another to go first."""


class FaultyTransport:
    """`KVTransport` around another. `wake` is what the inner transport was made with."""

    def __init__(self, inner: KVTransport, plan: FaultPlan, wake: Callable[[], None]) -> None:
        self._inner, self._plan, self._wake = inner, plan, wake
        self._random = random.Random(plan.seed)
        self.faults: Counter[str] = Counter()
        """Kind → how often it struck."""
        self._lock = threading.RLock()
        self._turn = threading.Condition(self._lock)
        self._numbers = 0
        self._outer: dict[int, int | None] = {}
        """The inner transport's number → ours; None for what stands in for a dropped one, of which nobody hears."""
        self._copies: dict[int, int] = {}
        """Our number → copies under way: a transfer is over when all of them are, since they read its memory."""
        self._worst: dict[int, TransferDone] = {}
        self._inner_of: dict[int, int] = {}
        self._held: list[_Held] = []
        self._events: deque[TransportEvent] = deque()
        self._broken: set[int] = set()
        self._free_at = 0.0
        self._tensors: Sequence[Tensor] = ()
        self._scratch: Tensor | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------------------------------------------------ passed through
    @property
    def epoch(self) -> int:
        return self._inner.epoch

    @property
    def revokes(self) -> bool:
        return self._inner.revokes

    @property
    def counters(self) -> TransportCounters:
        found = self._inner.counters
        found.other.update({f"fault_{kind}": count for kind, count in self.faults.items()})
        return found

    def metadata(self) -> bytes:
        return self._inner.metadata()

    def connect(self, metadata: bytes) -> Peer:
        return self._inner.connect(metadata)

    def expect(self, handoffs: int) -> None:
        self._inner.expect(handoffs)

    # ----------------------------------------------------------------------------------------------------------- the faults
    def register(self, tensors: Sequence[Tensor]) -> int:
        with self._lock:
            self._fail_held(lambda held: True, PeerDied("This end registers anew."))
            self._tensors = list(tensors)
            extra: list[Tensor] = []
            if self._plan.corrupt:
                # Wrong bytes are sent from here, behind what the caller registered, so that its memory stays as it is.
                self._scratch = tensors[0].new_zeros(0).byte().new_zeros(SPOTS * SPOT)
                extra = [self._scratch]
            return self._inner.register([*tensors, *extra])

    def submit(self, peer: Peer, writes: np.ndarray, notification: bytes | None = None) -> int:
        with self._lock:
            if peer.number in self._broken:
                raise PeerDied(f"The connection to {peer.name!r} was cut by a fault.")
            rows = check_rows(writes)
            strikes = [kind for kind in KINDS if self._random.random() < getattr(self._plan, kind)]
            self._numbers += 1
            number = self._numbers
            if "disconnect" in strikes:
                self.faults["disconnect"] += 1
                self._broken.add(peer.number)
                self._inner.disconnect(peer)
                self._end(number, peer, int(rows[:, 2].sum()), PeerDied(f"The connection to {peer.name!r} was cut by a fault."))
                return number
            if "drop" in strikes:
                # An empty transfer in its place raises PeerDied where the real one would.
                self._outer[self._inner.submit(peer, rows[:0], None)] = None
                self.faults["drop"] += 1
                self._end(number, peer, int(rows[:, 2].sum()), None)
                return number
            if "corrupt" in strikes and len(rows):
                self.faults["corrupt"] += 1
                rows = self._spoil(rows)
            if "corrupt_note" in strikes and notification:
                self.faults["corrupt_note"] += 1
                place = self._random.randrange(len(notification))
                changed = notification[place] ^ self._random.randrange(1, 256)
                notification = notification[:place] + bytes([changed]) + notification[place + 1 :]
            held = _Held(0.0, number, peer, rows, notification, 1 + ("duplicate" in strikes))
            if "duplicate" in strikes:
                self.faults["duplicate"] += 1
            self._hold(held, strikes)
            if held.due:
                heapq.heappush(self._held, held)
                self._start()
            else:
                self._send(held)
                self._let_overtaken_go(peer)
            return number

    def cancel(self, transfer: int) -> None:
        with self._lock:
            for held in self._held:
                if held.number == transfer:
                    self._held.remove(held)
                    heapq.heapify(self._held)
                    self._tell(TransferDone(transfer, held.peer, "cancelled", int(held.rows[:, 2].sum())))
                    return
            if transfer in self._inner_of:
                self._inner.cancel(self._inner_of[transfer])

    def disconnect(self, peer: Peer) -> None:
        with self._lock:
            for held in [held for held in self._held if held.peer is peer]:
                self.cancel(held.number)
            self._inner.disconnect(peer)

    def poll(self) -> list[TransportEvent]:
        with self._lock:
            found: list[TransportEvent] = []
            for event in self._inner.poll():
                if isinstance(event, TransferDone):
                    over = self._copy_over(event)
                    if over is not None:
                        found.append(over)
                    continue
                if isinstance(event, PeerGone):
                    found += self._last_of(event)
                else:
                    found.append(event)
            found += self._events
            self._events.clear()
            return found

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._fail_held(lambda held: True, PeerDied("This end closes."))
            self._turn.notify_all()
        self._inner.close()

    # -------------------------------------------------------------------------------------------------------------- helpers
    def _copy_over(self, event: TransferDone) -> TransferDone | None:
        """What to tell of a transfer whose last copy this was."""
        number = self._outer.pop(event.transfer, None)
        if number is None:
            return None
        worst = self._worst.get(number)
        if worst is None or (worst.status != "failed" and event.status == "failed"):
            worst = replace(event, transfer=number)
        self._copies[number] -= 1
        if self._copies[number]:
            self._worst[number] = worst
            return None
        del self._copies[number]
        self._worst.pop(number, None)
        self._inner_of.pop(number, None)
        return worst

    def _last_of(self, gone: PeerGone) -> list[TransportEvent]:
        """What is held for the peer fails first."""
        peer, cut = gone.peer, gone.peer.number in self._broken
        error = PeerDied(f"The connection to {peer.name!r} was cut by a fault.") if cut else gone.error
        self._fail_held(lambda held: held.peer is peer, error or PeerDied(f"{peer.name!r} was disconnected."))
        events = [*self._events, replace(gone, error=error)]
        self._events.clear()
        return events

    def _hold(self, held: _Held, strikes: list[str]) -> None:
        """Set `due` where the transfer does not go at once."""
        now = time.monotonic()
        if self._plan.bytes_per_second:
            self._free_at = max(self._free_at, now) + int(held.rows[:, 2].sum()) / self._plan.bytes_per_second
            held.due = self._free_at
        if "delay" in strikes:
            self.faults["delay"] += 1
            held.due = max(held.due, now) + self._random.random() * self._plan.delay_seconds
        elif "reorder" in strikes:
            self.faults["reorder"] += 1
            held.due = max(held.due, now) + REORDER_WITHIN
            held.overtaken_by = True

    def _send(self, held: _Held) -> None:
        number = self._inner.submit(held.peer, held.rows, held.note)
        self._outer[number] = held.number
        self._inner_of[held.number] = number
        self._copies[held.number] = 1
        for _ in range(held.copies - 1):
            self._outer[self._inner.submit(held.peer, held.rows, held.note)] = held.number
            self._copies[held.number] += 1

    def _send_late(self, held: _Held) -> None:
        try:
            self._send(held)
        except TransportError as error:
            if held.number not in self._inner_of:
                self._end(held.number, held.peer, int(held.rows[:, 2].sum()), error)

    def _let_overtaken_go(self, peer: Peer) -> None:
        for held in [held for held in self._held if held.overtaken_by and held.peer is peer]:
            self._held.remove(held)
            self._send_late(held)
        heapq.heapify(self._held)

    def _spoil(self, rows: np.ndarray) -> np.ndarray:
        """The same writes, but that a few bytes of one come from the scratch memory, which has them inverted."""
        import numpy as np

        row = self._random.randrange(len(rows))
        local, remote, length = rows[row].tolist()
        place = self._random.randrange(length)
        size = min(SPOT, length - place)
        start = local + place
        for tensor in self._tensors:
            total = tensor.numel() * tensor.element_size()
            if start + size <= total:
                break
            start -= total
        else:
            return rows  # out of range: the inner transport says so
        assert self._scratch is not None
        spot = self._random.randrange(SPOTS) * SPOT
        self._scratch[spot : spot + size] = ~tensor.view(-1).view(self._scratch.dtype)[start : start + size]
        before = sum(tensor.numel() * tensor.element_size() for tensor in self._tensors)
        pieces = [
            *rows[:row].tolist(),
            *rows[row + 1 :].tolist(),
            [local, remote, place],
            [before + spot, remote + place, size],
            [local + place + size, remote + place + size, length - place - size],
        ]
        return check_rows(np.array(pieces, dtype=np.int64))

    def _end(self, number: int, peer: Peer, size: int, error: TransportError | None) -> None:
        self._tell(TransferDone(number, peer, "failed" if error else "done", size, error))

    def _tell(self, event: TransportEvent) -> None:
        self._events.append(event)
        self._wake()

    def _fail_held(self, which: Callable[[_Held], bool], error: TransportError) -> None:
        for held in [held for held in self._held if which(held)]:
            self._held.remove(held)
            self._end(held.number, held.peer, int(held.rows[:, 2].sum()), error)
        heapq.heapify(self._held)

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kv-faults", daemon=True)
            self._thread.start()
        self._turn.notify_all()

    def _run(self) -> None:
        with self._lock:
            while not self._closed:
                now = time.monotonic()
                while self._held and self._held[0].due <= now:
                    held = heapq.heappop(self._held)
                    self._send_late(held)
                    self._let_overtaken_go(held.peer)
                self._turn.wait(max(0.0, self._held[0].due - now) if self._held else None)


KINDS = ("disconnect", "drop", "corrupt", "corrupt_note", "duplicate", "delay", "reorder")
"""In the order of the draws."""
