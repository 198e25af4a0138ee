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
from medgen.report.measure import NEAREST_K, REPEATS
from medgen.report.measurements import Distance, Measurements

__all__ = ["features_file", "render"]

GRID = 24  # images of each set that are shown
TOP_FEATURES = 10
WORST_PAIRS = 6
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
        sets=_sets(found),
        grids=[_grid(role, of, found.seed) for role, of in shown.items()],
        histogram=charts.intensity_histograms({r: of.summary.histogram for r, of in shown.items()}) if shown else "",
        distances=found.distances,
        verdicts=found.verdicts(),
        interval_text=_interval_text(found),
        repeats=REPEATS,
        nearest_k=NEAREST_K,
        patches=found.patches,
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
        equal, base = distance.frechet_equal, distance.frechet_baseline
        detail = f"{_interval(distance.frechet)}, n = {distance.frechet.n_samples}; "
        if equal and base:
            detail += f"at equal n {_figure(equal)}, real against real {_figure(base)}"
        else:
            detail += "no baseline"
        cards.append({"name": distance.title, "value": _figure(distance.frechet), "detail": detail})
    if found.diversity.get("samples"):
        of, real = found.diversity["samples"], found.diversity.get("reference")
        detail = _interval(of) + (f"; reference {_figure(real)}" if real else "")
        cards.append({"name": "MS-SSIM between samples", "value": _figure(of), "detail": detail})
    if found.memorisation is not None:
        audit = found.memorisation
        detail = f"of {len(found.samples)} samples"
        if audit.share is not None:
            detail += f": {100 * audit.share_low:.1f} to {100 * audit.share_high:.1f}%"
        cards.append({"name": "copies of training images", "value": str(len(audit.flagged)), "detail": detail})
    return cards


def _interval(estimate: Any) -> str:
    if estimate.low is None or not math.isfinite(estimate.low) or not math.isfinite(estimate.high):
        return "no interval"
    return f"{_figure(estimate.low)} to {_figure(estimate.high)}"


def features_file(protocol: str) -> str:
    """Name of the per-feature table of a protocol."""
    return f"features_{protocol}.csv"


def _sets(found: Measurements) -> list[dict[str, Any]]:
    rows = []
    for role, (name, n, patients) in found.feature_files.items():
        row = {"role": role, "name": name, "n": n, "n_patients": patients, "shape": "features"}
        rows.append({**row, "constant": NO_VALUE, "n_rejected": NO_VALUE, "left_out": []})
    for role, images in found.image_sets().items():
        channels, height, width = images.summary.shapes[0]
        rows.append(
            {
                "role": role,
                "name": images.name.removeprefix(f"{role} "),
                "n": len(images),
                "n_patients": None if images.patients is None else len(set(images.patients)),
                "shape": f"{width} × {height} {'grey' if channels == 1 else 'RGB'}",
                "constant": len(images.summary.constant),
                "n_rejected": len(images.rejected),
                "left_out": [(file, reason) for of, file, reason in found.left_out() if of == role],
            }
        )
    return rows


def _grid(role: str, images: ImageSet, seed: int) -> dict[str, str]:
    count = min(GRID, len(images))
    chosen = np.sort(np.random.default_rng(seed).choice(len(images), count, replace=False))
    return {
        "uri": charts.image_grid([images[int(i)] for i in chosen], columns=6),
        "caption": f"{count} of the {len(images)} images of the {role}, drawn at random (seed {seed}).",
    }


def _interval_text(found: Measurements) -> str:
    if not found.distances:
        return ""
    sizes = {(distance.frechet.n_samples, distance.frechet.n_reference) for distance in found.distances}
    n = "; ".join(f"{samples} samples against {reference}" for samples, reference in sorted(sizes))
    drawn = {
        f"{'patients' if real else 'images'} of the reference and {'patients' if judged else 'images'} of the samples"
        for real, judged in (distance.by_patient for distance in found.distances)
    }
    level = 100 * min(distance.frechet.level for distance in found.distances)
    return f"n: {n}. Below each figure its {level:.0f}% interval, from drawing {', '.join(sorted(drawn))} again."


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
                "note": "; ".join(part for part in summary.note.split("; ") if "resamples" not in part),
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
            "excess": match.excess,
            "p_value": match.p_value,
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
        "features": _feature_summary(audit, next((d.title for d in found.distances), "")),
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


def _feature_summary(audit: Any, title: str) -> str:
    of = audit.features
    if of is None or of.closer is None:
        return ""
    return (
        f"In the features of {title}: a sample is nearer to the training images than an independent image is with "
        f"probability {of.closer:.2f} (0.5 would be ideal; p = {of.closer_p_value:.2g} that it is no more), and "
        f"{len(of.flagged)} are nearer than any plausible independent image. Nearness there is a reason to look, not a "
        "finding: smooth images are near without being copies."
    )


def _transform(match: Any) -> str:
    parts = [] if match.flip == "none" else [f"flipped ({match.flip})"]
    if any(match.shift):
        down, right = match.shift
        moved = [f"{abs(down)} {'down' if down > 0 else 'up'}"] if down else []
        moved += [f"{abs(right)} {'right' if right > 0 else 'left'}"] if right else []
        parts.append(f"shifted by {', '.join(moved)}")
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
