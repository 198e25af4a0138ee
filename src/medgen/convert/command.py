"""``medgen convert``: other projects' weights into ``model.pt``, and back. Nothing in a foreign file is executed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medgen.errors import UserError

if TYPE_CHECKING:
    from medgen.convert.latent_diffusion import ConvertedNetwork
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


@app.command("latent-diffusion")
def latent_diffusion(
    source: Annotated[
        Path, typer.Argument(help="AutoencoderKL or DiffusionModelUNet (.pth), or a model folder that MLflow logged.")
    ],
    output: Output,
    network: Annotated[
        str | None, typer.Option("--network", help="Key of the network in a checkpoint that holds several.")
    ] = None,
    num_head_channels: Annotated[
        str | None,
        typer.Option(
            "--num_head_channels",
            help="Width of the attention heads, for all levels or for each, such as 0,512,768.  [default: as the file "
            "tells; for the source's network, one head a level]",
        ),
    ] = None,
    norm_num_groups: Annotated[
        int | None,
        typer.Option(
            "--norm_num_groups",
            help="Groups of the normalisations.  [default: as the file tells; for the source's networks, 32]",
        ),
    ] = None,
    autoencoder: Annotated[
        Path | None,
        typer.Option(
            "--autoencoder", help="Converted autoencoder of a diffusion network: writes scaling.json beside --output."
        ),
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(
            "--scale",
            help="With --autoencoder: what the diffusion network's latents were times.  [default: scale_factor of the "
            "file; for the source's network, 0.3]",
        ),
    ] = None,
    prediction_type: Annotated[
        str | None,
        typer.Option(
            "--prediction_type",
            help="What a diffusion network gives: epsilon, v_prediction or sample.  [default: for the source's "
            "network, v_prediction]",
        ),
    ] = None,
    config: Config = None,
    force: Force = False,
) -> None:
    """Networks of monai-generative or MONAI to autoencoder.pt or model.pt and an overlay.

    A diffusion network gets trained_as.json beside it, with what is known of its training: sampling with other settings
    is refused.
    """
    config = _targets(output, config, force)
    scaling, record = output.with_name("scaling.json"), output.with_name("trained_as.json")
    files = [output, config, scaling, record, *([] if autoencoder is None else [autoencoder])]
    if len({path.resolve() for path in files}) < len(files):
        raise UserError(
            f"expected different files, got {', '.join(map(str, files))}; choose another --output or --config"
        )
    if autoencoder is None and scale is not None:
        raise UserError("--scale goes into the scaling of an autoencoder's latents; name it with --autoencoder")
    if autoencoder is not None:
        _check_target("the scaling", scaling, ".json", force)
        _check_autoencoder(autoencoder)
        if scale is not None and not (scale > 0 and math.isfinite(scale)):
            raise UserError(f"--scale must be a number above 0, got {scale}")
    if prediction_type is not None:
        from medgen.settings import check_choice

        check_choice(["epsilon", "v_prediction", "sample"], prediction_type=prediction_type)
    heads = None
    if num_head_channels is not None:
        from medgen.inferers import parse_numbers

        heads = parse_numbers(num_head_channels, "num_head_channels")
    from medgen.convert.latent_diffusion import convert_latent_diffusion

    converted = convert_latent_diffusion(source, network, heads, norm_num_groups)
    name, levels = converted.network.__name__, "-".join(map(str, converted.settings["channels"]))
    done = f"{source}, {levels} channels -> {output} for {name}, {config} with its settings"
    if converted.is_autoencoder:
        for option, given in {"--autoencoder": autoencoder, "--prediction_type": prediction_type}.items():
            if given is not None:
                raise UserError(f"{option} belongs to a diffusion network, got it with {source}, an autoencoder itself")
        _write_files(converted.state, converted.overlay, output, config)
        typer.echo(done)
        return
    _check_target("the record of the training", record, ".json", force)
    given = {} if prediction_type is None else {"prediction_type": prediction_type}
    overlay, trained_as = converted.overlay | given, converted.trained_as | given
    if autoencoder is not None:
        from medgen.data import LatentScaling
        from medgen.data.image_set import file_sha256

        scale, origin = _scale(converted, scale, source)
        factors = LatentScaling((scale,), (0.0,), file_sha256(autoencoder))
        trained_as |= {
            "autoencoder": factors.autoencoder_sha256,
            "scale": list(factors.scale),
            "shift": list(factors.shift),
        }
    _write_files(converted.state, overlay, output, config)
    _write_json(trained_as, record, "--output")
    typer.echo(done)
    typer.echo(f"what is known of its training -> {record}")
    if autoencoder is not None:
        factors.write(scaling)
        typer.echo(f"scale {scale:g} ({origin}) of the latents of {autoencoder} -> {scaling}")
    else:
        typer.echo("no scaling.json: convert the autoencoder, then this again with --autoencoder and --force")
    if converted.is_source:
        typer.echo(
            f"built like the source's network, so taken to be trained like it: {trained_as['prediction_type']}, betas "
            f"{trained_as['beta_start']} to {trained_as['beta_end']}, null caption {trained_as['null_caption']}"
        )
    else:
        unknown = "" if prediction_type else "--prediction_type, "
        typer.echo(
            f"the file does not tell how it was trained: set {unknown}--beta_start, --beta_end, --num_train_timesteps"
            f"{' and --null_caption' if converted.overlay['conditioning'] == 'text' else ''} as in its training when "
            "you sample"
        )


@app.command("pggan")
def pggan(
    source: Annotated[
        Path,
        typer.Argument(
            help="Snapshot of the official progressive GAN (TensorFlow, .pkl), or checkpoint of CXR_PGGAN (.pth) or of "
            "the PyTorch GAN zoo (.pt, .pth, .npz)."
        ),
    ],
    output: Output,
    discriminator: Annotated[
        Path | None,
        typer.Option(
            "--discriminator",
            help="State dict of the discriminator to write (.pt), where the source has one.  [default: "
            "discriminator.pt beside --output]",
        ),
    ] = None,
    generator_only: Annotated[bool, typer.Option("--generator_only", help="Leave the discriminator out.")] = False,
    config: Config = None,
    force: Force = False,
) -> None:
    """Progressive GAN of three projects to model.pt, discriminator.pt and an overlay.

    Of two generators in a file the moving average is taken. Weights know how far they are grown.
    """
    config = _targets(output, config, force)
    discriminator = output.with_name("discriminator.pt") if discriminator is None else discriminator
    files = (output, config) if generator_only else (output, discriminator, config)
    if len({path.resolve() for path in files}) < len(files):
        raise UserError(
            f"expected different files, got {', '.join(map(str, files))}; choose another --output, --discriminator or "
            "--config"
        )
    from medgen.convert.pggan import convert_pggan

    weights = convert_pggan(source, generator_only)
    if weights.discriminator is not None:
        _check_target("--discriminator", discriminator, ".pt", force)
    written = [
        (network, path)
        for network, path in ((weights.generator, output), (weights.discriminator, discriminator))
        if network is not None
    ]
    for network, path in written:
        _save_weights(network.state, path)
    _write_json(weights.overlay, config, "--config")
    for network, path in written:
        side, alpha = network.state["growth"].tolist()
        fading = f", alpha {alpha:.3g}" if alpha < 1 else ""
        typer.echo(
            f"{source}, grown to {side:.0f} of {network.image_size} px{fading} -> {path} for {network.network.__name__}"
        )
    typer.echo(f"their settings -> {config}")


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


def _check_autoencoder(path: Path) -> None:
    """See that weights are those that this command writes for an autoencoder."""
    if not path.is_file():
        raise UserError(f"--autoencoder must be a converted autoencoder, got {path}, which is not there")
    from medgen.convert.latent_diffusion import is_converted_autoencoder
    from medgen.weights import read_state_dict

    if not is_converted_autoencoder(read_state_dict(path)):
        raise UserError(
            f"--autoencoder must be a converted autoencoder, got {path} with weights of something else; convert the "
            "autoencoder first"
        )


def _scale(converted: ConvertedNetwork, scale: float | None, source: Path) -> tuple[float, str]:
    """What a diffusion network's latents were times, and who says so."""
    from medgen.convert.latent_diffusion import SCALE_FACTOR, SOURCE_SCALE

    if scale is not None:
        return scale, "--scale"
    if converted.scale_factor is not None:
        return converted.scale_factor, f"{SCALE_FACTOR} of {source}"
    if converted.is_source:
        return SOURCE_SCALE, "the source's"
    raise UserError(
        f"{source} does not tell what its latents were multiplied by; name it with --scale, such as --scale 0.3"
    )


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
    from medgen.networks import StyleGAN2Generator

    name = converted.network.__name__
    definition = "network_def" if converted.network is StyleGAN2Generator else "discriminator_def"
    overlay = {definition: {"_target_": f"medgen.networks.{name}", **converted.settings}}
    _write_files(converted.state, overlay, output, config)
    typer.echo(f"{source}, {converted.settings['image_size']} px -> {output} for {name}, {config} with its settings")


def _write_files(state: Mapping[str, Any], overlay: Mapping[str, Any], output: Path, config: Path) -> None:
    _save_weights(state, output)
    _write_json(overlay, config, "--config")


def _write_json(content: Mapping[str, Any], path: Path, option: str) -> None:
    from medgen.output import atomic_write_text

    try:
        atomic_write_text(path, json.dumps(content, indent=4) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}); choose another {option}") from error


def _save_weights(state: Mapping[str, Any], output: Path) -> None:
    import torch

    from medgen.output import atomic_file

    try:
        with atomic_file(output) as file:
            torch.save(dict(state), file)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror or error}); choose another --output") from error
