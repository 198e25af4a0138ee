"""Writes images and latents below a folder, named after the files they come from."""

from __future__ import annotations

import os
import re
import secrets
from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends, convert_to_numpy, ensure_tuple
from PIL import Image, PngImagePlugin

from medgen.data.datalist import distinct_names
from medgen.errors import UserError

__all__ = ["SaveArray", "SaveArrayd", "SavePNG", "SavePNGd"]

# A suffix begins with a letter: the last number of a UID that serves as a file name is none.
_SUFFIX = re.compile(r"(\.nii\.gz|\.[A-Za-z][A-Za-z0-9]{1,5})$", re.IGNORECASE)


def _folder_of(source: str, data_root: str) -> Path:
    """Folder of an input relative to ``data_root``, or a UserError if it lies elsewhere."""
    if not data_root:
        return Path()
    # by the letter, without following links: data sets are often linked together from several places
    folder = Path(os.path.relpath(os.path.dirname(os.path.abspath(source)), os.path.abspath(data_root)))
    if ".." in folder.parts:
        raise UserError(f"expected a file below data_root {data_root}, got {source}; set data_root")
    return folder


@lru_cache(maxsize=1)  # a run has a dozen savers for the same inputs, of which there may be hundreds of thousands
def _names_of(data_root: str, inputs: tuple[str, ...], working_dir: str) -> dict[str, str]:
    """Names of the outputs below the folder of each, without suffix, by the inputs' full paths."""
    sources = list(dict.fromkeys(os.path.abspath(source) for source in inputs))
    short, full = [], []
    for source in sources:
        folder, name = _folder_of(source, data_root), os.path.basename(source)
        short.append((folder / _SUFFIX.sub("", name)).as_posix())
        full.append((folder / name).as_posix())
    return dict(zip(sources, distinct_names(short, full, sources), strict=True))


class _Save(Transform):
    """Naming that both kinds of file share.

    Args:
        output_dir: folder to write below; made where missing.
        data_root: folder of the inputs; their sub-folders are repeated below ``output_dir``. Empty: all files go into
            ``output_dir`` itself.
        postfix: goes between the input's name and the suffix.
        inputs: paths of all inputs of a run. Those whose outputs would have one name (``a.png`` beside ``a.dcm``) keep
            their own suffix in it. Without, the second one of them is an error.
    """

    backend: ClassVar[list[TransformBackends]] = [TransformBackends.NUMPY]
    suffix = ""

    def __init__(
        self,
        output_dir: str | PathLike[str],
        data_root: str | PathLike[str] = "",
        postfix: str = "",
        inputs: Sequence[str | PathLike[str]] = (),
    ) -> None:
        if not str(output_dir):
            raise UserError("output_dir must name a folder, got an empty text")
        if "/" in postfix or "\\" in postfix:
            raise UserError(f"postfix must be part of a file name, got {postfix!r}")
        self.output_dir = Path(output_dir)
        self.data_root = str(data_root)
        self.postfix = postfix
        self._sources: dict[Path, str] = {}
        self._names = _names_of(self.data_root, tuple(map(str, inputs)), os.getcwd())

    def path(self, img: NdarrayOrTensor, meta_data: Mapping[str, Any] | None = None) -> Path:
        """Where an image goes.

        Args:
            img: the image; a ``MetaTensor`` brings its metadata.
            meta_data: metadata of any other image; ``filename_or_obj`` names its file.

        Returns:
            ``output_dir / <folder of the input relative to data_root> / <name><postfix><suffix>``; the name is without
            the input's suffix unless another of the ``inputs`` would have the same.

        Raises:
            UserError: if the input has no name, lies outside ``data_root``, or would be overwritten, or if another
                input has the same output.
        """
        meta = meta_data if meta_data is not None else getattr(img, "meta", {})
        source = str(meta.get("filename_or_obj") or "")
        name = _SUFFIX.sub("", os.path.basename(source))
        if not name or name in (".", ".."):
            raise UserError(f"expected metadata with the file name of the image (filename_or_obj), got {source!r}")
        stem = self._names.get(os.path.abspath(source)) or str(_folder_of(source, self.data_root) / name)
        path = self.output_dir / f"{stem}{self.postfix}{self.suffix}"
        if not path.resolve().is_relative_to(self.output_dir.resolve()):
            raise UserError(f"{path} lies outside output_dir {self.output_dir} through a link; remove the link")
        if path.exists() and os.path.exists(source) and os.path.samefile(path, source):
            raise UserError(f"{path} would overwrite its own input; set another output_dir or a postfix")
        if self._sources.setdefault(path, source) != source:
            raise UserError(f"{self._sources[path]} and {source} would both be saved as {path}; set data_root")
        return path

    def is_written(self, source: str | PathLike[str]) -> bool:
        """Whether the output of an input is there and no older than it: an image that was replaced since is not done.

        Args:
            source: path of the input.
        """
        try:
            written = self.path(np.empty(0), {"filename_or_obj": str(source)}).stat().st_mtime_ns
            return written >= os.stat(source).st_mtime_ns
        except FileNotFoundError:
            return False

    @abstractmethod
    def write(self, array: np.ndarray, path: Path, name: str) -> None:
        """Write one array, (C, H, W), or raise a UserError that begins with ``name``."""

    def save(self, img: NdarrayOrTensor, meta_data: Mapping[str, Any] | None = None) -> Path:
        """Write one image and return its path; see :meth:`path` and :meth:`write` for the errors."""
        path = self.path(img, meta_data)
        path.parent.mkdir(parents=True, exist_ok=True)
        # random: the processes of containers that share a folder have equal numbers
        partial = path.with_name(f".{secrets.token_hex(8)}.part")
        try:
            self.write(convert_to_numpy(img), partial, self._sources[path])
            os.replace(partial, path)  # a run that is killed leaves no half-written picture behind
        finally:
            partial.unlink(missing_ok=True)
        return path

    def __call__(self, img: NdarrayOrTensor, meta_data: Mapping[str, Any] | None = None) -> NdarrayOrTensor:
        """Write one image.

        Args:
            img: (C, H, W).
            meta_data: metadata of an image that is no ``MetaTensor``.

        Returns:
            ``img`` itself.
        """
        self.save(img, meta_data)
        return img


