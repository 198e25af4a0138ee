"""Detection figures of a table of anomaly scores: each score's, MSE against Wasserstein distance, and the ROC curves.

A table has a row per image with ``anomaly`` (1, or 0 for an image like the training data), ``patient``, and the scores
of :class:`~medgen.metrics.anomaly.AnomalyScores`; a score that an image lacks is None or NaN.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medgen.errors import UserError
from medgen.metrics.detection import (
    SHUFFLES,
    auroc_bootstrap,
    auroc_delong,
    auroc_source_subsampling,
    average_precision_bootstrap,
    delong_test,
    permutation_tests,
    sensitivity_at_specificity,
)
from medgen.metrics.intervals import CHEAP_RESAMPLES, Estimate
from medgen.output import atomic_file, atomic_write_text, git_revision, plain_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "MEASURES",
    "SCORE_COLUMNS",
    "DetectionTable",
    "detection_figures",
    "detection_report",
    "read_scores",
    "roc_curve",
    "roc_figure",
    "write_detection",
    "write_table",
]

MEASURES = {"mse": "MSE", "wd": "Wasserstein distance"}
REGIONS = ("full", "body", "patch")
SCORE_COLUMNS = tuple(f"{measure}_{region}" for measure in MEASURES for region in REGIONS)
SPECIFICITIES = (0.9, 0.95)
STYLES = {"mse": {"color": "#1d4ed8"}, "wd": {"color": "#c2410c", "linestyle": "--"}}

Row = Mapping[str, Any]


@dataclass(frozen=True)
class DetectionTable:
    """Result of :func:`detection_figures`.

    Args:
        figures: flat names such as ``auroc_mse_full``, ``auroc_mse_full_low``, ``permutation_p_wd_patch``; what could
            not be computed is left out.
        rows: the same as a table with a row per score; None where a figure could not be computed.
        counts: ``n_normal``, ``n_anomalous``, ``patients_normal``, ``patients_anomalous`` of the whole table.
        notes: what was left out and why, one line each.
    """

    figures: dict[str, float]
    rows: tuple[dict[str, Any], ...]
    counts: dict[str, int]
    notes: tuple[str, ...]

    def summary(self) -> str:
        """A line per score with its AUROC, then the notes."""
        lines = [", ".join(f"{name} {value}" for name, value in self.counts.items())]
        for row in self.rows:
            if "auroc" in row:
                lines.append(
                    f"{row['score']}: AUROC {row['auroc']:.3f} ({row['auroc_low']:.3f} to {row['auroc_high']:.3f})"
                )
        return "\n".join([*lines, *self.notes])


def detection_figures(
    rows: Sequence[Row],
    *,
    resamples: int = CHEAP_RESAMPLES,
    shuffles: int = SHUFFLES,
    level: float = 0.95,
    seed: int = 0,
) -> DetectionTable:
    """How well each score of a table tells anomalies from ordinary images.

    Per score: AUROC with the interval of a bootstrap by patient and that of DeLong, the mean and standard deviation of
    the source's subsampling protocol, average precision, sensitivity at a specificity of 0.9 and 0.95, and a one-sided
    permutation test of whether anomalies have the larger mean. Per region: DeLong's test of MSE against Wasserstein
    distance on the images that have both.

    A figure that the images do not allow (a test by patient where patients have images of both classes, a single
    patient of a class) is left out, and a note says why; so is an image without a score, such as one in which no body
    was found.

    Args:
        rows: of all images, of both classes. Where any lacks its ``patient``, each image counts as its own.
        resamples: of each bootstrap.
        shuffles: of each permutation test.
        level: of confidence, between 0 and 1.
        seed: of all draws.

    Returns:
        The figures.

    Raises:
        UserError: an ``anomaly`` that is neither 0 nor 1, a class without images, or no column of scores.
    """
    labels = np.array([_label(row) for row in rows], dtype=bool)
    if not labels.any() or labels.all():
        raise UserError(
            f"both classes are needed, got {int(labels.sum())} anomalous and {int((~labels).sum())} normal images; "
            "add images of the class that is missing"
        )
    columns = {name: _column(rows, name) for name in SCORE_COLUMNS if any(name in row for row in rows)}
    if not columns:
        raise UserError(f"a table of scores needs one of the columns {', '.join(SCORE_COLUMNS)}; write it by scoring")
    notes: list[str] = []
    patients = None
    if all(str(row.get("patient") or "") for row in rows):
        patients = np.array([str(row["patient"]) for row in rows])
    else:
        notes.append("not every image names its patient: each image counts as its own, which may be too narrow")
    settings = {"resamples": resamples, "level": level, "seed": seed}
    p_values = _permutation_p_values(columns, labels, patients, shuffles, seed)
    figures: dict[str, float] = {}
    table: dict[str, dict[str, Any]] = {}
    concerned: dict[str, list[str]] = {}  # problem -> scores that have it: most hold for all of them
    for name, values in columns.items():
        known = np.isfinite(values)
        chosen = None if patients is None else patients[known]
        found, problems = _figures_of(values[known], labels[known], chosen, p_values[name], settings)
        lost = {"normal": int((~known & ~labels).sum()), "anomalous": int((~known & labels).sum())}
        if sum(lost.values()):
            problems.insert(
                0, f"{lost['normal']} normal and {lost['anomalous']} anomalous images without it are left out"
            )
        for problem in problems:
            concerned.setdefault(problem, []).append(name)
        table[name] = {"score": name, **_counts(labels[known], chosen), "left_out": sum(lost.values())}
        table[name] |= {f"{stem}{suffix}": value for (stem, suffix), value in found.items()}
        table[name]["note"] = "; ".join(problems)
        figures |= {f"{stem}_{name}{suffix}": value for (stem, suffix), value in found.items()}
    notes += [f"{', '.join(names)}: {problem}" for problem, names in concerned.items()]
    for region in REGIONS:
        pair = [f"{measure}_{region}" for measure in MEASURES]
        if not set(pair) <= columns.keys():
            continue
        first, second = (columns[name] for name in pair)
        known = np.isfinite(first) & np.isfinite(second)
        try:
            test = delong_test(
                first[known], second[known], labels[known], None if patients is None else patients[known], level=level
            )
        except UserError as error:
            notes.append(f"{' against '.join(pair)}: {error}")
            continue
        figures[f"auroc_mse_minus_wd_{region}"] = test.difference
        figures[f"auroc_mse_minus_wd_{region}_low"] = test.low
        figures[f"auroc_mse_minus_wd_{region}_high"] = test.high
        figures[f"delong_p_{region}"] = test.p_value
        for name in pair:
            table[name] |= {"mse_minus_wd": test.difference, "delong_p": test.p_value}
    return DetectionTable(figures, tuple(table.values()), _counts(labels, patients), tuple(notes))


def _permutation_p_values(
    columns: Mapping[str, NDArray[np.float64]],
    labels: NDArray[np.bool_],
    patients: NDArray[np.str_] | None,
    shuffles: int,
    seed: int,
) -> dict[str, float | UserError]:
    """Per score the p-value, or why there is none; scores that the same images have are shuffled together."""
    together: dict[bytes, list[str]] = {}
    for name, values in columns.items():
        together.setdefault(np.isfinite(values).tobytes(), []).append(name)
    found: dict[str, float | UserError] = {}
    for names in together.values():
        known = np.isfinite(columns[names[0]])
        groups = [known & labels, known & ~labels]
        try:
            tests = permutation_tests(
                *([columns[name][group] for name in names] for group in groups),
                alternative="greater",
                shuffles=shuffles,
                seed=seed,
                first_patients=None if patients is None else patients[groups[0]],
                second_patients=None if patients is None else patients[groups[1]],
            )
            found |= {name: test.p_value for name, test in zip(names, tests, strict=True)}
        except UserError as error:
            found |= dict.fromkeys(names, error)
    return found


def _figures_of(
    scores: NDArray[np.float64],
    labels: NDArray[np.bool_],
    patients: NDArray[np.str_] | None,
    p_value: float | UserError,
    settings: Mapping[str, Any],
) -> tuple[dict[tuple[str, str], float], list[str]]:
    """Figures of one score as {(name, suffix): value}, and why others are missing."""
    found: dict[tuple[str, str], float] = {}
    problems: list[str] = []

    def add(name: str, make: Callable[[], dict[str, float]]) -> None:
        try:
            found.update({(name, suffix): value for suffix, value in make().items()})
        except UserError as error:
            problems.append(f"no {name}: {error}")

    def with_interval(estimate: Estimate) -> dict[str, float]:
        return {"": estimate.value, "_low": estimate.low, "_high": estimate.high}

    def delong() -> dict[str, float]:
        estimate = auroc_delong(scores, labels, patients, level=settings["level"])
        return {"_low": estimate.low, "_high": estimate.high}

    def source() -> dict[str, float]:
        result = auroc_source_subsampling(scores, labels, seed=settings["seed"])
        return {"_mean": result.mean, "_sd": result.sd}

    def sensitivity(specificity: float) -> dict[str, float]:
        point = sensitivity_at_specificity(scores, labels, patients, specificity=specificity, **settings)
        return {**with_interval(point.sensitivity), "_threshold": point.threshold}

    def permutation() -> dict[str, float]:
        if isinstance(p_value, UserError):
            raise p_value
        return {"": p_value}

    add("auroc", lambda: with_interval(auroc_bootstrap(scores, labels, patients, **settings)))
    add("auroc_delong", delong)
    add("auroc_source", source)
    add("average_precision", lambda: with_interval(average_precision_bootstrap(scores, labels, patients, **settings)))
    for specificity in SPECIFICITIES:
        add(f"sensitivity_at_{round(100 * specificity)}", lambda at=specificity: sensitivity(at))
    add("permutation_p", permutation)
    return found, problems


def read_scores(path: str | PathLike[str], anomaly: int | None = None) -> list[dict[str, Any]]:
    """Rows of a ``scores.csv``.

    Args:
        path: CSV with a header; columns beyond ``patient``, ``anomaly`` and the scores are kept as text.
        anomaly: class of every row where the table does not say; None: the column ``anomaly`` must.

    Returns:
        A dictionary a row; an empty score is None.

    Raises:
        UserError: no such file, no rows, a score that is no number, or a class that is neither 0 nor 1, is missing or
            contradicts ``anomaly``.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # Excel puts a byte order mark first
            rows: list[dict[str, Any]] = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or "not a CSV in UTF-8"
        raise UserError(f"{path} cannot be read ({reason}); name a scores.csv that scoring wrote") from error
    if not rows:
        raise UserError(f"{path} has no rows; score some images first")
    for number, row in enumerate(rows, 2):
        for name in (name for name in SCORE_COLUMNS if name in row):
            row[name] = _number(row[name], f"{path}, line {number}, {name}")
        given = _number(row.get("anomaly"), f"{path}, line {number}, anomaly")  # pandas writes 1.0
        if given not in (None, 0, 1):
            raise UserError(f"{path}, line {number}: anomaly must be 0 or 1, got {row['anomaly']}; mend the table")
        if anomaly is not None and given not in (None, anomaly):
            raise UserError(
                f"{path}, line {number}: anomaly is {given:g}, but the table was given as one of class {anomaly} "
                "alone; give one table with both classes, or two with one each"
            )
        if anomaly is None and given is None:
            raise UserError(
                f"{path}, line {number}: names no class in a column anomaly (0 or 1); add it, or give the anomalous "
                "images as a second table with --anomalous_scores"
            )
        row["anomaly"] = anomaly if given is None else int(given)
    return rows


