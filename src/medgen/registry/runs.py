"""Runs that are not a training's."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import mlflow

from medgen.registry._connection import connection, experiment_id

__all__ = ["log_run"]


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
        mlflow.start_run(experiment_id=experiment_id(client, experiment), run_name=name, tags=tags) as run,
    ):
        mlflow.log_metrics(numbers)
        for file in files:
            mlflow.log_artifact(str(file))
    return run.info.run_id
