"""Whole bundles into the model registry, whole bundles out."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import LoggedModel, LoggedModelOutput, Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from medgen import serving
from medgen.bundle_zip import read_zip
from medgen.data.image_set import file_sha256
from medgen.errors import UserError
from medgen.registry._connection import already_exists, check_registry_uri, connection, experiment_id
from medgen.registry.contents import (
    check_plain_weights,
    check_weights,
    lineage_of,
    pip_requirements,
    read_json,
    stage_bundle,
    verify_checksums,
    write_checksums,
)
from medgen.registry.names import check_alias, check_name, find_version
from medgen.registry.pictures import save_pictures
from medgen.registry.runs import log_figures, new_run
from medgen.tracking.journal import FOLDER, RUN, read_records
from medgen.tracking.sender import JOURNAL_TAG

__all__ = ["fetch", "fetch_model", "pull", "register_bundle"]

logger = logging.getLogger(__name__)

DESCRIPTION_LENGTH = 5000  # characters of a description column in MLflow's database
SHOWN_METRICS = 8  # on a model card

_METRIC_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# part of a registered model -> where its files are, and the tag with the checksum of their list
_PARTS = {"bundle": ("/artifacts/bundle", "bundle_sha256"), "model": ("", "served_sha256")}


def register_bundle(
    bundle: str | Path,
    name: str,
    tracking_uri: str | None = None,
    alias: str | None = None,
    metrics: str | Path | None = None,
    overlays: Sequence[str | Path] = (),
    weights: str | Path | None = None,
    training: str | Path | None = None,
    pictures: Sequence[str | Path] = (),
) -> int:
    """Register a bundle as a new version of an MLflow model.

    ``LICENSE``, ``configs``, ``docs`` and ``models/model.pt`` travel as they are, with a list of checksums, and so does
    what a training leaves beside weights that are of no use alone. Weights and configs are checked before anything is
    written.

    Args:
        bundle: the bundle's folder, or a zip archive with that folder; its name names the MLflow experiment.
        name: registered model, made if there is none of that name: letters, digits, ``_`` and ``-``.
        tracking_uri: ``sqlite:////path/mlflow.db`` or the address of a server; default: MLFLOW_TRACKING_URI.
        alias: alias to point at the new version.
        metrics: flat JSON file; its numbers become metrics, the rest (and what is not finite) tags.
        overlays: JSON files whose top-level ids replace those of the same name in each registered config that builds
            the network: the overlays that the weights were trained with. One that is no file as given is looked for
            among the bundle's own configs.
        weights: state dict to register as models/model.pt; default: the bundle's own.
        training: output folder of the training, whose run is then named as the one that the version comes from.
        pictures: image files to keep with the version, beside what the bundle itself makes without anybody's images.

    Returns:
        the new version, counted from 1.

    Raises:
        UserError: a name, a file or the weights are not as they must be, or MLflow refuses.
    """
    check_name("name", name)
    if alias is not None:
        check_alias(alias)
    check_registry_uri(tracking_uri)  # a wrong one is told at once, not after the weights were read
    figures, notes = _read_metrics(metrics)
    run_name = _training_name(training) if training is not None else None
    with tempfile.TemporaryDirectory(prefix="medgen-register-") as folder:
        stage = Path(folder)
        root = read_zip(bundle, stage / "zip") if Path(bundle).is_file() else Path(bundle).resolve()
        staged = stage / "bundle"
        stage_bundle(root, staged, overlays, weights)
        weights_sha256 = file_sha256(staged / "models" / "model.pt")
        if notes.get("model_sha256", weights_sha256) != weights_sha256:
            raise UserError(f"{metrics} was measured with other weights; evaluate the weights that you register")
        if training is not None:
            _check_of_training(Path(training), weights, weights_sha256)
        described = staged / "configs" / "metadata.json"
        requirements = pip_requirements(read_json(described, root / "configs" / "metadata.json"))
        check_weights(staged)
        serving.describe(staged)
        metadata = read_json(described)
        about = {"bundle": root.name, "bundle_version": str(metadata["version"])}
        model = serving.save_model(stage, metadata, about, requirements)
        saved = stage / "model"
        kept = saved / "artifacts" / "bundle"
        lineage = lineage_of(kept)
        tags = {
            **lineage,  # first: what a file says of itself takes no other tag's place
            **about,
            "bundle_sha256": write_checksums(kept),
            "model_sha256": weights_sha256,
            "tensors_sha256": check_plain_weights(kept),
            "metrics": ",".join(figures),
            "requirements": ", ".join(requirements),
            "lineage": ",".join(lineage),
            "pictures": ",".join(save_pictures(kept, pictures, saved / "pictures")),
        }
        with connection(tracking_uri, create=True) as client:
            trained = _find_training(client, run_name, training) if run_name is not None else None
            of_training = {"training_run_id": trained.info.run_id} if trained else {}
            tags |= of_training
            run_tags = {**notes, **lineage, **about, **of_training}
            experiment = experiment_id(client, root.name)
            if trained and trained.info.experiment_id == experiment:
                run_tags[MLFLOW_PARENT_RUN_ID] = trained.info.run_id
            with new_run(client, experiment, name, run_tags) as run:
                logged, tags["served_sha256"] = _upload_model(client, saved, model, name, run)
                log_figures(client, run, figures, logged.model_id)
            version = _create_version(
                client,
                name,
                source=logged.model_uri,
                run_id=run.info.run_id,
                model_id=logged.model_id,
                description=_model_card(kept, tags, figures, trained),
                tags=tags,
            )
            if alias is not None:
                client.set_registered_model_alias(name, alias, version.version)
    return int(version.version)


def pull(uri: str, target: str | Path, tracking_uri: str | None = None) -> Path:
    """Fetch a registered bundle into a new folder, ready for ``python -m monai.bundle run``.

    Before the folder appears, its files are compared with those that were registered, and its weights are read as
    nothing but tensors; none of its code runs.

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
    with connection(tracking_uri) as client:
        _download(find_version(client, uri), uri, folder, "bundle")
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
    return _cached(uri, cache_dir, tracking_uri, "bundle")


