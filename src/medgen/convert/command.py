"""``medgen convert``: weights in and out. Nothing in a foreign file is executed."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from medgen.convert.formats import FORMATS, TOLERANCE
from medgen.errors import UserError, without_secrets

if TYPE_CHECKING:
    from medgen.convert.latent_diffusion import ConvertedNetwork
    from medgen.convert.stylegan2 import ConvertedStyleGAN2

__all__ = ["app"]

RECORDS = ("trained_as.json", "trained_on.json")  # beside weights: what they were trained with, and on whose images

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Read other projects' weights, without executing anything of their files; write a bundle for others to read.",
)

Output = Annotated[Path, typer.Option("--output", help="State dict to write (.pt).")]
Config = Annotated[
    Path | None,
    typer.Option("--config", help="Overlay with the network's settings.  [default: --output with .json]"),
]
Force = Annotated[bool, typer.Option("--force", help="Replace files that are there.")]
NetworkKey = Annotated[
    str | None, typer.Option("--network", help="Key of the network in a checkpoint that holds several.")
]
HeadChannels = Annotated[
    str | None,
    typer.Option(
        "--num_head_channels",
        help="Width of the attention heads, for all levels or for each, such as 0,512,768.  [default: as the file "
        "tells; for the source's network, one head a level]",
    ),
]
NormGroups = Annotated[
    int | None,
    typer.Option(
        "--norm_num_groups",
        help="Groups of the normalisations.  [default: as the file tells; for the source's networks, 32]",
    ),
]
Autoencoder = Annotated[
    str | None,
    typer.Option(
        "--autoencoder",
        help="Converted autoencoder of a diffusion network, a file, a bundle's folder or models:/NAME@ALIAS: writes "
        "scaling.json beside --output.",
    ),
]
Scale = Annotated[
    float | None,
    typer.Option(
        "--scale",
        help="With --autoencoder: what the diffusion network's latents were times.  [default: scale_factor of the "
        "file; for the source's network, 0.3]",
    ),
]
PredictionType = Annotated[
    str | None,
    typer.Option(
        "--prediction_type",
        help="What a diffusion network gives: epsilon, v_prediction or sample.  [default: for the source's "
        "network, v_prediction]",
    ),
]
Overlays = Annotated[
    list[Path] | None,
    typer.Option("--overlay", help="JSON overlay that the weights were trained with; may be repeated."),
]
BundleWeights = Annotated[
    str | None,
    typer.Option(
        "--weights", help="File, bundle folder or models:/NAME@ALIAS with weights to take instead of the bundle's own."
    ),
]
TrackingURI = Annotated[
    str | None,
    typer.Option(
        "--tracking_uri", help="sqlite:////path/mlflow.db or http://host:port  [default: $MLFLOW_TRACKING_URI]"
    ),
]


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
    network: NetworkKey = None,
    num_head_channels: HeadChannels = None,
    norm_num_groups: NormGroups = None,
    autoencoder: Autoencoder = None,
    scale: Scale = None,
    prediction_type: PredictionType = None,
    config: Config = None,
    force: Force = False,
) -> None:
    """Networks of monai-generative or MONAI to autoencoder.pt or model.pt and an overlay.

    A diffusion network gets trained_as.json beside it, with what is known of its training: sampling with other settings
    is refused.
    """
    config = _targets(output, config, force)
    given = LatentOptions(
        num_head_channels,
        norm_num_groups,
        _weights(autoencoder, "autoencoder", "--autoencoder"),
        scale,
        prediction_type,
    )
    _check_latent_options(given, output, config, force)
    from medgen.convert.latent_diffusion import convert_latent_diffusion

    converted = convert_latent_diffusion(source, network, given.heads(), norm_num_groups)
    _write_latent_diffusion(converted, str(source), given, output, config, force)


@app.command("mlflow")
def mlflow(
    source: Annotated[
        str,
        typer.Argument(
            help="Run id, runs:/ID/PATH, models:/NAME/VERSION, models:/NAME@ALIAS, or a folder that MLflow logged."
        ),
    ],
    output: Output,
    artifact_path: Annotated[
        str, typer.Option("--artifact_path", help="The model among a run's artifacts, if SOURCE does not name it.")
    ] = "final_model",
    tracking_uri: TrackingURI = None,
    package: Annotated[
        list[str] | None,
        typer.Option(
            "--package",
            help="Package whose classes a pickled module consists of, beside torch's, MONAI's and monai-generative's; "
            "it is not imported. May be repeated.",
        ),
    ] = None,
    network: NetworkKey = None,
    num_head_channels: HeadChannels = None,
    norm_num_groups: NormGroups = None,
    autoencoder: Autoencoder = None,
    scale: Scale = None,
    prediction_type: PredictionType = None,
    config: Config = None,
    force: Force = False,
) -> None:
    """Model that MLflow logged to model.pt; of latent diffusion as `latent-diffusion` does.

    Its weights alone are fetched, and read without running anything of the model.
    """
    _check_target("--output", output, ".pt", force)
    from medgen.convert import latent_diffusion as conversion
    from medgen.convert.mlflow_model import find_logged_weights, read_logged_weights
    from medgen.data.image_set import file_sha256

    with tempfile.TemporaryDirectory(prefix="medgen-convert-") as folder, _quiet_mlflow():
        found = _weights(autoencoder, "autoencoder", "--autoencoder", tracking_uri)
        given = LatentOptions(num_head_channels, norm_num_groups, found, scale, prediction_type)
        path, uri = find_logged_weights(source, folder, tracking_uri, artifact_path)
        digest = file_sha256(path)
        try:
            state = read_logged_weights(path, network, package or ())
            is_latent = conversion.is_latent_diffusion(state)
            if is_latent:
                overlay = _targets(output, config, force)
                _check_latent_options(given, output, overlay, force)
                if path.suffix == ".pt2":
                    converted = conversion.convert_state_dict(source, state, given.heads(), norm_num_groups)
                else:
                    converted = conversion.convert_latent_diffusion(path, network, given.heads(), norm_num_groups)
        except UserError as error:  # by the name that the user knows it by
            raise UserError(str(error).replace(str(path), f"{path.name} of {source}")) from error
    origin = f"{path.name} of {uri or source} has SHA-256 {digest}"
    if is_latent:
        _write_latent_diffusion(converted, source, given, output, overlay, force)
        typer.echo(origin)
        return
    if options := [*given.given(), *(["--config"] if config else [])]:
        raise UserError(
            f"{options[0]} belongs to an AutoencoderKL or a DiffusionModelUNet, got it with {source}, which is "
            "neither; leave it out"
        )
    _forget_training(output)
    _save_weights(state, output)
    typer.echo(f"{len(state)} tensors of {source} -> {output}, under their own names")
    typer.echo(origin)


@app.command("safetensors")
def safetensors(
    source: Annotated[Path, typer.Argument(help="State dict (.pt) or safetensors file (.safetensors).")],
    output: Annotated[Path, typer.Option("--output", help="The other of the two to write.")],
    force: Force = False,
) -> None:
    """State dict to safetensors, or the way back: every bit is kept."""
    suffixes = {".pt": ".safetensors", ".safetensors": ".pt"}
    if source.suffix not in suffixes:
        raise UserError(f"expected a file that ends in {' or '.join(suffixes)}, got {source}; rename it")
    _check_target("--output", output, suffixes[source.suffix], force)
    from medgen.convert.tensor_file import from_safetensors, to_safetensors

    state = (to_safetensors if source.suffix == ".pt" else from_safetensors)(source, output)
    typer.echo(f"{len(state)} tensors of {source} -> {output}, read back and equal in every bit")


@app.command("export")
def export(
    bundle: Annotated[str, typer.Argument(help="Bundle folder, models:/NAME@ALIAS or models:/NAME/VERSION.")],
    output: Annotated[Path, typer.Option("--output", help="File to write: .ts, .pt2 or .onnx.")],
    file_format: Annotated[str, typer.Option("--format", help="torchscript, torch_export or onnx.")],
    overlay: Overlays = None,
    weights: BundleWeights = None,
    device: Annotated[
        str, typer.Option("--device", help="Where it is made and compared; a traced network keeps to it.")
    ] = "cpu",
    check_inputs: Annotated[
        int, typer.Option("--check_inputs", min=1, help="Random inputs of each of two batch sizes to compare with.")
    ] = 4,
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="Largest difference, relative to the range of the output.")
    ] = TOLERANCE,
    tracking_uri: TrackingURI = None,
    force: Force = False,
) -> None:
    """Network of a bundle to TorchScript, torch.export or ONNX, compared with it before the file is kept."""
    if file_format not in FORMATS:
        raise UserError(f"--format must be one of {', '.join(FORMATS)}, got {file_format!r}; choose one")
    _check_target("--output", output, FORMATS[file_format], force)
    if not 0 < tolerance < 1:
        raise UserError(f"--tolerance must be above 0 and below 1, got {tolerance}")
    with _quiet_mlflow():
        folder = _bundle_folder(bundle, tracking_uri)
        from medgen.convert.export import export_network
        from medgen.settings import check_device

        check_device(device)
        found = _weights(weights, "model", "--weights", tracking_uri)
        own = folder / "configs"  # a bare name is one of the bundle's own, as when it is registered
        overlays = [own / path if (own / path).is_file() and not path.is_file() else path for path in overlay or ()]
        done = export_network(folder, output, file_format, overlays, found, device, check_inputs, tolerance)
    typer.echo(f"{done.network} of {bundle}, {done.how}: {done.inputs} -> {', '.join(map(str, done.files))}")
    typer.echo(
        f"largest difference on {done.compared} random batches: {done.difference:.3g}, "
        f"{done.difference / done.spread:.3g} of the output's range {done.spread:.4g} (tolerance {tolerance:g})"
    )


@app.command("push")
def push(
    bundle: Annotated[str, typer.Argument(help="Bundle folder, models:/NAME@ALIAS or models:/NAME/VERSION.")],
    output: Annotated[Path, typer.Option("--output", help="Folder to write into.")],
    url: Annotated[
        str | None,
        typer.Option(
            "--url",
            help="Where OUTPUT/files will be served: also writes the bundle as a folder with large_files.yml, as "
            "MONAI's zoo has it.",
        ),
    ] = None,
    overlay: Overlays = None,
    weights: BundleWeights = None,
    tracking_uri: TrackingURI = None,
    force: Force = False,
) -> None:
    """Bundle to an archive with its checksum, in the layout of MONAI's model zoo."""
    with _quiet_mlflow():
        folder = _bundle_folder(bundle, tracking_uri)
        from medgen.convert.zoo import push_bundle

        found = _weights(weights, "model", "--weights", tracking_uri)
        done = push_bundle(folder, output, url, overlay or (), found, force, _bundle_name(bundle, tracking_uri))
    typer.echo(f"{bundle} -> {done.archive}, SHA-256 {done.sha256}")
    if done.folder is None:
        typer.echo(
            f"for the zoo's folder with large_files.yml, name where {output / 'files'} will be served with --url"
        )
    else:
        files = ", ".join(path.name for path in done.large_files)
        typer.echo(f"{done.folder} without its weights; serve {files} at {url}")


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
    _forget_training(output)
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


