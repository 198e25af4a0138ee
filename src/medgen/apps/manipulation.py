"""Images of patients moved along a direction of the latent space, and what that changed of them."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medgen.apps.derived import SUFFIXES, check_space, derived_item, derived_record, render, save_derived
from medgen.apps.directions import Directions, move, orthogonalise, spread_along, unit
from medgen.apps.disentanglement import class_axes
from medgen.data.datalist import write_datalist
from medgen.errors import UserError
from medgen.metrics.detection_table import write_table
from medgen.output import atomic_file, atomic_write_text, git_revision, plain_json

if TYPE_CHECKING:
    from medgen.data.embedding import Embedding
    from medgen.networks import LatentGenerator

__all__ = ["Change", "change_between", "changed_region", "guided_direction", "manipulate", "parse_strengths"]

logger = logging.getLogger(__name__)

ALL, NONE = "all", "none"
SMOOTHING = 64  # the region is found at a 64th of the image's side
SHOWN = 16  # patients whose pictures are drawn

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Change:
    """What was changed of an image, and what was kept, by a region in which it was to be changed.

    Args:
        region_share: of the image's pixels.
        region_change_share: of the absolute difference that lies in the region; 0 where there is none.
        mae: mean absolute difference of the whole image, greys in [0, 1].
        outside_mae: of the pixels outside the region; 0 where it is everywhere.
        ms_ssim: of the two images; None below 48 pixels.
        outside_ms_ssim: the same once the region of the second is filled with the first: what happened to the rest.
    """

    region_share: float
    region_change_share: float
    mae: float
    outside_mae: float
    ms_ssim: float | None
    outside_ms_ssim: float | None


def changed_region(before: NDArray, after: NDArray) -> NDArray[np.bool_]:
    """Where an image was changed: the absolute difference, smoothed, above Otsu's threshold.

    The difference is the mean over channels, the smoothing a Gaussian of a 64th of the shorter side, at least a pixel.
    Otsu's threshold divides any change into a larger and a smaller part, so it tells a place from its surroundings,
    not whether there is such a place: for that see how much of the change lies in it.

    Args:
        before: (C, H, W).
        after: (C, H, W).

    Returns:
        (H, W); nowhere where the images are equal.
    """
    from scipy.ndimage import gaussian_filter
    from skimage.filters import threshold_otsu

    difference = np.abs(after.astype(np.float64) - before).mean(0)
    smooth = gaussian_filter(difference, max(1.0, min(difference.shape) / SMOOTHING))
    return smooth > threshold_otsu(smooth) if np.ptp(smooth) > 0 else np.full(smooth.shape, smooth.max() > 0)


def change_between(before: NDArray, after: NDArray, region: NDArray[np.bool_]) -> Change:
    """What differs between two images, within a region and outside it.

    Args:
        before: (C, H, W) in [0, 1].
        after: (C, H, W) in [0, 1].
        region: (H, W).
    """
    import torch

    from medgen.metrics.diversity import ms_ssim
    from medgen.metrics.paired import PAIRED_METRICS

    difference = np.abs(after.astype(np.float64) - before).mean(0)
    whole = outside = None
    if min(difference.shape) >= PAIRED_METRICS["ms_ssim"].min_side:
        rest = np.where(region, before, after)
        pair = (torch.from_numpy(np.stack([after, rest])), torch.from_numpy(np.stack([before, before])))
        whole, outside = ms_ssim(*pair).tolist()
    return Change(
        float(region.mean()),
        float(difference[region].sum() / difference.sum()) if difference.any() else 0.0,
        float(difference.mean()),
        float(difference[~region].mean()) if not region.all() else 0.0,
        whole,
        outside,
    )


def parse_strengths(strengths: float | str | Sequence[float]) -> list[float]:
    """Numbers of a setting: ``"-3,0,3"``, ``[-3, 0, 3]`` or ``2``.

    Returns:
        Each once, in the order given.

    Raises:
        UserError: none, or one that is no finite number.
    """
    parts = strengths.split(",") if isinstance(strengths, str) else strengths
    try:
        found = [float(part) for part in (parts if isinstance(parts, Sequence) else [parts])]
    except (TypeError, ValueError):
        found = []
    if not found or not all(map(math.isfinite, found)):
        raise UserError(f"strengths must be finite numbers, such as -3,-1,0,1,3, got {strengths!r}; set --strengths")
    return list(dict.fromkeys(found))


def guided_direction(
    directions: Directions,
    name: str,
    hold: str | Sequence[str] | None,
    embedding: Embedding,
    generator: LatentGenerator,
    layers: Sequence[int] | None = None,
) -> tuple[Array, list[Array], list[str], float]:
    """A direction without what would move the scores of other probes, at the length of strength 1.

    In W+ all but the chosen layers are set to 0 first, of the held probes' weights, too, so that the scores stay under
    a move of these layers alone. Of a network with classes, the numbers of z that hold the class are held as well.

    Args:
        directions: where it is from.
        name: of the direction.
        hold: names of probes, as a list or with commas between; "none" or None for none; "all" for all others
            that read more than chance, by the p-values in the file.
        embedding: whose spread along the direction strength 1 is.
        generator: of both.
        layers: styles that are moved, in W+; None for all.

    Returns:
        The direction (L, D), what it is orthogonal to (each (L, D)), the names held, and the cosine between it and the
        direction in the file.

    Raises:
        UserError: an unknown name, a direction that is held against itself, or of which nothing is left.
    """
    vector = directions.vector(name)
    words = hold.split(",") if isinstance(hold, str) else list(hold or [])
    names = list(dict.fromkeys(str(word).strip() for word in words if str(word).strip()))
    if names == [ALL]:
        names = [probe for probe in directions.probes if probe != name and not directions.is_chance(probe)]
    elif names == [NONE]:
        names = []
    if name in names:
        raise UserError(f"{name} cannot be moved and held at once; take it out of --hold")
    held = [directions.probe(other)[0] for other in names]
    if directions.is_chance(name):
        p_value = directions.records[name]["p_adjusted"]
        logger.warning(f"{name} reads no more than chance (adjusted p {p_value:.2g}): moving along it may show nothing")
    original, mask = unit(vector), np.ones((generator.latent_shape[0], 1))
    if layers is not None:
        if generator.space != "w+":
            raise UserError(f"layers must be null in the space {generator.space}, which has one style; leave it out")
        mask[~np.isin(range(len(mask)), layers)] = 0
        vector, held = vector * mask, [weight * mask for weight in held]
    held = [weight for weight in held if weight.any()] + class_axes(generator)
    if layers is not None and not vector.any():
        raise UserError(f"{name} is 0 in the layers {list(layers)}; choose others with --layers")
    direction = unit(orthogonalise(vector, held) * mask)  # once more, for what rounding left
    spread = spread_along(direction, embedding.latents.astype(np.float64))
    return direction * spread, held, names, float((direction * original).sum())


def manipulate(
    embedding: Embedding,
    directions: Directions,
    generator: LatentGenerator,
    output_dir: str | os.PathLike[str],
    images: Any,
    direction: str,
    hold: str | Sequence[str] | None = ALL,
    strengths: float | str | Sequence[float] = (-3, -2, -1, 0, 1, 2, 3),
    layers: Any = None,
    file_format: str = "png",
    resume: bool = False,
    modality: str = "unknown",
    batch_size: int = 16,
    seed: int = 0,
) -> dict[str, Any]:
    """Move images of patients along a direction, and measure what it changed.

    Strength 1 is the standard deviation of the embedding along the direction; 0 is the latent's own image. In z images
    move on the sphere, see :func:`medgen.apps.directions.move`. A probe's score is what the probe says of the latent,
    not what a radiologist would say of the image.

    All strengths of an image are measured by one region: what the lowest and the highest change, together. A region
    found so holds most of any change, whatever the direction. Hence the same figures of a control, ``control_*``: a
    random direction of the same length, layers and held scores, with the region that its own ends change. Equal lengths
    need not change the image equally: a direction keeps the patient better than chance where more of its change lies in
    its region (``region_change_share``), or less outside for the same ``mae``. What strength 0 has lost of the patient
    is in ``reconstruction_ms_ssim``, the embedding's own figure where it has one.

    Writes the images to ``samples/``, ``manipulation.csv`` (a row for each of them, with :class:`Change` against
    strength 0 and the change of each probe's score), ``metrics.json`` (means over the images at the lowest and at the
    highest strength), ``images/manipulation_*.png`` (a strip for each of the first 16 images, with the signed
    difference below), ``generation.json`` and ``datalist.json``, which says of each image that it is synthetic and from
    which image of which patient it was made. Files are named after the image's index in the embedding. Images of one
    patient have one synthetic patient: a split by patient keeps them together. They are not anonymous.

    Args:
        embedding: latents of real images.
        directions: of the same generator.
        generator: theirs.
        output_dir: where the files go.
        images: those to move, by :func:`medgen.apps.stylisation.select_images`.
        direction: its name.
        hold: see :func:`guided_direction`.
        strengths: see :func:`parse_strengths`.
        layers: styles that are moved, in W+, such as "0-3"; None for all.
        file_format: "png" or "dicom".
        resume: write again what an earlier run of the same settings wrote; False refuses a folder that holds samples.
        modality: of the datalist.
        batch_size: images rendered at once.
        seed: of the control's direction.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        UserError: latents of another generator, an unknown image or direction, settings that are none, or a folder that
            holds samples already.
    """
    from medgen.apps.stylisation import select_images
    from medgen.data.synthetic_set import begin_generation, check_format
    from medgen.inferers import parse_numbers

    check_space(embedding, generator)
    check_format(file_format, tuple(SUFFIXES))
    chosen, steps = select_images(embedding, images), parse_strengths(strengths)
    styles = None if layers is None else parse_numbers(layers, "layers", generator.latent_shape[0] - 1)
    vector, held, names, kept = guided_direction(directions, direction, hold, embedding, generator, styles)
    control = _random_direction(vector, held, embedding.latents, seed)
    moved, moved_at_random = (
        move(embedding.latents[chosen], way, [0.0, *steps], held, generator.is_spherical).astype(np.float32)
        for way in (vector, control)
    )
    settings = {"direction": direction, "hold": names, "strengths": steps, "layers": styles, "file_format": file_format}
    record = derived_record(embedding, generator, "manipulate", chosen, moved, **settings)
    folder = Path(output_dir)
    begin_generation(folder, folder / "samples", record, resume)
    rendered, at_random = (_in_8_bits(generator, latents, batch_size) for latents in (moved, moved_at_random))

    sources = [embedding.items[i] for i in chosen]
    word = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in direction)
    items = [
        derived_item(
            f"samples/image{i:04d}_{word}_{strength:+.12g}{SUFFIXES[file_format]}",
            [source],
            [source],
            generator.sha256,
            direction=direction,
            strength=strength,
        )
        for i, source in zip(chosen, sources, strict=True)
        for strength in steps
    ]
    for item, image in zip(items, rendered[:, 1:].reshape(-1, *rendered.shape[2:]), strict=True):
        save_derived(folder, item, record, file_format, image)
    write_datalist(
        folder / "datalist.json", f"synthetic: {direction}", modality, {"training": items}, generation=record
    )

    scores = {probe: _scores(directions, probe, moved) for probe in directions.probes}
    title = f"{direction}, held: {', '.join(names) or 'nothing'}"
    rows = []
    for number, (i, source) in enumerate(zip(chosen, sources, strict=True)):
        region, changes = _changes(rendered[number], steps)
        _, controls = _changes(at_random[number], steps)
        for place, (strength, change, control_change) in enumerate(zip(steps, changes, controls, strict=True)):
            row = {
                "image": source["image"],
                "patient": source.get("patient"),
                "file": items[number * len(steps) + place]["image"],
                "direction": direction,
                "strength": strength,
                "reconstruction_ms_ssim": source.get("ms_ssim"),
                **asdict(change),
                **{f"control_{name}": value for name, value in asdict(control_change).items()},
            }
            for probe, of_latents in scores.items():
                row[f"score_{probe}"] = float(of_latents[number, place + 1])
                row[f"change_{probe}"] = float(of_latents[number, place + 1] - of_latents[number, 0])
            rows.append(row)
        if number < SHOWN:
            path = folder / "images" / f"manipulation_image{i:04d}.png"
            caption = f"synthetic, from image {i} of the embedding: {title}"
            _draw(path, rendered[number], steps, changes, region, caption)
    if len(chosen) > SHOWN:
        logger.info(f"strips of the first {SHOWN} images are drawn, {len(chosen) - SHOWN} are left out")
    write_table(folder / "manipulation.csv", rows)
    metrics = _figures(rows, (min(steps), max(steps)), direction, names)
    metrics |= {"direction_kept": kept, "spread": float(np.linalg.norm(vector)), "n": len(chosen), "seed": seed}
    metrics |= {"generator_sha256": generator.sha256, "git": git_revision()}
    atomic_write_text(folder / "metrics.json", json.dumps(plain_json(metrics), indent=4, allow_nan=False) + "\n")
    return metrics


def _random_direction(vector: Array, held: Sequence[Array], latents: NDArray, seed: int) -> Array:
    """A direction (L, D) of the same length and layers, orthogonal to what is held.

    A random sum of the embedding's latents, for it to have their covariance: W lies along few axes, and of an isotropic
    direction most would lead where the generator changes nothing.
    """
    weights = np.random.default_rng(seed).standard_normal(len(latents))
    mask = vector.any(1, keepdims=True)
    drawn = np.tensordot(weights, latents - latents.mean(0, dtype=np.float64), 1) * mask
    return unit(orthogonalise(drawn, held)) * np.linalg.norm(vector)


def _changes(images: NDArray, steps: Sequence[float]) -> tuple[NDArray[np.bool_], list[Change]]:
    """The region that both ends change, and each image's change by it, of images at strength 0 and at the steps."""
    start, *others = images
    ends = (others[steps.index(end)] for end in (min(steps), max(steps)))
    region = np.any([changed_region(start, end) for end in ends], axis=0)
    return region, [change_between(start, image, region) for image in others]


