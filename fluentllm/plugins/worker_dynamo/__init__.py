"""`fluent dynamo`: an engine as a worker of NVIDIA Dynamo, whole or as prefill or decode, behind Dynamo's own front end.

Needs the packages `ai-dynamo-runtime` and `ai-dynamo`, which no extra installs: see docs/disaggregation.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...core.hookspecs import hookimpl

if TYPE_CHECKING:
    import typer

FLUENT_API_VERSION = 1


class DynamoPlugin:
    @hookimpl
    def fluent_commands(self, app: typer.Typer) -> None:
        from .command import dynamo

        app.command("dynamo")(dynamo)


plugin = DynamoPlugin()
