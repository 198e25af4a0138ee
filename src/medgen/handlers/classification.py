"""What an evaluation of a classifier leaves: its predictions, its figures, and the images it is most wrong about."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
from ignite.engine import Engine, Events
from monai.utils import convert_to_numpy
from PIL import Image, ImageDraw, ImageFont

from medgen.data.datalist import printable
from medgen.errors import UserError
from medgen.metrics.classification import classification_metrics, pick_threshold
from medgen.output import atomic_file
from medgen.transforms.save_probabilities import write_predictions

__all__ = ["ClassificationFigures", "ClassificationGrid", "PredictionsCSV"]

CELL = 160  # least width and height of an image in a grid, in pixels: two lines of text fit above it
LINE = 15  # height of a line of text
GAP = 4  # white pixels between pictures


class PredictionsCSV:
    """Collects the probabilities of an evaluation, and writes them as a table in the order of the datalist.

    ``image, patient, label, p0, p1, ...``: a row an image, all of them or no file.

    Attach it to an evaluator whose output is a list of dictionaries with ``image``, which names its file, and ``pred``,
    probabilities (K,).

    Args:
        path: the CSV.
        items: of the datalist, in their order, ``label`` an index.
        dataset_dir: folder that the images' names start from.

    Attributes:
        probabilities: (N, K) of the last run, once it has ended.
        labels: (N,) classes.
    """

    def __init__(self, path: str | Path, items: Sequence[Mapping[str, Any]], dataset_dir: str | Path) -> None:
        self.path, self.items, self.dataset_dir = Path(path), list(items), dataset_dir
        self.labels = np.array([item["label"] for item in self.items])
        self.probabilities = np.empty((0, 0))
        self._found: list[np.ndarray] = []

    def attach(self, engine: Engine) -> None:
        """Register on an evaluator."""
        engine.add_event_handler(Events.EPOCH_STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.write)

    def start(self, engine: Engine) -> None:
        """Forget the run before."""
        self._found = []

    def collect(self, engine: Engine) -> None:
        """Keep the probabilities of a batch.

        Raises:
            UserError: an image is not the one whose turn it is.
        """
        for output in engine.state.output:
            place, file = len(self._found), str(output["image"].meta["filename_or_obj"])
            expected = self.items[place]["image"] if place < len(self.items) else "no further image"
            if os.path.abspath(file) != os.path.abspath(expected):
                raise UserError(f"predictions must be in the order of the datalist: expected {expected}, got {file}")
            self._found.append(convert_to_numpy(output["pred"]).astype(float))

    def write(self, engine: Engine) -> None:
        """Write the table.

        Raises:
            UserError: an image has no prediction, or one that is not a number.
        """
        if len(self._found) != len(self.items):
            raise UserError(f"expected {len(self.items)} predictions, got {len(self._found)}; evaluate in one process")
        self.probabilities = np.stack(self._found)
        broken = ~np.isfinite(self.probabilities).all(axis=1)
        if broken.any():
            raise UserError(
                f"{self.items[int(broken.argmax())]['image']}: the prediction is not a number; train anew with a "
                "lower --lr"
            )
        rows = (
            {
                "image": printable(Path(os.path.relpath(item["image"], self.dataset_dir)).as_posix()),
                "patient": item["patient"],
                "label": item["label"],
                "probabilities": probabilities,
            }
            for item, probabilities in zip(self.items, self.probabilities, strict=True)
        )
        write_predictions(self.path, rows, self.probabilities.shape[1])


class ClassificationFigures:
    """Adds the figures of :func:`~medgen.metrics.classification_metrics` to the metrics of an evaluation.

    Attach it after the table that it reads.

    Args:
        table: whose predictions are judged.
        validation: predictions for other images, of which the threshold between two classes is taken
            (:func:`~medgen.metrics.pick_threshold`), unless ``threshold`` is given; their evaluation must have ended.
        threshold: of p1; None for that of the validation.
    """

    def __init__(self, table: PredictionsCSV, validation: PredictionsCSV, threshold: float | None = None) -> None:
        self.table, self.validation, self.threshold = table, validation, threshold

    def attach(self, engine: Engine) -> None:
        """Register on the evaluator of the table."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Compute."""
        threshold = self.threshold
        if threshold is None:
            threshold = pick_threshold(self.validation.probabilities, self.validation.labels)
        figures = classification_metrics(self.table.probabilities, self.table.labels, threshold)
        engine.state.metrics.update(figures if threshold is None else {**figures, "threshold": threshold})


