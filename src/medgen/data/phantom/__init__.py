"""Synthetic studies with known truth, in the folder layouts of public datasets. Imports neither MONAI nor torch."""

from __future__ import annotations

from medgen.data.phantom.abdomen import (
    CT_FINDINGS,
    AbdomenAnatomy,
    AbdomenFinding,
    AbdomenPhantom,
    AbdomenScan,
    AbdomenVolume,
)
from medgen.data.phantom.clip import write_clip
from medgen.data.phantom.layouts import (
    LAYOUTS,
    CtStudy,
    Layout,
    PhantomSpec,
    SkinStudy,
    Study,
    draw_ct_studies,
    draw_skin_studies,
    draw_studies,
    write_phantom,
)
from medgen.data.phantom.skin import SkinPhantom
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
    "CT_FINDINGS",
    "FINDINGS",
    "LAYOUTS",
    "AbdomenAnatomy",
    "AbdomenFinding",
    "AbdomenPhantom",
    "AbdomenScan",
    "AbdomenVolume",
    "Acquisition",
    "Anatomy",
    "CtStudy",
    "Finding",
    "Layout",
    "PhantomSpec",
    "SkinPhantom",
    "SkinStudy",
    "Study",
    "ThoraxImage",
    "ThoraxPhantom",
    "draw_ct_studies",
    "draw_skin_studies",
    "draw_studies",
    "make_thorax",
    "write_clip",
    "write_phantom",
]
