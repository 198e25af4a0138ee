"""Pictures of masks, and how certain their figures are."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
from ignite.engine import Engine, Events
from monai.utils import convert_to_numpy
from PIL import Image

from medgen.metrics.intervals import bootstrap_mean
from medgen.output import atomic_file
from medgen.transforms.outline import PREDICTED, TRUE, draw_outlines

# of MONAI's own distance metrics among themselves, once a batch
warnings.filterwarnings("ignore", message=".*Argument `always_return_as_numpy` has been deprecated")

__all__ = ["MetricIntervals", "SegmentationGrid"]

logger = logging.getLogger(__name__)

GAP = 4  # white pixels between pictures


class SegmentationGrid:
    """Writes the first images of a run with the outlines of the true mask (green) and of the predicted one (orange).

    Attach it to an evaluator whose output is a list of dictionaries with ``image`` (1 or 3, H, W) in [0, 1], and masks
    ``label`` and ``pred`` (1, H, W), all of one size.

    Args:
        folder: where the PNGs go.
        name: file name without suffix; ``{epoch}`` is replaced.
        count: images shown.
        columns: images in a row.
    """

    def __init__(self, folder: str | Path, name: str = "epoch_{epoch:04d}", count: int = 8, columns: int = 4) -> None:
        self.folder, self.name, self.count, self.columns = Path(folder), name, count, columns
        self._pictures: list[np.ndarray] = []

    def attach(self, engine: Engine) -> None:
        """Register on an evaluator."""
        engine.add_event_handler(Events.EPOCH_STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.write)

    def start(self, engine: Engine) -> None:
        """Forget the images of the run before."""
        self._pictures = []

    def collect(self, engine: Engine) -> None:
        """Draw those images of a batch that will be shown."""
        for item in engine.state.output[: max(0, self.count - len(self._pictures))]:
            image, label, pred = (convert_to_numpy(item[key]) for key in ("image", "label", "pred"))
            outlines = {TRUE: label[0] > 0, PREDICTED: pred[0] > 0}
            self._pictures.append(draw_outlines(image, outlines))

    def write(self, engine: Engine) -> None:
        """Write the picture."""
        if idist.get_rank() > 0 or not self._pictures:
            return
        height, width = self._pictures[0].shape[:2]
        columns = min(self.columns, len(self._pictures))
        rows = -(-len(self._pictures) // columns)
        sheet = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP), "white")
        for number, picture in enumerate(self._pictures):
            row, column = divmod(number, columns)
            sheet.paste(Image.fromarray(picture), (column * (width + GAP), row * (height + GAP)))
        with atomic_file(self.folder / f"{self.name.format(epoch=engine.state.epoch)}.png") as file:
            sheet.save(file, format="PNG")


class MetricIntervals:
    """Adds to each metric that is kept by image the 95 % interval of its mean: ``<name>_low`` and ``<name>_high``.

    Patients are drawn with replacement (:func:`~medgen.metrics.bootstrap_mean`). Images for which a metric is infinite
    or NaN, such as distances to an empty mask, are left out of its mean and its interval; ``n_<name>`` then
    counts the rest. Of one patient there is a mean and no interval.

    Attach it to an evaluator that goes through ``items`` in their order, in one process.

    Args:
        items: of the datalist, with ``patient``.
        seed: of the draws.
    """

    def __init__(self, items: Sequence[Mapping[str, Any]], seed: int = 0) -> None:
        self.patients, self.seed = [str(item["patient"]) for item in items], seed

    def attach(self, engine: Engine) -> None:
        """Register on an evaluator, after its metrics."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Add the intervals."""
        for name, details in engine.state.metric_details.items():
            values = convert_to_numpy(details).reshape(-1).astype(float)
            finite = np.isfinite(values)
            if not finite.all():
                engine.state.metrics[f"n_{name}"] = int(finite.sum())
            if not finite.any():
                continue
            patients = [patient for patient, known in zip(self.patients, finite, strict=True) if known]
            if len(set(patients)) < 2:
                logger.warning(f"{name} is known of one patient alone: written without an interval")
                engine.state.metrics[name] = float(values[finite].mean())
                continue
            estimate = bootstrap_mean(values[finite], patients, seed=self.seed)
            engine.state.metrics |= {
                name: estimate.value,
                f"{name}_low": estimate.low,
                f"{name}_high": estimate.high,
            }
