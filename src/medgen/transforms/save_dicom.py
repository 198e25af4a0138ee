"""Writes images below a folder as DICOM secondary captures, named after the files they come from."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import KeysCollection, NdarrayOrTensor
from monai.utils import convert_to_numpy

from medgen.data.dicom_writer import read_source, write_secondary_capture
from medgen.errors import UserError
from medgen.transforms.save import _Save, _Saved

__all__ = ["SaveDICOM", "SaveDICOMd"]


class SaveDICOM(_Save):
    """Write a (C, H, W) image in [0, 1] as an 8-bit DICOM secondary capture.

    Where the file that the image comes from is DICOM, the picture joins its patient and study and refers to it;
    otherwise it begins a study of its own. The same image gives the same bytes. See
    :func:`medgen.data.dicom_writer.write_secondary_capture`.

    Args:
        output_dir: folder to write below; made where missing.
        data_root: folder of the inputs; their sub-folders are repeated below ``output_dir``. Empty: all files go into
            ``output_dir`` itself.
        postfix: goes between the input's name and ``.dcm``.
        inputs: paths of all inputs of a run; see :class:`medgen.transforms.SavePNG`.
        description: of the series.
        derivation: how the picture was made.
        synthetic: whether a network generated it.
        origin: what made it, such as the SHA-256 of the weights; pictures of another origin are another series.

    Raises:
        UserError: ``description`` is empty.
    """

    suffix = ".dcm"

    def __init__(
        self,
        output_dir: str | PathLike[str],
        data_root: str | PathLike[str] = "",
        postfix: str = "",
        inputs: Sequence[str | PathLike[str]] = (),
        description: str = "medgen",
        derivation: str = "",
        synthetic: bool = False,
        origin: str = "",
    ) -> None:
        super().__init__(output_dir, data_root, postfix, inputs)
        if not description:
            raise UserError("description must say what the series shows, got an empty text")
        self.description, self.derivation = description, derivation
        self.synthetic, self.origin = synthetic, origin

    def write(self, array: np.ndarray, path: Path, name: str, frame: int = 0, patient: str = "") -> None:
        """Write (1, H, W) or (3, H, W) in [0, 1].

        Args:
            array: the image; values outside [0, 1] are clipped.
            path: the file.
            name: of the file that the image comes from.
            frame: of that file, from 0.
            patient: PatientID where that file is not DICOM; default: its name.
        """
        if array.ndim != 3 or array.shape[0] not in (1, 3):
            raise UserError(f"{name}: expected a (C, H, W) image with 1 or 3 channels, got shape {array.shape}")
        if not np.isfinite(array).all():
            raise UserError(f"{name}: expected values in [0, 1], got values that are not finite")
        levels = np.rint(np.clip(array.astype(np.float64), 0, 1) * 255).astype(np.uint8)
        write_secondary_capture(
            path,
            levels[0] if array.shape[0] == 1 else levels.transpose(1, 2, 0),
            read_source(name),
            description=self.description,
            derivation=self.derivation,
            frame=frame,
            synthetic=self.synthetic,
            patient=patient or Path(name).name,
            origin=self.origin,
        )

    def save(self, img: NdarrayOrTensor, meta_data: Mapping[str, Any] | None = None) -> Path:
        """Write one image and return its path; its metadata say which ``frame`` and whose (``patient``) it is."""
        meta = meta_data if meta_data is not None else getattr(img, "meta", {})
        path = self.path(img, meta_data)
        self.write(
            convert_to_numpy(img),
            path,
            self._sources[path],
            frame=int(meta.get("frame") or 0),
            patient=str(meta.get("patient") or ""),
        )
        return path


class SaveDICOMd(_Saved):
    """Dictionary version of :class:`SaveDICOM`; the path goes to ``<key>_path``.

    Args:
        keys: keys of the images.
        output_dir: see :class:`SaveDICOM`.
        data_root: see :class:`SaveDICOM`.
        postfix: goes between the input's name and the suffix, one text per key; None: nothing for a single key,
            ``_<key>`` for several.
        name_key: key whose value names the file, a ``MetaTensor`` or a path; None: the image itself does.
        patient_key: key of the PatientID of images that come from no DICOM file; None: their metadata's ``patient``.
        allow_missing_keys: whether to skip keys that an item lacks.
        inputs: see :class:`SaveDICOM`.
        description: see :class:`SaveDICOM`.
        derivation: see :class:`SaveDICOM`.
        synthetic: see :class:`SaveDICOM`.
        origin: see :class:`SaveDICOM`.

    Raises:
        UserError: if two keys have the same postfix, or ``description`` is empty.
    """

    def __init__(
        self,
        keys: KeysCollection,
        output_dir: str | PathLike[str],
        data_root: str | PathLike[str] = "",
        postfix: Sequence[str] | str | None = None,
        name_key: Hashable | None = None,
        patient_key: Hashable | None = None,
        allow_missing_keys: bool = False,
        inputs: Sequence[str | PathLike[str]] = (),
        description: str = "medgen",
        derivation: str = "",
        synthetic: bool = False,
        origin: str = "",
    ) -> None:
        super().__init__(
            keys,
            lambda text: SaveDICOM(output_dir, data_root, text, inputs, description, derivation, synthetic, origin),
            postfix,
            name_key,
            allow_missing_keys,
        )
        self.patient_key = patient_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the images of one item; returns a new dictionary with ``<key>_path`` beside each ``<key>``."""
        d = dict(data)
        for key, saver in self.key_iterator(d, self.savers):
            named = d[key] if self.name_key is None else d[self.name_key]
            meta = {"filename_or_obj": named} if isinstance(named, str | PathLike) else getattr(named, "meta", {})
            if self.patient_key is not None:
                meta = {**meta, "patient": d[self.patient_key]}
            d[f"{key}_path"] = str(saver.save(d[key], meta))
        return d
