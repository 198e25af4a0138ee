"""What a latent space tells about patients: probes, a map, scores of its coordinates, and directions to move along."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medgen.apps.compression import check_space
from medgen.apps.directions import Directions, ganspace, move, sefa, unit
from medgen.apps.factor_scores import FactorScores, factor_scores
from medgen.apps.latent_map import map_latents, write_map_page, write_map_picture
from medgen.apps.probes import Probe, find_factors, fit_probe, patients_of
from medgen.errors import UserError
from medgen.metrics.detection_table import write_table
from medgen.metrics.intervals import CHEAP_RESAMPLES
from medgen.output import atomic_file, atomic_write_text, git_revision, plain_json

if TYPE_CHECKING:
    from medgen.data.embedding import Embedding
    from medgen.networks import LatentGenerator

__all__ = ["captioned_grid", "disentangle", "probe_rows", "render"]

logger = logging.getLogger(__name__)

GRID_STRENGTHS = (-3, -2, -1, 0, 1, 2, 3)
CELL = 96  # pixels that an image of a grid is enlarged to
LEFT, TOP, GAP = 190, 20, 2  # of its captions, and between images


def disentangle(
    embedding: Embedding,
    generator: LatentGenerator,
    output_dir: str | os.PathLike[str],
    labels: str | Sequence[str] | None = None,
    image: str | None = None,
    folds: int = 5,
    min_patients: int = 10,
    shuffles: int = 200,
    resamples: int = CHEAP_RESAMPLES,
    level: float = 0.95,
    map_method: str = "pca",
    ganspace_components: int = 5,
    ganspace_samples: int = 10_000,
    sefa_components: int = 5,
    sefa_layers: Any = None,
    batch_size: int = 16,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure what latents tell, and write down the directions that they give.

    Writes ``probes.csv`` (a row for each label, age and sex; those left out with the reason), ``metrics.json``,
    ``map.html`` and ``images/map.png``, ``directions.safetensors`` with ``directions.json``, and
    ``images/directions.png``: rows of images that move along each direction from -3 to 3.

    Args:
        embedding: latents of N images with what is known of them.
        generator: theirs.
        output_dir: where the files go.
        labels: those to probe, as a list or with commas between; None for all that enough patients have.
        image: of the embedding, that the picture of the directions starts from; None for the mean of all.
        folds: of the cross-validation by patient.
        min_patients: fewest patients with a label, and without it; at least ``folds``.
        shuffles: for what chance gives; 0 for none.
        resamples: for the intervals.
        level: of confidence.
        map_method: "pca" or "umap".
        ganspace_components: directions of GANSpace; 0 for none.
        ganspace_samples: latents drawn for them.
        sefa_components: directions of SeFa; 0 for none.
        sefa_layers: styles that SeFa looks at, such as "0-3"; None for all.
        batch_size: images rendered at once.
        seed: of folds, shuffles, draws and samples.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        UserError: latents of another generator, nothing to probe, or settings that are none.
    """
    if min_patients < folds:
        raise UserError(
            f"min_patients must be at least folds, {folds}, got {min_patients}: each fold needs some of both "
            "classes; set --min_patients"
        )
    from medgen.inferers import parse_numbers

    check_space(embedding, generator)
    layers = None if sefa_layers is None else parse_numbers(sefa_layers, "sefa_layers")
    start = _start(embedding, generator, image)
    names = [name.strip() for name in labels.split(",")] if isinstance(labels, str) else labels
    factors, left_out = find_factors(embedding.items, names, min_patients)
    latents = np.asarray(embedding.latents, dtype=np.float64)
    flat, patients = latents.reshape(len(latents), -1), patients_of(embedding.items)
    # first what may be refused, then what takes minutes
    places, axes = map_latents(flat, map_method, seed)
    unsupervised: list[tuple[str, NDArray[np.float64], dict[str, Any]]] = []
    if ganspace_components:
        for number, (vector, share) in enumerate(ganspace(generator, ganspace_components, ganspace_samples, seed)):
            unsupervised.append((f"ganspace_{number}", vector, {"kind": "ganspace", "variance_share": share}))
    if sefa_components:
        for number, (vector, value) in enumerate(sefa(generator, sefa_components, layers)):
            unsupervised.append((f"sefa_{number}", vector, {"kind": "sefa", "eigenvalue": value}))

    probes, directions = [], Directions(generator.space, generator.sha256)
    options = {"folds": folds, "shuffles": shuffles, "resamples": resamples, "level": level, "seed": seed}
    for factor in factors:
        logger.info(f"probing {factor.name}")
        probe = fit_probe(flat, factor, patients, **options)
        figures = {name: found.value for name, found in probe.figures.items()}
        known = {"kind": factor.kind, **figures, "p_value": probe.p_value, "n": probe.n}
        directions.add_probe(probe.name, probe.weight.reshape(latents.shape[1:]), probe.bias, latents, **known)
        probes.append(probe)
    for name, vector, known in unsupervised:
        directions.add(name, vector, latents, **known)

    folder = Path(output_dir)
    write_table(folder / "probes.csv", probe_rows(probes, left_out))
    write_map_page(folder / "map.html", places, axes, embedding.items, factors)
    write_map_picture(folder / "images" / "map.png", places, axes, factors)
    directions.write(folder)
    _draw_directions(folder / "images" / "directions.png", directions, start, generator, batch_size)
    scores = None
    try:
        scores = factor_scores(flat, factors, patients, seed=seed)
    except UserError as error:
        logger.warning(f"DCI and SAP left out: {error}")
    record = {
        **_figures(probes, scores),
        "n": len(latents),
        "n_patients": len(set(patients)),
        "n_left_out": len(left_out),
        "generator_sha256": generator.sha256,
        "seed": seed,
        "git": git_revision(),
    }
    atomic_write_text(folder / "metrics.json", json.dumps(plain_json(record), indent=4, allow_nan=False) + "\n")
    for line in _summary(probes, left_out, scores):
        logger.info(line)
    return record


