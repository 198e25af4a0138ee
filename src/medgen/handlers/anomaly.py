"""The table of anomaly scores, and what it says: localisation and detection."""

from __future__ import annotations

import logging
import math
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.handlers import IgniteMetricHandler, MeanAbsoluteError, from_engine
from monai.metrics import CumulativeIterationMetric, MAEMetric, MultiScaleSSIMMetric, PSNRMetric
from monai.utils import convert_to_numpy

from medgen.data.datalist import file_stem
from medgen.errors import UserError
from medgen.metrics.anomaly import Localisation, Patch, localisation_rate
from medgen.metrics.detection import SHUFFLES
from medgen.metrics.detection_table import MEASURES, SCORE_COLUMNS, detection_figures, write_detection, write_table
from medgen.metrics.intervals import CHEAP_RESAMPLES
from medgen.metrics.reconstruction import SCALES, ms_ssim_kernel_size
from medgen.transforms.save_projection import ProjectionRecord, RecordName

__all__ = ["DetectionFigures", "ScoresCSV", "image_metrics", "reconstruction_metrics"]

logger = logging.getLogger(__name__)

SMALLEST_MS_SSIM = 3 * 2 ** (SCALES - 1)  # pixels: the smallest window on the coarsest scale


class _MultiScaleSSIMBySize(MultiScaleSSIMMetric):
    """MS-SSIM with the window that each image's size leaves room for; NaN below the smallest size."""

    def _compute_metric(self, y_pred: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        side = min(y.shape[-2:])
        if side < SMALLEST_MS_SSIM:
            return y.new_full((len(y), 1), torch.nan)
        self.kernel_size = (ms_ssim_kernel_size(side),) * self.spatial_dims
        return super()._compute_metric(y_pred, y)


def reconstruction_metrics() -> dict[str, IgniteMetricHandler]:
    """L1 and MS-SSIM between ``pred`` and ``image``, of images of any sizes.

    The window of MS-SSIM goes by each image's size (:func:`~medgen.metrics.ms_ssim_kernel_size`). An image without the
    48 pixels that it takes has none: NaN by image, which :class:`ScoresCSV` leaves out of the metrics if all have.

    Returns:
        For an evaluator's ``additional_metrics``.
    """
    transform = from_engine(["pred", "image"])
    return {
        "l1": MeanAbsoluteError(output_transform=transform),
        "ms_ssim": IgniteMetricHandler(_MultiScaleSSIMBySize(spatial_dims=2), output_transform=transform),
    }


def image_metrics() -> dict[str, CumulativeIterationMetric]:
    """PSNR in dB for values in [0, 1], L1 and MS-SSIM of one image after another, for a record of each.

    The same figures as an evaluator with ``PeakSignalToNoiseRatio`` and :func:`reconstruction_metrics` keeps by image.

    Returns:
        For :class:`~medgen.transforms.SaveScoresd`.
    """
    return {"psnr": PSNRMetric(max_val=1.0), "l1": MAEMetric(), "ms_ssim": _MultiScaleSSIMBySize(spatial_dims=2)}


@dataclass(frozen=True)
class _Masks(Sequence):
    """Masks at a bit a pixel: those of thousands of images stay in memory until the end of the run."""

    packed: tuple[np.ndarray, ...]
    shapes: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, number: int) -> np.ndarray:
        height, width = self.shapes[number]
        return np.unpackbits(self.packed[number], count=height * width).reshape(height, width).astype(bool)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[number] for number in range(len(self)))