@app.command("dcgan")
def dcgan(
    source: Annotated[
        Path, typer.Argument(help="Generator of MedImageGAN, or of PyTorch's DCGAN example: state dict or module.")
    ],
    output: Output,
    config: Config = None,
    force: Force = False,
) -> None:
    """DCGAN generator of PyTorch's example, and of MedImageGAN, to model.pt and an overlay."""
    config = _targets(output, config, force)
    from medgen.convert.dcgan import convert_dcgan

    converted = convert_dcgan(source)
    _write_files(converted.state, converted.overlay, output, config)
    found = ", ".join(f"{name} {value}" for name, value in converted.overlay.items())
    typer.echo(f"{source}: {found} -> {output}, {config} with these settings")


@app.command("medimagegan")
def medimagegan(
    source: Annotated[Path, typer.Argument(help="Control file of MedImageGAN (YAML).")],
    output: Annotated[Path, typer.Option("--output", help="Overlay of train.json, or of inference.json, to write.")],
    force: Force = False,
) -> None:
    """Control file of MedImageGAN to an overlay of train.json; of arch Generator, of inference.json."""
    _check_target("--output", output, ".json", force)
    from medgen.convert.medimagegan import convert_control_file

    converted = convert_control_file(source, output)
    _write_json(converted.settings, output, "--output")
    typer.echo(f"{source} -> {output}, an overlay of {converted.config}")
    for note in converted.notes:
        typer.echo(note)


