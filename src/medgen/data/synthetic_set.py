"""A folder of generated images with its datalist: what to make, what is there already, and where it comes from."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from medgen import lineage
from medgen.data.datalist import write_datalist
from medgen.data.pending import pending_groups
from medgen.data.provenance import read_trained_on
from medgen.data.reader import read_frames
from medgen.data.shard import parse_shard, shard_line, shard_of
from medgen.errors import UserError
from medgen.output import atomic_write_text, write_first

__all__ = ["SyntheticSet", "begin_generation", "check_format", "provenance_line", "weights_sha256"]

SUFFIXES = {"png": ".png", "png16": ".png", "dicom": ".dcm"}
RECORD = "generation.json"
SHOWN = 200  # characters of a value in the provenance, which a DICOM text of 1,024 must hold


def check_format(file_format: str, formats: Sequence[str] = tuple(SUFFIXES)) -> None:
    """See that a format is one of those that are written.

    Raises:
        UserError: it is not.
    """
    if file_format not in formats:
        raise UserError(f"file_format must be {' or '.join(formats)}, got {file_format!r}; set --file_format png")


def weights_sha256(model_path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file of weights.

    Raises:
        UserError: no weights.
    """
    if not Path(model_path).is_file():
        raise UserError(f"no weights at {model_path}; train the bundle first, or name a file with --model_path")
    return lineage.weights_digest(model_path)


def provenance_line(record: Mapping[str, Any]) -> str:
    """What made images as one line, for a DICOM file: the weights first, since a line that is too long is cut off."""
    weights = {"model_sha256": record["model_sha256"]} if "model_sha256" in record else {}
    return ", ".join(f"{key} {value!s:.{SHOWN}}" for key, value in {**weights, **record}.items())


def begin_generation(
    output_dir: str | os.PathLike[str], folder: str | os.PathLike[str], record: Mapping[str, Any], resume: bool
) -> None:
    """Record the settings of images that are about to be made, or see that they are those of the images there.

    Args:
        output_dir: where ``generation.json`` goes.
        folder: of the images.
        record: plain values that decide the pixels, the weights' SHA-256 among them.
        resume: whether images, or processes that make others of them, may be there.

    Raises:
        UserError: images are there and ``resume`` is False, or settings are recorded that are others.
    """
    if not resume and Path(folder).is_dir() and any(Path(folder).iterdir()):
        raise UserError(
            f"{folder} holds images already; make the rest with --resume true, or choose another --output_dir"
        )
    _agree(output_dir, folder, record, resume)


