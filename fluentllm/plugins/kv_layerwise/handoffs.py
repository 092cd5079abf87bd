"""`core.handoff.Handoffs`: a prefill engine's sender or a decode engine's receiver, and the door that peers knock at."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from typing import TYPE_CHECKING

from msgspec import structs

from ...core.errors import ConfigError, FluentError, InvalidRequest
from ...core.types import HandoffDoor, HandoffReport
from ...transfer.layout import check_compatible
from ...transfer.link import Link
from ...transfer.messages import Describe, Message, Refuse
from .exchange import Connection, Exchange
from .quarantine import Quarantine
from .receiving import Receiver
from .sending import Sender
from .watch import StreamWatch, Watch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence as SequenceOf

    from ...core.handoff import HandoffContext, Host, PassWatcher
    from ...core.sequence import Sequence
    from ...core.transport import TransferDone
    from ...core.types import Request, SlotResult, StepPlan
    from ...transfer.messages import Group
    from . import LayerwiseSettings

log = logging.getLogger("fluentllm.handoff")


class LayerwiseHandoffs:
    """One engine's handoffs, in the direction of its role."""

    def __init__(self, context: HandoffContext, settings: LayerwiseSettings) -> None:
        self.exchange = Exchange(context, settings)
        self._settings = settings
        self.quarantine = Quarantine(self.exchange)
        self._sends = context.role == "prefill"
        self._told = False
        self._watch: Watch | None = None
        self.watcher: PassWatcher | None = None
        if self._sends:
            kind = StreamWatch if context.pool.device.type == "cuda" else Watch
            self.watcher = self._watch = kind(self._advanced, self.exchange.pacing.passed)
            self.sender: Sender | None = Sender(self.exchange, self._watch, self.quarantine)
            self.receiver: Receiver | None = None
        else:
            self.sender = None
            self.receiver = Receiver(self.exchange, self.quarantine)
        # Ranks of one engine listen at ports that follow each other.
        port = settings.port + context.tp_rank if settings.port else 0
        self._door = _listen(settings.host, port) if self._sends else None
        self._server: asyncio.Server | None = None
        self._opening: asyncio.Task[None] | None = None
        self._greeting: set[asyncio.Task[None]] = set()

    @property
    def open(self) -> int:
        if self.sender is not None:
            return self.sender.open
        return self.receiver.open if self.receiver is not None else 0

    @property
    def door(self) -> HandoffDoor:
        port = int(self._door.getsockname()[1]) if self._door is not None else 0
        return HandoffDoor(role=self.exchange.context.role, host=self._settings.host, port=port)

    # ------------------------------------------------------------------------------------------------------------- life
    def start(self, host: Host) -> None:
        self.exchange.on_group, self.exchange.on_transfer = self._group, self._transferred
        self.exchange.on_gone = self._gone
        self.exchange.start(host)
        if self._door is not None:
            self._opening = self.exchange.loop.create_task(self._open_door(self._door))

    def close(self) -> None:
        if self._opening is not None:
            self._opening.cancel()
        if self._server is not None:
            self._server.close()
        elif self._door is not None:
            self._door.close()
        for task in self._greeting:
            task.cancel()
        if self._watch is not None:
            self._watch.close()
        if self.receiver is not None:
            self.receiver.close()
        self.exchange.close()

    # ------------------------------------------------------------------------------------------------- from the engine
    def prepare(self, request: Request) -> Request:
        handoff = request.handoff
        assert handoff is not None
        if self._sends:
            # The rest of the answer is decode's; a stop id, a bias or a penalty counts for the first token as for any.
            return structs.replace(request, params=structs.replace(request.params, max_tokens=1))
        if not handoff.host:
            raise InvalidRequest(
                "The request does not say where its prompt is computed.",
                fix="Send bootstrap_host, bootstrap_port and bootstrap_room, or the kv_transfer_params of a prefill engine.",
            )
        assert self.receiver is not None
        self.receiver.peer_of(handoff.host, handoff.port)
        return request

    def adopt(self, sequence: Sequence) -> bool:
        handoff = sequence.request.handoff
        assert handoff is not None
        if self.sender is not None:
            return self.sender.adopt(sequence, handoff)
        if sequence.request.params.prompt_logprobs is not None:
            # They come from computing the prompt, so it is computed here.
            self.exchange.counters["local_prompt_logprobs"] += 1
            if self.receiver is not None:
                self.receiver.decline(handoff.id, handoff.host, handoff.port)
            return False
        assert self.receiver is not None
        self.receiver.adopt(sequence, handoff.id, handoff.host, handoff.port)
        return True

    def abort(self, sequence: Sequence) -> bool:
        if self.sender is not None:
            return self.sender.abort(sequence)
        return self.receiver is not None and self.receiver.abort(sequence)

    def planned(self, plan: StepPlan, sequences: SequenceOf[Sequence]) -> None:
        if self.sender is not None:
            self.sender.planned(plan, sequences)

    def drew(self, sequence: Sequence, result: SlotResult) -> HandoffReport | None:
        handoff = sequence.request.handoff
        if self.sender is None or handoff is None:
            return None
        self.sender.drew(sequence, result)
        door = self.door
        return HandoffReport(id=handoff.id, host=door.host, port=door.port)

    def turn(self) -> None:
        if self.receiver is not None:
            self.receiver.turn()

    def stats(self) -> Mapping[str, int]:
        now = {"open": self.open}
        if hasattr(self.exchange, "host"):
            now["quarantined_pages"] = self.quarantine.pages
        transport = self.exchange.transport.counters.as_dict() if hasattr(self.exchange, "transport") else {}
        return {**self.exchange.counters, **now, **{f"transport_{name}": count for name, count in transport.items()}}

    # ------------------------------------------------------------------------------------------------------------ events
    def _advanced(self) -> None:
        """From the thread that follows the passes."""
        if not self._told and not self.exchange.loop.is_closed():
            self._told = True
            self.exchange.loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        self._told = False
        assert self.sender is not None
        self.sender.advanced()

    def _group(self, connection: Connection, group: Group) -> None:
        if self.receiver is not None:
            self.receiver.group(connection, group)
        elif self.sender is not None:
            self.sender.fetcher.group(connection, group)

    def _transferred(self, done: TransferDone) -> None:
        if self.sender is not None:
            self.sender.transferred(done)
        elif self.receiver is not None:
            self.receiver.lender.transferred(done)

    def _gone(self, connection: Connection, error: FluentError) -> None:
        if self.sender is not None:
            self.sender.gone(connection)
        if self.receiver is not None:
            self.receiver.gone(connection, error)
        self.exchange.host.wake()

    # -------------------------------------------------------------------------------------------------------------- door
    async def _open_door(self, door: socket.socket) -> None:
        self._server = await asyncio.start_server(self._knock, sock=door)

    async def _knock(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        exchange = self.exchange
        try:
            async with asyncio.timeout(self._settings.connect_timeout):
                link = await Link.greet(reader, writer, exchange.key)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, FluentError) as error:
            exchange.counters["knocks_refused"] += 1
            log.warning("handoff: a connection was not accepted: %s", error)
            return
        Visitor(self, link)


