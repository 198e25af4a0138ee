"""``medgen convert``: other projects' weights into ``model.pt``, and back. Nothing in a foreign file is executed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medgen.errors import UserError

if TYPE_CHECKING:
    from medgen.convert.stylegan2 import ConvertedStyleGAN2

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Read other projects' weights, without executing anything of their files.",
)

Output = Annotated[Path, typer.Option("--output", help="State dict to write (.pt).")]
Config = Annotated[
    Path | None,
    typer.Option("--config", help="Overlay with the network's settings.  [default: --output with .json]"),
]
Force = Annotated[bool, typer.Option("--force", help="Replace files that are there.")]


@app.command("stylegan2-ada")
def stylegan2_ada(
    source: Annotated[Path, typer.Argument(help="Snapshot of StyleGAN2-ADA, PyTorch edition (.pkl).")],
    output: Output,
    network: Annotated[str, typer.Option("--network", help="G_ema, G or D.")] = "G_ema",
    config: Config = None,
    force: Force = False,
) -> None:
    """Official StyleGAN2-ADA snapshot (PyTorch) to model.pt and an overlay."""
    config = _targets(output, config, force)
    from medgen.convert.stylegan2_pickle import convert_stylegan2_pickle

    _write(convert_stylegan2_pickle(source, network), f"{network} of {source}", output, config)


@app.command("rosinality")
def rosinality(
    source: Annotated[Path, typer.Argument(help="Checkpoint of rosinality's stylegan2-pytorch (.pt).")],
    output: Output,
    network: Annotated[str, typer.Option("--network", help="g_ema, g or d.")] = "g_ema",
    config: Config = None,
    force: Force = False,
) -> None:
    """StyleGAN2 checkpoint of rosinality's project to model.pt and an overlay."""
    config = _targets(output, config, force)
    from medgen.convert.rosinality import convert_rosinality

    _write(convert_rosinality(source, network), f"{network} of {source}", output, config)


@app.command("to-stylegan2-ada")
def to_stylegan2_ada(
    source: Annotated[Path, typer.Argument(help="State dict of a StyleGAN2 generator or discriminator (model.pt).")],
    output: Output,
    force: Force = False,
) -> None:
    """Our StyleGAN2 weights to a state dict under the names of StyleGAN2-ADA (PyTorch)."""
    _check_target("--output", output, ".pt", force)
    from medgen.convert.stylegan2 import to_official
    from medgen.weights import read_state_dict

    official = to_official(read_state_dict(source))
    _save_weights(official, output)
    typer.echo(f"{len(official)} tensors of {source} under their official names -> {output}")


def _targets(output: Path, config: Path | None, force: bool) -> Path:
    """See that both files may be written; returns the overlay's path."""
    _check_target("--output", output, ".pt", force)
    config = output.with_suffix(".json") if config is None else config
    _check_target("--config", config, ".json", force)
    return config


def _check_target(option: str, path: Path, suffix: str, force: bool) -> None:
    if path.suffix != suffix:
        raise UserError(f"{option} must be a file that ends in {suffix}, got {path}")
    if path.exists() and not force:
        raise UserError(f"{option} must be a new file, got {path}, which is there; choose another or add --force")


def _write(converted: ConvertedStyleGAN2, source: str, output: Path, config: Path) -> None:
    import json

    from medgen.networks import StyleGAN2Generator
    from medgen.output import atomic_write_text

    name = converted.network.__name__
    definition = "network_def" if converted.network is StyleGAN2Generator else "discriminator_def"
    overlay = {definition: {"_target_": f"medgen.networks.{name}", **converted.settings}}
    _save_weights(converted.state, output)
    try:
        atomic_write_text(config, json.dumps(overlay, indent=4) + "\n")
    except OSError as error:
        raise UserError(f"{config} cannot be written ({error.strerror or error}); choose another --config") from error
    typer.echo(f"{source}, {converted.settings['image_size']} px -> {output} for {name}, {config} with its settings")


def _save_weights(state: Mapping[str, Any], output: Path) -> None:
    import torch

    from medgen.output import atomic_file

    try:
        with atomic_file(output) as file:
            torch.save(dict(state), file)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror or error}); choose another --output") from error
