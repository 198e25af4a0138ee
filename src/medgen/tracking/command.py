"""``medgen tracking``: runs whose tracker was away."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from medgen.tracking.sender import JournalStatus

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Send what a training has logged while its MLflow server was away.",
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Output folder of trainings.")]
TrackingURI = Annotated[
    str | None,
    typer.Option("--tracking_uri", help="Another tracker than the one that the training was given."),
]


@app.command()
def send(folder: Folder, tracking_uri: TrackingURI = None) -> None:
    """Send what waits in a folder; what was sent before is not sent again."""
    from medgen.tracking.sender import send_folder

    _print(send_folder(folder, tracking_uri))


@app.command()
def status(folder: Folder, tracking_uri: TrackingURI = None) -> None:
    """Show the runs of a folder, and how much of each waits to be sent."""
    from medgen.tracking.sender import folder_status

    _print(folder_status(folder, tracking_uri))


def _print(runs: list[JournalStatus]) -> None:
    for run in runs:
        things = "files" if run.waiting == run.waiting_files else "lines"
        where = "all sent" if not run.waiting else f"{run.waiting} {things} wait"
        where += ", a process is sending" if run.active else ""
        run_id = f" run {run.run_id}" if run.run_id else ""
        typer.echo(f"{run.name}: {run.status}, {run.points} points of curves, {where} -> {run.uri}{run_id}")
