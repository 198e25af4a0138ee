"""Weights of models that MLflow logged. Nothing of a model is run: its pickles are read as records, its code never.

A model logged with ``mlflow.pytorch`` is a folder with ``MLmodel`` and, in ``data``, the module pickled whole
(``model.pth``: MLflow 1 and 2, ``serialization_format="pickle"``) or exported (``model.pt2``: MLflow 3); what
``mlflow.pytorch.log_state_dict`` logs is a folder with ``state_dict.pth``.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from medgen.convert.latent_diffusion import PACKAGES, drop_rearrangements, names_of
from medgen.convert.restricted import OneLineErrors, RefusedError, module_state_dict, read_records
from medgen.errors import UserError, without_secrets

__all__ = ["LoggedWeights", "find_logged_weights", "read_exported_weights", "read_logged_weights"]

DESCRIPTION = "MLmodel"
WEIGHTS = ("data/model.pth", "data/model.pt2", "state_dict.pth")  # in the order in which they are looked for
MODEL_PATH = "final_model"  # where the source's trainings logged theirs

# of torch.export's archives; numbers of the types are those of its schema, which is kept compatible
EXPORTED_DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}

_RUN = re.compile(r"[0-9a-f]{32}")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_ALIAS = re.compile(r"models:/([^/@]+)@([^/@]+)")


class LoggedWeights(NamedTuple):
    """Weights of a model that MLflow logged.

    Attributes:
        path: ``data/model.pth``, ``data/model.pt2`` or ``state_dict.pth``.
        uri: of the model, with the number of its version where an alias named it; None for a folder.
    """

    path: Path
    uri: str | None = None


def find_logged_weights(
    source: str | Path, folder: str | Path, tracking_uri: str | None = None, artifact_path: str = MODEL_PATH
) -> LoggedWeights:
    """The file with the weights of a model that MLflow logged.

    Args:
        source: run id, ``runs:/ID`` or ``runs:/ID/PATH``, ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS``; or a
            folder: of the model, of a run's artifacts, or of a run in a file store (``mlruns/0/ID``).
        folder: where to put what is fetched.
        tracking_uri: of the server or database; default: MLFLOW_TRACKING_URI.
        artifact_path: the model's place among a run's artifacts, where the source does not name one.

    Returns:
        The file, in ``folder`` or where it was, and what it is of.

    Raises:
        UserError: no such run or model, a model of another kind, or a registered bundle.
    """
    text = str(source)
    if _RUN.fullmatch(text) and not Path(text).exists():
        text = f"runs:/{text}"
    if text.startswith(("runs:/", "models:/")):
        if re.fullmatch(r"runs:/[^/]+/?", text):
            text = f"{text.rstrip('/')}/{artifact_path}"
        return _fetch(text.rstrip("/"), Path(folder), tracking_uri)
    if _SCHEME.match(text):
        raise UserError(
            "expected a run id, runs:/ID/PATH, models:/NAME/VERSION, models:/NAME@ALIAS or a folder, got "
            f"{without_secrets(text)}; name its server with --tracking_uri instead"
        )
    root = Path(source)
    if not root.is_dir():
        raise UserError(f"no folder at {root}; name a run id, runs:/ID/PATH, models:/NAME@ALIAS or a model's folder")
    for model in (root, root / artifact_path, root / "artifacts" / artifact_path):
        present = {name for name in (*WEIGHTS, DESCRIPTION) if (model / name).is_file()}
        if present:
            _check_description(str(source), (model / DESCRIPTION) if DESCRIPTION in present else None)
            return LoggedWeights(model / _chosen(str(source), present))
    raise UserError(
        f"{root} must be a model that MLflow logged, with {DESCRIPTION} and {WEIGHTS[0]} in it, got a folder with "
        f"neither; name the folder {MODEL_PATH} of a run's artifacts"
    )


def read_logged_weights(
    path: str | Path, network: str | None = None, packages: Sequence[str] = ()
) -> dict[str, torch.Tensor]:
    """The state dict of a file of weights that MLflow logged.

    Args:
        path: a module pickled whole, a state dict, a checkpoint that holds one (``.pth``), or an exported program
            (``.pt2``).
        network: key of the state dict in a checkpoint that holds several.
        packages: whose classes a pickled module consists of, beside those of torch, MONAI and monai-generative; they
            are not imported.

    Returns:
        Names and tensors on the CPU, as they were saved.

    Raises:
        UserError: a damaged file, one that names something else, or none or several state dicts in it.
    """
    path = Path(path)
    if path.suffix == ".pt2":
        if network is not None:
            raise UserError(f"{path} holds one network, got --network {network}; leave it out")
        return read_exported_weights(path)
    with OneLineErrors(path, "module or state dict that MLflow logged"):
        content = read_records(path, (*PACKAGES, *packages))
        drop_rearrangements(content)
        if names_of(content):
            parts: Mapping[str, Any] = {"": content}
        else:
            entries = content.items() if isinstance(content, Mapping) else ()
            parts = {str(name): part for name, part in entries if names_of(part)}
        if network is not None and network not in parts:
            raise UserError(
                f"expected a state dict {network} in {path}, got {', '.join(parts) or 'none'}; set --network"
            )
        if network is None and len(parts) != 1:
            todo = "name one with --network" if parts else "name a run that logged a network"
            raise UserError(f"expected one module or state dict in {path}, got {', '.join(parts) or 'none'}; {todo}")
        return module_state_dict(parts[next(iter(parts)) if network is None else network])


def read_exported_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The parameters and persistent buffers of a program that ``torch.export.save`` wrote.

    ``torch.export.load`` unpickles whatever the archive asks for; here its list of weights and their bytes are read.

    Args:
        path: the archive (``.pt2``).

    Returns:
        Names and tensors on the CPU; those of one storage share their memory.

    Raises:
        UserError: no such archive or a damaged one, or weights that are pickled.
    """
    path = Path(path)
    with OneLineErrors(path, "program of torch.export"), zipfile.ZipFile(path) as archive:
        listed = [name for name in archive.namelist() if name.endswith("/data/weights/model_weights_config.json")]
        if len(listed) != 1:
            raise RefusedError(f"it has {len(listed)} lists of weights instead of one")
        folder = listed[0].rpartition("/")[0]
        order = f"{folder.removesuffix('/data/weights')}/byteorder"
        if _entry(archive, order).decode("ascii") != sys.byteorder:
            raise RefusedError(f"its numbers are not stored {sys.byteorder}-endian, as this machine's are")
        storages: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        state = {}
        for name, entry in json.loads(_entry(archive, listed[0]))["config"].items():
            if entry["use_pickle"] is not False or not re.fullmatch(r"weight_\d+", entry["path_name"]):
                raise RefusedError(f"its weight {name:.80} is pickled, or lies outside of its weights")
            meta = entry["tensor_meta"]
            if meta["dtype"] not in EXPORTED_DTYPES:
                raise RefusedError(f"its weight {name:.80} is of a type {meta['dtype']!r:.20} that is not read")
            key = entry["path_name"], EXPORTED_DTYPES[meta["dtype"]]
            if key not in storages:
                stored = bytearray(_entry(archive, f"{folder}/{key[0]}"))  # torch wants memory that may be written to
                storages[key] = torch.frombuffer(stored, dtype=key[1]) if stored else torch.empty(0, dtype=key[1])
            shape, stride = ([size["as_int"] for size in meta[part]] for part in ("sizes", "strides"))
            # as_strided itself sees that the numbers lie within the storage, not how often they are taken
            if torch.Size(shape).numel() > max(storages[key].numel(), 1):
                raise RefusedError(f"its weight {name:.80} has more numbers than are stored")
            state[name] = torch.as_strided(storages[key], shape, stride, meta["storage_offset"]["as_int"])
        return state