class Visitor:
    """A decode engine that has greeted; it describes itself first."""

    def __init__(self, handoffs: LayerwiseHandoffs, link: Link) -> None:
        self._handoffs, self._link = handoffs, link
        self._connection: Connection | None = None
        exchange = handoffs.exchange
        self._timer = exchange.after(handoffs._settings.connect_timeout, self._silent)
        link.listen(self._received, self._lost)

    def _received(self, message: Message) -> None:
        handoffs = self._handoffs
        if self._connection is not None:
            assert handoffs.sender is not None
            handoffs.sender.message(self._connection, message)
        elif isinstance(message, Describe):
            self._timer.cancel()
            self._described(message)
        else:
            self._link.close()

    def _described(self, other: Describe) -> None:
        exchange = self._handoffs.exchange
        try:
            check_compatible(exchange.layout, other.layout)
            self._connection = exchange.connect(self._link, other)
        except FluentError as error:
            exchange.counters["knocks_refused"] += 1
            log.error("handoff: %s is refused: %s", self._link.name, error)
            self._link.send(Refuse(code=error.code, reason=str(error)[:4096]))
            exchange.after(1.0, self._link.close)
            return
        self._link.send(exchange.describe())

    def _lost(self, error: FluentError) -> None:
        self._timer.cancel()
        if self._connection is not None:
            self._handoffs.exchange.end(self._connection, error)

    def _silent(self) -> None:
        self._handoffs.exchange.counters["deadline_describe"] += 1
        self._link.close()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    door = socket.socket(family, socket.SOCK_STREAM)
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        door.bind((host, port))
    except OSError as error:
        with contextlib.suppress(OSError):
            door.close()
        raise ConfigError(
            f"Control connections cannot be taken at {host}:{port}: {error.strerror}.",
            fix="Choose another plugins.kv_layerwise.port, or an address of this machine as plugins.kv_layerwise.host.",
            param="plugins.kv_layerwise.port",
        ) from error
    door.setblocking(False)
    return door
