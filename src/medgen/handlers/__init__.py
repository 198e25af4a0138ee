"""Handlers that MONAI and ignite do not ship."""

from __future__ import annotations

from medgen.handlers.animation import AnimationWriter, GridWriter, check_animation_name, write_animation
from medgen.handlers.anomaly import DetectionFigures, ScoresCSV, image_metrics, reconstruction_metrics
from medgen.handlers.checkpoint import BestModelSaver, TrainingCheckpoint, WeightsLoader, atomic_save
from medgen.handlers.classification import ClassificationFigures, ClassificationGrid, PredictionsCSV
from medgen.handlers.companions import ModelCompanions, check_trained_as
from medgen.handlers.embedding import EmbeddingWriter, inversion_metrics
from medgen.handlers.generator_metrics import GeneratorMetrics
from medgen.handlers.growth import LevelSaver
from medgen.handlers.latents import LatentWriter
from medgen.handlers.metrics import MetricsJSON
from medgen.handlers.pictures import DiffusionGrid, ReconstructionGrid, SampleGrid, save_comparison, save_grid
from medgen.handlers.progress import TrainingProgress, scalars
from medgen.handlers.projection import ProjectionProgress, save_loss_curves
from medgen.handlers.sample_metrics import SampleMetrics
from medgen.handlers.segmentation import MetricIntervals, SegmentationGrid
from medgen.handlers.validation import ValidationAtIntervals

__all__ = [
    "AnimationWriter",
    "BestModelSaver",
    "ClassificationFigures",
    "ClassificationGrid",
    "DetectionFigures",
    "DiffusionGrid",
    "EmbeddingWriter",
    "GeneratorMetrics",
    "GridWriter",
    "LatentWriter",
    "LevelSaver",
    "MetricIntervals",
    "MetricsJSON",
    "ModelCompanions",
    "PredictionsCSV",
    "ProjectionProgress",
    "ReconstructionGrid",
    "SampleGrid",
    "SampleMetrics",
    "ScoresCSV",
    "SegmentationGrid",
    "TrainingCheckpoint",
    "TrainingProgress",
    "ValidationAtIntervals",
    "WeightsLoader",
    "atomic_save",
    "check_animation_name",
    "check_trained_as",
    "image_metrics",
    "inversion_metrics",
    "reconstruction_metrics",
    "save_comparison",
    "save_grid",
    "save_loss_curves",
    "scalars",
    "write_animation",
]
