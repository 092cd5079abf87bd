"""KV transport between endpoints of one process: real copies, no network. For tests, and for trying the handoff alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...core.hookspecs import hookimpl

if TYPE_CHECKING:
    from ...core.protocols import Register
    from ...core.transport import KVTransport, TransportContext, TransportSpec

FLUENT_API_VERSION = 1


class LoopbackPlugin:
    @hookimpl
    def fluent_kv_transports(self, register: Register) -> None:
        register("loopback", _create, supports=_supports)


def _supports(spec: TransportSpec) -> str | None:
    return None if spec.device == "cpu" else f"it copies memory of the CPU, not of {spec.device}"


def _create(context: TransportContext) -> KVTransport:
    from ...transfer.polled import PolledTransport
    from .wire import LoopbackWire

    return PolledTransport(context, LoopbackWire())


plugin = LoopbackPlugin()
