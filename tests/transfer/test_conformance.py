"""The transport that needs no library keeps the promise of all transports; and the suite notices who does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fluentllm.core.plugins.registry import Registry
from fluentllm.core.transport import TransportContext, TransportSpec
from fluentllm.plugins.kv_loopback.wire import LoopbackWire
from fluentllm.testing import assert_kv_transport_conforms
from fluentllm.transfer.polled import PolledTransport


def test_loopback_conforms(installed: Callable[[str], str]) -> None:
    passed = assert_kv_transport_conforms(installed("loopback"))
    assert len(passed) >= 12


def test_every_transport_says_why_it_cannot(transports: Registry) -> None:
    assert {"loopback", "nixl", "mooncake"} <= set(transports.names())
    reasons = transports.why_not(TransportSpec("tpu"))
    assert reasons.keys() >= {"loopback", "nixl", "mooncake"}
    assert all("tpu" in reason for reason in reasons.values())


class LosesTheLastByte(LoopbackWire):
    def post(self, connection, rows):
        rows = rows.copy()
        rows[-1, 2] -= 1
        super().post(connection, rows[rows[:, 2] > 0])


class NotifiesFirst(LoopbackWire):
    """Writes when it is asked whether it has written."""

    def post(self, connection, rows):
        return connection, rows

    def finished(self, operation):
        return True

    def probe(self, connection, note):
        self._target(connection)


class StaysOpen(LoopbackWire):
    def close(self):
        return None


class NeverTellsOfDeath(LoopbackWire):
    def probe(self, connection, note):
        return None


class RepeatsNotes(LoopbackWire):
    def send(self, connection, note):
        super().send(connection, note)
        super().send(connection, note)


@pytest.mark.parametrize(
    ("wire", "check"),
    [
        (LosesTheLastByte, "bytes arrive intact"),
        (NotifiesFirst, "notification after data"),
        (RepeatsNotes, "concurrent transfers"),
        (StaysOpen, "closing stops writes"),
        (NeverTellsOfDeath, "a dead peer is told"),
    ],
)
def test_what_a_broken_transport_does_is_noticed(wire: type[LoopbackWire], check: str) -> None:
    def factory(context: TransportContext) -> PolledTransport:
        return PolledTransport(context, wire())

    with pytest.raises(AssertionError, match=check):
        assert_kv_transport_conforms(factory, only=check, timeout=2)
