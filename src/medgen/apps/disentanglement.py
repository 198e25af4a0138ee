"""What a latent space tells about patients: probes, a map, scores of its coordinates, and directions to move along."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medgen.apps.derived import check_space, render
from medgen.apps.directions import SIGNIFICANT, Directions, ganspace, move, orthogonalise, sefa, spread_along, unit
from medgen.apps.factor_scores import FactorScores, factor_scores
from medgen.apps.latent_map import map_latents, write_map_page, write_map_picture
from medgen.apps.probes import Probe, find_factors, fit_probe, fits_of_probe, holm, patients_of
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
METRIC_ENDS = ("", "_low", "_high", "_chance", "_null_mean", "_null_low", "_null_high")
LEFT, TOP, GAP = 190, 20, 2  # of its captions, and between images


def disentangle(
    embedding: Embedding,
    generator: LatentGenerator,
    output_dir: str | os.PathLike[str],
    labels: str | Sequence[str] | None = None,
    image: int | str | None = None,
    folds: int = 5,
    min_patients: int = 10,
    shuffles: int = 200,
    factor_shuffles: int = 5,
    resamples: int = CHEAP_RESAMPLES,
    level: float = 0.95,
    map_method: str = "pca",
    ganspace_components: int = 5,
    ganspace_samples: int = 10_000,
    ganspace_resolution: int | None = None,
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
        image: name or index, by :func:`medgen.apps.stylisation.select_images`, of the image that the picture of the
            directions starts from; None for a random one in z, where the mean is no image, and else for the mean.
        folds: of the cross-validation by patient.
        min_patients: fewest patients with a label, and without it; at least ``folds``.
        shuffles: for what chance gives; 0 for none. Adjusted p-values of K factors are at least K / (shuffles + 1).
            Time grows with them: 1000 images take minutes, 100 000 of long latents days, for which take 20 or 0.
        factor_shuffles: the same for DCI and SAP.
        resamples: for the intervals.
        level: of confidence.
        map_method: "pca" or "umap".
        ganspace_components: directions of GANSpace; 0 for none.
        ganspace_samples: latents drawn for them.
        ganspace_resolution: side of the features that they are taken from in z; None for 16.
        sefa_components: directions of SeFa; 0 for none.
        sefa_layers: styles that SeFa looks at, such as "0-3"; None for all.
        batch_size: images rendered at once.
        seed: of folds, shuffles, draws and samples.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        UserError: latents of another generator, nothing to probe, names that cannot be told apart, or settings that
            are none.
    """
    if min_patients < folds:
        raise UserError(
            f"min_patients must be at least folds, {folds}, got {min_patients}: each fold needs some of both "
            "classes; set --min_patients"
        )
    from medgen.inferers import parse_numbers

    check_space(embedding, generator)
    layers = None if sefa_layers is None else parse_numbers(sefa_layers, "sefa_layers")
    start, origin = _start(embedding, generator, image, seed)
    names = [name.strip() for name in labels.split(",")] if isinstance(labels, str) else labels
    factors, left_out = find_factors(embedding.items, names, min_patients)
    latents = embedding.latents
    flat, patients = latents.reshape(len(latents), -1), patients_of(embedding.items)
    # first what may be refused, then what takes minutes
    unsupervised: list[tuple[str, NDArray[np.float64], dict[str, Any]]] = []
    if sefa_components:
        for number, (vector, value) in enumerate(sefa(generator, sefa_components, layers)):
            unsupervised.append((f"sefa_{number}", vector, {"kind": "sefa", "eigenvalue": value}))
    _check_names([factor.name for factor in factors], [name for name, _, _ in unsupervised], ganspace_components)
    if ganspace_components:
        of_sefa = np.reshape([vector for _, vector, _ in unsupervised], (-1, flat.shape[1]))
        found = ganspace(generator, ganspace_components, ganspace_samples, seed, ganspace_resolution)
        for number, (vector, share) in enumerate(found):
            known = {"kind": "ganspace", "variance_share": share}
            if sefa_components:
                known["largest_sefa_cosine"] = float(np.abs(of_sefa @ vector.reshape(-1)).max())
            unsupervised.insert(number, (f"ganspace_{number}", vector, known))
    places, axes = map_latents(flat, map_method, seed)

    if 0 < shuffles < len(factors) / SIGNIFICANT:
        logger.warning(
            f"{shuffles} shuffles are too few to tell {len(factors)} factors from chance; set --shuffles to "
            f"{math.ceil(len(factors) / SIGNIFICANT)} or more"
        )
    fits = len(factors) * fits_of_probe(folds, shuffles)
    logger.info(f"{fits} fits of {len(factors)} factors to {flat.shape[1]} numbers of {len(flat)} images")
    options = {"folds": folds, "shuffles": shuffles, "resamples": resamples, "level": level, "seed": seed}
    probes = []
    for factor in factors:
        logger.info(f"probing {factor.name}")
        probes.append(fit_probe(flat, factor, patients, **options))
    adjusted = holm([probe.p_value for probe in probes]) if shuffles else [None] * len(probes)
    directions = Directions(generator.space, generator.sha256)
    for probe, p_adjusted in zip(probes, adjusted, strict=True):
        known = {"kind": probe.factor.kind, **{name: found.value for name, found in probe.figures.items()}}
        known |= {"p_value": probe.p_value, "p_adjusted": p_adjusted, "n": probe.n}
        directions.add_probe(probe.name, probe.weight.reshape(latents.shape[1:]), probe.bias, latents, **known)
    for name, vector, known in unsupervised:
        directions.add(name, vector, latents, **known)

    folder = Path(output_dir)
    write_table(folder / "probes.csv", probe_rows(probes, adjusted, left_out))
    write_map_page(folder / "map.html", places, axes, embedding.items, factors)
    write_map_picture(folder / "images" / "map.png", places, axes, factors)
    directions.write(folder)
    _draw_directions(folder / "images" / "directions.png", directions, latents, start, origin, generator, batch_size)
    scores = None
    try:
        scores = factor_scores(flat, factors, patients, shuffles=factor_shuffles, level=level, seed=seed)
    except UserError as error:
        logger.warning(f"DCI and SAP left out: {error}")
    record = {
        **_figures(probes, adjusted, scores),
        "n": len(latents),
        "n_patients": len(set(patients)),
        "n_left_out": len(left_out),
        "generator_sha256": generator.sha256,
        "seed": seed,
        "git": git_revision(),
    }
    atomic_write_text(folder / "metrics.json", json.dumps(plain_json(record), indent=4, allow_nan=False) + "\n")
    for line in _summary(probes, adjusted, left_out, scores):
        logger.info(line)
    return record