def _agree(
    output_dir: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    record: Mapping[str, Any],
    resume: bool,
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the record unless there is one, see that the one that is there is the same, and return it.

    Which of several shards comes first is not known, and none has made an image then: records are compared whether
    there are images or not. ``defaults`` stand for what older ones lack.
    """
    path, defaults = Path(output_dir) / RECORD, defaults or {}
    text = json.dumps(dict(record)) + "\n"
    if not resume:  # nothing is there that another record could belong to
        atomic_write_text(path, text)
        return dict(record)
    # in this order: who has made an image has written the record before
    if Path(folder).is_dir() and any(Path(folder).iterdir()) and not path.is_file():
        _check_same(folder, {}, record)
    write_first(path, text)
    before = _read_record(output_dir)
    _check_same(folder, {**defaults, **before}, {**defaults, **record})
    return before


def _read_record(output_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """What an earlier run recorded; empty where that cannot be read."""
    try:
        before = json.loads((Path(output_dir) / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return before if isinstance(before, dict) else {}


def _check_same(folder: str | os.PathLike[str], before: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    for key, value in json.loads(json.dumps(dict(record))).items():
        if before.get(key) != value:
            raise UserError(
                f"the samples in {folder} were made with {key} {before.get(key)!s:.100}, this run has {value!s:.100}; "
                f"resume with what they were made with (where there are none yet, delete {RECORD}), or choose another "
                "--output_dir"
            )


def _checked_names(label: int | str | None, names: Sequence[str] | None, num_classes: int) -> list[str]:
    """The names of the classes, among which is that of all images, where it is a name."""
    if names is not None and (
        not isinstance(names, list | tuple) or not names or not all(name and isinstance(name, str) for name in names)
    ):
        raise UserError(f"label_names must be a list of names, or null, got {names!r}; set --label_names \"['a','b']\"")
    names = list(names or [])
    if isinstance(label, str) and label not in names:
        raise UserError(
            f"label must be a number, or one of label_names ({', '.join(names) or 'none given'}), got {label!r}; "
            "trainings know a name only by them"
        )
    classes = num_classes or (label + 1 if isinstance(label, int) else 0)
    if names and len(names) < classes:
        raise UserError(f"label_names must name the classes 0 to {classes - 1}, got {', '.join(names)}; name them all")
    return names


class SyntheticSet:
    """Images generated from seeds, and from prompts, below ``output_dir``.

    - ``samples/seed000042.png`` (or ``.dcm``), one for each seed, written by the caller; with several prompts
      ``samples/prompt0003_seed000042.png``, one for each seed of each prompt;
    - ``generation.json``, the settings that decide the pixels, since a folder holds images of one setting only, with
      the size of the batches, by which sums are rounded, and the seeds of all runs in it. It is written before the
      first image, and of shards that begin at once the first writes it;
    - ``datalist.json``, each image a patient of its own (``synthetic-42``) with its seed, its class, its prompt as
      ``text`` and the SHA-256 of the generator's weights (and ``model``, ``models:/NAME/VERSION`` of a registered
      one), so that metrics and trainings read the set like a real one; images of earlier runs in the folder are among
      them. ``trained_on`` is the generator's own, where its training left it: whose images it saw
      (:func:`medgen.data.check_synthetic`);
    - ``images/grid.png``, the first images.

    Args:
        output_dir: the folder.
        seeds: one for each image; doubles are made once.
        model_path: weights of the generator.
        settings: plain values that decide the pixels, beside the weights.
        num_classes: of the generator; 0 for none.
        class_index: class of all images. None: the classes in turn, by the seed (``seed % num_classes``), so that a
            seed means one image whatever range it is made in.
        file_format: one of ``formats``.
        batch_size: images generated together, the same in all runs of a folder: a resumed one makes the same batches.
        resume: keep what is there and make the rest; False refuses a folder that holds samples.
        name: of the data set.
        modality: of the data set.
        grid_images: most images in the grid.
        prompts: each is made with every seed; none for a network without.
        formats: of ``file_format``, those that the caller writes; ``png16`` is a PNG of 16 bits.
        label: class of all images in the datalist, of a generator that was trained on one class alone and has none of
            its own: a number, as the real images have it, so that both can be put into one datalist; or one of
            ``label_names``. None for none.
        label_names: names of the classes 0, 1, ..., as the datalist of the real images has them; none by default.
        shard: "i/n" makes the samples of one of n shares, whatever of them is missing, and neither the datalist nor
            the grid; None makes all. See :func:`shard_of`.

    Raises:
        UserError: an unknown format or shard, a label beside a generator's own classes or that is none of the classes
            named, or a folder that holds samples already, or samples of other settings.
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
        prompts: Sequence[str] = (),
        formats: Sequence[str] = ("png", "dicom"),
        label: int | str | None = None,
        label_names: Sequence[str] | None = None,
        shard: str | None = None,
    ) -> None:
        check_format(file_format, formats)
        if label is not None and num_classes:
            raise UserError(
                f"label must be null for a network with {num_classes} classes, which label its images, got {label!r}; "
                "set --class_index instead"
            )
        if label is not None and (isinstance(label, bool) or not isinstance(label, int | str) or label == ""):
            raise UserError(f"label must be a whole number or a name, or null, got {label!r}; set --label 0")
        self.output_dir, self.model_path = Path(output_dir), Path(model_path)
        self.name, self.modality, self.grid_images = name, modality, grid_images
        self.suffix = SUFFIXES[file_format]
        self._settings = {**settings, "class_index": class_index, "file_format": file_format}
        self.num_classes, self.class_index, self.prompts = num_classes, class_index, list(prompts)
        self.label, self.label_names = label, _checked_names(label, label_names, num_classes)
        self.items = self._items(dict.fromkeys(seeds))
        self.shard = None if parse_shard(shard) is None else shard
        self.part = shard_of(self.items, shard, batch_size)
        resume = resume or self.shard is not None
        there = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
        there = {file for file in there if file.endswith(tuple(SUFFIXES.values())) and not file.startswith(".")}
        if there and not resume:
            raise UserError(
                f"{self.folder} holds {len(there)} samples already; make the rest with --resume true, or choose "
                "another --output_dir"
            )
        self._before = _read_record(self.output_dir) if there else {}
        self._resume, self._batch_size = resume, batch_size
        self._started = time.perf_counter()
        self.todo = pending_groups(
            self.part, lambda item: item["name"] + self.suffix in there, batch_size, resume, shard=self.shard
        )

    def _items(self, seeds: Iterable[int]) -> list[dict[str, Any]]:
        """An item for each seed, prompt by prompt."""
        if len(self.prompts) < 2:
            text = {"text": self.prompts[0]} if self.prompts else {}
            return [{**self._item(seed, f"seed{seed:06d}", f"{seed}"), **text} for seed in seeds]
        return [
            {**self._item(seed, f"prompt{index:04d}_seed{seed:06d}", f"{index}-{seed}"), "text": prompt}
            for index, prompt in enumerate(self.prompts)
            for seed in seeds
        ]

    def _item(self, seed: int, name: str, patient: str) -> dict[str, Any]:
        item: dict[str, Any] = {"seed": seed, "name": name, "patient": f"synthetic-{patient}"}
        if self.num_classes:
            item["label"] = seed % self.num_classes if self.class_index is None else self.class_index
        return item

    @property
    def seeds(self) -> list[int]:
        """Of this run and of those before it in the same folder, in the order in which they were asked for."""
        before = self._before.get("seeds")
        before = [seed for seed in before if type(seed) is int] if isinstance(before, list) else []
        return list(dict.fromkeys([*before, *(item["seed"] for item in self.items)]))

    @property
    def summary(self) -> str:
        """What was made, where, and how fast: once :meth:`finish` was called."""
        if self.shard is not None:
            return shard_line(self.shard, self.part, self.items, self.folder)
        new = len(self.todo)
        speed = f" ({new / self._seconds:.2f} a second)" if new else ""
        return (
            f"{len(self.items)} images in {self.folder}, {new} of them new{speed}; datalist.json and images/grid.png "
            "beside them"
        )

    @property
    def folder(self) -> Path:
        """Where the samples are."""
        return self.output_dir / "samples"

    @cached_property
    def model_sha256(self) -> str:
        """SHA-256 of the weights; see :func:`weights_sha256`."""
        return weights_sha256(self.model_path)

    @cached_property
    def trained_on(self) -> dict[str, Any] | None:
        """Whose images the generator saw, see :func:`medgen.data.trained_on`; None where its training left no word."""
        return read_trained_on(self.model_path)

    @property
    def _registered(self) -> dict[str, str]:
        """The registered model that the weights are of, where they are of one."""
        uri = lineage.uri_of(self.model_sha256)
        return {"model": uri} if uri else {}

    @property
    def record(self) -> dict[str, Any]:
        """All that decides the pixels of a seed's image, and its label."""
        prompts = {"prompts": self.prompts} if self.prompts else {}
        label = {} if self.label is None else {"label": self.label}
        return {**prompts, **self._settings, **label, "model_sha256": self.model_sha256}

    @property
    def provenance(self) -> str:
        """The record as a text, the weights first and each value cut short; of several prompts their number."""
        shown = {**self._registered, **self.record}
        if len(self.prompts) == 1:
            shown["prompts"] = f"'{self.prompts[0]:.{SHOWN - 2}}'"
        elif self.prompts:
            shown["prompts"] = len(self.prompts)
        return provenance_line(shown)

    def begin(self) -> None:
        """Record the settings, or see that they are those of the samples that are there or that others make.

        Raises:
            UserError: no weights, or others, or other settings; or what lies beside the weights is broken.
        """
        _ = self.trained_on  # a broken record is told now, not when all images are made
        # sums are rounded by the batch: images of another size of it are not the same to the last bit
        record = {**self.record, "batch_size": self._batch_size}
        defaults = {"prompts": [], "label": None, "batch_size": self._batch_size}
        self._before = _agree(self.output_dir, self.folder, record, self._resume, defaults)
        atomic_write_text(self.output_dir / RECORD, json.dumps({**record, "seeds": self.seeds}) + "\n")
        self._started = time.perf_counter()

    def finish(self) -> None:
        """Write the datalist and the grid, once all samples are there; a shard writes neither.

        Seeds of an earlier run that was interrupted before it had made them are left out.
        """
        self._seconds = time.perf_counter() - self._started
        if self.shard is not None:
            return
        items = []
        for item in self._items(self.seeds):
            if not (self.folder / f"{item['name']}{self.suffix}").is_file():
                continue
            condition = {key: item[key] for key in ("label", "text") if key in item}
            if self.label is not None:
                condition["label"] = self.label
            items.append(
                {
                    "image": f"samples/{item['name']}{self.suffix}",
                    "patient": item["patient"],
                    **condition,
                    "synthetic": True,
                    "seed": item["seed"],
                    **self._registered,
                    "model_sha256": self.model_sha256,
                }
            )
        write_datalist(
            self.output_dir / "datalist.json",
            self.name,
            self.modality,
            {"training": items},
            generation=self.record,
            **({} if self.trained_on is None else {"trained_on": self.trained_on}),
            **({"label_names": self.label_names} if self.label_names else {}),
        )
        self._write_grid([self.output_dir / item["image"] for item in items[: self.grid_images]])

    def _write_grid(self, files: list[Path]) -> None:
        """The samples row by row, from the files: what is on the disk is what a person should see."""
        import torch  # here, since importing this package must import neither torch nor MONAI

        from medgen.handlers import save_grid

        tiles = [np.atleast_3d(read_frames(file)[0].pixels).transpose(2, 0, 1) for file in files]
        channels = max(tile.shape[0] for tile in tiles)  # the reader gives colour without colour as grey
        tiles = [torch.from_numpy(np.repeat(tile, channels // tile.shape[0], axis=0)) for tile in tiles]
        columns = math.ceil(math.sqrt(len(tiles)))
        tiles += [torch.ones_like(tiles[0])] * (-len(tiles) % columns)
        save_grid(torch.stack(tiles).split(columns), self.output_dir / "images" / "grid.png")
