"""A dataset small enough to train a bundle in seconds, and workflows that do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medgen.data import write_datalist
from medgen.data.phantom.clip import write_clip

SIDE = 64


@pytest.fixture(scope="module", autouse=True)
def process_as_before() -> Iterator[None]:
    """Running a bundle changes the process: its hook for errors, its import path, its determinism."""
    from monai.utils import set_determinism

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "excepthook", sys.excepthook)
        patch.setattr(sys, "path", list(sys.path))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)  # it would win over the bundle's own
        yield
    set_determinism(seed=None)


@pytest.fixture(scope="session")
def datalist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight grey 64×64 PNGs of as many patients, with the optional fields of a datalist as well."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    row, column = np.mgrid[:SIDE, :SIDE] / SIDE
    splits: dict[str, list[dict[str, Any]]] = {}
    number = 0
    for split, count in {"training": 4, "validation": 2, "test": 2}.items():
        splits[split] = []
        for _ in range(count):
            centre_row, centre_column, radius = random.uniform((0.3, 0.3, 0.1), (0.7, 0.7, 0.3))
            disc = (row - centre_row) ** 2 + (column - centre_column) ** 2 < radius**2
            grey = 60 + 120 * disc + random.normal(0, 8, disc.shape)
            Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).save(folder / f"image{number}.png")
            Image.fromarray(255 * disc.astype(np.uint8)).save(folder / f"mask{number}.png")
            item = {"image": f"image{number}.png", "patient": f"p{number}"}
            item |= {"label": number % 2, "text": "A disc.", "mask": f"mask{number}.png"}
            splits[split].append(item)
            number += 1
    write_datalist(folder / "datalist.json", "discs", "X-ray", splits)
    return folder / "datalist.json"


@pytest.fixture(scope="session")
def ingredients(datalist: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], dict[str, str]]:
    """Settings of what a bundle's training cannot begin without, beside a datalist; made on first use.

    For a bundle with latents: an autoencoder (of random weights), the latents of the data, a text encoder, and samples.
    For one that inverts a generator: a generator and an encoder of random weights.
    """
    import torch
    from monai.bundle import ConfigParser, ConfigWorkflow

    made: dict[Path, dict[str, str]] = {}

    def inverted(bundle: Path) -> dict[str, str]:
        folder = tmp_path_factory.mktemp("ingredients")
        torch.manual_seed(0)
        of_generator = [str(bundle.parent / "cxr_pggan" / "configs" / f"{name}.json") for name in ("inference", "demo")]
        generator = ConfigParser(ConfigParser.load_config_files(of_generator)).get_parsed_content("network_def")
        torch.save(generator.state_dict(), folder / "generator.pt")
        parser = ConfigParser(
            ConfigParser.load_config_files([str(bundle / "configs" / f"{name}.json") for name in ("train", "demo")])
        )
        torch.save(parser.get_parsed_content("network_def").state_dict(), folder / "encoder.pt")
        return {
            "generator": str(bundle.parent / "cxr_pggan"),
            "generator_weights": str(folder / "generator.pt"),
            "initial_weights": str(folder / "encoder.pt"),
        }

    def of(bundle: Path) -> dict[str, str]:
        if bundle in made:
            return made[bundle]
        if (bundle / "configs" / "train_bootstrap.json").is_file():
            return made.setdefault(bundle, inverted(bundle))
        encode = bundle / "configs" / "encode.json"
        if not encode.is_file():
            return made.setdefault(bundle, {})
        folder = tmp_path_factory.mktemp("ingredients")
        configs = [str(encode), str(bundle / "configs" / "demo.json")]
        torch.manual_seed(0)
        autoencoder = ConfigParser(ConfigParser.load_config_files(configs)).get_parsed_content("autoencoder_def")
        torch.save(autoencoder.state_dict(), folder / "autoencoder.pt")
        settings = {"autoencoder_path": str(folder / "autoencoder.pt"), "latents_dir": str(folder / "latents")}
        options = {"bundle_root": str(bundle), "datalist": str(datalist), "num_workers": 0, **settings}
        run = ConfigWorkflow(configs, logging_file=False, workflow_type="infer", **options)
        run.initialize()
        run.run()
        write_clip(folder / "clip", width=32)
        samples = {"training": [{"image": f"sample{n}.png", "patient": f"synthetic-{n}"} for n in range(4)]}
        for number, item in enumerate(samples["training"]):
            pixels = np.random.default_rng(number).integers(0, 255, (SIDE, SIDE), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / item["image"])
        write_datalist(folder / "datalist.json", "samples", "X-ray", samples)
        return made.setdefault(bundle, {**settings, "text_encoder": str(folder / "clip"), "samples_dir": str(folder)})

    return of


@pytest.fixture(scope="session")
def workflow(datalist: Path, ingredients: Callable[[Path], dict[str, str]]) -> Callable[..., Any]:
    """Factory of workflows: ``workflow(bundle, "train", output_dir, tracking=..., **overrides)``.

    Where the bundle has a demo overlay it is laid over the config: its network is small enough for a CPU.
    """
    from monai.bundle import ConfigParser, ConfigWorkflow

    def make(bundle: Path, config: str, output_dir: Path, tracking: Any = None, **overrides: Any) -> ConfigWorkflow:
        config_file = [str(bundle / "configs" / f"{config}.json"), str(bundle / "configs" / "demo.json")]
        ids = ConfigParser.load_config_files(config_file)
        needed = ingredients(bundle)
        if "latents_dir" in needed and config != "train":
            # a training puts it beside its model; here it may not have run
            needed = {**needed, "scaling_path": f"{needed['latents_dir']}/scaling.json"}
        short = {"max_epochs": 2, "max_images": 8, "max_steps": 2, "tick_images": 4, "steps": 2}
        short |= {"val_interval": 1, "preview_steps": 2}
        settings = {
            "bundle_root": str(bundle),
            "datalist": str(datalist),
            "output_dir": str(output_dir),
            "model_path": str(output_dir / "models" / "model.pt"),
            "num_workers": 0,
            "batch_size": 2,
            **{name: value for name, value in {**short, **needed}.items() if name in ids},
            **overrides,
        }
        return ConfigWorkflow(
            config_file,
            logging_file=False,  # it would take pytest's handlers off
            tracking=tracking,
            workflow_type="train" if config.startswith("train") else "infer",
            **settings,
        )

    return make
