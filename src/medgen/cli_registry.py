"""``medgen registry``: bundles in the MLflow model registry."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from medgen.registry import Comparison, VersionDetails

__all__ = ["app", "quiet_registry"]

SHOWN_METRICS = 4

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Register bundles with MLflow, compare and promote them, fetch them back, serve them.",
)

TrackingURI = Annotated[
    str | None,
    typer.Option(
        "--tracking_uri", help="sqlite:////path/mlflow.db or http://host:port  [default: $MLFLOW_TRACKING_URI]"
    ),
]


@app.command()
def register(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, or a zip archive of one.")],
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
    training: Annotated[
        Path | None, typer.Option("--training", help="Output folder of the training that the version comes from.")
    ] = None,
    pictures: Annotated[
        list[Path] | None, typer.Option("--pictures", help="Picture to keep with the version; may be repeated.")
    ] = None,
    tracking_uri: TrackingURI = None,
) -> None:
    """Register a bundle as a new version of a model."""
    with quiet_registry() as registry:
        version = registry.register_bundle(
            bundle, name, tracking_uri, alias, metrics, overlay or (), weights, training, pictures or ()
        )
    typer.echo(f"registered models:/{name}/{version}" + (f", also models:/{name}@{alias}" if alias else ""))


@app.command()
def pull(
    uri: Annotated[str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION.")],
    target: Annotated[Path, typer.Argument(help="New folder for the bundle.")],
    tracking_uri: TrackingURI = None,
) -> None:
    """Fetch a registered bundle into a new folder."""
    with quiet_registry() as registry:
        folder = registry.pull(uri, target, tracking_uri)
    typer.echo(f"{uri} -> {folder}")


@app.command("list")
def list_(tracking_uri: TrackingURI = None) -> None:
    """List the versions of all registered models."""
    with quiet_registry() as registry:
        models = registry.list_models(tracking_uri)
    if not models:
        typer.echo("no registered models")
        return
    rows = [("NAME", "VERSION", "ALIASES", "BUNDLE", "CREATED (UTC)", "METRICS")]
    for model in models:
        figures = list(model.metrics.items())[:SHOWN_METRICS]
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


@app.command()
def show(
    model: Annotated[str, typer.Argument(help="models:/NAME@ALIAS, models:/NAME/VERSION, or NAME.")],
    version: Annotated[int | None, typer.Argument(help="Version of NAME.  [default: the newest]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
    tracking_uri: TrackingURI = None,
) -> None:
    """Show all that the registry knows of a version."""
    with quiet_registry() as registry:
        found = registry.show(model, version, tracking_uri)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found), indent=4, default=str))
    else:
        typer.echo(_description(found))


@app.command()
def promote(
    name: Annotated[str, typer.Argument(help="Registered model.")],
    version: Annotated[int, typer.Argument(help="Version to promote.")],
    alias: Annotated[str, typer.Option("--alias", help="Alias to point at it.")] = "champion",
    require: Annotated[
        list[str] | None,
        typer.Option("--require", help='Figure that it must have, such as "auroc>=0.8"; may be repeated.'),
    ] = None,
    not_worse: Annotated[
        list[str] | None,
        typer.Option(
            "--not_worse",
            help="Metric in which it must not be worse than the version that has the alias: METRIC:higher or "
            "METRIC:lower, whichever is better; may be repeated. A figure that it must have also where none has it.",
        ),
    ] = None,
    tracking_uri: TrackingURI = None,
) -> None:
    """Point an alias at a version whose figures are good enough."""
    with quiet_registry() as registry:
        done = registry.promote(name, version, alias, require or (), not_worse or (), tracking_uri)
    before = {None: "which no version had", version: "as before"}.get(
        done.previous, f"which version {done.previous} had"
    )
    gate = f"; passed {', '.join(done.gate)}" if done.gate else ""
    gate += "".join(f"; {metric}: no version to compare with" for metric in done.uncompared)
    typer.echo(f"models:/{name}@{alias} is version {version}, {before}{gate or '; nothing was required'}")


@app.command()
def compare(
    name: Annotated[str, typer.Argument(help="Registered model.")],
    versions: Annotated[list[int], typer.Argument(help="Two versions or more.")],
    output: Annotated[Path | None, typer.Option("--output", help="HTML page to write, with pictures.")] = None,
    tracking_uri: TrackingURI = None,
) -> None:
    """Set versions of a model side by side."""
    with quiet_registry() as registry:
        found = registry.compare(name, versions, tracking_uri)
        typer.echo(_side_by_side(found))
        if output is not None:
            typer.echo(f"page: {registry.write_comparison(found, output)}")


@app.command()
def serve(
    uri: Annotated[str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION.")],
    host: Annotated[str, typer.Option("--host", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen at.")] = 5001,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes, each with a model of its own.")] = 1,
    timeout: Annotated[
        int, typer.Option("--timeout", min=1, help="Seconds of a request, its wait included; then 504.")
    ] = 600,
    tracking_uri: TrackingURI = None,
) -> None:
    """Verify a registered bundle and answer HTTP requests with it."""
    with quiet_registry() as registry, contextlib.suppress(KeyboardInterrupt):
        status = registry.serve(uri, host, port, workers, tracking_uri, timeout=timeout)
        raise typer.Exit(status if status >= 0 else 128 - status)  # as shells tell of a signal


def _description(found: VersionDetails) -> str:
    """Everything about a version, for a person."""
    training = found.training
    lines = {
        "version": f"models:/{found.name}/{found.version}",
        "aliases": ", ".join(found.aliases),
        "bundle": found.bundle,
        "registered": f"{found.created:%Y-%m-%d %H:%M} UTC, in run {found.run_id}",
        "weights": found.model_sha256,
        "training": f"{training.name or 'deleted'}, {training.status or 'deleted'}: run {training.run_id}"
        if training
        else "",
        **{f"gate of {alias}": gate for alias, gate in found.gates.items()},
        "figures": "\n".join(f"{key} {value:.6g}" for key, value in found.metrics.items()),
        "measured": "\n".join(f"{key} {value}" for key, value in found.notes.items()),
        "made with": "\n".join(
            f"{key.removesuffix('_sha256')} {', '.join(found.origins.get(key, ())) or value}"
            for key, value in found.lineage.items()
        ),
        "takes": found.inputs,
        "returns": found.outputs,
        "parameters": _pairs(found.parameters),
        "requirements": ", ".join(found.requirements),
        "pictures": ", ".join(found.pictures),
    }
    rows = [
        (key if number == 0 else "", line)
        for key, text in lines.items()
        if text
        for number, line in enumerate(text.splitlines())
    ]
    return _aligned(rows)


def _pairs(values: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


def _side_by_side(found: Comparison) -> str:
    """Metrics of several versions, with the differences from the first."""
    from medgen.registry.comparison import figure, signed

    rows = [("METRIC", *(f"V{v.version}{f' {chr(44).join(v.aliases)}' if v.aliases else ''}" for v in found.versions))]
    rows[0] += ("BETTER",)
    for row in found.metrics:
        cells = [figure(row.values[0])]
        cells += [
            f"{figure(value)} {f'({signed(gap)})' if gap is not None else ''}".rstrip()
            for value, gap in zip(row.values[1:], row.differences[1:], strict=True)
        ]
        better = f"V{found.versions[row.best].version}" if row.best is not None else ""
        rows.append((row.name, *cells, better or ("intervals overlap" if row.overlap else "-")))
    for name, values in found.conditions.items():
        rows.append((f"{name} differs", *(value or "-" for value in values), "not measured alike"))
    for name, values in found.params.items():
        rows.append((f"trained with {name}", *(value or "-" for value in values), ""))
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


@contextlib.contextmanager
def quiet_registry() -> Iterator[ModuleType]:
    """The registry's module, with MLflow silent about what needs no action.

    MLflow tells of the tables of a new database and draws a progress bar even for files that are copied at once. What
    goes wrong comes as an exception all the same.
    """
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from medgen import registry  # first: it keeps MLflow from reporting its usage

    importlib.import_module("mlflow")  # before the log levels: it sets its own on import

    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield registry
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
