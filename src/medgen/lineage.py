"""Which weights this process has read, and where they came from."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from medgen.data.image_set import file_sha256

__all__ = ["Source", "forget", "note", "uri_of", "used", "weights_digest"]


@dataclass(frozen=True)
class Source:
    """A file of weights that was read.

    Args:
        kind: what it was read as: "model", "autoencoder", "generator", "encoder", "discriminator", or the setting that
            named it.
        source: as the user named it.
        path: the file.
        sha256: of the file.
        uri: ``models:/NAME/VERSION`` of the registered model that it is of; None for a file that is of none.
        model_id: of MLflow's LoggedModel behind that version, where it has one.
    """

    kind: str
    source: str
    path: Path
    sha256: str
    uri: str | None = None
    model_id: str | None = None


_used: dict[str, Source] = {}  # kind -> the last of it; a run reads one of each


def note(
    kind: str, source: str | Path, path: str | Path, uri: str | None = None, model_id: str | None = None
) -> Source:
    """Note that weights were read. One file noted again under its kind keeps what is known of where it came from."""
    found = Source(kind, str(source), Path(path), weights_digest(path), uri, model_id)
    before = _used.get(kind)
    if before is None or (before.path, before.sha256) != (found.path, found.sha256):
        _used[kind] = found
    return _used[kind]


def used() -> list[Source]:
    """The weights that the current run has read so far, in the order of their first use, one of each kind."""
    return list(_used.values())


def forget() -> None:
    """Begin anew: bundles call this in ``initialize``, since a notebook runs several, one after the other."""
    _used.clear()


def uri_of(sha256: str) -> str | None:
    """``models:/NAME/VERSION`` that weights of this checksum came from in this run; None for none."""
    return next((source.uri for source in _used.values() if source.sha256 == sha256 and source.uri), None)


def weights_digest(path: str | Path) -> str:
    """SHA-256 of a file of weights, read once as long as the file does not change."""
    path = Path(path).resolve()
    status = path.stat()
    return _digest(path, (status.st_ino, status.st_size, status.st_mtime_ns))


@functools.lru_cache(maxsize=64)
def _digest(path: Path, _state: tuple[int, ...]) -> str:
    return file_sha256(path)
