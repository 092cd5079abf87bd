"""The command `fluent`: assembles the subcommands of this package and of plugins, and prints errors for people.

Each module of `COMMANDS` has `register(app)`. Nothing heavy is imported here or at the top of those modules, so that
`fluent --help` is quick.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from fluentllm.core.errors import FluentError

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = ("serve", "dynamo", "run", "chat", "bench", "models", "plugins", "config", "doctor")
"""Modules of this package, in the order of `fluent --help`."""

EXIT_USER_ERROR = 2
DEBUG_VARIABLE = "FLUENT_DEBUG"
DIAGNOSTICS = (["plugins"], ["doctor"])
"""Commands that must work when plugins do not, so plugins add nothing to `fluent` while they run."""


def create_app(arguments: Sequence[str] = ()) -> typer.Typer:
    """`fluent` with all of its subcommands, for a command line that decides by its config which plugins may add some.

    Raises `PluginError` if plugins' commands clash.
    """
    app = typer.Typer(
        name="fluent",
        help="FluentLLM serves large language models. Start with: fluent serve",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name in COMMANDS:
        module = f"{__name__}.{name}"
        if importlib.util.find_spec(module) is not None:
            importlib.import_module(module).register(app)
    if list(arguments[:1]) not in DIAGNOSTICS:
        from fluentllm.core.plugins import PluginManager

        from .options import plugin_lists

        lists = plugin_lists(arguments)
        PluginManager.load({"cli"}, lists.allow, lists.deny).add_commands(app)
    return app


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the script `fluent`. Exits with 2, and without a traceback, on what a user can mend."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        create_app(arguments)(arguments, prog_name="fluent")
    except FluentError as error:
        if os.environ.get(DEBUG_VARIABLE) == "1":
            raise
        print_error(error)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(130)


def print_error(error: FluentError) -> None:
    """`error: …` and `fix: …` on stderr."""
    typer.echo(f"error: {error.message}", err=True)
    if error.fix:
        typer.echo(f"fix: {error.fix}", err=True)


def _version(wanted: bool) -> None:
    if wanted:
        from fluentllm import __version__

        typer.echo(f"fluentllm {__version__}")
        raise typer.Exit


_VERSION = typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_version, show_default=False)


def _root(version: Annotated[bool, _VERSION] = False) -> None:
    """The callback of the application itself."""