def fetch_model(uri: str, cache_dir: str | Path, tracking_uri: str | None = None) -> Path:
    """A registered bundle as MLflow serves it: its model, with the code that runs it, verified as a bundle is.

    Args:
        uri: ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.
        cache_dir: folder of the cache, made if need be; models lie in it under their checksums.
        tracking_uri: ``sqlite:////path/mlflow.db`` or the address of a server; default: MLFLOW_TRACKING_URI.

    Returns:
        the folder of the MLflow model.

    Raises:
        UserError: no such model, or the files are not those that were registered.
    """
    return _cached(uri, cache_dir, tracking_uri, "model")


def _cached(uri: str, cache_dir: str | Path, tracking_uri: str | None, part: str) -> Path:
    with connection(tracking_uri) as client:
        version = find_version(client, uri)
        digest = _digest(version, uri, part)
        folder = Path(cache_dir).resolve() / digest
        logger.info(f"{uri} is version {version.version} of {version.name}, in {folder}")
        if not folder.is_dir():
            try:
                _download(version, uri, folder, part)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
        try:
            verify_checksums(folder, uri, digest)
        except UserError as error:
            raise UserError(f"{error}: the copy in {folder}; delete that folder to fetch it again") from error
    return folder


def _digest(version: ModelVersion, uri: str, part: str) -> str:
    """SHA-256 of the list of a part's files."""
    digest = version.tags.get(_PARTS[part][1])
    if digest is None:
        raise UserError(f"{uri} was registered before models were served; register its bundle again")
    if not _SHA256.fullmatch(digest):  # it names a folder, and comes from elsewhere
        raise UserError(f"the checksum of {uri} must be a SHA-256, got {digest!r:.80}; do not use this version")
    return digest


def _download(version: ModelVersion, uri: str, folder: Path, part: str) -> None:
    """Fetch and verify; the folder appears whole or not at all."""
    digest = _digest(version, uri, part)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        source = f"models:/{version.name}/{version.version}{_PARTS[part][0]}"
        target = Path(temporary) / "files"
        target.mkdir()
        files = Path(mlflow.artifacts.download_artifacts(artifact_uri=source, dst_path=str(target)))
        (files / "registered_model_meta").unlink(missing_ok=True)  # MLflow's note of where it came from
        verify_checksums(files, uri, digest)
        # a list of checksums and its digest say who wrote them last; what a file may do is another question
        bundle = files if part == "bundle" else files / "artifacts" / "bundle"
        tensors = check_plain_weights(bundle, uri)
        if version.tags.get("tensors_sha256", tensors) != tensors:
            raise UserError(
                f"models/model.pt of {uri} has other tensors than were registered, by name, shape or type; do not use "
                "this version"
            )
        os.replace(files, folder)


def _read_metrics(path: str | Path | None) -> tuple[dict[str, float], dict[str, str]]:
    figures: dict[str, float] = {}
    notes: dict[str, str] = {}
    for key, value in (read_json(Path(path)) if path is not None else {}).items():
        if not _METRIC_NAME.fullmatch(key) or isinstance(value, dict | list):
            raise UserError(
                f"{path} must be one flat object with names of letters, digits and _, got {type(value).__name__} at "
                f"{key!r}; register the metrics.json that evaluate.json writes"
            )
        if key.startswith(("mlflow.", "medgen.")):
            raise UserError(
                f"{path} must hold figures, got {key}, a name for what a run is; register the metrics.json that "
                "evaluate.json writes"
            )
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            figures[key] = float(value)
        else:
            notes[key] = value if isinstance(value, str) else json.dumps(value)
    return figures, notes