class ClassificationGrid:
    """Writes the images that a classifier is most wrong about: the least probability of the true class comes first.

    Above each stand its true class, and the likeliest with its probability. Of several processes the first shows those
    of its own images.

    Attach it to an evaluator whose output is a list of dictionaries with ``image`` (1 or 3, H, W), ``label`` (K,), one
    at the true class, and ``pred``, probabilities (K,).

    Args:
        folder: where the PNGs go.
        class_names: of the K classes.
        mean: that was subtracted from each channel.
        std: that each channel was then divided by: the pictures show values in [0, 1] again.
        name: file name without suffix; ``{epoch}`` is replaced.
        count: images shown.
        columns: images in a row.
    """

    def __init__(
        self,
        folder: str | Path,
        class_names: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
        name: str = "epoch_{epoch:04d}",
        count: int = 8,
        columns: int = 4,
    ) -> None:
        self.folder, self.class_names = Path(folder), list(class_names)
        self.mean, self.std = (np.reshape(values, (-1, 1, 1)) for values in (mean, std))
        self.name, self.count, self.columns = name, count, columns
        self._worst: list[tuple[float, str, np.ndarray]] = []

    def attach(self, engine: Engine) -> None:
        """Register on an evaluator."""
        engine.add_event_handler(Events.EPOCH_STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.write)

    def start(self, engine: Engine) -> None:
        """Forget the images of the run before."""
        self._worst = []

    def collect(self, engine: Engine) -> None:
        """Keep those images of a batch that are among the worst so far."""
        for output in engine.state.output:
            pred, label = (convert_to_numpy(output[key]) for key in ("pred", "label"))
            true, found = int(label.argmax()), int(pred.argmax())
            caption = f"true {self.class_names[true]}\n{self.class_names[found]} {pred[found]:.3f}"
            self._worst.append((float(pred[true]), caption, convert_to_numpy(output["image"])))
            if len(self._worst) > 2 * self.count:
                self._keep_worst()
        self._keep_worst()

    def _keep_worst(self) -> None:
        self._worst = sorted(self._worst, key=lambda entry: entry[0])[: self.count]

    def write(self, engine: Engine) -> None:
        """Write the picture."""
        if idist.get_rank() > 0 or not self._worst:
            return
        pictures = [self._draw(image, caption) for _, caption, image in self._worst]
        width, height = pictures[0].size
        columns = min(self.columns, len(pictures))
        rows = -(-len(pictures) // columns)
        sheet = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP), "white")
        for number, picture in enumerate(pictures):
            row, column = divmod(number, columns)
            sheet.paste(picture, (column * (width + GAP), row * (height + GAP)))
        with atomic_file(self.folder / f"{self.name.format(epoch=engine.state.epoch)}.png") as file:
            sheet.save(file, format="PNG")

    def _draw(self, image: np.ndarray, caption: str) -> Image.Image:
        pixels = np.rint(np.clip(image * self.std + self.mean, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
        picture = Image.fromarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)).copy())
        scale = max(1, -(-CELL // min(picture.size)))
        picture = picture.resize((scale * picture.width, scale * picture.height), Image.Resampling.NEAREST)
        cell = Image.new("RGB", (picture.width, picture.height + 2 * LINE), "white")
        cell.paste(picture, (0, 2 * LINE))
        for line, text in enumerate(caption.split("\n")):
            ImageDraw.Draw(cell).text((2, line * LINE), text, fill="black", font=ImageFont.load_default(LINE - 3))
        return cell