def _in_8_bits(generator: LatentGenerator, latents: NDArray, batch_size: int) -> NDArray:
    """Images (N, S, C, H, W) of latents (N, S, L, D), as they are written: what is on the disk is what is measured."""
    images = np.round(render(generator, latents.reshape(-1, *generator.latent_shape), batch_size) * 255) / 255
    return images.reshape(*latents.shape[:2], *images.shape[1:])


def _scores(directions: Directions, probe: str, latents: NDArray) -> Array:
    """(N, S) of latents (N, S, L, D)."""
    weight, bias = directions.probe(probe)
    return (latents.astype(np.float64) * weight).sum((2, 3)) + bias


def _figures(
    rows: Sequence[dict[str, Any]], ends: Sequence[float], direction: str, held: Sequence[str]
) -> dict[str, float]:
    """Means over the images at both ends, and the largest change of a held score at any strength."""
    names = [name for name in rows[0] if name.removeprefix("control_") in Change.__dataclass_fields__]
    names = {name: name for name in (*names, "reconstruction_ms_ssim")} | {f"change_{direction}": "target_change"}
    figures: dict[str, float] = {}
    for end, strength in zip(("lowest", "highest"), ends, strict=True):
        figures[f"{end}_strength"] = strength
        for column, name in names.items():
            values = [row.get(column) for row in rows if row["strength"] == strength]
            if None not in values:
                key = name if name == "reconstruction_ms_ssim" else f"{end}_{name}"
                figures[key] = float(np.mean(values))
    if held:
        figures["held_change"] = max(abs(row[f"change_{name}"]) for row in rows for name in held)
    return figures


