"""Runs that are not a training's."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlflow
from mlflow.entities import Metric, Run
from mlflow.tracking.context.registry import resolve_tags

from medgen.registry._connection import connection, experiment_id

__all__ = ["log_figures", "log_run", "new_run"]


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
        connection(tracking_uri, create=True) as client,
        new_run(client, experiment_id(client, experiment), name, tags) as run,
    ):
        log_figures(client, run, numbers)
        for file in files:
            client.log_artifact(run.info.run_id, str(file))
    return run.info.run_id


@contextlib.contextmanager
def new_run(client: mlflow.MlflowClient, experiment: str, name: str, tags: Mapping[str, str]) -> Iterator[Run]:
    """A run of its own, closed at the end of the block.

    ``mlflow.start_run`` would take the run that ``MLFLOW_RUN_ID`` or a notebook has open for it.

    Args:
        client: of the registry.
        experiment: id of the experiment.
        name: of the run.
        tags: beside MLflow's own, which tell the user and the program.
    """
    run = client.create_run(experiment, tags=resolve_tags(dict(tags)), run_name=name)
    try:
        yield run
    except BaseException:
        client.set_terminated(run.info.run_id, "FAILED")
        raise
    client.set_terminated(run.info.run_id)


def log_figures(
    client: mlflow.MlflowClient, run: Run, figures: Mapping[str, float], model_id: str | None = None
) -> None:
    """Figures as metrics of a run, and of a LoggedModel."""
    now = int(time.time() * 1000)
    client.log_batch(run.info.run_id, [Metric(key, value, now, 0, model_id) for key, value in figures.items()])
