"""KV transport on Mooncake's transfer engine: TCP here, RDMA where the machine has it. Extra `mooncake`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta, Struct

from ...core.hookspecs import hookimpl

if TYPE_CHECKING:
    from ...core.protocols import Register, RegisterConfig
    from ...core.transport import KVTransport, TransportContext, TransportSpec

FLUENT_API_VERSION = 1


class MooncakeSettings(Struct, kw_only=True, forbid_unknown_fields=True):
    protocol: Annotated[Literal["tcp", "rdma"], Meta(description="What Mooncake moves bytes with.")] = "tcp"
    devices: Annotated[str, Meta(description="RDMA devices, such as mlx5_0,mlx5_1; all if empty.")] = ""


class MooncakePlugin:
    @hookimpl
    def fluent_config(self, register: RegisterConfig) -> None:
        register(MooncakeSettings)

    @hookimpl
    def fluent_kv_transports(self, register: Register) -> None:
        register("mooncake", _create, supports=_supports)


def _supports(spec: TransportSpec) -> str | None:
    from importlib.util import find_spec

    if spec.device not in ("cpu", "cuda"):
        return f"it moves memory of CPUs and CUDA GPUs, not of {spec.device}"
    if find_spec("mooncake") is None:
        return "Mooncake is not installed: pip install 'fluentllm[mooncake]'"
    return None


def _create(context: TransportContext) -> KVTransport:
    from ...transfer.polled import PolledTransport
    from .wire import MooncakeWire

    settings = context.settings.plugin.get("kv_mooncake") or MooncakeSettings()
    return PolledTransport(context, MooncakeWire(context.host, settings))


plugin = MooncakePlugin()
