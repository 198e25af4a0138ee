"""Versions of registered models: list, show, promote."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import mlflow
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from medgen.errors import UserError
from medgen.registry._connection import connection
from medgen.registry.figures import direction_of
from medgen.registry.names import check_alias, find_version, model_id_of

__all__ = [
    "Promotion",
    "RegisteredBundle",
    "TrainingRun",
    "VersionDetails",
    "describe",
    "list_models",
    "promote",
    "show",
]

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
_REQUIREMENT = re.compile(r"\s*(?P<metric>[A-Za-z_][\w.-]*?)\s*(?P<sign>>=|<=|==|>|<)\s*(?P<limit>\S+)\s*", re.ASCII)
_NOT_WORSE = re.compile(r"(?P<metric>[A-Za-z_][\w.-]*)(?::(?P<direction>higher|lower))?", re.ASCII)


@dataclass(frozen=True)
class RegisteredBundle:
    """One version of a registered model.

    Args:
        name: name of the registered model.
        version: version in the registry, counted from 1.
        aliases: aliases that point at this version.
        bundle: name and version of the bundle; "" for a model that did not come from
            :func:`medgen.registry.register_bundle`.
        created: when it was registered, UTC.
        metrics: all figures of its run, those of its metrics file first and in that file's order.
    """

    name: str
    version: int
    aliases: tuple[str, ...]
    bundle: str
    created: datetime
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class TrainingRun:
    """The run of the training that a version comes from.

    Args:
        run_id: MLflow's.
        name: of the run.
        experiment: its name.
        status: MLflow's; "" if the run has been deleted.
        params: its parameters.
    """

    run_id: str
    name: str
    experiment: str
    status: str
    params: Mapping[str, str]


@dataclass(frozen=True)
class VersionDetails(RegisteredBundle):
    """All that the registry knows of one version of a registered bundle; first the fields of its base.

    Args:
        notes: what its metrics file says in words: split, git state, ...
        model_sha256: of the weights.
        bundle_sha256: of the list of the bundle's files.
        lineage: what it was made from: checksum, or URI of a registered model.
        origins: of the lineage's checksums those that belong to registered models -> URIs of these.
        training: the run of its training, where one was named.
        requirements: Python packages that it runs with.
        inputs: what a served model takes, as MLflow puts it.
        outputs: what it returns.
        parameters: what a request may set -> default.
        gates: alias -> when it was promoted to that, and through which gate.
        pictures: names of the pictures that are kept with it.
        run_id: of the run that holds its metrics.
        model_id: of MLflow's LoggedModel.
        description: its card, Markdown.
    """

    notes: Mapping[str, str]
    model_sha256: str
    bundle_sha256: str
    lineage: Mapping[str, str]
    origins: Mapping[str, tuple[str, ...]]
    training: TrainingRun | None
    requirements: tuple[str, ...]
    inputs: str
    outputs: str
    parameters: Mapping[str, str]
    gates: Mapping[str, str]
    pictures: tuple[str, ...]
    run_id: str
    model_id: str
    description: str


@dataclass(frozen=True)
class Promotion:
    """An alias that has moved.

    Args:
        name: of the registered model.
        version: that the alias points at now.
        alias: the alias.
        previous: version that it pointed at before; None for none.
        gate: the requirements, each with the figure that met it.
        uncompared: metrics in which it was to be not worse, while no other version had the alias.
    """

    name: str
    version: int
    alias: str
    previous: int | None
    gate: tuple[str, ...]
    uncompared: tuple[str, ...] = ()


def list_models(tracking_uri: str | None = None) -> list[RegisteredBundle]:
    """All versions of all registered models, by name and version.

    Args:
        tracking_uri: ``sqlite:////path/mlflow.db`` or the address of a server; default: MLFLOW_TRACKING_URI.

    Raises:
        UserError: no registry there, or MLflow refuses.
    """
    with connection(tracking_uri) as client:
        aliases = {model.name: model.aliases for model in mlflow.search_registered_models()}
        versions = [_summary(client, found, aliases.get(found.name, {})) for found in mlflow.search_model_versions()]
    return sorted(versions, key=lambda v: (v.name, v.version))


def show(model: str, version: int | None = None, tracking_uri: str | None = None) -> VersionDetails:
    """All that the registry knows of one version.

    Args:
        model: ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, or the name of a registered model.
        version: of the model that is named; default: its newest.
        tracking_uri: ``sqlite:////path/mlflow.db`` or the address of a server; default: MLFLOW_TRACKING_URI.

    Raises:
        UserError: no such version, or none that :func:`medgen.registry.register_bundle` made.
    """
    if model.startswith("models:/") and version is not None:
        raise UserError(f"{model} names a version already, got version {version} as well; leave one out")
    with connection(tracking_uri) as client:
        if not model.startswith("models:/"):
            if version is None:
                found = client.search_model_versions(f"name = '{_plain(model)}'")
                if not found:
                    raise UserError(f"the registry has no model {model}; see `medgen registry list`")
                version = max(int(each.version) for each in found)
            model = f"models:/{model}/{version}"
        return describe(client, find_version(client, model))


def promote(
    name: str,
    version: int,
    alias: str = "champion",
    require: Sequence[str] = (),
    not_worse: Sequence[str] = (),
    tracking_uri: str | None = None,
) -> Promotion:
    """Point an alias at a version, if its figures meet what is required.

    The version's tags say afterwards when it was promoted, and through which gate.

    Args:
        name: of the registered model.
        version: to promote.
        alias: that is to point at it.
        require: such as ``auroc>=0.8``; ``>=``, ``<=``, ``>``, ``<`` and ``==``. A figure that the version lacks, or
            that is not finite, does not meet it.
        not_worse: metrics in which it must not be worse than the version that has the alias now, such as
            ``auroc:higher`` or ``frd:lower``: which way is better may be left out where it is known. Where no other
            version has the alias, it must have that figure all the same, and the tags say that nothing was compared.
        tracking_uri: ``sqlite:////path/mlflow.db`` or the address of a server; default: MLFLOW_TRACKING_URI.

    Returns:
        What has moved.

    Raises:
        UserError: no such version, a requirement that cannot be read, or one that is not met: which, and by how much.
    """
    check_alias(alias)
    limits = [_limit(text) for text in require]
    rivals = [_rival(text) for text in not_worse]
    with connection(tracking_uri) as client:
        found = find_version(client, f"models:/{name}/{version}")
        metrics = _run_metrics(client, found.run_id)
        held = client.get_registered_model(name).aliases.get(alias)
        previous = int(held) if held is not None else None
        uncompared = tuple(metric for metric, _ in rivals) if previous in (None, version) else ()
        if not uncompared and rivals:
            theirs = _run_metrics(client, client.get_model_version(name, str(previous)).run_id)
            for metric, direction in rivals:
                if not math.isfinite(theirs.get(metric, math.nan)):
                    raise UserError(
                        f"models:/{name}@{alias} is version {previous}, which has no figure {metric} to compare with; "
                        "leave --not_worse out, or choose another metric"
                    )
                sign = ">=" if direction == "higher" else "<="
                limits.append(_Limit(metric, sign, theirs[metric], f" of version {previous}"))
        short = [_shortfall(metrics, limit) for limit in limits]
        short += [_absence(metrics, metric, f"{metric} is required") for metric in uncompared]
        if short := list(filter(None, short)):
            raise UserError(f"models:/{name}/{version} was not promoted to {alias}: {'; '.join(short)}")
        gate = tuple(f"{limit} ({metrics[limit.metric]:.6g})" for limit in limits)
        now = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        client.set_model_version_tag(name, str(version), f"promoted_{alias}", now)
        told = (*gate, *(f"{metric}: no version to compare with ({metrics[metric]:.6g})" for metric in uncompared))
        client.set_model_version_tag(name, str(version), f"gate_{alias}", "; ".join(told) or "none")
        client.set_registered_model_alias(name, alias, str(version))
    return Promotion(name, version, alias, previous, gate, uncompared)


def describe(client: mlflow.MlflowClient, version: ModelVersion) -> VersionDetails:
    """All that the registry knows of a version of a registered bundle."""
    summary = _summary(client, version, client.get_registered_model(version.name).aliases)
    tags = version.tags
    lineage = {key: tags[key] for key in _split(tags.get("lineage")) if key in tags}
    signature = mlflow.models.get_model_info(f"models:/{version.name}/{version.version}").signature
    run = _run(client, version.run_id)
    return VersionDetails(
        **vars(summary),
        notes={
            k: v for k, v in (run.data.tags if run else {}).items() if not k.startswith("mlflow.") and k not in tags
        },
        model_sha256=tags.get("model_sha256", ""),
        bundle_sha256=tags["bundle_sha256"],
        lineage=lineage,
        origins={key: uris for key, value in lineage.items() if (uris := _origins(client, key, value))},
        training=_training(client, tags["training_run_id"]) if "training_run_id" in tags else None,
        requirements=_split(tags.get("requirements")),
        inputs=str(signature.inputs or "") if signature else "",
        outputs=str(signature.outputs or "") if signature else "",
        parameters={p.name: str(p.default) for p in signature.params} if signature and signature.params else {},
        gates={
            key.removeprefix("gate_"): f"{tags.get(key.replace('gate_', 'promoted_', 1), '')}: {value}"
            for key, value in tags.items()
            if key.startswith("gate_")
        },
        pictures=_split(tags.get("pictures")),
        run_id=version.run_id,
        model_id=model_id_of(version) or "",
        description=version.description or "",
    )


def _summary(client: mlflow.MlflowClient, found: ModelVersion, aliases: Mapping[str, str]) -> RegisteredBundle:
    number = int(found.version)
    figures = _run_metrics(client, found.run_id)
    first = [key for key in _split(found.tags.get("metrics")) if key in figures]
    return RegisteredBundle(
        name=found.name,
        version=number,
        aliases=tuple(sorted(key for key, value in aliases.items() if int(value) == number)),
        bundle=f"{found.tags.get('bundle', '')} {found.tags.get('bundle_version', '')}".strip(),
        created=datetime.fromtimestamp(found.creation_timestamp / 1000, UTC),
        metrics={key: figures[key] for key in dict.fromkeys([*first, *sorted(figures)])},
    )


def _run_metrics(client: mlflow.MlflowClient, run_id: str | None) -> dict[str, float]:
    run = _run(client, run_id)
    return dict(run.data.metrics) if run else {}


def _run(client: mlflow.MlflowClient, run_id: str | None) -> Run | None:
    try:
        return client.get_run(run_id) if run_id else None
    except MlflowException:
        return None  # the run was deleted for good; its model was not


def _training(client: mlflow.MlflowClient, run_id: str) -> TrainingRun:
    try:
        run = client.get_run(run_id)
        experiment = client.get_experiment(run.info.experiment_id).name
    except MlflowException:
        return TrainingRun(run_id, "", "", "", {})
    return TrainingRun(run_id, run.info.run_name, experiment, run.info.status, dict(run.data.params))


def _origins(client: mlflow.MlflowClient, key: str, value: str) -> tuple[str, ...]:
    """Registered models whose weights have a checksum."""
    if not key.endswith("_sha256"):
        return ()
    found = client.search_model_versions(f"tags.model_sha256 = '{_plain(value)}'")
    return tuple(sorted(f"models:/{version.name}/{version.version}" for version in found))


def _plain(text: str) -> str:
    """A value for a filter of MLflow's, which has no way to write a quotation mark."""
    if "'" in text:
        raise UserError(f"a name in the registry has no quotation mark, got {text!r:.100}; correct it")
    return text


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


