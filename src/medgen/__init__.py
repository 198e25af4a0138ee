"""Generative models for medical images, as MONAI bundles."""

from __future__ import annotations

import importlib
from types import ModuleType

__version__ = "0.1.0"

_SUBMODULES = (
    "apps",
    "convert",
    "data",
    "distributed",
    "engines",
    "errors",
    "handlers",
    "inferers",
    "lineage",
    "losses",
    "metrics",
    "networks",
    "output",
    "registry",
    "report",
    "serving",
    "settings",
    "sources",
    "tracking",
    "transforms",
    "weights",
)


def __getattr__(name: str) -> ModuleType:
    # Submodules on first use: `$import medgen` in a bundle's config binds one name only ("$import medgen.errors" would
    # bind "medgen.errors", which no expression can say), and `medgen phantom` must not wait ten seconds for MONAI.
    if name in _SUBMODULES:
        return importlib.import_module(f"medgen.{name}")
    raise AttributeError(f"module 'medgen' has no attribute {name!r}")
