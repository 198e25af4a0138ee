"""``medgen features``: features of a set of images, by a named protocol, as a file."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
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
from medgen.errors import UserError

__all__ = ["app"]

WIDTH = 118  # columns of --list

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def features(
    source: Annotated[Path | None, typer.Argument(help="Folder of images, or datalist (.json).")] = None,
    protocol: Annotated[
        str | None, typer.Option("--protocol", help="One of --list, or module:PATH for a network of your own.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", help="File to write (.npz).")] = None,
    list_: Annotated[
        bool, typer.Option("--list", help="Print the protocols and whether their weights are here.")
    ] = False,
    moments: Annotated[
        bool, typer.Option("--moments", help="Write number, mean and covariance instead of one row per image.")
    ] = False,
    split: Annotated[str | None, typer.Option("--split", help="Split of the datalist.  [default: all]")] = None,
    dataset_dir: Annotated[
        Path | None, typer.Option("--dataset_dir", help="Base of the datalist's paths.  [default: its folder]")
    ] = None,
    image_size: ImageSize = None,
    mode: Mode = None,
    patient_pattern: Annotated[
        str | None,
        typer.Option("--patient_pattern", help="Regular expression; its first group is the patient in a file's name."),
    ] = None,
    max_images: MaxImages = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of that sample.")] = 0,
    weights: Annotated[
        list[str] | None, typer.Option("--weights", help="PROTOCOL=PATH: where the weights lie; may be repeated.")
    ] = None,
    role: Annotated[
        str | None, typer.Option("--role", help="reference or samples; only xrv_ldm_source treats them differently.")
    ] = None,
    feature_size: FeatureSize = None,
    feature_range: FeatureRange = None,
    feature_channels: FeatureChannels = None,
    device: Device = "cpu",
    batch_size: BatchSize = 32,
    num_workers: NumWorkers = None,
    cache_dir: CacheDir = None,
) -> None:
    """Extract features of images, for `medgen report` and for comparing later."""
    if list_:
        typer.echo(protocol_table())
        return
    if source is None or protocol is None or output is None:
        missing = [n for n, v in (("SOURCE", source), ("--protocol", protocol), ("--output", output)) if v is None]
        raise UserError(f"expected {' and '.join(missing)}; medgen features --help lists the options")
    if output.suffix != ".npz":
        raise UserError(f"--output must be a file that ends in .npz, got {output}")
    for name, value, least in (("num_workers", num_workers, 0), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        if value is not None and value < least:
            raise UserError(f"{name} must be at least {least}, got {value}; set --{name}")

    from medgen.data.datalist import write_rejected
    from medgen.data.image_set import ImageSet
    from medgen.data.workers import default_workers
    from medgen.metrics.feature_set import extract_features
    from medgen.metrics.protocols import get_protocol, make_extractor, parse_weights

    given = parse_weights(weights or [])
    row = get_protocol(
        protocol,
        feature_size=feature_size,
        feature_range=feature_range,
        feature_channels=feature_channels,
    ).with_role(role)
    if moments and row.extractor == "radiomics":
        raise UserError(
            f"{row.name} normalises every feature by the reference's images, which moments do not hold; leave "
            "--moments out"
        )
    if row.invalid:
        print(f"note: figures by {row.name} mean nothing: {row.invalid}", file=sys.stderr)
    images = ImageSet.from_source(
        source,
        split=split,
        dataset_dir=dataset_dir,
        image_size=image_size,
        mode=mode,
        max_images=max_images,
        seed=seed,
        patient_pattern=patient_pattern,
    )
    extractor = make_extractor(row, weights=given.get(row.name), device=device)  # before hours of reading
    workers = default_workers() if num_workers is None else num_workers
    images.scan(workers)
    found = extract_features(
        images, row, extractor=extractor, batch_size=batch_size, num_workers=workers, cache_dir=cache_dir
    )
    if images.summary is not None and images.summary.constant:
        constant = images.summary.constant
        print(f"note: {len(constant)} images are constant (every pixel alike), such as {constant[0]}", file=sys.stderr)
    if moments:
        try:
            found.moments().save(output)
        except OSError as error:
            raise UserError(
                f"{output} cannot be written ({error.strerror or error}); choose another --output"
            ) from error
    else:
        found.save(output)
    reasons = output.with_suffix(".rejected.csv")
    write_rejected(reasons, found.rejected)  # empty, too: an earlier one must not stay
    what = f"{row.name} {'moments' if moments else 'features'}"
    why = f" ({reasons} says why)" if found.rejected else ""
    width = found.features.shape[1]
    typer.echo(f"{what} of {len(found)} images, {width} each; {len(found.rejected)} rejected{why} -> {output}")
    if found.rejected:
        raise typer.Exit(REJECTED)


def protocol_table() -> str:
    """The protocols as text: what each does to an image, whose figures it reproduces, and where its weights lie."""
    from medgen.metrics.protocols import PROTOCOLS

    rows = [("PROTOCOL", "INPUT", "0..1 BECOMES", "CHANNELS", "LAYER", "WIDTH", "WEIGHTS")]
    notes, users = [], {}
    for name, row in PROTOCOLS.items():
        if row.weights is not None:
            users.setdefault(row.weights, []).append(name)
        size = "any size" if row.size is None else f"{row.size} px {row.resize}"
        ranges = "; ".join(f"{low:g}..{high:g} ({role})" for role, (low, high) in row.ranges.items())
        normalised = ", ImageNet mean and std" if row.mean else ""
        state = "none needed" if row.weights is None else "found" if row.weights.found() else "missing"
        width = str(row.width or "-")
        becomes = ranges or f"{row.low:.4g}..{row.high:.4g}{normalised}"
        rows.append((name, size, becomes, str(row.channels or "any"), row.layer, width, state))
        notes.append((name, f"INVALID, only to compare with old figures: {row.invalid}" if row.invalid else row.source))
    indent = max(len(name) for name, _ in notes) + 2
    text = [_aligned(rows), ""]
    text += [
        textwrap.fill(note, WIDTH, initial_indent=name.ljust(indent), subsequent_indent=" " * indent)
        for name, note in notes
    ]
    text.append(f"{'module:PATH'.ljust(indent)}a network of your own: a TorchScript file, or package.module:callable")
    for weights, names in users.items():
        found = weights.found()
        if found is not None:
            text += ["", f"{', '.join(names)}: weights found", f"  {found}"]
            continue
        text += [
            "",
            f"{', '.join(names)}: weights missing ({weights.told}); fetch",
            f"  {weights.url}",
            f"and put the file into {weights.search_folder}, or name it with --weights NAME=PATH",
        ]
    return "\n".join(text)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
