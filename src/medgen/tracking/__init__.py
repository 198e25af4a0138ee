"""Experiment tracking with MLflow that neither stops nor slows a training: a journal on disk, sent in the background.

Importing this package imports neither MONAI nor torch nor MLflow: `medgen --help` asks it for a help line.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "handlers": ["EvaluationTracking", "TrainingTracking", "ValidationTracking"],
        "journal": ["Journal"],
        "sender": ["Sender", "first_use", "folder_status", "send_folder"],
        "tracker": ["Tracker"],
        "uri": ["database_of", "default_uri", "local_uri", "resolve_uri"],
    },
)
