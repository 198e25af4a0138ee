"""Features of a set of images: extracted once, streamed in chunks, cached by content, saved without pickles."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from typing import Protocol as Interface

import numpy as np
from tqdm import tqdm

from medgen import __version__
from medgen.data.image_set import ImageSet, image_reason
from medgen.data.workers import CRASHED, map_each
from medgen.errors import UserError
from medgen.metrics.protocols import Protocol, get_protocol, make_extractor
from medgen.output import atomic_file

if TYPE_CHECKING:
    from medgen.metrics.frechet import FeatureMoments

__all__ = ["CHUNK", "FeatureExtractor", "FeatureSet", "default_cache_dir", "extract_features", "read_arrays"]

CHUNK = 256  # images whose features are one file of the cache
FORMAT = 1  # of saved features and of the cache


class FeatureExtractor(Interface):
    """What :func:`extract_features` asks of an extractor.

    One that has ``prepare`` and ``on_prepared`` beside these is a network: images are decoded and prepared in
    processes and given to it in batches. Any other is sent to the processes and works there.

    Attributes:
        name: for messages.
        settings: everything that decides the numbers, the weights' SHA-256 included; can stand in JSON.
        feature_names: of the columns; None if they have none.
    """

    name: str
    settings: dict[str, Any]
    feature_names: tuple[str, ...] | None

    def on_images(self, batch: Sequence[np.ndarray]) -> np.ndarray:
        """(B, D) from B images (C, H, W) in [0, 1]."""


@dataclass
class FeatureSet:
    """Features, and what they are of.

    Attributes:
        features: (N, D), finite; read-only and on disk (a memory map) after :func:`extract_features`.
        names: of the D features; empty if they have none.
        files: of the N images.
        patients: of the N images; None if unknown.
        protocol: name of the protocol.
        settings: what decided the numbers; sets are comparable if these are equal.
        rejected: reason per file that has no row here: the files that the set of images had left out before, and those
            that have no features by this protocol.
    """

    features: np.ndarray
    names: tuple[str, ...]
    files: tuple[str, ...]
    patients: tuple[str, ...] | None
    protocol: str
    settings: dict[str, Any]
    rejected: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.features.ndim != 2:
            raise UserError(f"features must be (images, features), got shape {self.features.shape}")
        for what, values, axis in (("files", self.files, 0), ("patients", self.patients, 0), ("names", self.names, 1)):
            if values and len(values) != self.features.shape[axis]:
                raise UserError(f"{what} must be {self.features.shape[axis]}, one each, got {len(values)}")

    def __len__(self) -> int:
        return len(self.features)

    def save(self, path: str | os.PathLike) -> None:
        """Write an ``.npz`` without pickles, whole or not at all.

        Raises:
            UserError: it cannot be written.
        """
        meta = {
            "format": FORMAT,
            "medgen": __version__,
            "protocol": self.protocol,
            "settings": self.settings,
            "names": self.names,
            "files": self.files,
            "patients": self.patients,
            "rejected": self.rejected,
        }
        try:
            _write_npz(Path(path), self.features, meta)
        except OSError as error:
            raise UserError(f"{error.strerror}; choose another --output") from error

    @classmethod
    def load(cls, path: str | os.PathLike) -> FeatureSet:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: the file is missing, damaged or something else.
        """
        try:
            features, meta = _read_npz(Path(path))
            if meta["format"] > FORMAT:
                raise UserError(f"{path} was written by medgen {meta['medgen']}; upgrade from {__version__} to read it")
            if not np.isfinite(features).all():
                raise UserError(f"{path} holds features that are not finite (NaN or infinity); extract them again")
            return cls(
                features=features,
                names=tuple(meta["names"]),
                files=tuple(meta["files"]),
                patients=None if meta["patients"] is None else tuple(meta["patients"]),
                protocol=str(meta["protocol"]),
                settings=dict(meta["settings"]),
                rejected=dict(meta["rejected"]),
            )
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"feature file {path} cannot be read ({error.strerror or error})") from error
        except Exception as error:  # damaged bytes raise whatever they lead to
            raise UserError(
                f"{path} is no feature file ({type(error).__name__}); make one with: medgen features SOURCE --protocol "
                "NAME --output FILE.npz"
            ) from error

    def moments(self) -> FeatureMoments:
        """Number, mean and covariance of the features, in one pass over the rows."""
        from medgen.metrics.frechet import FeatureMoments

        # the two sides of a protocol that treats them differently are meant to be compared
        ignored = ("role", "range") if "role" in self.settings else ()
        settings = {key: value for key, value in self.settings.items() if key not in ignored}
        return FeatureMoments.from_features(self.features, protocol=self.protocol, settings=settings)

    def check_comparable(self, other: FeatureSet) -> None:
        """See that two sets of features came about in the same way.

        Raises:
            UserError: names the settings that differ.
        """
        # the two sides of a protocol that treats them differently are meant to differ in that
        ignored = {"role", "range"} if "role" in self.settings and "role" in other.settings else set()
        keys = [*self.settings, *(key for key in other.settings if key not in self.settings)]
        missing = object()
        differ = [
            f"{key} {self.settings.get(key, 'absent')} and {other.settings.get(key, 'absent')}"
            for key in keys
            if key not in ignored and self.settings.get(key, missing) != other.settings.get(key, missing)
        ]
        if differ:
            shown = "; ".join(text[:120] for text in differ[:3])
            raise UserError(f"features of two kinds cannot be compared: {shown}; extract both with the same --protocol")
        if self.names != other.names or self.features.shape[1] != other.features.shape[1]:
            raise UserError(
                f"features of two kinds cannot be compared: {self.features.shape[1]} and {other.features.shape[1]} "
                "columns, or other names; extract both with the same medgen"
            )