def _check_names(factors: Sequence[str], sefa_names: Sequence[str], ganspace_components: int) -> None:
    """See that no name of a direction or a metric stands for two factors."""
    taken = {*sefa_names, *(f"ganspace_{number}" for number in range(ganspace_components))}
    metrics: dict[str, str] = {}
    for name in factors:
        if name in taken:
            raise UserError(f"{name} is what a direction without a label is called; rename the label")
        for end in METRIC_ENDS:
            other = metrics.setdefault(_flat_name(name) + end, name)
            if other != name:
                raise UserError(f"metrics of {other} and {name} would have one name; rename one of the labels")


def _flat_name(name: str) -> str:
    return re.sub(r"\W+", "_", name.lower())


def _start(
    embedding: Embedding, generator: LatentGenerator, image: int | str | None, seed: int
) -> tuple[NDArray[np.float64], str]:
    """(L, D) that the picture starts from, and what it is."""
    import torch

    from medgen.apps.stylisation import select_images
    from medgen.inferers import draw_latents

    if image is not None:
        index, *more = select_images(embedding, image, "image")
        if more:
            raise UserError(f"image must be one image, got {image!r:.80}; set --image to one of them")
        return embedding.latents[index].astype(np.float64), Path(embedding.items[index]["image"]).name
    if not generator.is_spherical:
        return embedding.latents.mean(0, dtype=np.float64), "the mean latent"
    labels = torch.zeros(1, dtype=torch.long) if generator.num_classes else None
    z = draw_latents([seed], generator.z_dim)
    device = generator.mean.device
    latent = generator.from_z(z.to(device), labels if labels is None else labels.to(device))
    return latent[0].double().cpu().numpy(), f"seed {seed}"


def probe_rows(
    probes: Sequence[Probe], adjusted: Sequence[float | None], left_out: Mapping[str, str]
) -> list[dict[str, Any]]:
    """A row for each factor: its figures with their intervals and what chance gives, or why it was left out."""
    rows = []
    for probe, p_adjusted in zip(probes, adjusted, strict=True):
        row = {"factor": probe.name, "kind": probe.factor.kind, "n": probe.n, "patients": probe.patients}
        if probe.factor.is_binary:
            row["positives"] = probe.positives
        for name, found in probe.figures.items():
            row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
            row[f"{name}_chance"] = probe.chance[name]
        if probe.null is not None:
            row |= dict(zip(("null_mean", "null_low", "null_high"), probe.null, strict=True))
            row |= {"p_value": probe.p_value, "p_adjusted": p_adjusted}
        rows.append({**row, "strength": probe.strength, "left_out": ""})
    return rows + [{"factor": name, "left_out": reason} for name, reason in left_out.items()]


def _figures(
    probes: Sequence[Probe], adjusted: Sequence[float | None], scores: FactorScores | None
) -> dict[str, float | None]:
    """Flat names, such as ``auroc_pneumonia_low``."""
    figures: dict[str, float | None] = {}
    for probe, p_adjusted in zip(probes, adjusted, strict=True):
        name = _flat_name(probe.name)
        for figure, found in probe.figures.items():
            figures |= {f"{figure}_{name}": found.value}
            figures |= {f"{figure}_{name}_low": found.low, f"{figure}_{name}_high": found.high}
            figures[f"{figure}_{name}_chance"] = probe.chance[figure]
        if probe.null is not None:
            ends = zip(("null_mean", "null_low", "null_high"), probe.null, strict=True)
            figures |= {f"{probe.headline}_{name}_{end}": value for end, value in ends}
            figures |= {f"p_value_{name}": probe.p_value, f"p_adjusted_{name}": p_adjusted}
    if scores is not None:
        figures |= scores.scores
        for name, chance in scores.shuffled.items():
            ends = ("shuffled", "shuffled_low", "shuffled_high")
            figures |= {f"{name}_{end}": value for end, value in zip(ends, chance, strict=True)}
        figures["n_factor_scores"] = scores.n
    return figures


