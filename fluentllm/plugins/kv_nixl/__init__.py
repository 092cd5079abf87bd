"""KV transport on NVIDIA's NIXL with UCX: shared memory and TCP on CPUs, RDMA and NVLink on GPUs. Extra `nixl`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from msgspec import Meta, Struct

from ...core.hookspecs import hookimpl

if TYPE_CHECKING:
    from ...core.protocols import Register, RegisterConfig
    from ...core.transport import KVTransport, TransportContext, TransportSpec

FLUENT_API_VERSION = 1


class NixlSettings(Struct, kw_only=True, forbid_unknown_fields=True):
    kernel_copies: Annotated[
        bool,
        Meta(
            description="Let peers on this machine copy through the kernel (CMA). Faster for some sizes, but nothing except "
            "the end of a process then stops a peer that writes too late."
        ),
    ] = False
    devices: Annotated[
        str,
        Meta(
            description="Network devices as UCX names them, such as mlx5_0:1 or eth0. auto: lo where the host is a loopback "
            "address, else UCX chooses, and listens on all."
        ),
    ] = "auto"


class NixlPlugin:
    @hookimpl
    def fluent_config(self, register: RegisterConfig) -> None:
        register(NixlSettings)

    @hookimpl
    def fluent_kv_transports(self, register: Register) -> None:
        register("nixl", _create, supports=_supports)


def _supports(spec: TransportSpec) -> str | None:
    from importlib.util import find_spec

    if spec.device not in ("cpu", "cuda"):
        return f"it moves memory of CPUs and CUDA GPUs, not of {spec.device}"
    if not any(find_spec(name) for name in ("nixl_cu13", "nixl_cu12")):
        return "NIXL is not installed: pip install 'fluentllm[nixl]'"
    return None


def _create(context: TransportContext) -> KVTransport:
    from ...transfer.polled import PolledTransport
    from .wire import NixlWire

    settings = context.settings.plugin.get("kv_nixl") or NixlSettings()
    return PolledTransport(context, NixlWire(context.host, settings))


plugin = NixlPlugin()
