"""The conformance suite of KV transports: what `core/transport.py` promises, tried out on real memory.

Every check starts from fresh ends, compares with what plain copies give, and says in its assertion what a transport did
wrong. With `processes=2` the receiving end lives in a process of its own, which is also killed and frozen.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from ..core.transport import MAX_NOTIFICATION, PeerDied, TransportError, WriteRefused
from .bench import BIG, SIZES, Bench, any_bytes, copied, differs
from .ends import Factory, checked_note


def assert_kv_transport_conforms(
    factory: Factory | str,
    *,
    processes: int = 1,
    device: str = "cpu",
    host: str = "127.0.0.1",
    seed: int = 0,
    timeout: float = 20.0,
    only: str | None = None,
) -> list[str]:
    """Hold a transport to its promise; returns the names of the checks that it passed.

    factory(TransportContext) -> KVTransport, or `module:attribute` that names it (which `processes=2` needs, as each end is
    made where it lives). timeout: seconds that any one thing may take. only: run the check of this name alone.
    Raises AssertionError with what was expected and what came.
    """
    if processes == 2 and not isinstance(factory, str):
        raise ValueError("with processes=2 the factory is given as 'module:attribute', since another process loads it")
    bench = Bench(factory, processes, device, host, seed, timeout)
    passed = []
    try:
        for check in CHECKS:
            name = check.__name__.removeprefix("_").replace("_", " ")
            if (only and name != only) or (check is _a_frozen_peer_holds_up_nobody and processes != 2):
                continue
            try:
                check(bench)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
            passed.append(name)
    finally:
        bench.close()
    return passed


# --------------------------------------------------------------------------------------------------------------- the checks
def _bytes_arrive_intact(bench: Bench) -> None:
    """Ragged, empty, unaligned, merged and long writes over several tensors; nothing else is touched."""
    with bench.pair() as pair:
        source, before = pair.source.memory(), pair.target.memory()
        taken = bytearray(b"\1" * (3 * 2**20) + bytes(sum(SIZES) - 3 * 2**20))
        rows = [[0, 0, 3 * 2**20], *bench.rows(SIZES, 60, taken)]
        transfer = pair.source.submit(pair.to_target, rows, b"all")
        assert pair.done(transfer) == {transfer: "done"}, "a plain transfer is done"
        assert [note[2] for note in pair.notes(1)] == [b"all"], "its notification arrives, once"
        expected = copied(before, source, rows)
        after = pair.target.memory()
        assert after == expected, differs(after, expected)
        assert pair.source.memory() == source, "the source's memory does not change"
        counters = pair.source.counters()
        assert counters["bytes"] == sum(row[2] for row in rows), "bytes are counted"
        assert (counters["transfers"], counters["done"]) == (1, 1), "transfers are counted"


def _long_and_many_rows(bench: Bench) -> None:
    """More bytes, and more rows, than a library takes at once."""
    with bench.pair(BIG) as pair:
        source, before = pair.source.memory(), pair.target.memory()
        half = BIG[0] // 2
        rows = [[5, 3, half], *([half + 8 + 1024 * i, half + 16 + 1024 * i, 1000] for i in range(6000))]
        transfer = pair.source.submit(pair.to_target, rows, b"long")
        assert pair.done(transfer) == {transfer: "done"}, "a long transfer is done"
        pair.notes(1)
        expected, after = copied(before, source, rows), pair.target.memory()
        assert after == expected, differs(after, expected)


def _nothing_to_write(bench: Bench) -> None:
    """No rows, rows of no length; with a notification, of any bytes and up to the limit, or without."""
    with bench.pair() as pair:
        before = pair.target.memory()
        large = bytes(bench.random.randrange(256) for _ in range(MAX_NOTIFICATION))
        notes = [b"", bytes(range(256)), "ü€".encode(), large]
        transfers = [pair.source.submit(pair.to_target, rows, None) for rows in ([], [[0, 0, 0], [7, 9, 0]])]
        transfers += [pair.source.submit(pair.to_target, [], note) for note in notes]
        assert set(pair.done(*transfers).values()) == {"done"}, "empty transfers are done"
        assert sorted(note[2] for note in pair.notes(len(notes))) == sorted(notes), "every notification arrives as it was"
        assert pair.target.memory() == before, "nothing was written"


def _notification_after_data(bench: Bench) -> None:
    """When a notification is polled, the bytes that it speaks of are there: checked at that moment."""
    with bench.pair() as pair:
        source = pair.source.memory()
        for size in (1, 4096, 2**20, 3 * 2**20):
            for repeat in range(8):
                start = bench.random.randint(0, 3 * 2**20 - size)
                note = checked_note(repeat, 0, source[start : start + size])
                pair.source.submit(pair.to_target, [[start, 0, size]], note)
                [(_, _, payload, intact)] = pair.notes(1)
                assert payload == note, "the notification is the one sent"
                assert intact, f"a notification came before its {size} bytes"


def _concurrent_transfers(bench: Bench) -> None:
    """Many transfers at once, both ways; each ends once, each notification comes once, after its bytes."""
    with bench.pair() as pair:
        memories = {True: pair.source.memory(), False: pair.target.memory()}
        # Each end's upper half is written to, the lower half read from, so that the two directions do not mix.
        middle, piece = 3 * 2**19, 16 * 1024
        count = 90
        places = {forward: bench.random.sample(range(middle // piece), count) for forward in (True, False)}
        sent: dict[bool, list[int]] = {True: [], False: []}
        rows: dict[bool, list[list[int]]] = {True: [], False: []}
        for number in range(count):
            for forward, end, peer in ((True, pair.source, pair.to_target), (False, pair.target, pair.to_source)):
                start = bench.random.randint(0, middle - piece)
                row = [start, middle + places[forward][number] * piece, piece]
                note = checked_note(number, row[1], memories[forward][start : start + piece])
                sent[forward].append(end.submit(peer, [row], note))
                rows[forward].append(row)
        for forward, end in ((True, pair.source), (False, pair.target)):
            seen = bench.until(
                end,
                lambda seen: sum(e[0] == "done" for e in seen) >= count and sum(e[0] == "note" for e in seen) >= count,
                f"{count} transfers and notifications",
            )
            ends = [event for event in seen if event[0] == "done"]
            assert sorted(event[1] for event in ends) == sorted(sent[forward]), "each transfer ends once"
            assert {event[2] for event in ends} == {"done"}, "all are done"
            notes = [event for event in seen if event[0] == "note"]
            assert len({note[2] for note in notes}) == len(notes) == count, "each notification comes once"
            assert all(note[3] for note in notes), "a notification came before its bytes"
        assert pair.target.memory() == copied(memories[False], memories[True], rows[True]), "the target has all bytes"
        assert pair.source.memory() == copied(memories[True], memories[False], rows[False]), "the source has all bytes"


def _wrong_writes_are_refused(bench: Bench) -> None:
    """What lies outside, or across two tensors, is refused before anything is written."""
    with bench.pair() as pair:
        before, total, border = pair.target.memory(), sum(SIZES), SIZES[0]
        wrong = [
            *([-1, 0, 4], [0, -1, 4], [total, 0, 1], [0, total, 1], [total - 1, 0, 2], [0, total - 1, 2]),
            *([border - 1, 0, 2], [0, border - 1, 2], [0, 0, -1], [0, 0, 2**62], [2**62, 0, 2**62], [0, 2**63 - 1, 1]),
        ]
        for row in wrong:
            _refused(partial(pair.source.submit, pair.to_target, [[0, 0, 16], row], b"no"), WriteRefused, str(row))
        _refused(lambda: pair.source.submit(pair.to_target, [[0, 0]], b"no"), WriteRefused, "rows of two numbers")
        large = bytes(MAX_NOTIFICATION + 1)
        _refused(lambda: pair.source.submit(pair.to_target, [], large), WriteRefused, "a notification that is too long")
        ok = pair.source.submit(pair.to_target, [[total - 1, total - 1, 1]], b"last byte")
        assert pair.done(ok) == {ok: "done"}, "refusals end no connection, and the last byte can be written"
        assert [note[2] for note in pair.notes(1)] == [b"last byte"], "refused transfers notify nobody"
        assert pair.target.memory()[:-1] == before[:-1], "refused transfers write nothing"


def _wrong_metadata_is_refused(bench: Bench) -> None:
    end = bench.end("lonely")
    try:
        good = end.register([64], 1)
        for bad in (b"", b"\x00" * 40, good[:-3], good + b"x", b"\xff" * 70_000):
            _refused(partial(end.connect, bad), TransportError, f"{len(bad)} bytes of no metadata")
    finally:
        end.close()


def _cancelling(bench: Bench) -> None:
    """A cancelled transfer ends once, writes nothing more after that, and notifies only if it was done."""
    with bench.pair(BIG) as pair:
        for _ in range(5):  # a fast transport may be done before it is asked to stop
            pair.target.fill(0)
            transfers = [pair.source.submit(pair.to_target, [[0, 0, BIG[0]]], b"%d" % number) for number in range(4)]
            for transfer in (*transfers[1:], 10**9):
                pair.source.cancel(transfer)
            status = pair.done(*transfers)
            assert status[transfers[0]] == "done", "other transfers go on"
            assert set(status.values()) <= {"done", "cancelled"}, status
            pair.target.fill(0)
            time.sleep(0.1)
            assert not any_bytes(pair.target.memory()), "bytes were written after the transfer had ended"
            expected = [b"%d" % number for number, transfer in enumerate(transfers) if status[transfer] == "done"]
            notes = [note[2] for note in pair.notes(len(expected))]
            assert sorted(notes) == expected, f"notifications {notes} of transfers that ended as {list(status.values())}"
            assert not pair.target.events(0.1), "a cancelled transfer notified"
            if "cancelled" in status.values():
                return
        raise AssertionError("nothing was ever cancelled, though four transfers waited behind each other")


def _disconnecting(bench: Bench) -> None:
    """After `disconnect` all transfers end, then `PeerGone` comes; nothing goes either way; connecting again works."""
    with bench.pair(BIG) as pair:
        transfers = [pair.source.submit(pair.to_target, [[0, 0, BIG[0]]], b"late") for _ in range(3)]
        pair.source.disconnect(pair.to_target)
        _refused(lambda: pair.source.submit(pair.to_target, [], b"no"), PeerDied, "a disconnected peer")
        seen = pair.gone()
        kinds = [event[0] for event in seen]
        assert kinds.index("gone") == len(kinds) - 1, f"something came after PeerGone: {seen}"
        assert {event[1] for event in seen if event[0] == "done"} == set(transfers), "all transfers ended before"
        assert seen[-1][2] is None, "a wanted end is no error"
        pair.target.fill(0)
        time.sleep(0.2)
        assert not any_bytes(pair.target.memory()), "bytes were written after PeerGone"
        lost = pair.target.submit(pair.to_source, [], b"nobody listens")
        pair.done(lost, end=pair.target)
        assert not [event for event in pair.source.events(0.3) if event[0] == "note"], "a note of a disconnected peer came"
        again = pair.source.connect(pair.metadata[1])
        assert again != pair.to_target, "a new connection has a new number"
        bench.until(pair.source, lambda seen: ("ready", again) in seen, "PeerReady")
        transfer = pair.source.submit(again, [[0, 0, 64]], b"again")
        assert pair.done(transfer) == {transfer: "done"}, "writing works after connecting again"
        assert pair.source.connect(pair.metadata[1]) == again, "the same metadata twice is the same peer"


def _registering_again_is_a_new_epoch(bench: Bench) -> None:
    """Old addresses lead nowhere: neither into the old memory nor the new; new ones work."""
    with bench.pair() as pair:
        old_epoch, revokes = pair.target.epoch(), pair.target.revokes()
        new = pair.target.register(SIZES, 3)
        assert pair.target.epoch() not in (0, old_epoch), "the epoch is new"
        assert new != pair.metadata[1], "the metadata is new"
        assert ("gone", pair.to_source) in [event[:2] for event in pair.gone(pair.target)], "its connections ended"
        memory, old = pair.target.memory(), pair.target.previous()
        size = SIZES[0]
        try:
            late = pair.source.submit(pair.to_target, [[0, 0, size]], b"late")
        except PeerDied:
            seen = pair.gone()
        else:
            seen = pair.gone()
            assert ("done", late, "failed", size) in seen, f"a write to an old epoch fails: {seen}"
        assert seen[-1][:2] == ("gone", pair.to_target), "the peer is gone"
        assert seen[-1][2] is not None, "and an error says why"
        time.sleep(0.1)
        assert pair.target.memory() == memory, "a write to the old epoch landed in the new memory"
        if revokes:
            assert pair.target.previous() == old, "a write landed in memory that was no longer registered"
        peer, back = pair.source.connect(new), pair.target.connect(pair.metadata[0])
        bench.until(pair.source, lambda seen: ("ready", peer) in seen, "PeerReady")
        bench.until(pair.target, lambda seen: ("ready", back) in seen, "PeerReady")
        transfer = pair.source.submit(peer, [[0, 0, size]], b"new")
        assert pair.done(transfer) == {transfer: "done"}, "the new epoch can be written to"
        assert [note[2] for note in pair.notes(1)] == [b"new"], "only the new epoch's notification arrives"
        assert pair.target.memory()[:size] == pair.source.memory()[:size], "bytes arrive in the new memory"


def _closing_stops_writes(bench: Bench) -> None:
    """After `close` nothing lands any more, though the peer is in the middle of writing."""
    with bench.pair(BIG) as pair:
        transfers = [pair.source.submit(pair.to_target, [[0, 0, BIG[0]]], b"more") for _ in range(6)]
        pair.bench.until(pair.target, lambda seen: any(event[0] == "note" for event in seen), "a first notification")
        revokes = pair.target.revokes()
        pair.target.close()
        pair.target.fill(0)
        seen = pair.gone()
        assert {event[1] for event in seen if event[0] == "done"} == set(transfers), "every transfer ended"
        if revokes:
            assert not any_bytes(pair.target.memory()), "bytes were written after close"
        pair.target.close()


def _a_dead_peer_is_told(bench: Bench) -> None:
    """A peer that ends, by kill -9 where it has a process, is reported, whether or not something is under way; one that
    starts anew is another."""
    for busy in (True, False):
        with bench.pair(BIG) as pair:
            # More than can be written before the peer has ended, however late this thread gets to end it.
            transfers = [pair.source.submit(pair.to_target, [[0, 0, BIG[0]]], b"x") for _ in range(100 if busy else 0)]
            bench.kill(pair.target)
            seen = pair.gone()
            ends = {event[1]: event[2] for event in seen if event[0] == "done"}
            assert set(ends) == set(transfers), f"open transfers end: {seen}"
            assert seen[-1][:2] == ("gone", pair.to_target), f"PeerGone comes last: {seen}"
            assert seen[-1][2] is not None, "PeerGone has an error"
            assert not busy or "failed" in ends.values(), f"what could not be written has failed: {ends}"
            _refused(partial(pair.source.submit, pair.to_target, [], b"x"), PeerDied, "a dead peer")
            second = bench.end("target", remote=True)
            try:
                peer = pair.source.connect(second.register(SIZES, 4))
                second.connect(pair.metadata[0])
                transfer = pair.source.submit(peer, [[0, 0, 4096]], b"hello again")
                assert pair.done(transfer) == {transfer: "done"}, "a restarted peer can be written to"
                assert [note[2] for note in pair.notes(1, second)] == [b"hello again"], "and is notified"
            finally:
                second.close()


def _a_frozen_peer_holds_up_nobody(bench: Bench) -> None:
    """While one peer's process is stopped, transfers to another go on; when it continues, its own do."""
    with bench.pair(BIG) as pair:
        other = bench.end("other")
        try:
            peer = pair.source.connect(other.register(SIZES, 5))
            other.connect(pair.metadata[0])
            bench.until(pair.source, lambda seen: ("ready", peer) in seen, "PeerReady")
            stopped = pair.target.host.process
            stopped.send_signal(signal.SIGSTOP)
            held = [pair.source.submit(pair.to_target, [[0, 0, BIG[0]]], b"held") for _ in range(2)]
            quick = pair.source.submit(peer, [[0, 0, 4096]], b"quick")
            assert quick in pair.done(quick), "a frozen peer holds up another"
            stopped.send_signal(signal.SIGCONT)
            assert len(pair.notes(2)) == 2, "a peer that continues gets its notifications"
            assert held
        finally:
            other.close()


def _refused(call: Callable[[], Any], error: type[TransportError], what: str) -> None:
    try:
        call()
    except error:
        return
    raise AssertionError(f"{error.__name__} was expected for {what}")


CHECKS: tuple[Callable[[Bench], None], ...] = (
    _bytes_arrive_intact,
    _long_and_many_rows,
    _nothing_to_write,
    _notification_after_data,
    _concurrent_transfers,
    _wrong_writes_are_refused,
    _wrong_metadata_is_refused,
    _cancelling,
    _disconnecting,
    _registering_again_is_a_new_epoch,
    _closing_stops_writes,
    _a_dead_peer_is_told,
    _a_frozen_peer_holds_up_nobody,
)