def _summary(
    probes: Sequence[Probe],
    adjusted: Sequence[float | None],
    left_out: Mapping[str, str],
    scores: FactorScores | None,
) -> list[str]:
    lines = []
    for probe, p_adjusted in zip(probes, adjusted, strict=True):
        found = probe.figures[probe.headline]
        line = f"{probe.name}: {probe.headline.upper()} {found.value:.3f} ({found.low:.3f} to {found.high:.3f})"
        if probe.null is not None:
            line += f", chance {probe.null[1]:.3f} to {probe.null[2]:.3f}, p {probe.p_value:.3g}"
            line += f", {p_adjusted:.3g} of {len(probes)} factors"
        lines.append(line)
    lines += [f"{name} left out: {reason}" for name, reason in left_out.items()]
    for name, value in scores.scores.items() if scores is not None else ():
        chance = scores.shuffled.get(name)
        shuffled = "" if chance is None else f", shuffled {chance[0]:.3f} ({chance[1]:.3f} to {chance[2]:.3f})"
        lines.append(f"{name}: {value:.3f}{shuffled}")
    return lines


def _draw_directions(
    path: Path,
    directions: Directions,
    latents: NDArray,
    start: NDArray[np.float64],
    origin: str,
    generator: LatentGenerator,
    batch_size: int,
) -> None:
    """A row for each direction: one image at strengths from -3 to 3. Of a network with classes, the class stays."""
    rows, captions, axes = [], [], class_axes(generator)
    for name, record in directions.records.items():
        try:
            direction = unit(orthogonalise(directions.vector(name), axes))
            vector = direction * spread_along(direction, latents)
            moved = move(start[None], vector, GRID_STRENGTHS, axes, generator.is_spherical)[0]
        except UserError as error:
            logger.warning(f"{name} left out of {path.name}: {error}")
            continue
        rows.append(render(generator, moved, batch_size))
        figures = [f"{key.upper()} {record[key]:.2f}" for key in ("auroc", "r2") if key in record]
        if record.get("p_adjusted") is not None:
            figures.append(f"adjusted p {record['p_adjusted']:.2g}")
        captions.append("\n".join([name, *figures]))
    if rows:
        names = [f"{strength:+g}" if strength else "0" for strength in GRID_STRENGTHS]
        captioned_grid(path, rows, captions, names, f"synthetic, from {origin}")


def class_axes(generator: LatentGenerator) -> list[NDArray[np.float64]]:
    """The axes (L, D) of z that hold the class of a network with classes, which no move may change."""
    if generator.space != "z":
        return []
    return [unit(axis[None]) for axis in np.eye(generator.latent_shape[1])[generator.z_dim :]]


def captioned_grid(
    path: str | Path, rows: Sequence[NDArray], row_names: Sequence[str], column_names: Sequence[str], title: str
) -> None:
    """Rows of images with a name beside each row and above each column, as a PNG.

    Args:
        path: the file.
        rows: each (N, C, H, W) in [0, 1], C 1 or 3, N at most as many as columns.
        row_names: of the rows.
        column_names: of the columns.
        title: of the whole, cut to what fits above the row names.
    """
    from PIL import Image, ImageDraw, ImageFont

    _, _, H, W = rows[0].shape
    factor = max(1, -(-CELL // max(H, W)))
    high, wide = H * factor + GAP, W * factor + GAP
    canvas = Image.new("RGB", (LEFT + wide * len(column_names), TOP + high * len(rows)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    while draw.textlength(title, font) > LEFT - 10:
        title = title[:-2] + "…"
    draw.text((LEFT - 8, TOP // 2), title, "black", font, anchor="rm")
    for column, name in enumerate(column_names):
        draw.text((LEFT + wide * column + wide // 2, TOP // 2), name, "black", font, anchor="mm")
    for number, (images, name) in enumerate(zip(rows, row_names, strict=True)):
        draw.text((LEFT - 8, TOP + high * number + high // 2), name, "black", font, anchor="rm", align="right")
        for column, image in enumerate(images):
            pixels = (np.clip(image, 0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
            tile = Image.fromarray(pixels if len(image) == 3 else np.ascontiguousarray(pixels[..., 0]))
            tile = tile.resize((W * factor, H * factor), Image.Resampling.NEAREST)
            canvas.paste(tile, (LEFT + wide * column, TOP + high * number))
    with atomic_file(path) as file:
        canvas.save(file, format="PNG")
