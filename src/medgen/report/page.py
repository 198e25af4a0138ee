"""The report as one self-contained HTML file: no script, no network, no file beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from medgen.data.image_set import ImageSet
from medgen.metrics.protocols import PROTOCOLS
from medgen.output import git_revision
from medgen.report import charts
from medgen.report.measure import BASELINE_REPEATS, NEAREST_K, Distance, Measurements, features_file

__all__ = ["render"]

GRID = 24  # images of each set that are shown
TOP_FEATURES = 10
WORST_PAIRS = 8
HELD_OUT_NAMES = {"held_out": "reference images", "training": "training images, each against other patients'"}
NO_VALUE = "–"


def render(found: Measurements, title: str, created: str, versions: dict[str, str], command: str = "") -> str:
    """The page.

    Args:
        found: what was measured.
        title: heading.
        created: date and time.
        versions: of the libraries.
        command: the command line that asked for it.

    Returns:
        HTML.
    """
    environment = Environment(
        loader=PackageLoader("medgen.report", "."),
        autoescape=True,  # file names and messages are others' text
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": _figure, "range": _range}
    images = found.image_sets()
    shown = {role: of for role, of in images.items() if role != "training"}
    return environment.get_template("page.html.jinja").render(
        title=title,
        created=created.replace("T", " "),
        versions=versions,
        git=git_revision(),
        seed=found.seed,
        command=command,
        cards=_cards(found),
        notes=found.notes,
        sets=[_set(role, of) for role, of in images.items()],
        grids=[_grid(role, of, found.seed) for role, of in shown.items()],
        histogram=charts.intensity_histograms({r: of.summary.histogram for r, of in shown.items()}) if shown else "",
        distances=found.distances,
        interval_text=_interval_text(found),
        baseline_repeats=BASELINE_REPEATS,
        nearest_k=NEAREST_K,
        features=[_features(distance) for distance in found.distances if distance.differences],
        diversity=[{"role": role, "ms_ssim": of, **vars(of)} for role, of in found.diversity.items()],
        ms_ssim_window=next((of.window for of in found.diversity.values()), None),
        paired=_paired(found),
        memorisation=_memorisation(found) if found.memorisation is not None else None,
        protocols=[_protocol(distance) for distance in found.distances],
    )


def _figure(value: Any) -> str:
    """A number to four significant digits; of an estimate its value, of a baseline its mean."""
    for name in ("value", "mean"):
        value = getattr(value, name, value)
    if value is None or not math.isfinite(value):
        return NO_VALUE
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:.4g}"


def _range(estimate: Any) -> Markup:
    """The interval below a number; nothing where there is none."""
    low, high = getattr(estimate, "low", None), getattr(estimate, "high", None)
    if low is None or high is None or not (math.isfinite(high)):
        return Markup("")
    return Markup('<span class="range">{} to {}</span>').format(_figure(low), _figure(high))


def _cards(found: Measurements) -> list[dict[str, str]]:
    cards = []
    for distance in found.distances:
        if distance.invalid:
            continue
        base = distance.frechet_baseline
        detail = f"real against real: {_figure(base)}" if base else "no baseline"
        cards.append({"name": distance.title, "value": _figure(distance.frechet), "detail": detail})
    if found.diversity.get("samples"):
        real = found.diversity.get("reference")
        detail = f"reference: {_figure(real)}" if real else ""
        value = _figure(found.diversity["samples"])
        cards.append({"name": "MS-SSIM between samples", "value": value, "detail": detail})
    if found.memorisation is not None:
        detail = f"of {len(found.samples)} samples"
        value = str(len(found.memorisation.flagged))
        cards.append({"name": "copies of training images", "value": value, "detail": detail})
    return cards


def _set(role: str, images: ImageSet) -> dict[str, Any]:
    channels, height, width = images.summary.shapes[0]
    return {
        "role": role,
        "name": images.name.removeprefix(f"{role} "),
        "n": len(images),
        "n_patients": None if images.patients is None else len(set(images.patients)),
        "shape": f"{width} × {height} {'grey' if channels == 1 else 'RGB'}",
        "constant": len(images.summary.constant),
        "rejected": images.rejected,
    }


def _grid(role: str, images: ImageSet, seed: int) -> dict[str, str]:
    count = min(GRID, len(images))
    chosen = np.sort(np.random.default_rng(seed).choice(len(images), count, replace=False))
    return {
        "uri": charts.image_grid([images[int(i)] for i in chosen], columns=6),
        "caption": f"{count} of the {len(images)} images of the {role}, drawn at random (seed {seed}).",
    }


def _interval_text(found: Measurements) -> str:
    levels = {distance.frechet.level for distance in found.distances}
    if not levels:
        return ""
    sizes = {(distance.frechet.n_samples, distance.frechet.n_reference) for distance in found.distances}
    n = "; ".join(f"{samples} samples against {reference}" for samples, reference in sorted(sizes))
    patients = "patients" if found.reference is not None and found.reference.patients else "images"
    return f"n: {n}. Below each figure its {100 * min(levels):.0f}% interval, from drawing {patients} with replacement."


def _features(distance: Distance) -> dict[str, Any]:
    top = distance.differences[:TOP_FEATURES]
    rows = [
        {
            "name": row.name,
            "reference_mean": row.reference_mean,
            "reference_std": row.reference_std,
            "samples_mean": row.samples_mean,
            "samples_std": row.samples_std,
            "difference": row.difference,
        }
        for row in top
    ]
    return {
        "title": distance.title,
        "chart": charts.feature_bars([row.name for row in top], [row.difference for row in top]),
        "rows": rows,
        "n": len(distance.differences),
        "file": features_file(distance.protocol),
    }


def _paired(found: Measurements) -> list[dict[str, Any]]:
    if found.paired is None:
        return []
    from medgen.metrics.paired import PAIRED_METRICS

    rows = []
    for name, summary in found.paired.summary.items():
        metric = PAIRED_METRICS[name]
        best = "∞" if math.isinf(metric.best) else f"{metric.best:g}"
        rows.append(
            {
                "title": metric.title,
                "estimate": summary,
                "best": f"{best} ({metric.direction} is better)",
                "n": summary.n,
                "note": summary.note,
            }
        )
    return rows


def _memorisation(found: Measurements) -> dict[str, Any]:
    from medgen.metrics.memorisation import draw_worst_pairs

    audit = found.memorisation
    names, others = _names(found.samples.files), _names(found.training.files)
    rows = [
        {
            "sample": names[match.sample],
            "training": others[match.training],
            "similarity": match.similarity,
            "transform": _transform(match),
            "flagged": match.flagged,
        }
        for match in audit.worst(WORST_PAIRS)
    ]
    calibration = audit.calibration
    held_out = HELD_OUT_NAMES.get(calibration.source, calibration.source)
    similarities = np.array([match.similarity for match in audit.matches if match.similarity is not None])
    chart = ""
    if calibration.n and len(similarities):
        chart = charts.similarity_histogram(similarities, np.array(calibration.scores), audit.threshold, held_out)
    pairs = ""
    if rows:
        pairs = charts.figure_png_uri(draw_worst_pairs(audit, found.samples, found.training, WORST_PAIRS))
    return {
        "summary": _audit_summary(audit, held_out),
        "notes": audit.notes,
        "chart": chart,
        "chart_caption": f"How like each sample is to its nearest of {audit.n_training} training images, beside "
        f"{held_out}.",
        "pairs": pairs,
        "pairs_caption": f"The {len(rows)} most suspicious samples, flagged or not, worst first.",
        "rows": rows,
    }


def _audit_summary(audit: Any, held_out: str) -> str:
    flagged, n = len(audit.flagged), sum(match.similarity is not None for match in audit.matches)
    if audit.share is None:
        return "All samples are constant: nothing to compare."
    text = (
        f"{flagged} of {n} samples ({100 * audit.share:.1f}%, {100 * audit.level:.0f}% interval "
        f"{100 * audit.share_low:.1f} to {100 * audit.share_high:.1f}%) are more like a training image than "
        f"independent images are"
    )
    if audit.calibration.n:
        text += (
            f", judged by {audit.calibration.n} {held_out}: limit {audit.threshold:.3f}, set so that the "
            f"chance of any false alarm is {100 * audit.alpha:g}%"
        )
    return f"{text}."


def _transform(match: Any) -> str:
    parts = [] if match.flip == "none" else [f"flipped ({match.flip})"]
    if any(match.shift):
        parts.append("shifted by {} down, {} right".format(*match.shift))
    return ", ".join(parts) or "as it is"


def _protocol(distance: Distance) -> dict[str, str]:
    row = PROTOCOLS.get(distance.protocol)
    return {
        "title": distance.title,
        "description": row.source if row else "features as given",
        "settings": json.dumps(distance.settings, sort_keys=True) if distance.settings else "",
    }


def _names(files: Sequence[str]) -> tuple[str, ...]:
    return tuple(PurePosixPath(file).name for file in files)