def _start(embedding: Embedding, generator: LatentGenerator, image: str | None) -> NDArray[np.float64]:
    """(L, D) that the picture starts from: an image's latent, or the mean of all, brought back to the sphere."""
    import torch

    if image is not None:
        return embedding.of_images([image]).latents[0].astype(np.float64)
    mean = torch.from_numpy(embedding.latents.mean(0, keepdims=True, dtype=np.float64))
    return generator.nearest(mean)[0].numpy()


def render(generator: LatentGenerator, latents: NDArray, batch_size: int) -> NDArray[np.float32]:
    """Images (N, C, H, W) in [0, 1] of latents (N, L, D)."""
    import torch

    images = []
    with torch.no_grad():
        for part in torch.from_numpy(np.asarray(latents, dtype=np.float32)).split(batch_size):
            images.append(generator(part.to(generator.mean.device)).clamp(0, 1).cpu())
    return torch.cat(images).numpy()


def probe_rows(probes: Sequence[Probe], left_out: Mapping[str, str]) -> list[dict[str, Any]]:
    """A row for each factor: its figures with their intervals and what chance gives, or why it was left out."""
    rows = []
    for probe in probes:
        row = {"factor": probe.name, "kind": probe.factor.kind, "n": probe.n, "patients": probe.patients}
        if probe.factor.is_binary:
            row["positives"] = probe.positives
        for name, found in probe.figures.items():
            row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
            row[f"{name}_chance"] = probe.chance[name]
        if probe.null is not None:
            row |= dict(zip(("null_mean", "null_low", "null_high"), probe.null, strict=True))
            row["p_value"] = probe.p_value
        rows.append({**row, "strength": probe.strength, "left_out": ""})
    return rows + [{"factor": name, "left_out": reason} for name, reason in left_out.items()]


