"""Names, aliases and URIs of registered models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import mlflow
from mlflow.entities.model_registry import ModelVersion

from medgen.errors import UserError
from medgen.registry._connection import connection

__all__ = ["ResolvedModel", "check_alias", "check_name", "find_version", "model_id_of", "resolve"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_RESERVED_ALIAS = re.compile(r"latest|v\d+", re.IGNORECASE)
_MODEL_ID = re.compile(r"models:/(m-[0-9a-f]+)")
_MODEL_URI = re.compile(r"models:/(?P<name>[^/@:]+)(?:@(?P<alias>[^/@:]+)|/(?P<version>[0-9]+))")


class ResolvedModel(NamedTuple):
    """What a URI of a registered bundle points at.

    Args:
        name: of the registered model.
        version: its number.
        model_id: of MLflow's LoggedModel behind it, where it has one.
        tags: of the version.
    """

    name: str
    version: int
    model_id: str | None
    tags: Mapping[str, str]


def resolve(uri: str, tracking_uri: str | None = None) -> ResolvedModel:
    """What a URI of a registered bundle points at now.

    Args:
        uri: ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.
        tracking_uri: ``sqlite:////path/mlflow.db`` or the address of a server; default: MLFLOW_TRACKING_URI.

    Raises:
        UserError: no such model, or none that :func:`register_bundle` made.
    """
    with connection(tracking_uri) as client:
        version = find_version(client, uri)
    return ResolvedModel(version.name, int(version.version), model_id_of(version), dict(version.tags))


def find_version(client: mlflow.MlflowClient, uri: str) -> ModelVersion:
    """The version of a registered bundle that a URI names.

    Raises:
        UserError: it names none, or one that :func:`register_bundle` did not make.
    """
    parts = _MODEL_URI.fullmatch(uri)
    if parts is None:
        raise UserError(f"a registered bundle is named models:/NAME@ALIAS or models:/NAME/VERSION, got {uri}")
    if parts["alias"]:
        version = client.get_model_version_by_alias(parts["name"], parts["alias"])
    else:
        version = client.get_model_version(parts["name"], parts["version"])
    if "bundle_sha256" not in version.tags:
        raise UserError(f"{uri} is not a registered bundle; register one with `medgen registry register`")
    return version


def model_id_of(version: ModelVersion) -> str | None:
    """Id of MLflow's LoggedModel behind a version; None where it has none. A database keeps it in the source alone."""
    source = _MODEL_ID.fullmatch(version.source or "")
    return version.model_id or (source[1] if source else None)


def check_name(what: str, name: str) -> None:
    """See that a name or an alias has the form that all registries accept.

    Args:
        what: it is a name of.
        name: the name.

    Raises:
        UserError: it has not.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{what} must be up to 100 letters, digits, _ and -, a letter or digit first, got {name!r}; choose another"
        )


def check_alias(alias: str) -> None:
    """See that an alias is one that MLflow accepts.

    Raises:
        UserError: it is not.
    """
    check_name("alias", alias)
    if _RESERVED_ALIAS.fullmatch(alias):
        raise UserError(f"MLflow keeps the aliases latest and v1, v2, ... for itself, got {alias}; choose another")
