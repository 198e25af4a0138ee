"""MLflow model registry: whole bundles in, whole bundles out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import mlflow
import numpy as np
from mlflow.entities import LoggedModel, LoggedModelOutput
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec
from packaging.requirements import InvalidRequirement, Requirement
from sqlalchemy.exc import SQLAlchemyError

import medgen
from medgen import _pyfunc
from medgen.errors import UserError
from medgen.output import disable_usage_reports
from medgen.weights import check_same_shapes, read_state_dict

__all__ = ["RegisteredBundle", "fetch", "list_models", "log_run", "pull", "register_bundle"]

disable_usage_reports()

logger = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"
# a bundle folder also holds outputs, checkpoints and perhaps images of patients: only these are ever registered
BUNDLE_PARTS = ("LICENSE", "configs", "docs", "models/model.pt")
# what a training puts beside weights that are of no use alone (medgen.handlers.ModelCompanions)
COMPANIONS = ("models/autoencoder.pt", "models/scaling.json", "models/trained_as.json")
REQUIRED_FILES = ("LICENSE", "configs/metadata.json", "configs/inference.json", "models/model.pt")
DESCRIPTION_LENGTH = 5000  # characters of a description column in MLflow's database
SHOWN_METRICS = 4

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_RESERVED_ALIAS = re.compile(r"latest|v\d+", re.IGNORECASE)
_METRIC_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,199}")
_MODEL_URI = re.compile(r"models:/(?P<name>[^/@:]+)(?:@(?P<alias>[^/@:]+)|/(?P<version>\d+))")


@dataclass(frozen=True)
class RegisteredBundle:
    """One version of a registered model.

    Args:
        name: name of the registered model.
        version: version in the registry, counted from 1.
        aliases: aliases that point at this version.
        bundle: name and version of the bundle; "" for a model that did not come from :func:`register_bundle`.
        created: when it was registered, UTC.
        metrics: all figures of its run, those of its metrics file first and in that file's order.
    """

    name: str
    version: int
    aliases: tuple[str, ...]
    bundle: str
    created: datetime
    metrics: Mapping[str, float]


def register_bundle(
    bundle: str | Path,
    name: str,
    tracking_uri: str | None = None,
    alias: str | None = None,
    metrics: str | Path | None = None,
    overlays: Sequence[str | Path] = (),
    weights: str | Path | None = None,
) -> int:
    """Register a bundle folder as a new version of an MLflow model.

    ``LICENSE``, ``configs``, ``docs`` and ``models/model.pt`` travel as they are, with a list of checksums, and so does
    what a training of latent diffusion leaves beside its weights; the model itself runs ``network_def`` on one tensor.
    Weights and configs are checked before anything is written.

    Args:
        bundle: the bundle folder; its name names the MLflow experiment.
        name: registered model, made if there is none of that name: letters, digits, ``_`` and ``-``.
        tracking_uri: ``sqlite:////path/mlflow.db`` or the address of a server; default: MLFLOW_TRACKING_URI.
        alias: alias to point at the new version.
        metrics: flat JSON file; its numbers become metrics, the rest (and what is not finite) tags.
        overlays: JSON files whose top-level ids replace those of the same name in each registered config that builds
            the network: the overlays that the weights were trained with.
        weights: state dict to register as models/model.pt; default: the bundle's own.

    Returns:
        the new version, counted from 1.

    Raises:
        UserError: a name, a file or the weights are not as they must be, or MLflow refuses.
    """
    _check_name("name", name)
    if alias is not None:
        _check_name("alias", alias)
        if _RESERVED_ALIAS.fullmatch(alias):
            raise UserError(f"MLflow keeps the aliases latest and v1, v2, ... for itself, got {alias}; choose another")
    _resolve_uri(tracking_uri)  # a wrong one is told at once, not after the weights were read
    figures, notes = _read_metrics(metrics)
    root = Path(bundle).resolve()
    with tempfile.TemporaryDirectory(prefix="medgen-register-") as folder:
        stage = Path(folder)
        staged = stage / "bundle"
        _stage(root, staged, overlays, weights)
        weights_sha256 = _sha256(staged / "models" / "model.pt")
        if notes.get("model_sha256", weights_sha256) != weights_sha256:
            raise UserError(f"{metrics} was measured with other weights; evaluate the weights that you register")
        metadata = _read_json(staged / "configs" / "metadata.json", root / "configs" / "metadata.json")
        about = {"bundle": root.name, "bundle_version": str(metadata.get("version", ""))}
        model = _save_model(stage, metadata, about)
        digest = _sha256(staged / CHECKSUMS)
        with _registry(tracking_uri, create=True) as client:
            experiment = _experiment(client, root.name)
            with mlflow.start_run(experiment_id=experiment, run_name=name, tags={**notes, **about}) as run:
                logged = _upload_model(client, stage / "model", model, name, run)
                mlflow.log_metrics(figures, model_id=logged.model_id)
            version = _create_version(
                client,
                name,
                source=logged.model_uri,
                run_id=run.info.run_id,
                model_id=logged.model_id,
                description=_model_card(staged),
                tags={**about, "bundle_sha256": digest, "metrics": ",".join(figures)},
            )
            if alias is not None:
                client.set_registered_model_alias(name, alias, version.version)
    return int(version.version)


def pull(uri: str, target: str | Path, tracking_uri: str | None = None) -> Path:
    """Fetch a registered bundle into a new folder, ready for ``python -m monai.bundle run``.

    Args:
        uri: ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.
        target: folder to make; it may exist if it is empty.
        tracking_uri: ``sqlite:////path/mlflow.db`` or the address of a server; default: MLFLOW_TRACKING_URI.

    Returns:
        the folder.

    Raises:
        UserError: no such model, the folder is in use, or the files are not those that were registered.
    """
    folder = Path(target).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"the target must be a new or empty folder, got {folder}; name another")
    with _found(uri, tracking_uri) as version:
        _download(version, uri, folder)
    return folder


def fetch(uri: str, cache_dir: str | Path, tracking_uri: str | None = None) -> Path:
    """A registered bundle in a cache, pulled if it is not there: to read, not to change.

    Args:
        uri: ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.
        cache_dir: folder of the cache, made if need be; bundles lie in it under their checksums.
        tracking_uri: ``sqlite:////path/mlflow.db`` or the address of a server; default: MLFLOW_TRACKING_URI.

    Returns:
        the bundle's folder.

    Raises:
        UserError: no such model, or the files are not those that were registered.
    """
    with _found(uri, tracking_uri) as version:
        digest = version.tags["bundle_sha256"]
        if not re.fullmatch(r"[0-9a-f]{64}", digest):  # it names a folder, and comes from elsewhere
            raise UserError(f"the checksum of {uri} must be a SHA-256, got {digest!r:.80}; do not use this version")
        folder = Path(cache_dir).resolve() / digest
        logger.info(f"{uri} is version {version.version} of {version.name}, in {folder}")
        if not folder.is_dir():
            try:
                _download(version, uri, folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
        try:
            _verify_checksums(folder, uri, digest)
        except UserError as error:
            raise UserError(f"{error}: the copy in {folder}; delete that folder to fetch it again") from error
    return folder


def list_models(tracking_uri: str | None = None) -> list[RegisteredBundle]:
    """All versions of all registered models, by name and version.

    Args:
        tracking_uri: ``sqlite:////path/mlflow.db`` or the address of a server; default: MLFLOW_TRACKING_URI.

    Raises:
        UserError: no registry there, or MLflow refuses.
    """
    with _registry(tracking_uri) as client:
        aliases = {model.name: model.aliases for model in mlflow.search_registered_models()}
        versions = []
        for found in mlflow.search_model_versions():
            number = int(found.version)
            figures = _run_metrics(client, found.run_id)
            first = [key for key in found.tags.get("metrics", "").split(",") if key in figures]
            versions.append(
                RegisteredBundle(
                    name=found.name,
                    version=number,
                    aliases=tuple(
                        sorted(key for key, value in aliases.get(found.name, {}).items() if int(value) == number)
                    ),
                    bundle=f"{found.tags.get('bundle', '')} {found.tags.get('bundle_version', '')}".strip(),
                    created=datetime.fromtimestamp(found.creation_timestamp / 1000, UTC),
                    metrics={key: figures[key] for key in dict.fromkeys([*first, *sorted(figures)])},
                )
            )
    return sorted(versions, key=lambda v: (v.name, v.version))


@contextlib.contextmanager
def _found(uri: str, tracking_uri: str | None) -> Iterator[ModelVersion]:
    """The registered bundle of that URI, while its registry is MLflow's."""
    parts = _MODEL_URI.fullmatch(uri)
    if parts is None:
        raise UserError(f"a registered bundle is named models:/NAME@ALIAS or models:/NAME/VERSION, got {uri}")
    with _registry(tracking_uri) as client:
        if parts["alias"]:
            version = client.get_model_version_by_alias(parts["name"], parts["alias"])
        else:
            version = client.get_model_version(parts["name"], parts["version"])
        if "bundle_sha256" not in version.tags:
            raise UserError(f"{uri} is not a registered bundle; register one with `medgen registry register`")
        yield version


