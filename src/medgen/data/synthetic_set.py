"""A folder of generated images with its datalist: what to make, what is there already, and where it comes from."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medgen.data.datalist import write_datalist
from medgen.data.image_set import file_sha256
from medgen.data.pending import pending_groups
from medgen.data.reader import read_frames
from medgen.errors import UserError
from medgen.output import atomic_file, atomic_write_text

__all__ = ["SyntheticSet"]

SUFFIXES = {"png": ".png", "dicom": ".dcm"}
GAP = 2  # white pixels between the images of the grid


class SyntheticSet:
    """Images generated from seeds, below ``output_dir``.

    - ``samples/seed000042.png`` (or ``.dcm``), one for each seed, written by the caller;
    - ``generation.json``, the settings that decide the pixels: a folder holds images of one setting only;
    - ``datalist.json``, each image a patient of its own (``synthetic-42``) with its seed, its class and the SHA-256 of
      the generator's weights, so that metrics and trainings read the set like a real one;
    - ``images/grid.png``, the first images.

    Args:
        output_dir: the folder.
        seeds: one for each image; doubles are made once.
        model_path: weights of the generator.
        settings: plain values that decide the pixels, beside the weights.
        num_classes: of the generator; 0 for none.
        class_index: class of all images. None: the classes in turn, by the seed (``seed % num_classes``), so that a
            seed means one image whatever range it is made in.
        file_format: ``png`` or ``dicom``.
        batch_size: images generated together; a resumed run makes the same batches again.
        resume: keep what is there and make the rest; False refuses a folder that holds samples.
        name: of the data set.
        modality: of the data set.
        grid_images: most images in the grid.

    Raises:
        UserError: an unknown format, or a folder that holds samples already, or samples of other settings.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        seeds: Iterable[int],
        model_path: str | os.PathLike[str],
        settings: Mapping[str, Any],
        num_classes: int = 0,
        class_index: int | None = None,
        file_format: str = "png",
        batch_size: int = 1,
        resume: bool = False,
        name: str = "synthetic",
        modality: str = "unknown",
        grid_images: int = 64,
    ) -> None:
        if file_format not in SUFFIXES:
            raise UserError(f"file_format must be {' or '.join(SUFFIXES)}, got {file_format!r}; set --file_format png")
        self.output_dir, self.model_path = Path(output_dir), Path(model_path)
        self.name, self.modality, self.grid_images = name, modality, grid_images
        self.suffix = SUFFIXES[file_format]
        self._settings = {**settings, "class_index": class_index, "file_format": file_format}
        self.items: list[dict[str, Any]] = []
        for seed in dict.fromkeys(seeds):
            item: dict[str, Any] = {"seed": seed, "name": f"seed{seed:06d}", "patient": f"synthetic-{seed}"}
            if num_classes:
                item["label"] = seed % num_classes if class_index is None else class_index
            self.items.append(item)
        there = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
        there = {file for file in there if file.endswith(tuple(SUFFIXES.values())) and not file.startswith(".")}
        if there and not resume:
            raise UserError(
                f"{self.folder} holds {len(there)} samples already; make the rest with --resume true, or choose "
                "another --output_dir"
            )
        self._resumed = bool(there)
        self.todo = pending_groups(self.items, lambda item: item["name"] + self.suffix in there, batch_size, resume)

    @property
    def folder(self) -> Path:
        """Where the samples are."""
        return self.output_dir / "samples"

    @cached_property
    def model_sha256(self) -> str:
        """SHA-256 of the weights.

        Raises:
            UserError: no weights.
        """
        if not self.model_path.is_file():
            raise UserError(
                f"no weights at {self.model_path}; train the bundle first, or name a file with --model_path"
            )
        return file_sha256(self.model_path)

    @property
    def record(self) -> dict[str, Any]:
        """All that decides the pixels of a seed's image."""
        return {**self._settings, "model_sha256": self.model_sha256}

    @property
    def provenance(self) -> str:
        """The record as a text."""
        return ", ".join(f"{key} {value}" for key, value in self.record.items())

    def begin(self) -> None:
        """Record the settings, or see that they are those of the samples that are there.

        Raises:
            UserError: no weights, or others, or other settings.
        """
        path = self.output_dir / "generation.json"
        if self._resumed:
            try:
                before = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                before = {}
            for key, value in self.record.items():
                if before.get(key) != value:
                    raise UserError(
                        f"the samples in {self.folder} were made with {key} {before.get(key)}, this run has {value}; "
                        "resume with what they were made with, or choose another --output_dir"
                    )
        atomic_write_text(path, json.dumps(self.record, indent=4) + "\n")

    def finish(self) -> None:
        """Write the datalist and the grid, once all samples are there."""
        items = []
        for item in self.items:
            label = {"label": item["label"]} if "label" in item else {}
            items.append(
                {
                    "image": f"samples/{item['name']}{self.suffix}",
                    "patient": item["patient"],
                    **label,
                    "synthetic": True,
                    "seed": item["seed"],
                    "model_sha256": self.model_sha256,
                }
            )
        write_datalist(
            self.output_dir / "datalist.json",
            self.name,
            self.modality,
            {"training": items},
            generation=self.record,
        )
        self._write_grid([self.output_dir / item["image"] for item in items[: self.grid_images]])

    def _write_grid(self, files: list[Path]) -> None:
        """The samples row by row, from the files: what is on the disk is what a person should see."""
        tiles = [np.rint(read_frames(file)[0].pixels * 255).astype(np.uint8) for file in files]
        # the reader gives colour without colour as grey
        if any(tile.ndim == 3 for tile in tiles):
            tiles = [tile if tile.ndim == 3 else np.repeat(tile[..., None], 3, axis=2) for tile in tiles]
        columns = math.ceil(math.sqrt(len(tiles)))
        rows = math.ceil(len(tiles) / columns)
        height, width = tiles[0].shape[:2]
        shape = (rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, *tiles[0].shape[2:])
        grid = np.full(shape, 255, dtype=np.uint8)
        for number, tile in enumerate(tiles):
            top, left = number // columns * (height + GAP), number % columns * (width + GAP)
            grid[top : top + height, left : left + width] = tile
        with atomic_file(self.output_dir / "images" / "grid.png") as file:
            Image.fromarray(grid).save(file, format="PNG")
