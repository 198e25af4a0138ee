"""``medgen phantom``: write small synthetic studies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medgen.data.phantom.layouts import LAYOUTS, PhantomSpec, write_phantom

__all__ = ["app", "phantom"]

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_DEFAULT = PhantomSpec()


@app.command(no_args_is_help=True)
def phantom(
    layout: Annotated[
        str,
        typer.Argument(
            metavar="LAYOUT",
            help="; ".join(f"{name}: {layout.summary}" for name, layout in LAYOUTS.items()),
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write, new or empty.", show_default=False)],
    patients: Annotated[int, typer.Option(help="Number of patients.")] = _DEFAULT.patients,
    images_per_patient: Annotated[int, typer.Option(help="Images of each.")] = _DEFAULT.images_per_patient,
    size: Annotated[
        int | None,
        typer.Option(
            help="Height and width in pixels, 32 to 2048; default: "
            + ", ".join(f"{layout.size} for {name}" for name, layout in LAYOUTS.items()),
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed writes the same bytes.")] = _DEFAULT.seed,
    anomaly_fraction: Annotated[
        float, typer.Option(help="Share of the images with findings, 0 to 1.")
    ] = _DEFAULT.anomaly_fraction,
    force: Annotated[bool, typer.Option("--force", help="Replace phantoms made with other options.")] = False,
) -> None:
    """Write small synthetic studies, with masks and truth, in the layout of a public dataset."""
    if size is None:  # of an unknown layout, which write_phantom refuses, any
        size = LAYOUTS[layout].size if layout in LAYOUTS else _DEFAULT.size
    spec = PhantomSpec(patients, images_per_patient, size, seed, anomaly_fraction)
    for line in write_phantom(layout, out, spec, force):
        print(line)