def _training_name(training: str | Path) -> str:
    """Name of the run of a training's output folder."""
    path = Path(training) / "run.json"
    if not path.is_file():
        raise UserError(f"no run.json in {training}; name the output folder of the training (its --output_dir)")
    name = read_json(path).get("run_name")
    if not isinstance(name, str) or not name or "'" in name:
        raise UserError(f"{path} must hold the run_name of a training, got {name!r:.80}; name another folder")
    return name


def _check_of_training(training: Path, weights: str | Path | None, sha256: str) -> None:
    """See that weights are not those of another training, as far as the folder of this one tells."""
    best = training / "best.json"
    trained = read_json(best).get("model_sha256", sha256) if best.is_file() else sha256
    # other weights of the training, of a smaller resolution say, lie in its folder
    if trained != sha256 and not (weights and Path(weights).resolve().is_relative_to(training.resolve())):
        raise UserError(
            f"the weights, {sha256[:12]}, are not the best ones of the training in {training}, {trained[:12]}; name "
            "those with --weights, or the folder of their training with --training"
        )


def _find_training(client: mlflow.MlflowClient, run_name: str, training: str | Path) -> Run:
    """The run that holds a training's journal; where it kept none, the one run of its name."""
    journal = _journal_id(Path(training), run_name)
    which = f"tags.`{JOURNAL_TAG}` = '{journal}'" if journal else f"attributes.run_name = '{run_name}'"
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, which, max_results=2)
    if not found:
        raise UserError(
            f"the registry knows no run {run_name} of the training in {training}; send it with `medgen tracking send "
            f"{training} --tracking_uri URI`, or leave --training out"
        )
    if len(found) > 1:
        raise UserError(
            f"the registry must know one run {run_name} of the training in {training}, got several of that name; "
            "rename or delete the others, or leave --training out"
        )
    return found[0]


def _journal_id(training: Path, run_name: str) -> str | None:
    """Id of the newest journal of a run in a training's output folder; None for none."""
    firsts = [next(read_records(path), None) for path in (training / FOLDER).glob("*.jsonl")]
    headers = [first[0] for first in firsts if first and first[0]["kind"] == RUN and first[0].get("name") == run_name]
    if not headers:
        return None
    found = max(headers, key=lambda header: header["time"]).get("id")
    if not isinstance(found, str) or not found.isalnum():  # it becomes part of a filter of MLflow's
        raise UserError(f"a journal in {training / FOLDER} has no id of {run_name}; leave --training out")
    return found


def _upload_model(
    client: mlflow.MlflowClient, folder: Path, model: Model, name: str, run: Run
) -> tuple[LoggedModel, str]:
    """What ``mlflow.pyfunc.log_model`` does, for a model that has been saved already; with the digest of its files."""
    logged = client.create_logged_model(run.info.experiment_id, name, source_run_id=run.info.run_id)
    try:
        model.run_id, model.model_id, model.model_uuid = run.info.run_id, logged.model_id, logged.model_id
        model.save(folder / "MLmodel")
        digest = write_checksums(folder)
        client.log_model_artifacts(logged.model_id, str(folder))
    except BaseException:
        client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.log_outputs(run.info.run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return client.finalize_logged_model(logged.model_id, "READY"), digest


def _model_card(bundle: Path, tags: Mapping[str, str], figures: Mapping[str, float], trained: Run | None) -> str:
    """The bundle's README below what is known of this version."""
    shown = [f"{key} {value:.4g}" for key, value in list(figures.items())[:SHOWN_METRICS]]
    shown += [f"and {len(figures) - SHOWN_METRICS} more"] if len(figures) > SHOWN_METRICS else []
    lines = {
        "Bundle": f"{tags['bundle']} {tags['bundle_version']}, weights {tags['model_sha256'][:12]}",
        "Figures": ", ".join(shown),
        "Training": f"run {trained.info.run_name}, {trained.info.run_id}" if trained else "",
        "Made with": ", ".join(
            f"{key.removesuffix('_sha256')} {tags[key]:.40}" for key in tags["lineage"].split(",") if key
        ),
        "Requirements": tags["requirements"],
    }
    card = "\n".join(f"- **{key}**: {value}" for key, value in lines.items() if value)
    readme = bundle / "docs" / "README.md"
    if readme.is_file():
        card += "\n\n" + readme.read_text(encoding="utf-8")
    ending = "\n\n[goes on in docs/README.md of the bundle]"
    return card if len(card) <= DESCRIPTION_LENGTH else card[: DESCRIPTION_LENGTH - len(ending)] + ending


def _create_version(client: mlflow.MlflowClient, name: str, **version: Any) -> ModelVersion:
    """Create a model version and, where there is none of that name, the registered model; or neither."""
    created = not client.search_registered_models(filter_string=f"name = '{name}'")
    if created:
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if not already_exists(error):
                raise
            created = False
    try:
        return client.create_model_version(name, **version)
    except BaseException:
        # in the meantime another process may have given the model a version
        if created and not client.search_model_versions(f"name = '{name}'"):
            client.delete_registered_model(name)
        raise
