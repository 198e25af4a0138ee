"""The ``medgen`` command. Each subcommand is a module of its own, imported when it is asked for."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from medgen import __version__
from medgen.errors import find_user_error

__all__ = ["COMMANDS", "app"]

# Subcommand -> module that holds it as ``app``, a typer.Typer of one command or of several. ``medgen --help`` imports
# them all for their help lines: what needs torch or MLflow belongs into their functions' bodies.
COMMANDS = {
    "check": "medgen.check",
    "convert": "medgen.convert.command",
    "features": "medgen.cli_features",
    "phantom": "medgen.data.phantom.command",
    "registry": "medgen.cli_registry",
    "report": "medgen.report.command",
    "stage": "medgen.data.stage",
    "tracking": "medgen.tracking.command",
}


class _Commands(TyperGroup):
    """A group that imports a subcommand's module on first use, and prints a UserError as one line."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        command = typer.main.get_command(import_module(COMMANDS[cmd_name]).app)
        command.name = cmd_name
        return command

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            message = find_user_error(error)
            if message is None or os.environ.get("MEDGEN_TRACEBACK"):
                raise
            print(f"error: {message}", file=sys.stderr)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Commands, no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"medgen {__version__}")
        raise typer.Exit


@app.callback()
def medgen(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Generative models for medical images, as MONAI bundles."""
