"""Weights and models named by where they are: a file, a bundle's folder, or the URI of a registered bundle."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from torch import nn

from medgen import lineage
from medgen.bundle_config import build_network
from medgen.errors import UserError, without_secrets
from medgen.handlers.companions import check_trained_as
from medgen.lineage import Source, used, weights_digest
from medgen.networks.encoders import LatentEncoder
from medgen.networks.latent_generator import LatentGenerator
from medgen.settings import optional
from medgen.weights import load_weights

__all__ = ["Source", "find_weights", "load_discriminator", "load_encoder", "load_generator", "used"]

logger = logging.getLogger(__name__)

Overlay = str | Path | Sequence[str | Path] | None

WEIGHTS = "models/model.pt"
# what names weights of a kind in the configs, where it is not the kind itself
SETTINGS = {
    "model": "model_path",
    "autoencoder": "autoencoder_path",
    "discriminator": "discriminator_checkpoint",
    "encoder": "encoder_weights",
    "generator": "generator_weights",
}
_MODEL_URI = "models:/NAME@ALIAS or models:/NAME/VERSION"
_RUN_URI = re.compile(r"runs:/(?P<run>\w+)/(?P<path>.+)")


def find_weights(
    source: str | Path | None,
    kind: str = "model",
    file: str = WEIGHTS,
    tracking_uri: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path | None:
    """The file of weights that a setting names.

    What was found is logged and noted: see :func:`used`.

    Args:
        source: a file, the folder of a bundle, ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION`` of a registered one,
            or ``runs:/RUN_ID/PATH`` of a file that a run keeps. Of a bundle the weights alone are taken. None, also as
            text, for none.
        kind: what they are weights of, see :class:`Source`.
        file: which file of the folder, or of the registered bundle.
        tracking_uri: of the registry; default: MLFLOW_TRACKING_URI.
        cache_dir: where registered bundles are kept once they are fetched; default: ``medgen/models`` in the user's
            cache.

    Returns:
        The file, which need not exist where a file or a folder was named: whoever reads it says so. What belongs to the
        weights lies beside it. None for None.

    Raises:
        UserError: no such version or run, or the files are not those that were registered.
    """
    if optional(source) is None:
        return None
    path = Path(source)
    if path.exists() or not _is_uri(source):
        path = path / file if path.is_dir() else path
        if path.is_file():
            _note(kind, source, path)
        return path
    option = SETTINGS.get(kind, kind)
    if run := _RUN_URI.fullmatch(str(source)):
        path = _download(str(source), run, tracking_uri, cache_dir, option)
        _note(kind, source, path)
        return path
    wanted = f"{option} must be a file, a folder, {_MODEL_URI}"
    registered = _fetch(wanted, option, str(source), tracking_uri, cache_dir)
    path = registered.folder / file
    if not path.is_file():
        raise UserError(f"{registered.uri} holds no {file}; set --{option} to a file or a folder that does")
    _note(kind, source, path, registered)
    return path


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
        weights: state dict, named as for :func:`find_weights`; default: the bundle's own.
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
        check_trained_as(path, generator_sha256=weights_digest(generator_weights))
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
        checkpoint: a training's ``checkpoints/last.pt``, its output folder, or a file with the discriminator's state
            dict alone: a bundle's own weights are the generator's.
        tracking_uri: as for :func:`load_generator`.
        cache_dir: as for :func:`load_generator`.

    Returns:
        The discriminator; its attribute ``sha256`` is that of ``checkpoint``.

    Raises:
        UserError: there is no such model or checkpoint, or it is of another architecture.
    """
    bundle = _bundle_folder("generator", source, tracking_uri, cache_dir, "train.json").folder
    network = build_network(
        bundle, "discriminator_def", "train.json", _overlay_paths("generator", overlay, bundle / "configs")
    )
    path = find_weights(checkpoint, "discriminator", "checkpoints/last.pt", tracking_uri, cache_dir)
    if path is None or not path.is_file():
        raise UserError(f"no checkpoint with a discriminator at {path}; name OUT/checkpoints/last.pt of its training")
    load_weights(network, path, f"the discriminator of {path}", component="discriminator")
    network.sha256 = weights_digest(path)
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
    overlays = _overlay_paths(kind, overlay, bundle.folder / "configs")
    path = find_weights(weights, kind, tracking_uri=tracking_uri, cache_dir=cache_dir) or bundle.folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"no weights of the {kind} at {path}; train that bundle first, or set --{kind}_weights")
    network = build_network(bundle.folder, overlays=overlays)
    load_weights(network, path, option=f"--{kind}_overlay")
    if optional(weights) is None:
        _note(kind, source, path, bundle)
    logger.info(f"{kind} from {source}: {type(network).__name__}")
    return network, weights_digest(path), path


