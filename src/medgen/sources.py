"""Models named by where they are: a bundle's folder, or a registered bundle's URI."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from medgen._pyfunc import build_network
from medgen.data.image_set import file_sha256
from medgen.errors import UserError
from medgen.handlers.companions import check_trained_as
from medgen.networks.encoders import LatentEncoder
from medgen.networks.latent_generator import LatentGenerator
from medgen.weights import check_same_shapes, read_state_dict

__all__ = ["load_discriminator", "load_encoder", "load_generator"]

logger = logging.getLogger(__name__)

Overlay = str | Path | Sequence[str | Path] | None


def load_generator(
    source: str | Path,
    overlay: Overlay = None,
    weights: str | Path | None = None,
    space: str | None = None,
    tracking_uri: str | None = None,
    cache_dir: str | Path | None = None,
) -> LatentGenerator:
    """A trained generator, frozen, on the CPU.

    The network is ``network_def`` of the bundle's ``configs/inference.json``. A config is code: its expressions run.

    Args:
        source: folder of the bundle, or ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION`` of a registered one.
        overlay: JSON files that are laid over that config, as ``monai.bundle run`` would, or one of them: what the
            weights were trained with. One that is no file as given is looked for among the bundle's own configs.
        weights: file of the state dict; default: the bundle's own.
        space: "z", "w" or "w+"; None for the usual one of its family.
        tracking_uri: of the registry; default: MLFLOW_TRACKING_URI.
        cache_dir: where registered bundles are kept once they are fetched; default: ``medgen/models`` in the user's
            cache.

    Returns:
        The generator, with the SHA-256 of its weights' file.

    Raises:
        UserError: there is no such model, it is of another kind, or its weights are of another architecture.
    """
    network, sha256, _ = _load("generator", source, overlay, weights, tracking_uri, cache_dir)
    return LatentGenerator(network, space, sha256)


def load_encoder(
    source: str | Path,
    overlay: Overlay = None,
    weights: str | Path | None = None,
    generator_weights: str | Path | None = None,
    tracking_uri: str | None = None,
    cache_dir: str | Path | None = None,
) -> LatentEncoder:
    """A trained inversion encoder in evaluation mode, without gradients, on the CPU.

    Args:
        source: as for :func:`load_generator`.
        overlay: as for :func:`load_generator`.
        weights: as for :func:`load_generator`.
        generator_weights: weights of the generator that it is to be used with: refused if ``trained_as.json`` beside
            the encoder's weights says that it was trained for others.
        tracking_uri: as for :func:`load_generator`.
        cache_dir: as for :func:`load_generator`.

    Returns:
        The encoder; its attribute ``sha256`` is that of its weights' file.

    Raises:
        UserError: there is no such model, it is of another kind, its weights are of another architecture, or it was
            trained for another generator.
    """
    encoder, sha256, path = _load("encoder", source, overlay, weights, tracking_uri, cache_dir)
    if not isinstance(encoder, LatentEncoder):
        raise UserError(
            f"expected an inversion encoder in {source}, got a {type(encoder).__name__}; name the bundle of an encoder "
            "with --encoder"
        )
    if generator_weights is not None:
        if not Path(generator_weights).is_file():
            raise UserError(f"no weights of a generator at {generator_weights}; name a file that is there")
        check_trained_as(path, generator_sha256=file_sha256(generator_weights))
    encoder.sha256 = sha256
    return encoder.eval().requires_grad_(False)


def load_discriminator(
    source: str | Path,
    overlay: Overlay,
    checkpoint: str | Path,
    tracking_uri: str | None = None,
    cache_dir: str | Path | None = None,
) -> nn.Module:
    """A generator's discriminator in evaluation mode, without gradients, on the CPU.

    The network is ``discriminator_def`` of the bundle's ``configs/train.json``.

    Args:
        source: as for :func:`load_generator`.
        overlay: as for :func:`load_generator`.
        checkpoint: a training's ``checkpoints/last.pt``, or a file with the discriminator's state dict alone: a
            bundle's own weights are the generator's.
        tracking_uri: as for :func:`load_generator`.
        cache_dir: as for :func:`load_generator`.

    Returns:
        The discriminator; its attribute ``sha256`` is that of ``checkpoint``.

    Raises:
        UserError: there is no such model or checkpoint, or it is of another architecture.
    """
    bundle = _bundle_folder("generator", source, tracking_uri, cache_dir, "train.json")
    network = build_network(
        bundle, "discriminator_def", "train.json", _overlay_paths("generator", overlay, bundle / "configs")
    )
    path = Path(checkpoint)
    state = _discriminator_state(path)
    check_same_shapes(f"the discriminator of {path}", network.state_dict(), state)
    network.load_state_dict(state)
    network.sha256 = file_sha256(path)
    logger.info(f"discriminator of {source}: weights {network.sha256[:12]} from {path}")
    return network.eval().requires_grad_(False)


def _load(
    kind: str,
    source: str | Path,
    overlay: Overlay,
    weights: str | Path | None,
    tracking_uri: str | None,
    cache_dir: str | Path | None,
) -> tuple[nn.Module, str, Path]:
    """The network of a source with its weights, their SHA-256 and their file."""
    bundle = _bundle_folder(kind, source, tracking_uri, cache_dir)
    overlays = _overlay_paths(kind, overlay, bundle / "configs")
    path = bundle / "models" / "model.pt" if weights is None else Path(weights)
    if not path.is_file():
        raise UserError(f"no weights of the {kind} at {path}; train that bundle first, or set --{kind}_weights")
    network = build_network(bundle, overlays=overlays)
    state = read_state_dict(path)
    try:
        check_same_shapes(str(path), network.state_dict(), state)
    except UserError as error:
        raise UserError(f"{error} (--{kind}_overlay)") from error
    network.load_state_dict(state)
    sha256 = file_sha256(path)
    logger.info(f"{kind} from {source}: {type(network).__name__}, weights {sha256[:12]} from {path}")
    return network, sha256, path


def _bundle_folder(
    kind: str,
    source: str | Path,
    tracking_uri: str | None,
    cache_dir: str | Path | None,
    config: str = "inference.json",
) -> Path:
    """Where a source's files are: fetched if it is a registered one."""
    wanted = f"{kind} must be a bundle's folder, models:/NAME@ALIAS or models:/NAME/VERSION"
    if source is None or not str(source):
        raise UserError(f"{wanted}, got none; set --{kind}")
    if re.match(r"\w+:", str(source)):
        if not str(source).startswith("models:/"):
            raise UserError(f"{wanted}, got {source}; set --{kind}")
        if not (tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")):
            raise UserError(
                f"{kind} {source} is in a registry, and none is named; set MLFLOW_TRACKING_URI to "
                "sqlite:////path/to/mlflow.db or http://host:port"
            )
        # here, because it brings MLflow's server and its database along
        from medgen.registry import fetch

        return fetch(str(source), cache_dir or _user_cache(), tracking_uri)
    folder = Path(source)
    if folder.is_file():
        raise UserError(
            f"{wanted}, got the file {folder}; give the folder of its bundle, and the file as --{kind}_weights"
        )
    if not folder.is_dir():
        raise UserError(f"{wanted}, no folder at {folder}; set --{kind}")
    if not (folder / "configs" / config).is_file():
        raise UserError(f"{wanted}, no configs/{config} in {folder}; set --{kind}")
    return folder


def _user_cache() -> Path:
    """As the XDG base directory specification has it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medgen" / "models"


def _overlay_paths(kind: str, overlay: Overlay, configs: Path) -> list[Path]:
    if isinstance(overlay, str) and not Path(overlay).is_file():
        # a list from the command line may come as text: ['a.json', 'b.json'], or as MONAI has it: a.json,b.json
        overlay = [name.strip(" '\"") for name in overlay.strip("[]").split(",")]
    names = [overlay] if isinstance(overlay, str | Path) else overlay or []
    paths = []
    for name in names:
        path = next((path for path in (Path(name), configs / name) if path.is_file()), None)
        if path is None:
            raise UserError(f"no overlay {name}, neither as given nor in {configs}; set --{kind}_overlay")
        paths.append(path)
    return paths


def _discriminator_state(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise UserError(f"no checkpoint with a discriminator at {path}; name OUT/checkpoints/last.pt of its training")
    try:
        # mapped: of networks, averages and optimisers one is wanted
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:
        content = None  # whatever it is, it will be told below
    if not isinstance(content, Mapping) or not isinstance(content.get("components"), Mapping):
        return read_state_dict(path)
    parts = content["components"]
    if "discriminator" not in parts:
        raise UserError(
            f"expected a checkpoint with a discriminator, {path} holds {', '.join(parts)}; name one of the generator's "
            "training"
        )
    return parts["discriminator"]