@dataclass(frozen=True)
class _Limit:
    """What a figure must be."""

    metric: str
    sign: str
    value: float
    whose: str = ""

    def __str__(self) -> str:
        return f"{self.metric}{self.sign}{self.value:.6g}{self.whose}"


def _limit(text: str) -> _Limit:
    parts = _REQUIREMENT.fullmatch(text)
    try:
        value = float(parts["limit"]) if parts else math.nan
    except ValueError:
        value = math.nan
    if parts is None or not math.isfinite(value):
        raise UserError(f"a requirement is METRIC>=NUMBER, or with <=, >, < or ==, got {text!r}; write auroc>=0.8, say")
    return _Limit(parts["metric"], parts["sign"], value)


def _rival(text: str) -> tuple[str, str]:
    """Metric, and which way is better."""
    parts = _NOT_WORSE.fullmatch(text)
    direction = parts and (parts["direction"] or direction_of(parts["metric"]))
    if not direction:
        raise UserError(
            f"a metric to be not worse in is METRIC:higher or METRIC:lower, whichever is better, got {text!r}; write "
            "auroc:higher, say"
        )
    return parts["metric"], direction


def _shortfall(metrics: Mapping[str, float], limit: _Limit) -> str:
    """Why a figure does not meet a requirement; "" if it does."""
    if absence := _absence(metrics, limit.metric, f"{limit} is required"):
        return absence
    value = metrics[limit.metric]
    if _COMPARISONS[limit.sign](value, limit.value):
        return ""
    return f"{limit.metric} is {value:.6g}, {abs(value - limit.value):.3g} off the required {limit}"


def _absence(metrics: Mapping[str, float], metric: str, why: str) -> str:
    """Why a figure is none to compare; "" if it is one."""
    value = metrics.get(metric)
    if value is None:
        known = ", ".join(list(metrics)[:6]) or "none"
        return f"{why}, and the version has no figure {metric} (it has {known})"
    return "" if math.isfinite(value) else f"{why}, and {metric} is {value}"