def roc_curve(scores: NDArray[np.float64], labels: NDArray[np.bool_]) -> tuple[NDArray, NDArray]:
    """Points of the ROC curve from (0, 0) to (1, 1); images of equal score are passed together.

    Args:
        scores: (N,) finite; high means anomalous.
        labels: (N,) bool, True for an anomaly; both classes are there.

    Returns:
        Share of ordinary images above each threshold, share of anomalies above it, both ascending.
    """
    order = np.argsort(-scores, kind="stable")
    ordered, anomalies = scores[order], np.cumsum(labels[order])
    ends = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)
    found, false = anomalies[ends], ends + 1 - anomalies[ends]
    return np.append(0, false) / (~labels).sum(), np.append(0, found) / labels.sum()


def roc_figure(rows: Sequence[Row], table: DetectionTable) -> Figure:
    """ROC curves, one panel a region, MSE and Wasserstein distance in each.

    Args:
        rows: what the table was made of.
        table: its figures, for the legend.

    Returns:
        A matplotlib figure that is not registered with pyplot.
    """
    from matplotlib.figure import Figure

    labels = np.array([_label(row) for row in rows], dtype=bool)
    figure = Figure(figsize=(4 * len(REGIONS), 4.3), layout="constrained")
    for region, axes in zip(REGIONS, figure.subplots(1, len(REGIONS)), strict=True):
        axes.plot([0, 1], [0, 1], color="0.6", linestyle=":", linewidth=1)
        for measure, title in MEASURES.items():
            name = f"{measure}_{region}"
            if f"auroc_{name}" not in table.figures:
                continue
            values = _column(rows, name)
            known = np.isfinite(values)
            value, low, high = (table.figures[f"auroc_{name}{end}"] for end in ("", "_low", "_high"))
            text = f"{title}: {value:.2f} ({low:.2f} to {high:.2f})"
            axes.plot(*roc_curve(values[known], labels[known]), **STYLES[measure], label=text)
        axes.set(title=region, xlabel="1 − specificity", ylabel="sensitivity", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
        axes.set_aspect("equal")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(title="AUROC", loc="lower right", fontsize=8, title_fontsize=8)
    return figure


def write_detection(rows: Sequence[Row], table: DetectionTable, csv_path: Path, figure_path: Path) -> None:
    """Write the table as CSV and the ROC curves as PNG.

    Args:
        rows: what the table was made of.
        table: the figures.
        csv_path: the CSV, a row per score.
        figure_path: the PNG.
    """
    write_table(csv_path, table.rows)
    with atomic_file(figure_path) as file:
        roc_figure(rows, table).savefig(file, format="png", dpi=120)


def write_table(path: str | PathLike[str], rows: Sequence[Row]) -> None:
    """Write rows as CSV, whole or not at all: every column that any row has, None and NaN as empty cells.

    Args:
        path: the file.
        rows: at least one.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: plain_json(value) for name, value in row.items()} for row in rows)
    atomic_write_text(path, text.getvalue())


def detection_report(
    scores: str | PathLike[str],
    anomalous_scores: str | PathLike[str] | None,
    output_dir: str | PathLike[str],
    *,
    distinct: bool = False,
    resamples: int = CHEAP_RESAMPLES,
    shuffles: int = SHUFFLES,
    level: float = 0.95,
    seed: int = 0,
) -> DetectionTable:
    """From tables of scores to ``detection.json``, ``detection.csv`` and ``images/roc.png``.

    A ``metrics.json`` in the folder stays as it is: that of an evaluation says which weights it measured.

    Args:
        scores: CSV of the normal images, or of all images with a column ``anomaly``.
        anomalous_scores: CSV of the anomalous images, or None.
        output_dir: folder of the three files.
        distinct: whether the two tables are of different people throughout, whatever their names: images of folders
            without DICOM attributes are named after their files, and two folders may both hold a ``0001.png``.
        resamples: see :func:`detection_figures`.
        shuffles: see :func:`detection_figures`.
        level: see :func:`detection_figures`.
        seed: see :func:`detection_figures`.

    Returns:
        The figures.

    Raises:
        UserError: as for :func:`read_scores` and :func:`detection_figures`.
    """
    notes: tuple[str, ...] = ()
    if anomalous_scores:
        normal, anomalous = read_scores(scores, anomaly=0), read_scores(anomalous_scores, anomaly=1)
        names = [{row["patient"] for row in rows if row.get("patient")} for rows in (normal, anomalous)]
        shared = sorted(names[0] & names[1])
        if shared and distinct:
            for row in (row for row in anomalous if row.get("patient")):
                row["patient"] = f"anomalous {row['patient']}"
        elif shared:
            notes = (
                f"{len(shared)} patients are in both tables ({shared[0]} is one) and count as the same people; where "
                "they are others, as with files of one name in two folders, give --distinct true",
            )
        rows = [*normal, *anomalous]
    else:
        rows = read_scores(scores)
    table = detection_figures(rows, resamples=resamples, shuffles=shuffles, level=level, seed=seed)
    table = replace(table, notes=(*notes, *table.notes))
    folder = Path(output_dir)
    write_detection(rows, table, folder / "detection.csv", folder / "images" / "roc.png")
    record = {**table.figures, **table.counts, "n": len(rows), "seed": seed, "git": git_revision()}
    atomic_write_text(folder / "detection.json", json.dumps(plain_json(record), indent=4, allow_nan=False) + "\n")
    return table


def _label(row: Row) -> int:
    value = row.get("anomaly")
    number = _number(value, "anomaly") if isinstance(value, str) else value
    if number is None or number not in (0, 1):
        raise UserError(f"anomaly must be 1 or 0 in every row, got {value!r} for {row.get('image', 'an image')}")
    return int(number)


def _column(rows: Sequence[Row], name: str) -> NDArray[np.float64]:
    """(N,), NaN where an image has no such score."""
    return np.array([math.nan if row.get(name) is None else float(row[name]) for row in rows])


def _counts(labels: NDArray[np.bool_], patients: NDArray[np.str_] | None) -> dict[str, int]:
    counts = {"n_normal": int((~labels).sum()), "n_anomalous": int(labels.sum())}
    if patients is not None:
        counts["patients_normal"] = len(np.unique(patients[~labels]))
        counts["patients_anomalous"] = len(np.unique(patients[labels]))
    return counts


def _number(text: str | None, where: str) -> float | None:
    if text is None or not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"{where}: expected a number, got {text!r}; mend the table") from None
    if not math.isfinite(value):
        raise UserError(f"{where}: expected a finite number or an empty cell, got {text!r}; mend the table")
    return value
