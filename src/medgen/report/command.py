"""``medgen report``: one page that says how good a set of generated images is."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from medgen.cli_options import (
    REJECTED,
    BatchSize,
    CacheDir,
    Device,
    FeatureChannels,
    FeatureRange,
    FeatureSize,
    ImageSize,
    MaxImages,
    Mode,
    NumWorkers,
)

__all__ = ["app"]

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def report(
    samples: Annotated[str, typer.Argument(help="Generated images: folder, datalist, or feature file (.npz).")],
    reference: Annotated[
        str, typer.Argument(help="Real images to compare with: folder, datalist, or feature file (.npz).")
    ],
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Folder for report.html and what belongs to it.")],
    training: Annotated[
        str | None,
        typer.Option(
            "--training",
            help="Images that the model was trained on, searched for copies: folder or datalist.  "
            "[default: the training split, if REFERENCE is a datalist]",
        ),
    ] = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option(
            "--protocol",
            help="Distance to compute; may be repeated. `medgen features --list` shows them.  "
            "[default: frd_v1, radiomics]",
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            "--weights",
            help="PROTOCOL=PATH, and with --paired also lpips=PATH (LPIPS SqueezeNet); may be repeated. "
            "Nothing is downloaded.",
        ),
    ] = None,
    feature_size: FeatureSize = None,
    feature_range: FeatureRange = None,
    feature_channels: FeatureChannels = None,
    paired: Annotated[
        bool,
        typer.Option(
            "--paired",
            help="Compare each sample with the reference of the same file name (without folder and suffix), too.",
        ),
    ] = False,
    samples_split: Annotated[
        str | None, typer.Option("--samples_split", help="Split of SAMPLES, if it is a datalist.  [default: all]")
    ] = None,
    split: Annotated[
        str, typer.Option("--split", help="Split of REFERENCE, if it is a datalist; `all` for the whole of it.")
    ] = "test",
    dataset_dir: Annotated[
        Path | None,
        typer.Option("--dataset_dir", help="Base of the paths in the reference's and training's datalists."),
    ] = None,
    patient_pattern: Annotated[
        str | None,
        typer.Option(
            "--patient_pattern",
            help="If REFERENCE or the training images are a folder: regular expression whose first group is the "
            "patient in a file's name.",
        ),
    ] = None,
    image_size: ImageSize = None,
    mode: Mode = None,
    max_images: MaxImages = None,
    pairs: Annotated[str, typer.Option("--pairs", help="Pairs of images for MS-SSIM: a number, or `all`.")] = "2000",
    resamples: Annotated[
        int | None,
        typer.Option(
            "--resamples",
            help="Bootstrap resamples; the sliced Wasserstein distance takes at most 50.  "
            "[default: by the width of the features]",
        ),
    ] = None,
    device: Device = "cpu",
    batch_size: BatchSize = 32,
    num_workers: NumWorkers = None,
    cache_dir: CacheDir = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of every random draw.")] = 0,
    title: Annotated[str | None, typer.Option("--title", help="Heading of the page.")] = None,
    tracking_uri: Annotated[
        str | None,
        typer.Option("--tracking_uri", help="Log figures and page to MLflow: sqlite:////path/mlflow.db or http://…"),
    ] = None,
    experiment: Annotated[str, typer.Option("--experiment", help="MLflow experiment.")] = "medgen_report",
) -> None:
    """Measure generated images against real ones and write report.html, report.json and metrics.json."""
    # not at the head: `medgen --help` imports this module for its help line
    from medgen.metrics.protocols import DEFAULT_PROTOCOLS
    from medgen.report.files import make_report

    files, found = make_report(
        samples,
        reference,
        output_dir,
        training=training,
        protocols=protocol or DEFAULT_PROTOCOLS,
        weights=weights or (),
        feature_size=feature_size,
        feature_range=feature_range,
        feature_channels=feature_channels,
        paired=paired,
        samples_split=samples_split,
        split=split,
        dataset_dir=dataset_dir,
        patient_pattern=patient_pattern,
        image_size=image_size,
        mode=mode,
        max_images=max_images,
        pairs=pairs,
        resamples=resamples,
        device=device,
        batch_size=batch_size,
        num_workers=num_workers,
        cache_dir=cache_dir,
        seed=seed,
        title=title,
        command="medgen " + shlex.join(sys.argv[1:]),
    )
    typer.echo("\n".join(found.lines()))
    for note in found.notes:
        typer.echo(f"note: {note}", err=True)
    for verdict in found.verdicts():
        typer.echo(verdict)
    left_out = {(role, file) for role, file, _ in found.left_out()}
    typer.echo(f"left out {len(left_out)} files" + (f" ({output_dir / 'rejected.csv'} says why)" if left_out else ""))
    typer.echo(files[0])
    if tracking_uri:
        # after the page is written: a tracker that is away must not cost the measurements
        from medgen.registry import log_run

        run = log_run(tracking_uri, experiment, title or f"report-{output_dir.name}", found.figures(), files)
        typer.echo(f"logged to MLflow, run {run}")
    if left_out:
        raise typer.Exit(REJECTED)
