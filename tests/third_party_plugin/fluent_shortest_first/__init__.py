"""Shortest prompt first: what this plugin adds to FluentLLM. Light to import; the policy itself is in `scheduler`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from msgspec import Meta, Struct

from fluentllm.core.hookspecs import hookimpl

if TYPE_CHECKING:
    import typer
    from starlette.requests import Request
    from starlette.responses import Response

    from fluentllm.core.protocols import Register, RegisterConfig, RegisterRoute, Scheduler, SchedulerContext

FLUENT_API_VERSION = 1


class ShortestFirstSettings(Struct, forbid_unknown_fields=True):
    """At `plugins.shortest_first`."""

    patience: Annotated[
        int,
        Meta(
            ge=0,
            description="A request that so many later ones have overtaken is overtaken no more.",
            extra_json_schema={"unit": "requests"},
        ),
    ] = 64


class ShortestFirst:
    @hookimpl
    def fluent_config(self, register: RegisterConfig) -> None:
        register(ShortestFirstSettings)

    @hookimpl
    def fluent_schedulers(self, register: Register) -> None:
        register("shortest_first", create_scheduler)

    @hookimpl
    def fluent_routes(self, register: RegisterRoute) -> None:
        register("/shortest_first", show_queue, summary="How long the queue is, and how patient its requests are.")

    @hookimpl
    def fluent_commands(self, app: typer.Typer) -> None:
        app.command("shortest-first")(print_order)


def create_scheduler(context: SchedulerContext) -> Scheduler:
    from .scheduler import ShortestFirstScheduler

    return ShortestFirstScheduler(context, context.settings.plugin["shortest_first"].patience)


async def show_queue(request: Request) -> Response:
    from starlette.responses import JSONResponse

    services = request.app.state.fluent
    stats = await services.client.stats()
    settings = services.settings.plugin["shortest_first"]
    policy = services.settings.scheduler.policy
    return JSONResponse({"policy": policy, "patience": settings.patience, "waiting": stats.waiting, "running": stats.running})


def print_order(lengths: list[int]) -> None:
    """Print the order in which waiting prompts of these LENGTHS would run, under this plugin's policy."""
    import typer

    from .scheduler import order_key

    order = sorted(range(len(lengths)), key=lambda index: order_key(0, lengths[index], index, overdue=False))
    for place, index in enumerate(order, 1):
        typer.echo(f"{place}. prompt {index + 1} of {lengths[index]} tokens")


plugin = ShortestFirst()