def _figures(probes: Sequence[Probe], scores: FactorScores | None) -> dict[str, float | None]:
    """Flat names, such as ``auroc_pneumonia_low``."""
    figures: dict[str, float | None] = {}
    for probe in probes:
        name = re.sub(r"\W+", "_", probe.name.lower())
        for figure, found in probe.figures.items():
            figures |= {f"{figure}_{name}": found.value}
            figures |= {f"{figure}_{name}_low": found.low, f"{figure}_{name}_high": found.high}
            figures[f"{figure}_{name}_chance"] = probe.chance[figure]
        if probe.null is not None:
            ends = zip(("null_mean", "null_low", "null_high"), probe.null, strict=True)
            figures |= {f"{probe.headline}_{name}_{end}": value for end, value in ends}
            figures[f"p_value_{name}"] = probe.p_value
    if scores is not None:
        figures |= scores.scores | {f"{name}_shuffled": value for name, value in scores.shuffled.items()}
        figures["n_factor_scores"] = scores.n
    return figures


def _summary(probes: Sequence[Probe], left_out: Mapping[str, str], scores: FactorScores | None) -> list[str]:
    lines = []
    for probe in probes:
        found = probe.figures[probe.headline]
        line = f"{probe.name}: {probe.headline.upper()} {found.value:.3f} ({found.low:.3f} to {found.high:.3f})"
        if probe.null is not None:
            line += f", chance {probe.null[1]:.3f} to {probe.null[2]:.3f}, p {probe.p_value:.3g}"
        lines.append(line)
    lines += [f"{name} left out: {reason}" for name, reason in left_out.items()]
    if scores is not None:
        lines += [f"{name}: {value:.3f}, shuffled {scores.shuffled[name]:.3f}" for name, value in scores.scores.items()]
    return lines


def _draw_directions(
    path: Path, directions: Directions, start: NDArray[np.float64], generator: LatentGenerator, batch_size: int
) -> None:
    """A row for each direction: one image at strengths from -3 to 3."""
    rows, captions = [], []
    for name, record in directions.records.items():
        vector = directions.vector(name)
        # of a network with classes, the class stays what it is
        moved = move(start[None], vector, GRID_STRENGTHS, class_axes(generator), generator.is_spherical)[0]
        rows.append(render(generator, moved, batch_size))
        figure = next((f" ({key.upper()} {record[key]:.2f})" for key in ("auroc", "r2") if key in record), "")
        captions.append(name + figure)
    captioned_grid(path, rows, captions, [f"{strength:+g}" if strength else "0" for strength in GRID_STRENGTHS])


def class_axes(generator: LatentGenerator) -> list[NDArray[np.float64]]:
    """The axes (L, D) of z that hold the class of a network with classes, which no move may change."""
    if generator.space != "z":
        return []
    return [unit(axis[None]) for axis in np.eye(generator.latent_shape[1])[generator.z_dim :]]


def captioned_grid(
    path: str | Path, rows: Sequence[NDArray], row_names: Sequence[str], column_names: Sequence[str]
) -> None:
    """Rows of images with a name beside each row and above each column, as a PNG.

    Args:
        path: the file.
        rows: each (N, C, H, W) in [0, 1], C 1 or 3, N at most as many as columns.
        row_names: of the rows.
        column_names: of the columns.
    """
    from PIL import Image, ImageDraw, ImageFont

    _, _, H, W = rows[0].shape
    factor = max(1, -(-CELL // max(H, W)))
    high, wide = H * factor + GAP, W * factor + GAP
    canvas = Image.new("RGB", (LEFT + wide * len(column_names), TOP + high * len(rows)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for column, name in enumerate(column_names):
        draw.text((LEFT + wide * column + wide // 2, TOP // 2), name, "black", font, anchor="mm")
    for number, (images, name) in enumerate(zip(rows, row_names, strict=True)):
        draw.text((LEFT - 8, TOP + high * number + high // 2), name, "black", font, anchor="rm")
        for column, image in enumerate(images):
            pixels = (np.clip(image, 0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
            tile = Image.fromarray(pixels if len(image) == 3 else np.ascontiguousarray(pixels[..., 0]))
            tile = tile.resize((W * factor, H * factor), Image.Resampling.NEAREST)
            canvas.paste(tile, (LEFT + wide * column, TOP + high * number))
    with atomic_file(path) as file:
        canvas.save(file, format="PNG")
