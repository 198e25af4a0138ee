"""Datalists and readers.

Importing this package imports neither MONAI nor torch: preprocessing starts a process per core, and MONAI's import
costs each of them ten seconds. What needs MONAI is imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# public name -> module of this package that defines it
_HOME = {
    "Frame": "reader",
    "ImageSet": "image_set",
    "MedicalImageReader": "image_reader",
    "ResumableDataLoader": "stream",
    "UnreadableImageError": "reader",
    "datalist_hash": "datalist",
    "derive_seed": "stream",
    "items_from_folder": "datalist",
    "load_datalist": "datalist",
    "read_frames": "reader",
    "split_by_patient": "datalist",
    "validate_datalist": "datalist",
    "write_datalist": "datalist",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
