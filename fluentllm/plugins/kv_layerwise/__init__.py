"""Hands requests over between prefill and decode engines: KV is pushed a group of layers at a time while later ones compute."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta, Struct, field

from ...core.hookspecs import hookimpl
from ...transfer.faults import FaultPlan

if TYPE_CHECKING:
    import typer

    from ...core.handoff import HandoffContext, Handoffs
    from ...core.protocols import Register, RegisterConfig, RegisterRoute

FLUENT_API_VERSION = 1

Seconds = Annotated[float, Meta(gt=0)]
_S = {"unit": "seconds"}


class LayerwiseSettings(Struct, kw_only=True, forbid_unknown_fields=True):
    host: Annotated[
        str,
        Meta(description="Address that other engines reach this one at, for control messages and KV; no other is listened on."),
    ] = "127.0.0.1"
    port: Annotated[
        int,
        Meta(description="Prefill: port for control connections (the bootstrap port of routers); 0 takes a free one.", ge=0),
    ] = 8998
    key: Annotated[
        str | None, Meta(description="Shared by all engines, at least 16 characters: who has it may hand requests over.")
    ] = None
    peers: Annotated[
        list[str],
        Meta(description="Decode: prefill engines that requests may name, as host:port of their control connections."),
    ] = field(default_factory=list)
    overlap: Annotated[
        bool,
        Meta(
            description="Prefill: send layers while later ones compute. Off, for comparison: a prompt goes when it is computed."
        ),
    ] = True
    checksums: Annotated[
        bool,
        Meta(description="Check each group of layers by a CRC-32 before it is used. For networks that are not trusted to."),
    ] = False
    attempts: Annotated[
        int,
        Meta(
            description="Tries of a transfer from one prefill engine; then another of `peers` computes the prompt, and at last "
            "the decode engine itself.",
            ge=1,
            le=100,
        ),
    ] = 3
    fetch: Annotated[
        Literal["auto", "always", "never"],
        Meta(
            description="Prefill: bring a prefix that decode has and prefill lacks from there instead of computing it. auto: "
            "where that takes less time, by measured bandwidth and speed."
        ),
    ] = "auto"
    fetch_wait: Annotated[
        float,
        Meta(
            description="Prefill: how long a long prompt may wait for decode to say what it has; with fetch auto, at most a "
            "fiftieth of the time that computing it takes.",
            ge=0,
            extra_json_schema=_S,
        ),
    ] = 0.02
    fetch_timeout: Annotated[
        Seconds, Meta(description="How long such a prefix may take; then it is computed.", extra_json_schema=_S)
    ] = 5.0
    connect_timeout: Annotated[
        Seconds, Meta(description="How long a peer may take to answer a new connection.", extra_json_schema=_S)
    ] = 5.0
    wait_timeout: Annotated[
        Seconds,
        Meta(
            description="How long a request may wait for free pages and for its peer (decode), or for the other half of the "
            "request to come (prefill).",
            extra_json_schema=_S,
        ),
    ] = 30.0
    transfer_timeout: Annotated[
        Seconds,
        Meta(description="How long a prompt may take from the ask to its last byte, computing included.", extra_json_schema=_S),
    ] = 60.0
    handoff_timeout: Annotated[
        Seconds,
        Meta(
            description="Decode: how long a prompt may take to come from elsewhere in all, every wait, attempt and engine "
            "included; then it is computed here.",
            extra_json_schema=_S,
        ),
    ] = 120.0
    drain_timeout: Annotated[
        Seconds,
        Meta(
            description="How long a peer may take to say that it writes no more; then the pages are quarantined.",
            extra_json_schema=_S,
        ),
    ] = 5.0
    keep_timeout: Annotated[
        Seconds, Meta(description="How long a computed prompt is kept for a decode engine to fetch.", extra_json_schema=_S)
    ] = 60.0
    breaker_failures: Annotated[int, Meta(description="Failures in a row after which a peer is left alone.", ge=1)] = 3
    breaker_seconds: Annotated[Seconds, Meta(description="For how long; then one request tries it.", extra_json_schema=_S)] = (
        10.0
    )
    quarantine: Annotated[
        float,
        Meta(
            description="Share of the pages that may be in quarantine; beyond it no prompt is fetched until they are free, and "
            "where the transport cannot revoke its memory the engine restarts.",
            gt=0,
            le=1,
        ),
    ] = 0.25
    faults: Annotated[FaultPlan | None, Meta(description="For tests: what goes wrong, and how often.")] = None


class LayerwisePlugin:
    @hookimpl
    def fluent_config(self, register: RegisterConfig) -> None:
        register(LayerwiseSettings)

    @hookimpl
    def fluent_handoffs(self, register: Register) -> None:
        register("layerwise", _create)

    @hookimpl
    def fluent_routes(self, register: RegisterRoute) -> None:
        from .routes import handoff

        register("/handoff", handoff, summary="The engine's role, and where it takes control connections of its peers.")

    @hookimpl
    def fluent_commands(self, app: typer.Typer) -> None:
        from .proxy import proxy_command

        app.command("proxy")(proxy_command)


def _create(context: HandoffContext) -> Handoffs:
    from .handoffs import LayerwiseHandoffs

    return LayerwiseHandoffs(context, context.settings.plugin.get("kv_layerwise") or LayerwiseSettings())


plugin = LayerwisePlugin()