def _entry(archive: zipfile.ZipFile, name: str) -> bytes:
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise RefusedError(f"{name:.80} is compressed, which torch's files never are")
    return archive.read(name)


def _fetch(source: str, folder: Path, tracking_uri: str | None) -> LoggedWeights:
    """Download the description and the weights of a model, and nothing else of it."""
    from medgen.registry._connection import connection  # first: it keeps MLflow from reporting its usage

    import mlflow  # isort: skip

    with connection(tracking_uri) as client:
        # once: an alias may move between two questions
        alias = _ALIAS.fullmatch(source)
        uri = f"models:/{alias[1]}/{client.get_model_version_by_alias(*alias.groups()).version}" if alias else source

        def download(name: str) -> Path:
            return Path(mlflow.artifacts.download_artifacts(artifact_uri=f"{uri}/{name}", dst_path=str(folder)))

        top = _listed(mlflow, uri)
        description = download(DESCRIPTION) if DESCRIPTION in top else None
        _check_description(source, description)
        present = {f"data/{name}" for name in (_listed(mlflow, f"{uri}/data") if "data" in top else ())} | top
        return LoggedWeights(download(_chosen(source, present)), uri)


def _listed(mlflow: Any, uri: str) -> set[str]:
    return {info.path.rpartition("/")[2] for info in mlflow.artifacts.list_artifacts(artifact_uri=uri)}


def _chosen(source: str, present: set[str]) -> str:
    weights = next((name for name in WEIGHTS if name in present), None)
    if weights is None:
        raise UserError(
            f"{source} must be a model of mlflow.pytorch with {', '.join(WEIGHTS[:-1])} or {WEIGHTS[-1]}, got "
            f"{', '.join(sorted(present)[:6]) or 'nothing'}; name its place with runs:/ID/PATH or --artifact_path"
        )
    return weights


def _check_description(source: str, path: Path | None) -> None:
    """See that a model is not one of this collection's own, which has its way back."""
    if path is None:
        return
    import yaml

    try:
        described = yaml.safe_load(path.read_text(encoding="utf-8"))
        flavours = dict(described["flavors"])
        ours = "bundle" in (flavours.get("python_function", {}).get("artifacts") or {})
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{DESCRIPTION} of {source} is damaged ({type(error).__name__}); log the model again"
        ) from error
    if ours:
        raise UserError(f"{source} is a registered bundle; fetch it whole with `medgen registry pull {source} FOLDER`")
    if "pytorch" not in flavours:
        raise UserError(
            f"{source} must be a model of mlflow.pytorch, got {', '.join(map(str, flavours))[:100]}; such is not read"
        )