class _Bundle(NamedTuple):
    """A bundle's folder, and of a registered one what the registry calls it."""

    folder: Path
    uri: str | None = None
    model_id: str | None = None


def _note(kind: str, source: str | Path, path: Path, bundle: _Bundle | None = None) -> None:
    bundle = bundle or _Bundle(path)
    found = lineage.note(kind, source, path, bundle.uri, bundle.model_id)
    logger.info(f"{kind}: weights {found.sha256[:12]} of {found.uri or source}, from {path}")


def _is_uri(source: str | Path) -> bool:
    return re.match(r"\w+:", str(source)) is not None


def _bundle_folder(
    kind: str,
    source: str | Path,
    tracking_uri: str | None,
    cache_dir: str | Path | None,
    config: str = "inference.json",
) -> _Bundle:
    """Where a source's files are: fetched if it is a registered one."""
    wanted = f"{kind} must be a bundle's folder, {_MODEL_URI}"
    if source is None or not str(source):
        raise UserError(f"{wanted}, got none; set --{kind}")
    if _is_uri(source):
        return _fetch(wanted, kind, str(source), tracking_uri, cache_dir)
    folder = Path(source)
    if folder.is_file():
        raise UserError(
            f"{wanted}, got the file {folder}; give the folder of its bundle, and the file as --{kind}_weights"
        )
    if not folder.is_dir():
        raise UserError(f"{wanted}, no folder at {folder}; set --{kind}")
    if not (folder / "configs" / config).is_file():
        raise UserError(f"{wanted}, no configs/{config} in {folder}; set --{kind}")
    return _Bundle(folder)


def _fetch(wanted: str, option: str, source: str, tracking_uri: str | None, cache_dir: str | Path | None) -> _Bundle:
    """A registered bundle in the cache."""
    if not source.startswith("models:/"):
        raise UserError(f"{wanted}, got {without_secrets(source)}; set --{option}")
    _check_registry_named(f"{option} {source}", tracking_uri)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # one line a file, in a cluster's log
    # here, because it brings MLflow's server and its database along
    from medgen.registry import fetch, resolve

    name, version, model_id, _ = resolve(source, tracking_uri)
    # by its number: an alias may move between two questions
    uri = f"models:/{name}/{version}"
    logger.info(f"{source} is version {version} of {name}")
    return _Bundle(fetch(uri, cache_dir or user_cache(), tracking_uri), uri, model_id)


def _download(
    source: str, run: re.Match[str], tracking_uri: str | None, cache_dir: str | Path | None, option: str
) -> Path:
    """A file that a run keeps, in the cache; fetched each time, since a run's last checkpoint changes."""
    name = PurePosixPath(run["path"])
    if name.is_absolute() or ".." in name.parts or "\\" in run["path"]:
        raise UserError(f"{option} must name a file of a run, got {source}; set --{option} runs:/RUN_ID/PATH")
    _check_registry_named(f"{option} {source}", tracking_uri)
    from medgen.registry._connection import connection  # first: it keeps MLflow from reporting its usage

    from mlflow.artifacts import download_artifacts  # isort: skip

    path = Path(cache_dir or user_cache()) / "runs" / run["run"] / run["path"]
    path.parent.mkdir(parents=True, exist_ok=True)
    # beside it, and renamed: another process may be reading it, or fetching it as well
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as part, connection(tracking_uri):
        fetched = Path(download_artifacts(run_id=run["run"], artifact_path=run["path"], dst_path=part))
        if not fetched.is_file():
            raise UserError(f"{option} must name a file of a run, got the folder {source}; add the name of the file")
        os.replace(fetched, path)
    return path


def _check_registry_named(what: str, tracking_uri: str | None) -> None:
    if not (tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")):
        raise UserError(
            f"{what} is in a registry, and none is named; set MLFLOW_TRACKING_URI to sqlite:////path/to/mlflow.db or "
            "http://host:port"
        )


def user_cache() -> Path:
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
