"""Bundles as served models: images in base64 or arrays in, images, scores, masks and latents out.

Importing this package imports neither torch, MONAI nor MLflow; what needs them is imported on first use.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "codec": ["decode_image", "encode_image"],
        "guard": ["RequestError"],
        "images": [
            "AnomalyService",
            "ClassificationService",
            "InversionService",
            "ReconstructionService",
            "SegmentationService",
            "served_generator",
        ],
        "load": ["load_service"],
        "model": ["describe", "example", "save_model"],
        "parameters": ["Parameter", "param_schema"],
        "sampling": ["DiffusionService", "GeneratorService", "served_conditioner"],
        "server": ["serve"],
        "service": ["ImageService", "Service"],
    },
)
