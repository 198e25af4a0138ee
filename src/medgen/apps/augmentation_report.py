"""The report of an augmentation study: tables and a picture from the predictions of its runs."""

from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medgen.apps.probes import holm
from medgen.errors import UserError
from medgen.metrics.arm_comparison import SHUFFLES, ArmFigure, compare_arms
from medgen.metrics.classification import (
    CLASSIFICATION_METRICS,
    ScoredImages,
    check_probabilities,
    confidence_and_outcome,
    equal_bins,
)
from medgen.metrics.detection_table import write_table
from medgen.metrics.intervals import CHEAP_RESAMPLES
from medgen.output import atomic_file, atomic_write_text, git_revision, plain_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["REFERENCE", "Arm", "AugmentationReport", "Predictions", "check_same_images", "read_predictions"]

logger = logging.getLogger(__name__)

REFERENCE = "real"  # arm that the others are held against
PRIMARY = (
    "auroc"  # chosen before any study was looked at: needs no threshold, and is what the best weights are taken by
)
OF_A_CLASS = ("auroc", "average_precision", "sensitivity", "specificity")
DRAWN = ("auroc", "average_precision", "sensitivity", "specificity", "accuracy", "ece")
SIGNIFICANT = 0.05
# Okabe and Ito 2008, told apart with any colour vision; marks differ as well
BETTER, WORSE, OPEN, LINE = "#009E73", "#D55E00", "#0072B2", "#555555"
COLUMNS = 5  # reliability diagrams in a row

_ABOUT_INTERVALS = (
    "Each figure is the mean over the seeds. Intervals ({level:.0%}) and p are for other patients and, with two seeds "
    "or more, for other trainings as well, of which two seeds tell next to nothing and three little: five are better. "
    "P *of these networks* takes the trained networks for given and asks for other patients alone. Tests are "
    "two-sided and paired: the same patients, the same seeds. The one primary figure is {primary} of all images: its "
    "Holm's p allows for all arms that are held against *{reference}*. The other figures, and those of single classes, "
    "are descriptive: Holm's p allows for the arms of one figure, and of many figures some are below {significant:g} "
    "by chance."
)
_ABOUT_CALIBRATION = (
    "Brier score, calibration error and negative log-likelihood are best at 0; calibration in the large is above 0 "
    "where probabilities are too high, as they are when a class was made more frequent in training than it is."
)


@dataclass(frozen=True)
class Predictions:
    """What a classifier says of the images of a split.

    Args:
        images: (N,) their names.
        patients: (N,) theirs.
        labels: (N,) true classes.
        probabilities: (N, K).
    """

    images: tuple[str, ...]
    patients: tuple[str, ...]
    labels: NDArray[np.intp]
    probabilities: NDArray[np.float64]


@dataclass(frozen=True)
class Arm:
    """Runs of an arm.

    Args:
        name: of the arm.
        real: training images by class.
        synthetic: the same of the synthetic ones.
        runs: seed -> predictions for the test images, and the threshold of p1 (None: 0.5, or several classes).
        failed: seed -> why it has none.
        left_out: why the arm was not run; "" where it was.
    """

    name: str
    real: Sequence[int] = ()
    synthetic: Sequence[int] = ()
    runs: Mapping[int, tuple[Predictions, float | None]] = field(default_factory=dict)
    failed: Mapping[int, str] = field(default_factory=dict)
    left_out: str = ""

    @property
    def reason(self) -> str:
        """Why runs are missing, one line; "" where none is."""
        return self.left_out or "; ".join(f"seed {seed}: {why}" for seed, why in self.failed.items())