class ScoresCSV:
    """Writes the scores of a run, a row per image in the order of its items, and adds their means to the metrics.

    Columns: ``image`` (path relative to ``data_root``), ``patient``, ``label`` and ``anomaly`` where any item has them,
    the fields of :class:`~medgen.metrics.anomaly.AnomalyScores`, ``mse_hit`` and ``wd_hit`` (whether the worst patch
    holds a pixel of the known anomaly) where any image has a mask, the metrics of the evaluator that are kept by image,
    and ``projection_steps`` and ``projection_distance`` where records are there. What an image lacks, such as the
    scores of a body that was not found, is an empty cell.

    ``engine.state.metrics`` gets ``n_patients`` and ``n_anomalous`` of the table, the mean of each score (where both
    classes are there also ``<score>_normal`` and ``<score>_anomalous``) and, where masks are known,
    ``localisation_mse`` with ``_low``, ``_high`` and ``_chance``, and the same for ``wd``.

    Attach it to an evaluator that goes through ``items`` in their order, whose batches hold ``image``, ``scores`` and,
    where anomalies are known, ``anomaly_mask`` (1, H, W). Batches of records
    (:meth:`~medgen.transforms.SaveScoresd.read`) have ``metrics`` as well, whose means go into the evaluator's.

    Args:
        path: the CSV.
        items: of the datalist, all that are scored.
        data_root: folder that ``image`` is relative to; empty: paths as they are.
        projection_dir: folder of the records that projecting wrote, for their columns; None, or no records: without.
        seed: of the draws for the localisation's intervals.
        inputs: all images of the run that projected, where ``items`` are some of them; default: those of ``items``.
        from_folder: whether the items are those of a folder, which names nobody: the patient is then DICOM's PatientID,
            or else the image's path below ``data_root`` without suffix.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        items: Sequence[Mapping[str, Any]],
        data_root: str | PathLike[str] = "",
        projection_dir: str | PathLike[str] | None = None,
        seed: int = 0,
        inputs: Sequence[str | PathLike[str]] = (),
        from_folder: bool = False,
    ) -> None:
        self.path, self.items, self.data_root = Path(path), items, str(data_root)
        self.seed, self.from_folder = seed, from_folder
        inputs = inputs or [item["image"] for item in items]
        self.records = None if projection_dir is None else RecordName(projection_dir, data_root, inputs=inputs)
        self.rows: list[dict[str, Any]] = []
        self.found: list[dict[str, float]] = []
        self.measured: list[dict[str, float]] = []
        self.patients: list[str] = []
        self.masks: dict[int, np.ndarray] = {}
        self.shapes: dict[int, tuple[int, int]] = {}

    def attach(self, engine: Engine) -> None:
        """Register on an evaluator."""
        engine.add_event_handler(Events.EPOCH_STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.write)

    def start(self, engine: Engine) -> None:
        """Forget the run before."""
        self.rows, self.found, self.measured, self.patients, self.masks, self.shapes = [], [], [], [], {}, {}

    def collect(self, engine: Engine) -> None:
        """Keep the scores of a batch.

        Raises:
            UserError: the evaluator does not go through the items in their order.
        """
        for entry in engine.state.batch:
            number = len(self.found)
            source = str(entry["image"].meta["filename_or_obj"])
            expected = str(self.items[number]["image"]) if number < len(self.items) else "none"
            if os.path.abspath(source) != os.path.abspath(expected):
                raise UserError(
                    f"scores must come in the order of the items, got {source} in the place of {expected}; give the "
                    "table the items of the dataset, and do not shuffle"
                )
            self.found.append(dict(entry["scores"]))
            self.measured.append(dict(entry.get("metrics", {})))
            self.patients.append(str(entry["image"].meta.get("patient") or ""))
            mask = entry.get("anomaly_mask")
            if mask is not None and mask.any():
                array = convert_to_numpy(mask)[0] > 0
                self.masks[number], self.shapes[number] = np.packbits(array), array.shape

    def write(self, engine: Engine) -> None:
        """Write the table and add the means."""
        located = self._localisation()
        details = {
            name: convert_to_numpy(values).reshape(len(values), -1)
            for name, values in getattr(engine.state, "metric_details", {}).items()
        }
        for name in self.measured[0] if self.measured else ():
            details[name] = np.array([[metrics[name]] for metrics in self.measured])
            if not np.isnan(details[name]).all():
                engine.state.metrics[name] = float(np.nanmean(details[name]))
        # nothing is left of a metric for which all images are too small
        for name in [name for name, values in details.items() if np.isnan(values).all()]:
            del details[name]
            engine.state.metrics.pop(name, None)
        given = [name for name in ("label", "anomaly") if any(item.get(name) is not None for item in self.items)]
        hits = {measure: dict(zip(self.masks, found.hits, strict=True)) for measure, found in located.items()}
        self.rows, broken = [], []
        for number, (item, scores) in enumerate(zip(self.items, self.found, strict=True)):
            row: dict[str, Any] = {"image": self._name(item["image"]), "patient": self._patient(number)}
            # where any item says that it is an anomaly, one that says nothing is none
            row |= {name: item.get(name) if name == "label" else int(item.get(name) or 0) for name in given}
            row |= {name: None if math.isnan(value) else value for name, value in scores.items()}
            for measure, of_image in hits.items():
                row[f"{measure}_hit"] = int(of_image[number][0]) if number in of_image else None
            row |= {name: float(values[number].mean()) for name, values in details.items()}
            try:
                row |= self._projection(item["image"])
            except UserError as error:  # scores of hours are not lost for it
                broken.append(str(error))
            self.rows.append(row)
        write_table(self.path, self.rows)
        logger.info(f"{len(self.rows)} images scored -> {self.path}")
        engine.state.metrics.update(self._means())
        engine.state.metrics["n_patients"] = len({row["patient"] for row in self.rows if row["patient"]})
        engine.state.metrics["n_anomalous"] = sum(row.get("anomaly", 0) for row in self.rows)
        for measure, found in located.items():
            rate = found.rate
            engine.state.metrics |= {
                f"localisation_{measure}": rate.value,
                f"localisation_{measure}_low": rate.low,
                f"localisation_{measure}_high": rate.high,
                f"localisation_{measure}_chance": found.chance,
            }
        if broken:
            logger.warning(f"{len(broken)} records of projections left out of the table: {broken[0]}")
        without = [row["image"] for row in self.rows if row["mse_body"] is None]
        if without:
            logger.warning(
                f"no body found in {len(without)} of {len(self.rows)} images ({without[0]} is one): their scores of "
                "the body are empty; look at them, or lower body_threshold"
            )

    def _name(self, image: str) -> str:
        path = os.path.relpath(os.path.abspath(image), os.path.abspath(self.data_root)) if self.data_root else image
        return str(path).replace(os.sep, "/")

    def _patient(self, number: int) -> str:
        item = self.items[number]
        if not self.from_folder:
            return str(item.get("patient") or "")
        folder = posixpath.dirname(self._name(item["image"]))
        return self.patients[number] or posixpath.join(folder, file_stem(str(item["image"])))

    def _projection(self, image: str) -> dict[str, float]:
        path = self.records.path(np.empty(0), {"filename_or_obj": image}) if self.records else None
        if path is None or not path.is_file():
            return {}
        record = ProjectionRecord(path)
        return {"projection_steps": record.steps, "projection_distance": record.distance}

    def _localisation(self) -> dict[str, Localisation]:
        """Per measure, of the images with a mask; empty without any."""
        expected = [n for n, item in enumerate(self.items) if item.get("anomaly_mask")]
        lost = [self._name(self.items[n]["image"]) for n in expected if n not in self.masks]
        if lost:
            logger.warning(
                f"the known anomaly of {len(lost)} of {len(expected)} images lies outside the part that was scored or "
                f"is empty ({lost[0]} is one); they do not count in the localisation rate"
            )
        if not self.masks:
            return {}
        masks = _Masks(tuple(self.masks.values()), tuple(self.shapes.values()))
        names = [self._patient(n) for n in self.masks]
        found = {}
        for measure in MEASURES:
            fields = ("row", "column")
            patches = [
                Patch(
                    *(int(self.found[n][f"{measure}_patch_{field}"]) for field in fields),
                    int(self.found[n]["patch"]),
                    float(self.found[n][f"{measure}_patch"]),
                )
                for n in self.masks
            ]
            try:
                found[measure] = localisation_rate(patches, masks, names if all(names) else None, seed=self.seed)
            except UserError as error:
                logger.warning(f"no localisation rate for {measure}: {error}")
        return found

    def _means(self) -> dict[str, float]:
        groups = {"": self.rows}
        if len({row.get("anomaly") for row in self.rows}) > 1:
            for suffix, kind in (("_normal", 0), ("_anomalous", 1)):
                groups[suffix] = [row for row in self.rows if row["anomaly"] == kind]
        means = {}
        for suffix, rows in groups.items():
            for name in SCORE_COLUMNS:
                values = [row[name] for row in rows if row[name] is not None]
                if values:
                    means[f"{name}{suffix}"] = float(np.mean(values))
        return means


class DetectionFigures:
    """Adds the figures of :func:`~medgen.metrics.detection_table.detection_figures` to the metrics of an evaluation.

    Only where the scored items hold both classes (``anomaly`` 1 and 0; an item without it counts as 0); otherwise
    nothing is written. Attach it after the table that it reads.

    Args:
        table: whose rows are judged.
        csv_path: table of the figures, a row per score.
        figure_path: ROC curves, PNG.
        resamples: see :func:`~medgen.metrics.detection_table.detection_figures`.
        shuffles: the same.
        seed: the same.
    """

    def __init__(
        self,
        table: ScoresCSV,
        csv_path: str | PathLike[str],
        figure_path: str | PathLike[str],
        resamples: int = CHEAP_RESAMPLES,
        shuffles: int = SHUFFLES,
        seed: int = 0,
    ) -> None:
        self.table, self.csv_path, self.figure_path = table, Path(csv_path), Path(figure_path)
        self.settings = {"resamples": resamples, "shuffles": shuffles, "seed": seed}

    def attach(self, engine: Engine) -> None:
        """Register on the evaluator of the table."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Compute and write."""
        rows = self.table.rows
        if len({row.get("anomaly") for row in rows}) < 2:
            logger.info('one class of images only: no detection figures (they need items with "anomaly": 1 as well)')
            return
        found = detection_figures(rows, **self.settings)
        for note in found.notes:
            logger.warning(note)
        engine.state.metrics.update(found.figures)
        write_detection(rows, found, self.csv_path, self.figure_path)
        logger.info(f"detection: {self.csv_path}, {self.figure_path}")