class LatentOptions(NamedTuple):
    """What is said on the command line about a network of latent diffusion."""

    num_head_channels: str | None
    norm_num_groups: int | None
    autoencoder: Path | None
    scale: float | None
    prediction_type: str | None

    def heads(self) -> list[int] | None:
        from medgen.inferers import parse_numbers

        return None if self.num_head_channels is None else parse_numbers(self.num_head_channels, "num_head_channels")

    def given(self) -> list[str]:
        return [f"--{name}" for name, value in self._asdict().items() if value is not None]


def _check_latent_options(given: LatentOptions, output: Path, config: Path, force: bool) -> None:
    """See that options fit together, and that what comes with a network of latent diffusion may be written."""
    autoencoder, scale = given.autoencoder, given.scale
    files = [output, config, *_companions(output), *([] if autoencoder is None else [autoencoder])]
    if len({path.resolve() for path in files}) < len(files):
        raise UserError(
            f"expected different files, got {', '.join(map(str, files))}; choose another --output or --config"
        )
    if autoencoder is None and scale is not None:
        raise UserError("--scale goes into the scaling of an autoencoder's latents; name it with --autoencoder")
    if autoencoder is not None:
        _check_target("the scaling", _companions(output)[0], ".json", force)
        _check_autoencoder(autoencoder)
        if scale is not None and not (scale > 0 and math.isfinite(scale)):
            raise UserError(f"--scale must be a number above 0, got {scale}")
    if given.prediction_type is not None:
        from medgen.settings import check_choice

        check_choice(["epsilon", "v_prediction", "sample"], prediction_type=given.prediction_type)


