"""Weights in and out. No pickle of a foreign file is executed: :mod:`medgen.convert.restricted` builds tensors only."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "dcgan": ["convert_dcgan", "ConvertedDCGAN"],
        "export": ["Exported", "export_network"],
        "formats": ["FORMATS", "TOLERANCE"],
        "latent_diffusion": ["ConvertedNetwork", "convert_latent_diffusion", "convert_state_dict"],
        "medimagegan": ["ControlOverlay", "convert_control_file"],
        "mlflow_model": ["find_logged_weights", "read_exported_weights", "read_logged_weights"],
        "pggan": ["ConvertedPGGAN", "PGGANWeights", "convert_pggan"],
        "pggan_pickle": ["SnapshotNetwork", "read_pggan_pickle"],
        "restricted": ["module_state_dict", "read_module_weights", "read_records", "Record", "StoredTensor"],
        "rosinality": ["convert_rosinality"],
        "stylegan2": ["ConvertedStyleGAN2", "from_official", "official_settings", "to_official"],
        "stylegan2_pickle": ["convert_stylegan2_pickle", "read_stylegan2_pickle"],
        "tensor_file": ["from_safetensors", "to_safetensors"],
        "zoo": ["PushedBundle", "push_bundle"],
    },
)