def _draw(
    path: Path,
    images: NDArray,
    steps: Sequence[float],
    changes: Sequence[Change],
    region: NDArray[np.bool_],
    title: str,
) -> None:
    """Images at each strength, over their difference from strength 0 with the changed region outlined."""
    from matplotlib.figure import Figure

    figure = Figure((1.7 * len(steps) + 1.2, 4.2), layout="constrained")
    panels = figure.subplots(2, len(steps), squeeze=False)
    differences = (images[1:].astype(np.float64) - images[0]).mean(1)
    largest = max(float(np.abs(differences).max()), 1 / 255)
    for column, (strength, change) in enumerate(zip(steps, changes, strict=True)):
        image = images[column + 1]
        shown = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        panels[0, column].imshow(shown, cmap="gray", vmin=0, vmax=1)
        panels[0, column].set_title(f"{strength:+g}" if strength else "0", fontsize=10)
        drawn = panels[1, column].imshow(differences[column], cmap="RdBu_r", vmin=-largest, vmax=largest)
        if region.any() and not region.all():
            panels[1, column].contour(region, levels=[0.5], colors="#111827", linewidths=0.7)
        outside = "" if change.outside_ms_ssim is None else f"\noutside MS-SSIM {change.outside_ms_ssim:.3f}"
        panels[1, column].set_xlabel(f"region {change.region_share:.0%}{outside}", fontsize=7)
        for panel in panels[:, column]:
            panel.set_xticks([])
            panel.set_yticks([])
    panels[0, 0].set_ylabel("synthetic image", fontsize=9)
    panels[1, 0].set_ylabel("difference from 0", fontsize=9)
    figure.colorbar(drawn, ax=panels[1, :], shrink=0.8, label="grey level, image in [0, 1]")
    figure.suptitle(title, fontsize=10)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110)