def read_predictions(path: str | os.PathLike[str], num_classes: int) -> Predictions:
    """A ``predictions.csv`` of an evaluation: ``image, patient, label, p0, p1, ...``.

    Args:
        path: the CSV.
        num_classes: K.

    Raises:
        UserError: no such file or none of these columns, an image that stands in it twice, a label or a probability
            that is none.
    """
    columns = ["image", "patient", "label", *(f"p{k}" for k in range(num_classes))]
    try:
        with open(path, newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            rows = list(table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or "not a CSV in UTF-8"
        raise UserError(f"{path} cannot be read ({reason}); delete its folder, and the run is done again") from error
    missing = [name for name in columns if name not in (table.fieldnames or ())]
    if missing or not rows or f"p{num_classes}" in (table.fieldnames or ()):
        raise UserError(
            f"{path} must have rows with {', '.join(columns)}, got {len(rows)} rows with "
            f"{', '.join(table.fieldnames or ()) or 'nothing'}; set --num_classes as in the training"
        )
    images = tuple(row["image"] for row in rows)
    if len(set(images)) < len(images):
        twice = next(name for number, name in enumerate(images) if name in images[:number])
        raise UserError(f"{path}: {twice} stands in it twice; evaluate again on a datalist without doubles")
    try:
        labels = np.array([int(row["label"]) for row in rows])
        probabilities = np.array([[float(row[name]) for name in columns[3:]] for row in rows])
        check_probabilities(probabilities, labels)
    except (TypeError, ValueError) as error:  # UserError is one: its line says what is wrong
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    return Predictions(images, tuple(row["patient"] for row in rows), labels, probabilities)


def check_same_images(first: Predictions, other: Predictions, names: tuple[str, str]) -> None:
    """See that two runs were judged by the same images in the same order.

    Args:
        first: of one run.
        other: of the other.
        names: of the two runs.

    Raises:
        UserError: names the first image that differs.
    """
    mine, others = (list(zip(p.images, p.patients, p.labels.tolist(), strict=True)) for p in (first, other))
    if mine == others:
        return
    place = next((n for n, (a, b) in enumerate(zip(mine, others, strict=False)) if a != b), min(len(mine), len(others)))
    row, its = (str(rows[place]) if place < len(rows) else "nothing" for rows in (mine, others))
    raise UserError(
        f"all runs must be judged by the same test images in the same order, got {len(mine)} of {names[0]} and "
        f"{len(others)} of {names[1]}, which differ at row {place + 1}: {row} and {its}; delete the older of the two"
    )


class AugmentationReport:
    """The figures of all arms, as ``study.md``, ``study.csv``, ``study.json`` and ``study.png``.

    Args:
        arms: in the order of the tables; ``real`` among them, if the others are to be held against it.
        class_names: of the K classes; with two the second is the one to be found.
        about: name -> text, told at the head.
        steps: optimisation steps of every run, for the table of arms; None for unknown.
        resamples: of the intervals.
        shuffles: of the tests.
        level: of confidence.
        seed: of both.

    Attributes:
        rows: a dictionary for each arm and figure; of more than two classes also for each class.

    Raises:
        UserError: no arm has predictions, or runs were judged by other images.
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        class_names: Sequence[str],
        about: Mapping[str, str],
        steps: int | None = None,
        resamples: int = CHEAP_RESAMPLES,
        shuffles: int = SHUFFLES,
        level: float = 0.95,
        seed: int = 0,
    ) -> None:
        self.arms, self.class_names, self.about, self.steps = list(arms), list(class_names), dict(about), steps
        self.level = level
        self.done = [arm for arm in self.arms if arm.runs]
        if not self.done:
            raise UserError("a report needs predictions of at least one run, got none; see why the runs failed")
        runs = [(f"{arm.name}, seed {seed}", run) for arm in self.done for seed, (run, _) in arm.runs.items()]
        self.first = runs[0][1]
        for name, run in runs[1:]:
            check_same_images(self.first, run, (runs[0][0], name))
        scored = {
            arm.name: {s: ScoredImages.of(run.probabilities, run.labels, at) for s, (run, at) in arm.runs.items()}
            for arm in self.done
        }
        settings = {"resamples": resamples, "shuffles": shuffles, "level": level, "seed": seed}
        self.figures = compare_arms(scored, self.first.patients, REFERENCE, **settings)
        self.rows = self._rows(self.figures)
        if len(self.class_names) > 2:
            for k, name in enumerate(self.class_names):
                of_class = {a: {s: one.one_against_rest(k) for s, one in seeds.items()} for a, seeds in scored.items()}
                found = compare_arms(of_class, self.first.patients, REFERENCE, names=OF_A_CLASS, **settings)
                self.rows += self._rows(found, name)

    def _rows(self, figures: Sequence[ArmFigure], of_class: str = "") -> list[dict[str, Any]]:
        """Dictionaries of the figures, with Holm's p-values over the arms of each figure."""
        adjusted: dict[tuple[str, str], float] = {}
        for metric in dict.fromkeys(one.metric for one in figures):
            tested = [one for one in figures if one.metric == metric and one.p_value is not None]
            p_values = holm([one.p_value for one in tested])
            adjusted |= {(one.arm, metric): p for one, p in zip(tested, p_values, strict=True)}
        counts = {arm.name: {"n_real": sum(arm.real), "n_synthetic": sum(arm.synthetic)} for arm in self.arms}
        return [
            {
                **{"arm": one.arm, "metric": one.metric, "class": of_class},
                **{key: value for key, value in asdict(one).items() if key not in ("arm", "metric", "note")},
                **{"p_holm": adjusted.get((one.arm, one.metric)), **counts[one.arm], "note": one.note},
            }
            for one in figures
        ]

    def write(self, output_dir: str | os.PathLike[str]) -> None:
        """Write the four files.

        Args:
            output_dir: where they go.
        """
        folder = Path(output_dir)
        atomic_write_text(folder / "study.md", self.markdown())
        record = {
            "about": self.about,
            "steps": self.steps,
            "level": self.level,
            "arms": [
                {
                    "name": arm.name,
                    "real": dict(zip(self.class_names, arm.real, strict=False)),
                    "synthetic": dict(zip(self.class_names, arm.synthetic, strict=False)),
                    "thresholds": {seed: threshold for seed, (_, threshold) in arm.runs.items()},
                    "failed": arm.reason,
                }
                for arm in self.arms
            ],
            "rows": self.rows,
            "git": git_revision(),
        }
        atomic_write_text(folder / "study.json", json.dumps(plain_json(record), indent=4) + "\n")
        table = [
            {
                key: " ".join(str(part) for part in value) if key == "seeds" else value
                for key, value in row.items()
                if key != "by_seed"
            }
            for row in self.rows
        ]
        table += [{"arm": arm.name, "note": arm.reason} for arm in self.arms if arm.reason]
        write_table(folder / "study.csv", table)
        with atomic_file(folder / "study.png") as file:
            self.figure().savefig(file, format="png", dpi=120)
        logger.info(f"study.md, study.csv, study.json and study.png in {folder}")

    # ------------------------------------------------------------------ the text

    def markdown(self) -> str:
        """The text of ``study.md``."""
        primary = CLASSIFICATION_METRICS[PRIMARY].title
        told = _ABOUT_INTERVALS.format(level=self.level, reference=REFERENCE, primary=primary, significant=SIGNIFICANT)
        lines = ["# What synthetic images are worth to a classifier", ""]
        lines += [f"- {name}: {text}" for name, text in {**self.about, "test": self._about_test()}.items() if text]
        lines += ["", "## Arms", "", *self._table_of_arms(), "", "## Figures", "", told, "", _ABOUT_CALIBRATION, ""]
        of_all = [row for row in self.rows if not row["class"]]
        lines += self._table_of_figures(of_all)
        for metric, about in CLASSIFICATION_METRICS.items():
            rows = [row for row in of_all if row["metric"] == metric]
            lines += ["", f"### {about.title[0].upper()}{about.title[1:]}", "", *self._table_of_metric(rows)]
        if len(self.class_names) > 2:
            lines += ["", "## Each class against the rest", "", *self._table_of_classes()]
        notes = dict.fromkeys(row["note"] for row in self.rows if row["note"])
        about_notes = [f"- {self._concerned(note)}: {note}" for note in notes]
        if about_notes:
            lines += ["", "## Notes", "", *about_notes]
        missing = [f"- {arm.name}: {arm.reason}" for arm in self.arms if arm.reason]
        if missing:
            lines += ["", "## Failed or left out", "", *missing]
        return "\n".join(lines) + "\n"

    def _concerned(self, note: str) -> str:
        """Which figures a note is about, in as few words as do."""
        rows = [row for row in self.rows if row["note"] == note]
        if len(rows) == len(self.rows):
            return "all figures"
        metrics = list(dict.fromkeys(CLASSIFICATION_METRICS[row["metric"]].title for row in rows))
        arms = list(dict.fromkeys(row["arm"] for row in rows))
        of_arms = "all arms" if len(arms) == len(self.done) else ", ".join(arms)
        return f"{', '.join(metrics) if len(metrics) < len(CLASSIFICATION_METRICS) else 'all figures'} of {of_arms}"

    def _about_test(self) -> str:
        labels, patients = self.first.labels, np.array(self.first.patients)
        of_class = [
            f"{name} {int((labels == k).sum()):,} of {len(set(patients[labels == k])):,}"
            for k, name in enumerate(self.class_names)
        ]
        return f"{len(labels):,} images of {len(set(patients)):,} patients ({', '.join(of_class)})"

    def _table_of_arms(self) -> list[str]:
        head = ["arm", *(f"real: {name}" for name in self.class_names)]
        head += [*(f"synthetic: {name}" for name in self.class_names), "steps", "seeds"]
        empty = [""] * len(self.class_names)
        return _table(
            head,
            [
                [
                    arm.name,
                    *([f"{count:,}" for count in arm.real] or empty),
                    *([f"{count:,}" for count in arm.synthetic] or empty),
                    "" if self.steps is None or arm.left_out else f"{self.steps:,}",
                    ", ".join(str(seed) for seed in arm.runs) or ("left out" if arm.left_out else "failed"),
                ]
                for arm in self.arms
            ],
        )

    def _table_of_figures(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """Every figure of every arm; bold where it differs from the reference by Holm's p."""
        cells: dict[str, dict[str, str]] = {arm.name: {} for arm in self.done}
        for row in rows:
            text = _with_interval(row["value"], row["low"], row["high"])
            sure = row["p_holm"] is not None and row["p_holm"] <= SIGNIFICANT
            cells[row["arm"]][row["metric"]] = f"**{text}**" if sure else text
        head = ["arm", *(metric.title for metric in CLASSIFICATION_METRICS.values())]
        table = _table(head, [[arm, *(found[m] for m in CLASSIFICATION_METRICS)] for arm, found in cells.items()])
        return [*table, "", f"Bold: Holm's p is at most {SIGNIFICANT:g}."]

    def _table_of_metric(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        head = ["arm", "mean", "each seed", f"difference from {REFERENCE}", "p", "Holm's p", "p of these networks"]
        return _table(
            head,
            [
                [
                    row["arm"],
                    _with_interval(row["value"], row["low"], row["high"]),
                    ", ".join(f"{value:.3f}" for value in row["by_seed"].values()),
                    *_tested(row),
                ]
                for row in rows
            ],
        )

    def _table_of_classes(self) -> list[str]:
        head = [
            "class",
            "figure",
            "arm",
            "mean",
            f"difference from {REFERENCE}",
            "p",
            "Holm's p",
            "p of these networks",
        ]
        return _table(
            head,
            [
                [
                    row["class"],
                    CLASSIFICATION_METRICS[row["metric"]].title,
                    row["arm"],
                    _with_interval(row["value"], row["low"], row["high"]),
                    *_tested(row),
                ]
                for row in sorted((row for row in self.rows if row["class"]), key=self._place)
            ],
        )

    def _place(self, row: Mapping[str, Any]) -> tuple[int, int]:
        return self.class_names.index(row["class"]), OF_A_CLASS.index(row["metric"])

    # ------------------------------------------------------------------ the picture

    def figure(self) -> Figure:
        """Differences from the reference (or the figures, without one), and a reliability diagram of each arm."""
        from matplotlib.figure import Figure

        compared = any(one.difference is not None for one in self.figures)
        arms = [arm.name for arm in self.done if not compared or arm.name != REFERENCE]
        height = 0.9 + 0.28 * len(arms)
        rows = -(-len(self.done) // COLUMNS)
        figure = Figure(figsize=(13, 2 * height + 2.9 * rows), layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=[2 * height, 2.9 * rows])
        panels = above.subplots(2, len(DRAWN) // 2, sharey=True)
        for metric, axes in zip(DRAWN, panels.flat, strict=True):
            self._draw_metric(axes, metric, arms, compared)
        what = f"difference from {REFERENCE}" if compared else "figures"
        above.suptitle(
            f"{what}, mean over the seeds and {self.level:.0%} interval; dots: single seeds. "
            + ("Green: better, orange: worse, blue: open (Holm's p)" if compared else ""),
            fontsize=10,
        )
        grid = below.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat[len(self.done) :]:
            axes.remove()
        for arm, axes in zip(self.done, grid.flat, strict=False):
            self._draw_reliability(axes, arm)
        below.supxlabel("p of " + self.class_names[1] if len(self.class_names) == 2 else "confidence", fontsize=9)
        below.supylabel(f"share of {self.class_names[1]}" if len(self.class_names) == 2 else "accuracy", fontsize=9)
        return figure

    def _draw_metric(self, axes: Axes, metric: str, arms: Sequence[str], compared: bool) -> None:
        reference = next((one for one in self.figures if (one.arm, one.metric) == (REFERENCE, metric)), None)
        about = CLASSIFICATION_METRICS[metric]
        for row in self.rows:
            if row["metric"] != metric or row["class"] or row["arm"] not in arms:
                continue
            place = len(arms) - 1 - arms.index(row["arm"])
            value, low, high, dots = row["value"], row["low"], row["high"], list(row["by_seed"].values())
            if compared:
                if row["difference"] is None:  # no seed in common
                    continue
                value, low, high = row["difference"], row["difference_low"], row["difference_high"]
                dots = [row["by_seed"][seed] - reference.by_seed[seed] for seed in row["seeds"]]
            colour = OPEN
            if row["p_holm"] is not None and row["p_holm"] <= SIGNIFICANT:
                colour = BETTER if (value > 0) == (about.best == "high") else WORSE
            if low is not None:
                axes.plot([low, high], [place, place], color=colour, linewidth=2, solid_capstyle="butt")
            axes.plot(value, place, marker="o" if colour == OPEN else "D", color=colour, markersize=5)
            axes.plot(dots, [place - 0.25] * len(dots), ".", color=LINE, markersize=3)
        if compared:
            axes.axvline(0, color=LINE, linewidth=0.8)
        axes.set_yticks(range(len(arms)), list(reversed(arms)), fontsize=8)
        axes.set_ylim(-0.7, len(arms) - 0.3)
        better = f"{'higher' if about.best == 'high' else 'lower'} is better"
        of_reference = f"; {REFERENCE}: {reference.value:.3f}" if compared else ""
        axes.set_title(f"{about.title} ({better}{of_reference})", fontsize=9)
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)

    def _draw_reliability(self, axes: Axes, arm: Arm) -> None:
        """All seeds together: mean confidence of about equally many images against how often it came true."""
        parts = [confidence_and_outcome(run.probabilities, run.labels) for run, _ in arm.runs.values()]
        confidence, outcome = (np.concatenate(values) for values in zip(*parts, strict=True))
        bins = equal_bins(confidence)
        counts = np.bincount(bins)
        axes.plot([0, 1], [0, 1], color=LINE, linewidth=0.8, linestyle=":")
        axes.plot(
            np.bincount(bins, confidence) / counts,
            np.bincount(bins, outcome) / counts,
            "o-",
            color=OPEN,
            markersize=3.5,
            linewidth=1,
        )
        axes.set_title(arm.name, fontsize=9)
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        axes.set_aspect("equal")
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)


def _tested(row: Mapping[str, Any]) -> list[str]:
    """Cells of the difference and its p-values."""
    if row["difference"] is None:
        return ["–"] * 4
    gap = _with_interval(row["difference"], row["difference_low"], row["difference_high"], "+")
    return [gap, *(f"{row[name]:.3g}" for name in ("p_value", "p_holm", "p_networks"))]


def _with_interval(value: float, low: float | None, high: float | None, sign: str = "") -> str:
    if low is None or high is None:
        return f"{value:{sign}.3f} (no interval)"
    return f"{value:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    cells = [list(head), ["---"] * len(head), *rows]
    return ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in cells]