def _download(version: ModelVersion, uri: str, folder: Path) -> None:
    """Fetch and verify; the folder appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as download:
        source = f"models:/{version.name}/{version.version}/artifacts/bundle"
        bundle = Path(mlflow.artifacts.download_artifacts(artifact_uri=source, dst_path=download))
        _verify_checksums(bundle, uri, version.tags["bundle_sha256"])
        os.replace(bundle, folder)


def _check_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{what} must be up to 100 letters, digits, _ and -, a letter or digit first, got {name!r}; choose another"
        )


def _read_json(path: Path, shown: Path | None = None) -> dict[str, Any]:
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


def _read_metrics(path: str | Path | None) -> tuple[dict[str, float], dict[str, str]]:
    figures: dict[str, float] = {}
    notes: dict[str, str] = {}
    for key, value in (_read_json(Path(path)) if path is not None else {}).items():
        if not _METRIC_NAME.fullmatch(key) or isinstance(value, dict | list):
            raise UserError(
                f"{path} must be one flat object with names of letters, digits and _, got {type(value).__name__} at "
                f"{key!r}; register the metrics.json that evaluate.json writes"
            )
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            figures[key] = float(value)
        else:
            notes[key] = value if isinstance(value, str) else json.dumps(value)
    return figures, notes


def _stage(root: Path, staged: Path, overlays: Sequence[str | Path], weights: str | Path | None = None) -> None:
    """Copy what belongs to a bundle, and make its configs those of the overlays."""
    elsewhere = {}
    if weights is not None:
        elsewhere = {name: Path(weights).with_name(Path(name).name) for name in COMPANIONS}
        elsewhere["models/model.pt"] = Path(weights)
    for name in REQUIRED_FILES:
        if not elsewhere.get(name, root / name).is_file():
            todo = (
                "train the bundle first, or name a file with --weights"
                if name == "models/model.pt"
                else ("name a bundle folder")
            )
            raise UserError(f"no {elsewhere[name]}; {todo}" if name in elsewhere else f"no {name} in {root}; {todo}")
    for name in (*BUNDLE_PARTS, *COMPANIONS):
        source, copy = elsewhere.get(name, root / name), staged / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.pyc"))
        elif source.is_file():
            shutil.copyfile(source, copy)
    # whatever runs the network: its other configs would build another one than the weights are of
    files = {path.name: _read_json(path) for path in sorted((staged / "configs").glob("*.json"))}
    configs = {name: config for name, config in files.items() if "network_def" in config}
    for overlay in overlays:
        for key, value in _read_json(Path(overlay)).items():
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


def _requirements(metadata: Mapping[str, Any]) -> list[str]:
    """pip requirements from the versions that metadata.json pins."""
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


def _check_weights(staged: Path) -> None:
    """See that models/model.pt is a bare state dict of network_def."""
    state = read_state_dict(staged / "models" / "model.pt", "models/model.pt")
    check_same_shapes("models/model.pt", _pyfunc.build_network(staged).state_dict(), state)


def _save_model(stage: Path, metadata: Mapping[str, Any], about: Mapping[str, str]) -> Model:
    """Check the bundle in ``stage/bundle`` and make an MLflow model of it in ``stage/model``."""
    signature = ModelSignature(
        *(
            Schema([TensorSpec(np.dtype(np.float32), _pyfunc.TensorFormat.from_metadata(metadata, side).shape)])
            for side in ("inputs", "outputs")
        )
    )
    requirements = _requirements(metadata)
    _check_weights(stage / "bundle")
    _write_checksums(stage / "bundle")
    code = shutil.copyfile(_pyfunc.__file__, stage / "bundle_pyfunc.py")
    # MLflow writes the paths that it is given into the model; relative ones keep this machine's out of it
    with contextlib.chdir(stage), warnings.catch_warnings():
        # MLflow would infer a signature from an example; ours is what metadata.json says
        warnings.filterwarnings("ignore", message=".*An input example was not provided")
        mlflow.pyfunc.save_model(
            path="model",
            python_model=code.name,
            artifacts={"bundle": "bundle"},
            signature=signature,
            pip_requirements=requirements,
            metadata={**about, "medgen_version": medgen.__version__},
        )
    model = Model.load(stage / "model")
    # the one path that MLflow makes absolute; loading uses its last part alone
    model.flavors["python_function"]["model_code_path"] = code.name
    return model


def _upload_model(
    client: mlflow.MlflowClient, folder: Path, model: Model, name: str, run: mlflow.ActiveRun
) -> LoggedModel:
    """What ``mlflow.pyfunc.log_model`` does, for a model that has been saved already."""
    logged = client.create_logged_model(run.info.experiment_id, name, source_run_id=run.info.run_id)
    try:
        model.run_id, model.model_id, model.model_uuid = run.info.run_id, logged.model_id, logged.model_id
        model.save(folder / "MLmodel")
        client.log_model_artifacts(logged.model_id, str(folder))
    except BaseException:
        client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.log_outputs(run.info.run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return client.finalize_logged_model(logged.model_id, "READY")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_checksums(staged: Path) -> None:
    """Write checksums.json: relative path -> SHA-256."""
    sums = {path.relative_to(staged).as_posix(): _sha256(path) for path in sorted(staged.rglob("*")) if path.is_file()}
    (staged / CHECKSUMS).write_text(json.dumps(sums, indent=4) + "\n", encoding="utf-8")


def _verify_checksums(bundle: Path, uri: str, digest: str) -> None:
    """See that a downloaded folder holds the registered files, all of them and nothing else."""
    found = [path for path in bundle.rglob("*") if path.is_symlink() or not path.is_dir()]
    if links := [path for path in found if path.is_symlink()]:
        raise UserError(f"{uri} holds a symbolic link, {links[0].relative_to(bundle)}; do not use this version")
    present = {path.relative_to(bundle).as_posix(): path for path in found}
    # the digest of the list lies in the registry's database, out of reach of who can write to the artifact store alone
    if CHECKSUMS not in present or _sha256(present[CHECKSUMS]) != digest:
        raise UserError(f"{CHECKSUMS} of {uri} was changed after it was registered; do not use this version")
    sums = _read_json(present.pop(CHECKSUMS))
    for name in sums:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
            raise UserError(f"{uri} names a file outside the bundle, {name!r}; do not use this version")
    for name in sorted({*sums, *present}):
        if name not in present:
            raise UserError(f"{uri} lacks {name}; register the bundle again")
        if name not in sums or _sha256(present[name]) != sums[name]:
            raise UserError(f"{name} of {uri} was changed after it was registered; do not use this version")


def _model_card(staged: Path) -> str | None:
    path = staged / "docs" / "README.md"
    if not path.is_file():
        return None
    card = path.read_text(encoding="utf-8")
    ending = "\n\n[goes on in docs/README.md of the bundle]"
    return card if len(card) <= DESCRIPTION_LENGTH else card[: DESCRIPTION_LENGTH - len(ending)] + ending


def _resolve_uri(tracking_uri: str | None) -> str:
    """Address of the registry; a SQLite file as an absolute path."""
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise UserError(
            "no registry named; give --tracking_uri sqlite:////path/to/mlflow.db or http://host:port, or set "
            "MLFLOW_TRACKING_URI"
        )
    if uri.startswith("file:") or ("://" not in uri and not uri.startswith("databricks")):
        raise UserError(
            f"tracking_uri must be a database or a server, got {uri}; for a local one give "
            f"sqlite:///{Path(uri.removeprefix('file:')).absolute() / 'mlflow.db'}"
        )
    return f"sqlite:///{path.absolute()}" if (path := _database(uri)) else uri


def _database(uri: str) -> Path | None:
    """File of a SQLite registry; None for a server."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def log_run(
    tracking_uri: str, experiment: str, name: str, figures: Mapping[str, Any], files: Sequence[str | os.PathLike]
) -> str:
    """Log figures and files to MLflow as a run of its own.

    Args:
        tracking_uri: ``sqlite:////path/mlflow.db`` or a server.
        experiment: made if need be.
        name: of the run.
        figures: flat; numbers become metrics, text becomes tags, None is left out.
        files: become artifacts; these alone, since what else lies in their folder may be nobody's business.

    Returns:
        The run's id.

    Raises:
        UserError: MLflow does not answer or refuses.
    """
    numbers = {key: float(value) for key, value in figures.items() if isinstance(value, int | float)}
    tags = {key: value for key, value in figures.items() if isinstance(value, str)}
    with (
        _registry(tracking_uri, create=True) as client,
        mlflow.start_run(experiment_id=_experiment(client, experiment), run_name=name, tags=tags) as run,
    ):
        mlflow.log_metrics(numbers)
        for file in files:
            mlflow.log_artifact(str(file))
    return run.info.run_id


