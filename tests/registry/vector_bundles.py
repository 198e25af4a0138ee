"""A complete bundle of a few numbers, where a registry keeps it, and code that must not run."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from mlflow.tracking import MlflowClient
from torch import nn

PINS = {"monai_version": "1.6.1", "pytorch_version": "2.15.0", "numpy_version": "2.4.6"}


def make_vector_bundle(folder: Path) -> Path:
    """A complete bundle whose network takes latent vectors: (B, 4) to (B, 2)."""
    tensor = {"spatial_shape": [], "dtype": "float32"}
    data_format = {"inputs": {"z": {**tensor, "num_channels": 4}}, "outputs": {"pred": {**tensor, "num_channels": 2}}}
    metadata = {"version": "0.2.0", **PINS, "required_packages_version": {}, "network_data_format": data_format}
    inference = {"network_def": {"_target_": "torch.nn.Linear", "in_features": "@width", "out_features": 2}, "width": 4}
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    (folder / "LICENSE").write_text("as you like\n")
    (folder / "configs" / "metadata.json").write_text(json.dumps(metadata))
    (folder / "configs" / "inference.json").write_text(json.dumps(inference))
    torch.save(nn.Linear(4, 2).state_dict(), folder / "models" / "model.pt")
    return folder


def stored_bundle(uri: str, name: str, version: int) -> Path:
    """The folder in the artifact store that holds a registered bundle."""
    database = Path(uri.removeprefix("sqlite:///"))
    model_id = MlflowClient(uri).get_model_version(name, str(version)).source.removeprefix("models:/")
    return database.parent / "mlruns" / "models" / model_id / "artifacts" / "artifacts" / "bundle"


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


class Evil:
    """Unpickles by making a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)
