"""Options that several subcommands of ``medgen`` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "REJECTED",
    "BatchSize",
    "CacheDir",
    "Device",
    "FeatureChannels",
    "FeatureRange",
    "FeatureSize",
    "ImageSize",
    "MaxImages",
    "Mode",
    "NumWorkers",
]

REJECTED = 3  # exit code: done, but some images were left out; as of the preprocessing commands

ImageSize = Annotated[
    int | None, typer.Option("--image_size", help="Shorter side to this many pixels, and the centre square.")
]
Mode = Annotated[str | None, typer.Option("--mode", help="L (grey) or RGB.  [default: as the files are]")]
MaxImages = Annotated[int | None, typer.Option("--max_images", help="Random sample of at most so many of each set.")]
FeatureSize = Annotated[
    int | None, typer.Option("--feature_size", help="With module:PATH: side of its input.  [default: as the images]")
]
FeatureRange = Annotated[
    tuple[float, float] | None,
    typer.Option("--feature_range", help="With module:PATH: what 0 and 1 become, such as: -1 1.  [default: 0 1]"),
]
FeatureChannels = Annotated[
    int | None, typer.Option("--feature_channels", help="With module:PATH: 1 or 3.  [default: as the images]")
]
Device = Annotated[str, typer.Option("--device", help="Where networks run: cpu, cuda, cuda:1, ...")]
BatchSize = Annotated[int, typer.Option("--batch_size", help="Images that a network sees at a time.")]
NumWorkers = Annotated[
    int | None,
    typer.Option("--num_workers", help="Processes; 0 works in this one.  [default: one per core, at most 8]"),
]
CacheDir = Annotated[
    Path | None,
    typer.Option("--cache_dir", help="Where features are kept.  [default: $MEDGEN_CACHE or ~/.cache/medgen/features]"),
]
