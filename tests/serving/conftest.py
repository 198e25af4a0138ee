"""Bundles of this collection, small and with fresh weights, as they lie in a registered model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from base64_pictures import as_base64
from monai.bundle import ConfigParser

from medgen.data import LatentScaling, file_sha256
from medgen.data.phantom import make_thorax

BUNDLES = Path(__file__).parents[2] / "bundles"
OVERLAYS = {"augmentation_classifier": ["demo"], "lung_segmentation": ["small_128"], "skin_sngan": ["demo"]}


def overlaid(bundle: Path, *overlays: str) -> dict[str, Any]:
    """serve.json as a registration with these overlays leaves it."""
    config = json.loads((bundle / "configs" / "serve.json").read_text(encoding="utf-8"))
    for name in overlays:
        overlay = json.loads((bundle / "configs" / f"{name}.json").read_text(encoding="utf-8"))
        config |= {key: value for key, value in overlay.items() if key in config}
    return config


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a bundle's folder with weights; each once."""
    made: dict[tuple[Any, ...], Path] = {}

    def make(name: str, *overlays: str, **settings: Any) -> Path:
        key = (name, overlays, json.dumps(settings, sort_keys=True))
        if key in made:
            return made[key]
        folder = tmp_path_factory.mktemp("served") / name
        shutil.copytree(BUNDLES / name / "configs", folder / "configs")
        shutil.copy(BUNDLES / name / "LICENSE", folder)
        config = overlaid(folder, *(OVERLAYS.get(name, ["small_64"])), *overlays) | settings
        (folder / "configs" / "serve.json").write_text(json.dumps(config))
        (folder / "models").mkdir()
        parser = ConfigParser(config | {"bundle_root": str(folder), "device": "cpu"})
        torch.manual_seed(0)
        torch.save(parser.get_parsed_content("network_def").state_dict(), folder / "models" / "model.pt")
        if "autoencoder_def" in config:
            path = folder / "models" / "autoencoder.pt"
            torch.save(parser.get_parsed_content("autoencoder_def").state_dict(), path)
            LatentScaling((1.5,), (0.0,), file_sha256(path)).write(folder / "models" / "scaling.json")
            (folder / "models" / "trained_as.json").write_text(json.dumps({"image_size": 64}))
        made[key] = folder
        return folder

    return make


@pytest.fixture(scope="session")
def radiograph() -> np.ndarray:
    """A phantom, (120, 100), 8-bit levels."""
    return np.rint(make_thorax(np.random.default_rng(3), 120).image[:, 10:110] * 255).astype(np.uint8)


@pytest.fixture(scope="session")
def png(radiograph: np.ndarray) -> str:
    """The phantom as the base64 text of a PNG."""
    return as_base64(radiograph)