def _companions(output: Path) -> tuple[Path, Path]:
    return output.with_name("scaling.json"), output.with_name("trained_as.json")


def _write_latent_diffusion(
    converted: ConvertedNetwork, source: str, given: LatentOptions, output: Path, config: Path, force: bool
) -> None:
    """Write a network with what is known of its training, and say so."""
    scaling, record = _companions(output)
    autoencoder, scale, prediction_type = given.autoencoder, given.scale, given.prediction_type
    name, levels = converted.network.__name__, "-".join(map(str, converted.settings["channels"]))
    done = f"{source}, {levels} channels -> {output} for {name}, {config} with its settings"
    if converted.is_autoencoder:
        for option, value in {"--autoencoder": autoencoder, "--prediction_type": prediction_type}.items():
            if value is not None:
                raise UserError(f"{option} belongs to a diffusion network, got it with {source}, an autoencoder itself")
        _write_files(converted.state, converted.overlay, output, config)
        typer.echo(done)
        return
    _check_target("the record of the training", record, ".json", force)
    told = {} if prediction_type is None else {"prediction_type": prediction_type}
    overlay, trained_as = converted.overlay | told, converted.trained_as | told
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


def _weights(source: str | None, kind: str, option: str, tracking_uri: str | None = None) -> Path | None:
    """The file of weights that an option names."""
    if source is None:
        return None
    from medgen.sources import SETTINGS, find_weights

    try:
        return find_weights(source, kind, tracking_uri=tracking_uri)
    except UserError as error:  # by the name that the user knows it by, which is another in a bundle's configs
        raise UserError(str(error).replace(f"--{SETTINGS[kind]}", option).replace(SETTINGS[kind], option)) from error


def _bundle_folder(source: str, tracking_uri: str | None) -> Path:
    """Where a bundle's files are: in the user's cache, if it is a registered one."""
    if source.startswith("models:/"):
        return _weights(source, "model", "BUNDLE", tracking_uri).parents[1]
    folder = Path(source)
    if not (folder / "configs" / "inference.json").is_file():
        raise UserError(
            "expected a bundle's folder, models:/NAME@ALIAS or models:/NAME/VERSION, got "
            f"{without_secrets(source)}, where no configs/inference.json is; name another"
        )
    return folder


def _bundle_name(source: str, tracking_uri: str | None) -> str | None:
    """What a registered bundle was called: its folder in the cache has another name. None for a folder's own."""
    if not source.startswith("models:/"):
        return None
    from medgen.registry import resolve

    *_, tags = resolve(source, tracking_uri)
    return tags["bundle"]


@contextlib.contextmanager
def _quiet_mlflow() -> Iterator[None]:
    """MLflow silent about what needs no action, such as the tables of a new database."""
    from medgen.cli_registry import quiet_registry

    with quiet_registry():
        yield


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


def _scale(converted: ConvertedNetwork, scale: float | None, source: str) -> tuple[float, str]:
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
    _forget_training(output)
    _save_weights(state, output)
    _write_json(overlay, config, "--config")


def _write_json(content: Mapping[str, Any], path: Path, option: str) -> None:
    from medgen.output import atomic_write_text

    try:
        atomic_write_text(path, json.dumps(content, indent=4) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}); choose another {option}") from error


def _forget_training(output: Path) -> None:
    """Take away what is recorded of weights that are about to be replaced: it would be taken for the new ones'."""
    if output.exists():
        for record in RECORDS:
            output.with_name(record).unlink(missing_ok=True)


def _save_weights(state: Mapping[str, Any], output: Path) -> None:
    import torch

    from medgen.output import atomic_file

    try:
        with atomic_file(output) as file:
            torch.save(dict(state), file)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror or error}); choose another --output") from error