class _Saved(MapTransform):
    """What the dictionary versions share: one saver per key, so that no two keys of an item have the same file."""

    backend = _Save.backend

    def __init__(
        self,
        keys: KeysCollection,
        saver: Callable[[str], _Save],
        postfix: Sequence[str] | str | None,
        name_key: Hashable | None,
        allow_missing_keys: bool,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if postfix is None:
            postfix = "" if len(self.keys) == 1 else [f"_{key}" for key in self.keys]
        postfixes = ensure_tuple(postfix)
        if len(postfixes) != len(self.keys) or len(set(postfixes)) != len(postfixes):
            raise UserError(f"expected a different postfix for each of the keys {self.keys}, got {postfix!r}")
        self.savers = [saver(text) for text in postfixes]
        self.name_key = name_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the images of one item; returns a new dictionary with ``<key>_path`` beside each ``<key>``."""
        d = dict(data)
        for key, saver in self.key_iterator(d, self.savers):
            named = d[key] if self.name_key is None else d[self.name_key]
            meta = {"filename_or_obj": named} if isinstance(named, str | PathLike) else getattr(named, "meta", {})
            d[f"{key}_path"] = str(saver.save(d[key], meta))
        return d


class SavePNG(_Save):
    """Write a (C, H, W) image in [0, 1] as an upright PNG named after its input.

    MONAI's ``SaveImage`` swaps rows and columns for Pillow, cuts 0.999 down instead of rounding it, and follows a
    relative input path out of the output folder. Values outside [0, 1] are clipped.

    Args:
        output_dir: folder to write below; made where missing.
        data_root: folder of the inputs; their sub-folders are repeated below ``output_dir``. Empty: all files go into
            ``output_dir`` itself.
        bits: 8, or 16 for grey images.
        postfix: goes between the input's name and ``.png``.
        inputs: paths of all inputs of a run. Those whose outputs would have one name (``a.png`` beside ``a.dcm``) keep
            their own suffix in it. Without, the second one of them is an error.
        text: keyword -> text, written into each file as the PNG's text chunks.

    Raises:
        UserError: if ``bits`` is neither 8 nor 16.
    """

    suffix = ".png"

    def __init__(
        self,
        output_dir: str | PathLike[str],
        data_root: str | PathLike[str] = "",
        bits: int = 8,
        postfix: str = "",
        inputs: Sequence[str | PathLike[str]] = (),
        text: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(output_dir, data_root, postfix, inputs)
        if bits not in (8, 16):
            raise UserError(f"bits must be 8 or 16, got {bits}")
        self.bits = bits
        self.text = PngImagePlugin.PngInfo()
        for keyword, value in (text or {}).items():
            self.text.add_text(keyword, value)  # Latin-1 as tEXt, the rest as iTXt

    def write(self, array: np.ndarray, path: Path, name: str) -> None:
        """Write (1, H, W) or (3, H, W) in [0, 1]."""
        if array.ndim != 3 or array.shape[0] not in (1, 3):
            raise UserError(f"{name}: expected a (C, H, W) image with 1 or 3 channels, got shape {array.shape}")
        if self.bits == 16 and array.shape[0] == 3:
            raise UserError(f"{name}: 16-bit PNG is for grey images, got 3 channels; set bits to 8 or use SaveArray")
        if not np.isfinite(array).all():
            raise UserError(f"{name}: expected values in [0, 1], got values that are not finite")
        top = 2**self.bits - 1
        levels = np.rint(np.clip(array.astype(np.float64), 0, 1) * top).astype(np.uint8 if top == 255 else np.uint16)
        image = Image.fromarray(levels[0] if array.shape[0] == 1 else np.ascontiguousarray(levels.transpose(1, 2, 0)))
        image.save(path, format="PNG", pnginfo=self.text)


class SavePNGd(_Saved):
    """Dictionary version of :class:`SavePNG`; the path goes to ``<key>_path``.

    Args:
        keys: keys of the images.
        output_dir: see :class:`SavePNG`.
        data_root: see :class:`SavePNG`.
        bits: see :class:`SavePNG`.
        postfix: goes between the input's name and the suffix, one text per key; None: nothing for a single key,
            ``_<key>`` for several.
        name_key: key whose value names the file, a ``MetaTensor`` or a path; None: the image itself does.
        allow_missing_keys: whether to skip keys that an item lacks.
        inputs: see :class:`SavePNG`.

    Raises:
        UserError: if two keys have the same postfix.
    """

    def __init__(
        self,
        keys: KeysCollection,
        output_dir: str | PathLike[str],
        data_root: str | PathLike[str] = "",
        bits: int = 8,
        postfix: Sequence[str] | str | None = None,
        name_key: Hashable | None = None,
        allow_missing_keys: bool = False,
        inputs: Sequence[str | PathLike[str]] = (),
    ) -> None:
        super().__init__(
            keys, lambda text: SavePNG(output_dir, data_root, bits, text, inputs), postfix, name_key, allow_missing_keys
        )


class SaveArray(_Save):
    """Write an array of any shape, such as a latent (C, H, W), as ``.npy`` named after its input.

    Args:
        output_dir: folder to write below; made where missing.
        data_root: see :class:`SavePNG`.
        dtype: ``float32`` or ``float16``.
        postfix: goes between the input's name and ``.npy``.
        inputs: see :class:`SavePNG`.

    Raises:
        UserError: if ``dtype`` is another type.
    """

    suffix = ".npy"

    def __init__(
        self,
        output_dir: str | PathLike[str],
        data_root: str | PathLike[str] = "",
        dtype: str = "float32",
        postfix: str = "",
        inputs: Sequence[str | PathLike[str]] = (),
    ) -> None:
        super().__init__(output_dir, data_root, postfix, inputs)
        if dtype not in ("float16", "float32"):
            raise UserError(f"dtype must be float16 or float32, got {dtype}")
        self.dtype = dtype

    def write(self, array: np.ndarray, path: Path, name: str) -> None:
        """Write any shape; values must be finite in the chosen type."""
        with np.errstate(over="ignore"):
            values = array.astype(self.dtype)
        if not np.isfinite(values).all():
            raise UserError(f"{name}: has values that are not finite in {self.dtype}; mend them or set float32")
        with path.open("wb") as file:  # np.save() would add .npy to the temporary name
            np.save(file, values, allow_pickle=False)


class SaveArrayd(_Saved):
    """Dictionary version of :class:`SaveArray`; the path goes to ``<key>_path``.

    Args:
        keys: keys of the arrays.
        output_dir: see :class:`SaveArray`.
        data_root: see :class:`SaveArray`.
        dtype: see :class:`SaveArray`.
        postfix: goes between the input's name and the suffix, one text per key; None: nothing for a single key,
            ``_<key>`` for several.
        name_key: key whose value names the file, a ``MetaTensor`` or a path; None: the image itself does.
        allow_missing_keys: whether to skip keys that an item lacks.
        inputs: see :class:`SavePNG`.

    Raises:
        UserError: if two keys have the same postfix.
    """

    def __init__(
        self,
        keys: KeysCollection,
        output_dir: str | PathLike[str],
        data_root: str | PathLike[str] = "",
        dtype: str = "float32",
        postfix: Sequence[str] | str | None = None,
        name_key: Hashable | None = None,
        allow_missing_keys: bool = False,
        inputs: Sequence[str | PathLike[str]] = (),
    ) -> None:
        super().__init__(
            keys,
            lambda text: SaveArray(output_dir, data_root, dtype, text, inputs),
            postfix,
            name_key,
            allow_missing_keys,
        )
