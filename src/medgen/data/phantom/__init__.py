"""Synthetic studies with known truth, in the folder layouts of public datasets. Imports neither MONAI nor torch."""

from __future__ import annotations

from medgen.data.phantom.layouts import LAYOUTS, Layout, PhantomSpec, Study, draw_studies, write_phantom
from medgen.data.phantom.thorax import (
    FINDINGS,
    Acquisition,
    Anatomy,
    Finding,
    ThoraxImage,
    ThoraxPhantom,
    make_thorax,
)

__all__ = [
    "FINDINGS",
    "LAYOUTS",
    "Acquisition",
    "Anatomy",
    "Finding",
    "Layout",
    "PhantomSpec",
    "Study",
    "ThoraxImage",
    "ThoraxPhantom",
    "draw_studies",
    "make_thorax",
    "write_phantom",
]
