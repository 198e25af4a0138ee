"""Datalists and readers.

Importing this package imports neither MONAI nor torch: preprocessing starts a process per core, and MONAI's import
costs each of them ten seconds. What needs MONAI is imported on first use.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "augmentation": [
            "AUGMENTATION_ARMS",
            "augmentation_arm",
            "load_synthetic",
            "mix_synthetic",
            "synthetic_mismatch",
        ],
        "classes": ["check_each_class", "class_names"],
        "conditions": ["as_text", "check_captions", "check_prompts", "load_prompts", "prompts_line", "with_masks"],
        "datalist": [
            "datalist_hash",
            "evenly",
            "items_from_folder",
            "load_classes",
            "load_datalist",
            "readable_items",
            "select_label",
            "split_by_patient",
            "validate_datalist",
            "write_datalist",
        ],
        "dicom_writer": ["pixel_affine", "read_source", "write_parametric_map", "write_secondary_capture"],
        "embedding": ["Embedding", "load_items"],
        "growth": ["GrowthSchedule", "GrowthStage"],
        "image_reader": ["MedicalImageReader"],
        "image_set": ["file_sha256", "ImageSet"],
        "latents": ["estimate_scaling", "LatentScaling", "LatentStore", "load_latents"],
        "masked": ["binary_mask", "load_masked", "mask_level"],
        "pending": ["group_batches", "pending_groups"],
        "provenance": ["check_synthetic", "check_unseen", "read_trained_on", "trained_on"],
        "pyramid": ["GrowingDataLoader", "ImagePyramid"],
        "reader": ["Frame", "read_frames", "UnreadableImageError"],
        "shard": ["parse_shard", "shard_line", "shard_of"],
        "stage": ["stage_datalist", "Staged"],
        "stream": ["derive_seed", "ResumableDataLoader", "SeedLoader", "ShieldedDataLoader"],
        "synthetic_set": ["begin_generation", "check_format", "provenance_line", "SyntheticSet", "weights_sha256"],
    },
)
