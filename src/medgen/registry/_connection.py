"""A connection to MLflow that fails in one line, and soon."""

from __future__ import annotations

import contextlib
import os
import re
import textwrap
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

import mlflow
from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from medgen.errors import UserError
from medgen.tracking.sender import first_use
from medgen.tracking.uri import database_of, resolve_uri

__all__ = ["already_exists", "check_registry_uri", "connection", "experiment_id"]

# of the first question to a server: MLflow's own are 7 retries of 120 s each
FIRST_ANSWER = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


def check_registry_uri(tracking_uri: str | None) -> str:
    """Address of the registry, ``MLFLOW_TRACKING_URI`` where none is given; a SQLite file as an absolute path.

    Raises:
        UserError: none is named, or it is none that MLflow has a registry at, or it holds a password.
    """
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise UserError(
            "no registry named; give --tracking_uri sqlite:////path/to/mlflow.db or http://host:port, or set "
            "MLFLOW_TRACKING_URI"
        )
    return resolve_uri(uri)


@contextlib.contextmanager
def connection(tracking_uri: str | None, create: bool = False) -> Iterator[mlflow.MlflowClient]:
    """A client of the registry that MLflow's own functions use as well, with failures in one line.

    Args:
        tracking_uri: ``sqlite:////path/mlflow.db`` or the address of a server; default: MLFLOW_TRACKING_URI.
        create: make a SQLite file that is not there.

    Raises:
        UserError: no registry there, or MLflow refuses what is asked of it within the block.
    """
    uri = check_registry_uri(tracking_uri)
    if database := database_of(uri):
        if create:
            database.parent.mkdir(parents=True, exist_ok=True)
        elif not database.is_file():
            # MLflow would make an empty database of a misspelt path
            raise UserError(f"no registry at {database}; register a bundle first, or correct --tracking_uri")
    tracking, registry = os.environ.get("MLFLOW_TRACKING_URI"), os.environ.get("MLFLOW_REGISTRY_URI")
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)  # else MLFLOW_REGISTRY_URI would put the versions elsewhere than their runs
    try:
        yield _connect(uri)
    except (MlflowException, SQLAlchemyError) as error:
        raise UserError(f"the registry at {uri} refused: {_one_line(error)}; see `medgen registry list`") from error
    finally:
        # MLflow keeps the variables in step with its own settings, so that they tell both
        mlflow.set_tracking_uri(tracking)
        mlflow.set_registry_uri(None)
        _set_environment({"MLFLOW_REGISTRY_URI": registry})


def _connect(uri: str) -> mlflow.MlflowClient:
    """A client that has had one answer, without the minutes of retries that MLflow spends on an absent server."""
    before = {name: os.environ.get(name) for name in FIRST_ANSWER}
    if urlsplit(uri).scheme in ("http", "https"):
        os.environ.update(FIRST_ANSWER)
    try:
        with first_use(uri):
            client = mlflow.MlflowClient(uri, registry_uri=uri)
            client.search_registered_models(max_results=1)
        return client
    except (MlflowException, SQLAlchemyError) as error:
        root: BaseException = error
        while cause := root.__cause__ or root.__context__:
            root = cause
        raise UserError(f"no MLflow registry answers at {uri} ({_one_line(root)}); correct --tracking_uri") from error
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _one_line(error: BaseException) -> str:
    # an address in a library's text may be that of a redirection, with a password in it
    text = re.sub(r"//[^/\s@]*@", "//", str(error))
    return textwrap.shorten(text, 300, placeholder=" ...").rstrip(".")


def experiment_id(client: mlflow.MlflowClient, name: str) -> str:
    """The id of the experiment of that name, made if need be."""
    found = client.get_experiment_by_name(name) or _make_experiment(client, name)
    if found.lifecycle_stage != "active":
        raise UserError(f"the MLflow experiment {name} was deleted; restore it with `mlflow experiments restore`")
    return found.experiment_id


def _make_experiment(client: mlflow.MlflowClient, name: str) -> Experiment:
    # beside a database MLflow would put artifacts into the current folder; MONAI's MLFlowHandler puts them here as well
    database = database_of(mlflow.get_tracking_uri())
    location = (database.parent / "mlruns").as_uri() if database else None
    try:
        return client.get_experiment(client.create_experiment(name, artifact_location=location))
    except MlflowException as error:
        if not already_exists(error) or not (found := client.get_experiment_by_name(name)):
            raise
    return found


def already_exists(error: MlflowException) -> bool:
    """Whether another process was faster."""
    return error.error_code == "RESOURCE_ALREADY_EXISTS"
