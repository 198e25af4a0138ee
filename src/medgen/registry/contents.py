"""What of a bundle's folder is registered, and how it is told from anything else."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

from medgen.bundle_config import build_network
from medgen.bundle_zip import BUNDLE_PARTS, COMPANIONS, GENERATOR_PARTS, bundle_files
from medgen.data.image_set import file_sha256
from medgen.errors import UserError
from medgen.weights import check_same_shapes, read_state_dict

__all__ = [
    "CHECKSUMS",
    "REQUIRED_FILES",
    "check_plain_weights",
    "check_weights",
    "lineage_of",
    "pip_requirements",
    "read_json",
    "stage_bundle",
    "verify_checksums",
    "write_checksums",
]

CHECKSUMS = "checksums.json"
REQUIRED_FILES = ("LICENSE", "configs/metadata.json", "configs/inference.json", "models/model.pt")
TORCH_FILES = (".pt", ".pth", ".ckpt")

# what trainings read, see :class:`medgen.lineage.Source`; weights that one began with were of its own model
_LINEAGE = re.compile(
    r"(autoencoder|text_encoder|(transfer_)?generator|(transfer_)?discriminator|encoder|initial_weights)(_sha256|_model)?"
    r"|model_model"
)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MODEL_URI = re.compile(r"models:/[^/@:\s]+(@[^/@:\s]+|/[0-9]+)")


def read_json(path: Path, shown: Path | None = None) -> dict[str, Any]:
    """A JSON file's object.

    Args:
        path: the file.
        shown: what to call it in messages; default: the path.

    Raises:
        UserError: it cannot be read, or is no JSON object.
    """
    shown = shown or path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{shown} cannot be read ({error.strerror}); name an existing JSON file") from error
    except ValueError as error:
        raise UserError(f"{shown} must be a JSON file ({error}); mend or rewrite it") from error
    if not isinstance(content, dict):
        raise UserError(f"{shown} must hold a JSON object, got a {type(content).__name__}")
    return content


def stage_bundle(
    root: Path, staged: Path, overlays: Sequence[str | Path] = (), weights: str | Path | None = None
) -> None:
    """Copy what belongs to a bundle, and make its configs those of the overlays.

    Args:
        root: the bundle's folder.
        staged: folder to make.
        overlays: JSON files whose top-level ids replace those of the same name in each config that builds the network.
            One that is no file as given is looked for among the bundle's own configs.
        weights: to be ``models/model.pt``, with the companions that lie beside them; default: the bundle's own.

    Raises:
        UserError: something is missing, a link, or no JSON, or an overlay sets what no config has.
    """
    if weights is None:
        files = bundle_files(root)
    else:
        elsewhere = {name: Path(weights).with_name(Path(name).name) for name in COMPANIONS}
        files = {name: path for name, path in bundle_files(root).items() if name not in COMPANIONS}
        own = Path(weights).absolute()  # an autoencoder is no companion of itself
        files |= {name: path for name, path in elsewhere.items() if path.is_file() and path.absolute() != own}
        files["models/model.pt"] = Path(weights)
    for name in REQUIRED_FILES:
        if name not in files or not files[name].is_file():
            if name != "models/model.pt":
                raise UserError(f"no {name} in {root}; name a bundle folder")
            missing = f"no {name} in {root}" if weights is None else f"no {weights}"
            raise UserError(f"{missing}; train the bundle first, or name a file with --weights")
    # what a link of a bundle from elsewhere points at is not that bundle's: a key, an image of a patient
    parts = (*BUNDLE_PARTS, *GENERATOR_PARTS)
    if links := [path for part in parts for path in ((root / part), *(root / part).rglob("*")) if path.is_symlink()]:
        name = links[0].relative_to(root)
        if weights is None or name.as_posix() != "models/model.pt":
            raise UserError(
                f"{name} in {root} is a symbolic link, which is not registered; put the file itself in its place, or "
                "name weights with --weights"
            )
    for name, path in files.items():
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, staged / name)
    _overlay(staged, overlays)


def _overlay(staged: Path, overlays: Sequence[str | Path]) -> None:
    # whatever runs the network: its other configs would build another one than the weights are of
    files = {path.name: read_json(path) for path in sorted((staged / "configs").glob("*.json"))}
    configs = {name: config for name, config in files.items() if "network_def" in config}
    for overlay in overlays:
        own = staged / "configs" / overlay  # an absolute path stays what it is
        path = Path(overlay) if Path(overlay).is_file() or not own.is_file() else own
        for key, value in read_json(path, Path(overlay)).items():
            having = [config for config in configs.values() if key in config]
            if not having:
                raise UserError(
                    f"{overlay} sets {key}, which is no top-level id of {', '.join(configs)}; correct it or take it out"
                )
            for config in having:
                config[key] = value
    if overlays:
        for name, config in configs.items():
            text = json.dumps(config, indent=4, ensure_ascii=False) + "\n"
            (staged / "configs" / name).write_text(text, encoding="utf-8")


def pip_requirements(metadata: Mapping[str, Any]) -> list[str]:
    """pip requirements from the versions that metadata.json pins.

    Raises:
        UserError: one is missing, or is no plain version.
    """
    keys = ("version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version")
    if missing := [key for key in keys if key not in metadata]:
        raise UserError(f"configs/metadata.json must hold {', '.join(keys)}; add {', '.join(missing)}")
    pins = {
        "monai": metadata["monai_version"],
        "torch": metadata["pytorch_version"],
        "numpy": metadata["numpy_version"],
        **metadata["required_packages_version"],
    }
    try:
        return [str(Requirement(f"{package}=={version}")) for package, version in pins.items()]
    except InvalidRequirement as error:
        raise UserError(
            f"configs/metadata.json must pin packages to plain X.Y.Z versions ({str(error).splitlines()[0]}); mend it"
        ) from error


def lineage_of(bundle: Path) -> dict[str, str]:
    """What a model was made from, as its training recorded it beside the weights.

    Returns:
        ``autoencoder_sha256`` and the like: checksums, and where it has them URIs of registered models. Of the kinds
        that trainings record alone: the file is whoever's made the bundle, and these become tags.
    """
    path = bundle / "models" / "trained_as.json"
    if not path.is_file():
        return {}
    found = {}
    for key, value in read_json(path, Path("models/trained_as.json")).items():
        if not _LINEAGE.fullmatch(key) or not isinstance(value, str):
            continue
        if _SHA256.fullmatch(value):
            found[key if key.endswith("_sha256") else f"{key}_sha256"] = value
        elif _MODEL_URI.fullmatch(value):
            found[key] = value
    return found


def check_weights(staged: Path) -> None:
    """See that models/model.pt is a bare state dict of network_def, and that what lies beside it holds no code.

    The config is built, so it runs: of a bundle that its user registers, not of one that came from elsewhere.

    Raises:
        UserError: it is not.
    """
    check_plain_weights(staged)
    state = read_state_dict(staged / "models" / "model.pt", "models/model.pt")
    check_same_shapes("models/model.pt", build_network(staged).state_dict(), state)


def check_plain_weights(folder: Path, uri: str = "") -> str:
    """See that no torch file below a folder holds anything but tensors; nothing in it is run.

    Args:
        folder: of a bundle.
        uri: of the registered model, for messages.

    Returns:
        SHA-256 of the names, shapes and types of the tensors in ``models/model.pt``.

    Raises:
        UserError: names the file that does.
    """
    of = f" of {uri}" if uri else ""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in TORCH_FILES:
            name = path.relative_to(folder).as_posix()
            state = read_state_dict(path, f"{name}{of}")
            if name == "models/model.pt":
                for key in sorted(state):
                    digest.update(f"{key} {tuple(state[key].shape)} {state[key].dtype}\n".encode())
    return digest.hexdigest()


def write_checksums(folder: Path) -> str:
    """Write checksums.json, relative path -> SHA-256 of all files in a folder; returns the SHA-256 of that list."""
    sums = {
        path.relative_to(folder).as_posix(): file_sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=4) + "\n", encoding="utf-8")
    return file_sha256(folder / CHECKSUMS)


def verify_checksums(folder: Path, uri: str, digest: str) -> None:
    """See that a downloaded folder holds the registered files, all of them and nothing else.

    Args:
        folder: with ``checksums.json`` in it.
        uri: of the registered model, for messages.
        digest: SHA-256 that ``checksums.json`` must have.

    Raises:
        UserError: names the first file that differs.
    """
    found = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    if links := [path for path in found if path.is_symlink()]:
        raise UserError(f"{uri} holds a symbolic link, {links[0].relative_to(folder)}; do not use this version")
    present = {path.relative_to(folder).as_posix(): path for path in found}
    # the digest of the list lies in the registry's database, out of reach of who can write to the artifact store alone
    if CHECKSUMS not in present or file_sha256(present[CHECKSUMS]) != digest:
        raise UserError(f"{CHECKSUMS} of {uri} was changed after it was registered; do not use this version")
    sums = read_json(present.pop(CHECKSUMS))
    for name in sums:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
            raise UserError(f"{uri} names a file outside the bundle, {name!r}; do not use this version")
    for name in sorted({*sums, *present}):
        if name not in present:
            raise UserError(f"{uri} lacks {name}; register the bundle again")
        if name not in sums or file_sha256(present[name]) != sums[name]:
            raise UserError(f"{name} of {uri} was changed after it was registered; do not use this version")