# ---------------------------------------------------------------------------------------------------------------------
# extraction


@dataclass(frozen=True)
class _Answer:
    """One image's prepared pixels or features, or why there are none; ``final`` if trying again cannot help.

    ``planes`` says how often the one plane in ``value`` is to be repeated, if it is not 0.
    """

    value: np.ndarray | None = None
    planes: int = 0
    reason: str = ""
    final: bool = True


def extract_features(
    images: Sequence[np.ndarray],
    protocol: Protocol | str,
    *,
    extractor: FeatureExtractor | None = None,
    role: str | None = None,
    weights: str | os.PathLike | None = None,
    device: str = "cpu",
    batch_size: int = 32,
    num_workers: int = 0,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> FeatureSet:
    """Features of a set of images.

    They are computed in chunks of 256 images, each a file of the cache, named by the SHA-256 of the extractor's
    settings and the images' contents. An interrupted extraction goes on where it was; other weights, another size or
    a changed image are computed anew.

    Args:
        images: an :class:`~medgen.data.image_set.ImageSet`; or (C, H, W) arrays in [0, 1], C = 1 or 3, which are asked
            for twice, for their contents' hash and for their features.
        protocol: row of the protocol table, or its name.
        extractor: default: the protocol's, made anew. One that is given is not used up: it may be made once, by
            :func:`~medgen.metrics.protocols.make_extractor`, and serve all sets of a protocol and role.
        role: ``reference`` or ``samples``; only ``xrv_ldm_source`` asks for it.
        weights: file of the network's weights; default: where its own library keeps it.
        device: of a network.
        batch_size: images that a network sees at a time.
        num_workers: processes that decode, and that compute what is no network; 0 does it in this one.
        cache_dir: default: ``$MEDGEN_CACHE``, or ``~/.cache/medgen/features``.
        progress: show a bar, if the output is a terminal.

    Returns:
        The features; images that cannot be read, and those with a feature that is not finite, have no row but a
        reason in ``rejected``. The set of images is left as it is.

    Raises:
        UserError: if no image has features, the weights are missing, the extractor given was made for the other role,
            or the cache cannot be written to.
    """
    if isinstance(protocol, str):
        protocol = get_protocol(protocol, role=role)
    elif role is not None:
        protocol = protocol.with_role(role)
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    if extractor is None:
        extractor = make_extractor(protocol, weights=weights, device=device)
    elif extractor.settings.get("role", protocol.role) != protocol.role:
        raise UserError(
            f"the extractor of {extractor.name} must be that of role {protocol.role}, got one made for "
            f"{extractor.settings['role']}; make one for each role"
        )
    cache = _Cache(Path(cache_dir or default_cache_dir()), extractor.settings)

    files = images.files if isinstance(images, ImageSet) else tuple(str(i) for i in range(len(images)))
    # only files that the set has left out: whoever holds the set may have noted other reasons there
    here = set(files)
    before = images.rejected if isinstance(images, ImageSet) else {}
    rejected = {file: reason for file, reason in before.items() if file not in here}
    chunks = [range(start, min(start + CHUNK, len(images))) for start in range(0, len(images), CHUNK)]
    keys, unread = _chunk_keys(images, chunks, cache)
    missing = [number for number, key in enumerate(keys) if not cache.holds(key)]
    todo = [i for number in missing for i in chunks[number] if i not in unread]

    if missing:
        with (
            closing(_answers(images, extractor, todo, batch_size, num_workers)) as answers,
            tqdm(
                total=len(todo),
                desc=f"{protocol.name} features",
                unit="image",
                leave=False,
                disable=None if progress else True,
            ) as bar,
        ):
            for number in missing:
                chunk = []
                for i in chunks[number]:
                    chunk.append(unread[i] if i in unread else next(answers))
                    bar.update(i not in unread)
                cache.write(keys[number], chunk)

    kept: list[int] = []
    for chunk_of, key in zip(chunks, keys, strict=True):
        _, reasons = cache.read(key)
        rejected.update({files[chunk_of[position]]: reason for position, reason in reasons.items()})
        kept += [i for position, i in enumerate(chunk_of) if position not in reasons]
    if not kept:
        file, reason = next(iter(rejected.items()), ("the set", "it holds no image"))
        raise UserError(f"none of the {len(images)} images gives {protocol.name} features; {file}: {reason}")
    features = cache.joined(keys, len(kept))
    patients = images.patients if isinstance(images, ImageSet) else None
    return FeatureSet(
        features=features,
        names=tuple(extractor.feature_names or ()),
        files=tuple(files[i] for i in kept),
        patients=None if patients is None else tuple(patients[i] for i in kept),
        protocol=protocol.name,
        settings=json.loads(json.dumps(extractor.settings)),
        rejected=rejected,
    )


def default_cache_dir() -> Path:
    """``$MEDGEN_CACHE``, or ``~/.cache/medgen/features``."""
    return Path(os.environ.get("MEDGEN_CACHE") or Path.home() / ".cache" / "medgen" / "features")


def _chunk_keys(
    images: Sequence[np.ndarray], chunks: Sequence[range], cache: _Cache
) -> tuple[list[str], dict[int, _Answer]]:
    """Name of each chunk in the cache, and the images whose files could not be read for it."""
    keys, unread = [], {}
    for chunk in chunks:
        contents = []
        for i in chunk:
            try:
                contents.append(_content_key(images, i))
            except OSError as error:
                unread[i] = _Answer(reason=image_reason(error), final=False)
                contents.append("unread")
        keys.append(cache.key(contents))
    return keys, unread


def _content_key(images: Sequence[np.ndarray], index: int) -> str:
    if isinstance(images, ImageSet):
        return images.content_key(index)
    image = np.ascontiguousarray(images[index])
    return f"{hashlib.sha256(image.tobytes()).hexdigest()}:{image.shape}:{image.dtype.str}"


def _answers(
    images: Sequence[np.ndarray], extractor: FeatureExtractor, indices: Sequence[int], batch_size: int, num_workers: int
) -> Iterator[_Answer]:
    crashed = _Answer(reason=CRASHED, final=False)
    if not hasattr(extractor, "on_prepared"):
        yield from map_each(_features_of_one, (images, extractor), indices, num_workers, crashed, per_task=4)
        return
    waiting: list[_Answer] = []
    shape = None
    prepared = map_each(_prepared_one, (images, extractor.prepare), indices, num_workers, crashed, per_task=4)
    for answer in map(_with_all_planes, prepared):
        other_shape = answer.value is not None and shape is not None and answer.value.shape != shape
        if len(waiting) == batch_size or other_shape:
            yield from _network_features(extractor, waiting)
            waiting = []
        waiting.append(answer)
        shape = shape if answer.value is None else answer.value.shape
    yield from _network_features(extractor, waiting)


def _network_features(extractor: Any, waiting: Sequence[_Answer]) -> Iterator[_Answer]:
    batch = [answer.value for answer in waiting if answer.value is not None]
    rows = iter(extractor.on_prepared(batch) if batch else ())
    for answer in waiting:
        yield answer if answer.value is None else _finite(next(rows), extractor)


def _prepared_one(shared: tuple[Sequence[np.ndarray], Any], index: int) -> _Answer:
    images, prepare = shared
    try:
        value = prepare(images[index])
        # grey in three channels: the way from one process to another takes as long as the decoding of a small image
        alike = len(value) > 1 and all(np.array_equal(value[0], plane) for plane in value[1:])
        return _Answer(value[:1], planes=len(value)) if alike else _Answer(value)
    except Exception as error:  # one odd file must not stop the rest
        return _failed(images, index, error)


def _with_all_planes(answer: _Answer) -> _Answer:
    if answer.value is None or not answer.planes:
        return answer
    return _Answer(np.broadcast_to(answer.value, (answer.planes, *answer.value.shape[1:])))


def _features_of_one(shared: tuple[Sequence[np.ndarray], FeatureExtractor], index: int) -> _Answer:
    images, extractor = shared
    try:
        return _finite(extractor.on_images([images[index]])[0], extractor)
    except Exception as error:  # one odd file must not stop the rest
        return _failed(images, index, error)


def _failed(images: Sequence[np.ndarray], index: int, error: Exception) -> _Answer:
    # what is said of an image holds for ever, but not what is said of a file that is away or locked
    there = not isinstance(images, ImageSet) or os.access(images.path(index), os.R_OK)
    return _Answer(reason=image_reason(error), final=isinstance(error, UserError) and there)


def _finite(row: np.ndarray, extractor: FeatureExtractor) -> _Answer:
    row = np.asarray(row)
    (bad,) = np.nonzero(~np.isfinite(row))
    if not len(bad):
        return _Answer(row)
    names = extractor.feature_names
    which = ", ".join(names[i] if names else f"number {i}" for i in bad[:3]) + (", ..." if len(bad) > 3 else "")
    return _Answer(reason=f"{len(bad)} of {len(row)} features are not finite ({which})")


# ---------------------------------------------------------------------------------------------------------------------
# files


class _Cache:
    """Chunks of features on disk, each one file that is whole or absent and carries checksums (those of zip)."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.fingerprint = json.dumps([FORMAT, __version__, _code_digest(), settings], sort_keys=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"cache_dir must be a folder that can be written to, got {self.folder} ({error.strerror or error}); choose "
            "another with --cache_dir or MEDGEN_CACHE"
        )

    def key(self, contents: Sequence[str]) -> str:
        return hashlib.sha256(json.dumps([self.fingerprint, *contents]).encode()).hexdigest()

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.npz"

    def holds(self, key: str) -> bool:
        path = self._path(key)
        if not path.exists():
            return False
        try:
            return bool(_read_npz(path)[1]["final"])
        except Exception as error:  # damaged bytes raise whatever they lead to
            print(f"note: {path} is damaged ({type(error).__name__}); computed again", file=sys.stderr)
            return False

    def write(self, key: str, answers: Sequence[_Answer]) -> None:
        rows = [answer.value for answer in answers if not answer.reason and answer.value is not None]
        _check_one_width({len(row) for row in rows})
        reasons = {position: answer.reason for position, answer in enumerate(answers) if answer.reason}
        meta = {"final": all(answer.final for answer in answers), "reasons": reasons}
        try:
            _write_npz(self._path(key), np.stack(rows) if rows else np.empty((0, 0)), meta)
        except OSError as error:
            raise self._unwritable(error) from error

    def read(self, key: str) -> tuple[np.ndarray, dict[int, str]]:
        """The rows of a chunk, and by position in it the reasons why others are missing."""
        features, meta = _read_npz(self._path(key))
        return features, {int(position): reason for position, reason in meta["reasons"].items()}

    def joined(self, keys: Sequence[str], rows: int) -> np.ndarray:
        """The rows of several chunks as one array on disk, put together without holding more than one chunk."""
        path = self.folder / "sets" / f"{self.key(keys)}.npy"
        try:
            if not self._is_joined(path, keys, rows):
                # written, not mapped: a full disk ends a process that writes to a map
                with atomic_file(path) as file:
                    for part in self._parts(keys, rows):
                        file.write(part)
        except OSError as error:
            raise self._unwritable(error) from error
        return np.load(path, mmap_mode="r", allow_pickle=False)

    def _is_joined(self, path: Path, keys: Sequence[str], rows: int) -> bool:
        """Whether the file holds the chunks, byte for byte: unlike them it carries no checksums."""
        try:
            with open(path, "rb") as file:
                return all(file.read(len(part)) == part for part in self._parts(keys, rows)) and not file.read(1)
        except FileNotFoundError:
            return False

    def _parts(self, keys: Sequence[str], rows: int) -> Iterator[bytes]:
        """Bytes of an ``.npy`` file of the rows of several chunks: its header, then a chunk at a time."""
        first = None
        for key in keys:
            features, _ = self.read(key)
            if not len(features):
                continue
            if first is None:
                first = features[:1]
                head = io.BytesIO()
                shape = (rows, first.shape[1])
                np.lib.format.write_array_header_1_0(
                    head, {"descr": first.dtype.str, "fortran_order": False, "shape": shape}
                )
                yield head.getvalue()
            _check_one_width({first.shape[1], features.shape[1]})
            yield features.astype(first.dtype, copy=False).tobytes()


def _check_one_width(widths: set[int]) -> None:
    if len(widths) > 1:
        raise UserError(
            f"each image must give as many features, got {' and '.join(map(str, sorted(widths)))}; bring the images to "
            "one size with --image_size, or --feature_size for a network of your own"
        )


def _code_digest() -> str:
    """Fingerprint of the code that decodes and measures: features by other code must not be taken for today's."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for path in (*sorted(here.glob("*.py")), *(here.parent / "data" / name for name in ("image_set.py", "reader.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _write_npz(path: Path, features: np.ndarray, meta: dict[str, Any]) -> None:
    """An array and JSON as one ``.npz``, whole or not at all."""
    encoded = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
    try:
        with atomic_file(path) as file:  # numpy would add .npz to a name without it
            np.savez(file, features=features, meta=encoded)
    except OSError as error:
        raise OSError(error.errno, f"{path} cannot be written: {error.strerror or error}") from error


def _read_npz(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    features, meta = read_arrays(path, ("features", "meta"))
    return features, json.loads(meta.tobytes())


def read_arrays(path: str | os.PathLike, names: Sequence[str]) -> list[np.ndarray]:
    """Arrays of an ``.npz`` file that :func:`numpy.savez` wrote; they take no more memory than the file has bytes.

    Compressed ones are refused, for a few megabytes can become gigabytes, and so are pickles.

    Args:
        path: the file.
        names: of the arrays.

    Raises:
        UserError: an array is compressed, or has another size than its header says.
        Exception: whatever damaged bytes lead to, :class:`ValueError` for pickles.
    """
    arrays = []
    with zipfile.ZipFile(path) as archive:
        for name in names:
            entry = archive.getinfo(f"{name}.npy")
            if entry.compress_type != zipfile.ZIP_STORED:
                raise UserError(
                    f"{path} must hold its arrays uncompressed, got {name} compressed; write it with medgen features "
                    "or numpy.savez"
                )
            with archive.open(entry) as file:
                if np.lib.format.read_magic(file) != (1, 0):
                    raise ValueError(f"{name} is in another version of NumPy's format")
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                told = file.tell() + math.prod(shape) * dtype.itemsize
            # NumPy makes room for the whole array before it reads; what holds pickles it refuses by itself
            if not dtype.hasobject and not told == entry.file_size == entry.compress_size <= os.path.getsize(path):
                raise UserError(
                    f"{path} must hold the {told:,} bytes that {name} has by its header, got "
                    f"{entry.compress_size:,}; write it again"
                )
            with archive.open(entry) as file:
                arrays.append(np.lib.format.read_array(file, allow_pickle=False))
    return arrays
