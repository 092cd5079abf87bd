"""One NIXL agent with its UCX backend; a new one for each registration.

Deregistering alone stops no peer: UCX's shared-memory and TCP transports write to any address that the peer asks for. Ending
the agent does, for all of them but those that need no help from the process written to: copies through the kernel (CMA),
which are off unless asked for, and copies between two processes' memory on GPUs (CUDA IPC), which is how KV moves within a
machine. So memory on GPUs cannot be revoked, unless UCX_TLS leaves `cuda_ipc` out.
"""

from __future__ import annotations

import ipaddress
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ...core.transport import PeerDied, TransportError, WriteRefused

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ...transfer.wire import Address, Region
    from . import NixlSettings

KERNEL_COPIES = ("cma", "knem", "xpmem")
UNASSISTED = {
    "DRAM": ({*KERNEL_COPIES}, {"all", "mm", "shm", "sm"}),
    "VRAM": ({*KERNEL_COPIES, "cuda_ipc"}, {"all", "mm", "shm", "sm", "cuda"}),
}
"""By memory: UCX's transports that write without the other process, and its names for groups that have one of them."""
CHUNK_BYTES = {"DRAM": 32 * 2**20, "VRAM": 256 * 2**20}
"""What takes a few milliseconds: one GPU copies at hundreds of GB/s, and the end of a chunk is seen after a nap."""
QUICK_BYTES = {"DRAM": 256 * 2**10, "VRAM": CHUNK_BYTES["VRAM"]}
"""UCX copies between CPUs while it is handed a transfer (2 to 7 ms for 19 MB); GPUs do it themselves."""
_variables = threading.Lock()


class NixlWire:
    """A `Wire`. A connection is the name of the peer's agent."""

    kind = "nixl"
    chunk_rows = 4096
    window = 3
    carries_notes = True

    def __init__(self, host: str, settings: NixlSettings) -> None:
        try:
            self._nixl = _library()
        except ImportError as error:
            raise TransportError(f"NIXL cannot be loaded: {error}.", fix="Type pip install 'fluentllm[nixl]'.") from error
        found = {name: item for name, item in vars(self._nixl.nixlBind).items() if name.endswith("Error")}
        self._errors: tuple[type[Exception], ...] = (*found.values(), RuntimeError, ValueError)
        self._variables = _ucx_variables(host, settings)
        self._agent: Any = None
        self._registered: Any = None
        self._memory = "DRAM"
        self._device = 0
        self._tensors: Sequence[Tensor] = ()
        self._bound = threading.local()
        """`here`: set where the thread has the CUDA context of the memory registered now."""

    @property
    def chunk_bytes(self) -> int:
        return CHUNK_BYTES[self._memory]

    @property
    def quick_bytes(self) -> int:
        return QUICK_BYTES[self._memory]

    @property
    def revokes(self) -> bool:
        return needs_both_ends(os.environ.get("UCX_TLS") or self._variables["UCX_TLS"], self._memory)

    def open(self, name: str, epoch: int, tensors: Sequence[Tensor], regions: Sequence[Region]) -> bytes:
        self._memory = "DRAM" if tensors[0].device.type == "cpu" else "VRAM"
        self._device = regions[0].device
        if self._memory == "VRAM":
            import torch

            torch.cuda.set_device(tensors[0].device)  # UCX copies in the context of the thread that calls it
            self._bound = threading.local()
        config = self._nixl.nixl_agent_config(enable_prog_thread=False, enable_listen_thread=False, backends=[])
        try:
            with _environment(self._variables):
                self._agent = self._nixl.nixl_agent(f"{name}-{epoch:x}", config)
                self._agent.create_backend("UCX", {"ucx_error_handling_mode": "peer"})
            rows = [(region.address, region.size, region.device, "") for region in regions if region.size]
            if rows:
                self._registered = self._agent.register_memory(rows, self._memory)
            self._tensors = tensors
            metadata: bytes = self._agent.get_agent_metadata()
        except self._errors as error:
            self.close()
            raise TransportError(f"NIXL cannot register {sum(r.size for r in regions):,} bytes: {error}.") from error
        return metadata

    def lent(self) -> AbstractContextManager[object]:
        if self._memory == "DRAM":
            return nullcontext()
        import torch

        if not hasattr(self._bound, "here"):
            torch.cuda.mem_get_info(self._device)  # a thread's first call makes its context
            self._bound.here = True
        return torch.cuda.device(self._device)

    def connect(self, address: Address) -> tuple[str, str, int]:
        memory = "DRAM" if address.memory == "cpu" else "VRAM"
        device = address.regions[0].device if address.regions else 0
        with _translated(self._errors, address.name):
            name = self._agent.add_remote_agent(address.wire)
            name = name.decode() if isinstance(name, bytes) else name
            self._agent.make_connection(name)
        return name, memory, device

    def post(self, connection: tuple[str, str, int], rows: np.ndarray, note: bytes | None = None) -> Any:
        import numpy as np

        name, memory, device = connection
        ours, theirs = np.empty_like(rows), np.empty_like(rows)
        ours[:, 0], ours[:, 1], ours[:, 2] = rows[:, 0], rows[:, 2], self._device
        theirs[:, 0], theirs[:, 1], theirs[:, 2] = rows[:, 1], rows[:, 2], device
        try:
            local = self._agent.get_xfer_descs(ours, self._memory)
            remote = self._agent.get_xfer_descs(theirs, memory)
            handle = self._agent.initialize_xfer("WRITE", local, remote, name, note or b"")
            state = self._agent.transfer(handle)
        except self._errors as error:
            raise _translation(error, name) from error
        return self._judged(handle, state)

    def send(self, connection: tuple[str, str, int], note: bytes) -> None:
        with _translated(self._errors, connection[0]):
            self._agent.send_notif(connection[0], note)

    def probe(self, connection: tuple[str, str, int], note: bytes) -> None:
        # UCX learns that a peer is gone when it sends to it.
        self.send(connection, note)

    def finished(self, operation: Any) -> bool:
        if operation is None:
            return True
        try:  # asked again and again: the context manager would take as long as the library
            state = self._agent.check_xfer_state(operation)
        except self._errors as error:
            raise _translation(error, "the peer") from error
        return self._judged(operation, state) is None

    def abandon(self, operation: Any) -> None:
        if operation is not None:
            self._release(operation)

    def received(self) -> Iterable[bytes]:
        notes = self._agent.get_new_notifs()
        return [note for of_peer in notes.values() for note in of_peer]

    def disconnect(self, connection: tuple[str, str, int]) -> None:
        try:
            self._agent.remove_remote_agent(connection[0])
        except self._errors:
            return  # NIXL has dropped it already

    def close(self) -> None:
        agent, self._agent = self._agent, None
        if agent is None:
            return
        if self._registered is not None:
            agent.deregister_memory(self._registered)
            self._registered = None
        # The last reference: the agent's end closes its UCX worker, and with it every way for peers to write.
        del agent
        self._tensors = ()

    def _judged(self, handle: Any, state: str) -> Any:
        """None for a transfer that is over, else its handle."""
        if state == "PROC":
            return handle
        self._release(handle)
        if state != "DONE":
            raise WriteRefused(f"NIXL says {state} of a write.")
        return None

    def _release(self, handle: Any) -> None:
        try:
            handle.release()
        except self._errors:
            return  # still under way: the binding keeps the handle, and releases it with the agent


