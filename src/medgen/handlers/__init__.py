"""Handlers that MONAI and ignite do not ship."""

from __future__ import annotations

from medgen.handlers.checkpoint import BestModelSaver, TrainingCheckpoint, WeightsLoader, atomic_save
from medgen.handlers.metrics import MetricsJSON
from medgen.handlers.pictures import ReconstructionGrid, SampleGrid, save_grid
from medgen.handlers.progress import TrainingProgress, scalars
from medgen.handlers.validation import ValidationAtIntervals

__all__ = [
    "BestModelSaver",
    "MetricsJSON",
    "ReconstructionGrid",
    "SampleGrid",
    "TrainingCheckpoint",
    "TrainingProgress",
    "ValidationAtIntervals",
    "WeightsLoader",
    "atomic_save",
    "save_grid",
    "scalars",
]
