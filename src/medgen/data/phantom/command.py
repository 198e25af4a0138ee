"""``medgen phantom``: write small synthetic studies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medgen.data.phantom.clip import write_clip
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
            help="; ".join(f"{name}: {layout.summary}" for name, layout in LAYOUTS.items())
            + "; clip: no studies but a tiny CLIP text model with random weights (--width and --seed alone apply)",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write, new or empty.", show_default=False)],
    patients: Annotated[int, typer.Option(help="Number of patients.")] = _DEFAULT.patients,
    images_per_patient: Annotated[
        int | None,
        typer.Option(
            help="Images of each, of MIMIC-CXR studies; default: "
            + ", ".join(f"{layout.images_per_patient} for {name}" for name, layout in LAYOUTS.items()),
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            help="Height and width in pixels (of isic: the height), 32 to 2048; default: "
            + ", ".join(f"{layout.size} for {name}" for name, layout in LAYOUTS.items()),
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed writes the same bytes.")] = _DEFAULT.seed,
    anomaly_fraction: Annotated[
        float, typer.Option(help="Share of the images with findings, 0 to 1.")
    ] = _DEFAULT.anomaly_fraction,
    width: Annotated[int, typer.Option(help="Width of the CLIP text model.")] = 32,
    force: Annotated[bool, typer.Option("--force", help="Replace phantoms made with other options.")] = False,
) -> None:
    """Write small synthetic studies, with masks and truth, in the layout of a public dataset."""
    if layout == "clip":
        print(*write_clip(out, width=width, seed=seed, force=force), sep="\n")
        return
    layout = next((name for name in LAYOUTS if name.replace("-", "_") == layout.replace("-", "_")), layout)
    default = LAYOUTS.get(layout, _DEFAULT)  # an unknown layout is refused by write_phantom
    spec = PhantomSpec(
        patients,
        default.images_per_patient if images_per_patient is None else images_per_patient,
        default.size if size is None else size,
        seed,
        anomaly_fraction,
    )
    for line in write_phantom(layout, out, spec, force):
        print(line)
