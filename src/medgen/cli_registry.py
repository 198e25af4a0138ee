"""``medgen registry``: bundles in the MLflow model registry."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Register bundles with MLflow, list them, fetch them back.",
)

TrackingURI = Annotated[
    str | None,
    typer.Option(
        "--tracking_uri", help="sqlite:////path/mlflow.db or http://host:port  [default: $MLFLOW_TRACKING_URI]"
    ),
]


@app.command()
def register(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    name: Annotated[str, typer.Option("--name", help="Registered model; made if there is none of that name.")],
    alias: Annotated[str | None, typer.Option("--alias", help="Alias to point at the new version.")] = None,
    metrics: Annotated[Path | None, typer.Option("--metrics", help="metrics.json of an evaluation.")] = None,
    overlay: Annotated[
        list[Path] | None,
        typer.Option("--overlay", help="JSON overlay that the weights were trained with; may be repeated."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option("--weights", help="Weights to register instead of BUNDLE/models/model.pt.")
    ] = None,
    tracking_uri: TrackingURI = None,
) -> None:
    """Register a bundle folder as a new version of a model."""
    with _registry() as registry:
        version = registry.register_bundle(bundle, name, tracking_uri, alias, metrics, overlay or (), weights)
    typer.echo(f"registered models:/{name}/{version}" + (f", also models:/{name}@{alias}" if alias else ""))


@app.command()
def pull(
    uri: Annotated[str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION.")],
    target: Annotated[Path, typer.Argument(help="New folder for the bundle.")],
    tracking_uri: TrackingURI = None,
) -> None:
    """Fetch a registered bundle into a new folder."""
    with _registry() as registry:
        folder = registry.pull(uri, target, tracking_uri)
    typer.echo(f"{uri} -> {folder}")


@app.command("list")
def list_(tracking_uri: TrackingURI = None) -> None:
    """List the versions of all registered models."""
    with _registry() as registry:
        models = registry.list_models(tracking_uri)
    if not models:
        typer.echo("no registered models")
        return
    rows = [("NAME", "VERSION", "ALIASES", "BUNDLE", "CREATED (UTC)", "METRICS")]
    for model in models:
        figures = list(model.metrics.items())[: registry.SHOWN_METRICS]
        rows.append(
            (
                model.name,
                str(model.version),
                ", ".join(model.aliases) or "-",
                model.bundle or "-",
                f"{model.created:%Y-%m-%d %H:%M}",
                "  ".join(f"{key} {value:.4g}" for key, value in figures) or "-",
            )
        )
    typer.echo(_aligned(rows))


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


@contextlib.contextmanager
def _registry() -> Iterator[ModuleType]:
    """The registry's module, with MLflow silent about what needs no action.

    MLflow tells of the tables of a new database and draws a progress bar even for files that are copied at once. What
    goes wrong comes as an exception all the same.
    """
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # before the log levels: MLflow sets its own on import
    from medgen import registry

    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield registry
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