@contextlib.contextmanager
def _registry(tracking_uri: str | None, create: bool = False) -> Iterator[mlflow.MlflowClient]:
    """A client of the registry that MLflow's own functions use as well, with failures in one line."""
    uri = _resolve_uri(tracking_uri)
    if database := _database(uri):
        if create:
            database.parent.mkdir(parents=True, exist_ok=True)
        elif not database.is_file():
            # MLflow would make an empty database of a misspelt path
            raise UserError(f"no registry at {database}; register a bundle first, or correct --tracking_uri")
    shown = re.sub(r"//[^/@]*@", "//", uri)  # without password
    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    try:
        yield _connect(shown)
    except (MlflowException, SQLAlchemyError) as error:
        reason = textwrap.shorten(str(error), 300, placeholder=" ...").rstrip(".")
        raise UserError(f"the registry at {shown} refused: {reason}; see `medgen registry list`") from error
    finally:
        # MLflow keeps the variable in step with its own setting, so that it tells both
        mlflow.set_tracking_uri(before)


def _connect(shown: str) -> mlflow.MlflowClient:
    """A client that has had one answer, without the minutes of retries that MLflow spends on an absent server."""
    variable = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        client = mlflow.MlflowClient()
        client.search_registered_models(max_results=1)
        return client
    except (MlflowException, SQLAlchemyError) as error:
        root: BaseException = error
        while cause := root.__cause__ or root.__context__:
            root = cause
        reason = textwrap.shorten(str(root), 300, placeholder=" ...").rstrip(".")
        raise UserError(f"no MLflow registry answers at {shown} ({reason}); correct --tracking_uri") from error
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def _experiment(client: mlflow.MlflowClient, name: str) -> str:
    """The id of the experiment of that name, made if need be."""
    if found := client.get_experiment_by_name(name):
        if found.lifecycle_stage != "active":
            raise UserError(f"the MLflow experiment {name} was deleted; restore it with `mlflow experiments restore`")
        return found.experiment_id
    # beside a database MLflow would put artifacts into the current folder; MONAI's MLFlowHandler puts them here as well
    database = _database(mlflow.get_tracking_uri())
    return client.create_experiment(name, artifact_location=(database.parent / "mlruns").as_uri() if database else None)


def _create_version(client: mlflow.MlflowClient, name: str, **version: Any) -> ModelVersion:
    """Create a model version and, where there is none of that name, the registered model; or neither."""
    created = not client.search_registered_models(filter_string=f"name = '{name}'")
    if created:
        client.create_registered_model(name)
    try:
        return client.create_model_version(name, **version)
    except BaseException:
        if created:
            client.delete_registered_model(name)
        raise


def _run_metrics(client: mlflow.MlflowClient, run_id: str | None) -> dict[str, float]:
    try:
        return dict(client.get_run(run_id).data.metrics) if run_id else {}
    except MlflowException:
        return {}  # the run was deleted for good; its model was not
