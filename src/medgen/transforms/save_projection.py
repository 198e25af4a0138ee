"""Records of projections: what was found for an image, and proof that the image is finished."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from monai.transforms import MapTransform
from monai.utils import TransformBackends, convert_to_numpy

from medgen.data.image_set import file_sha256
from medgen.errors import UserError
from medgen.output import atomic_file
from medgen.transforms.save import SaveArray

__all__ = ["ProjectionRecord", "SaveProjectiond"]

NEEDED = ("w", "loss_curve", "steps", "distance", "settings")


class RecordName(SaveArray):
    """Names records as the other files of a run are named."""

    suffix = ".npz"


class ProjectionRecord:
    """Reading of one record.

    Args:
        path: the ``.npz`` that :class:`SaveProjectiond` wrote.

    Raises:
        UserError: it cannot be read, or is no record.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        arrays = self._arrays(*NEEDED)
        self.w = arrays["w"]  # (L, W)
        self.loss_curve = arrays["loss_curve"]  # (steps,), NaN after an early stop
        self.steps = int(arrays["steps"])
        self.distance = float(arrays["distance"])
        self.settings: dict[str, Any] = json.loads(str(arrays["settings"]))

    @cached_property
    def noise(self) -> list[np.ndarray]:
        """Maps (H, W), read when asked for: nearly all of the file. Empty where they were not saved."""
        arrays = self._arrays()
        return [arrays[name] for name in sorted(set(arrays) - set(NEEDED), key=lambda name: int(name[6:]))]

    def _arrays(self, *names: str) -> dict[str, np.ndarray]:
        arrays = _read(self.path, *names)
        if arrays is None:
            raise UserError(f"{self.path} is no whole record of a projection; project again with --resume true")
        return arrays


def _read(path: Path, *names: str) -> dict[str, np.ndarray] | None:
    """Arrays of a record, all if none is named; None for a file that is no whole record."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if not set(NEEDED) <= set(file.files):
                return None
            return {name: file[name] for name in names or file.files}
    # a broken or foreign file raises whatever its bytes lead to
    except Exception:
        return None


class SaveProjectiond(MapTransform):
    """Write what a :class:`~medgen.inferers.StyleGAN2Projector` found for an image as one ``.npz`` without pickles.

    Arrays ``w`` (L, W), ``noise_0`` … (H, W) from the smallest map, ``loss_curve`` (steps,), ``steps``, ``distance``
    and ``settings``, a JSON text. The file is written whole or not at all. Put this transform last: a record says that
    the image is finished, so everything else must be on the disk before it.

    Args:
        output_dir: folder to write below; made where missing.
        settings: plain values that a projection depends on; records of other settings are not resumed.
        model_path: weights of the generator; the file's SHA-256 becomes one of the settings.
        data_root: see :class:`~medgen.transforms.SavePNG`.
        inputs: see :class:`~medgen.transforms.SavePNG`.
        image_key: key of the image, whose file names the record.
        save_noise: False leaves the noise maps out, nearly all of the file's size: 2.8 MB at 512×512 pixels. The
            reconstruction cannot be made again from the record then.
    """

    backend: ClassVar[list[TransformBackends]] = [TransformBackends.NUMPY]

    def __init__(
        self,
        output_dir: str | PathLike[str],
        settings: Mapping[str, Any],
        model_path: str | PathLike[str],
        data_root: str | PathLike[str] = "",
        inputs: Sequence[str | PathLike[str]] = (),
        image_key: str = "image",
        save_noise: bool = True,
    ) -> None:
        super().__init__(image_key)
        self.names = RecordName(output_dir, data_root, inputs=inputs)
        self.model_path, self.save_noise = Path(model_path), save_noise
        self._settings = dict(settings)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All settings of the records.

        Raises:
            UserError: no weights.
        """
        if not self.model_path.is_file():
            raise UserError(
                f"no weights at {self.model_path}; train the bundle first, or name a file with --model_path"
            )
        own = {"save_noise": self.save_noise, "model_sha256": file_sha256(self.model_path)}
        return self._settings | own

    def path_of(self, file: str | PathLike[str]) -> Path:
        """Where the record of an image file is."""
        return self.names.path(np.empty(0), {"filename_or_obj": str(file)})

    def is_finished(self, item: Mapping[Hashable, Any]) -> bool:
        """Whether the record of a datalist's item is there.

        Raises:
            UserError: it was made with other settings.
        """
        path = self.path_of(item[self.keys[0]])
        record = _read(path, "settings")
        if record is None:
            return False
        before = json.loads(str(record["settings"]))
        for name in [*self.settings, *before]:
            if before.get(name) != self.settings.get(name):
                raise UserError(
                    f"{path} was made with {name} {before.get(name)}, this run has {self.settings.get(name)}; resume "
                    f"with what it was made with, or choose another --output_dir"
                )
        return True

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the record of one item; returns a new dictionary with ``projection_path``.

        Args:
            data: the image, a ``MetaTensor``, and the entries of the projector's output for it.
        """
        d = dict(data)
        path = self.path_of(d[self.keys[0]].meta["filename_or_obj"])
        arrays = {name: convert_to_numpy(d[name]) for name in NEEDED[:-1]}
        if self.save_noise:
            arrays |= {f"noise_{number}": convert_to_numpy(noise)[0] for number, noise in enumerate(d["noise"])}
        with atomic_file(path) as file:
            np.savez(file, **arrays, settings=np.array(json.dumps(self.settings, sort_keys=True)))
        d["projection_path"] = str(path)
        return d