def needs_both_ends(chosen: str, memory: str) -> bool:
    """Does every transport that `UCX_TLS` allows need the process written to? memory: DRAM or VRAM."""
    names = set(chosen.lstrip("^").split(","))
    unassisted, groups = UNASSISTED[memory]
    if chosen.startswith("^"):
        return names >= unassisted
    return not names & (unassisted | groups)


def _library() -> Any:
    """The build for CUDA 13 or 12, whichever is there. Neither needs CUDA to move CPU memory."""
    os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")  # what goes wrong is reported by our own errors
    try:
        return import_module("nixl_cu13._api")
    except ImportError:
        return import_module("nixl_cu12._api")


def _ucx_variables(host: str, settings: NixlSettings) -> dict[str, str]:
    # What goes wrong is reported by our own errors.
    variables = {"UCX_LOG_LEVEL": "fatal", "UCX_TLS": "all" if settings.kernel_copies else f"^{','.join(KERNEL_COPIES)}"}
    if settings.devices != "auto":
        variables["UCX_NET_DEVICES"] = settings.devices
    elif _is_loopback(host):
        variables["UCX_NET_DEVICES"] = "lo"
    return variables


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """UCX reads these when a backend is made; what the user has set stays."""
    with _variables:
        added = [name for name in variables if name not in os.environ]
        os.environ.update({name: variables[name] for name in added})
        try:
            yield
        finally:
            for name in added:
                del os.environ[name]


@contextmanager
def _translated(errors: tuple[type[Exception], ...], peer: str) -> Iterator[None]:
    """Ours for NIXL's exceptions."""
    try:
        yield
    except errors as error:
        raise _translation(error, peer) from error


def _translation(error: Exception, peer: str) -> TransportError:
    """NIXL names its exceptions by what went wrong."""
    what = type(error).__name__
    if what == "nixlRemoteDisconnectError":
        return PeerDied(f"NIXL lost the connection to {peer}.")
    if what in ("nixlNotFoundError", "nixlInvalidParamError", "nixlMismatchError", "nixlNotAllowedError"):
        return WriteRefused(f"NIXL refuses an operation on {peer}: {error}.")
    return TransportError(f"NIXL: {what}: {error}.")
