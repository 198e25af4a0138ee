"""A training step of the latent diffusion model from cached latents against one from pixels, data loading included.

Both networks are those of the overlay small_64.json.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import Dataset
from monai.networks.schedulers import DDPMScheduler
from monai.transforms import CenterSpatialCropd, Compose, LoadImaged, RandAffined, SelectItemsd
from PIL import Image

from medgen.data import LatentScaling, LatentStore, MedicalImageReader, load_datalist, load_latents, write_datalist
from medgen.data.stream import ResumableDataLoader
from medgen.engines import LatentDiffusionTrainer
from medgen.inferers import PosteriorEncoder, PosteriorInferer
from medgen.losses import DiffusionLoss
from medgen.networks import KLAutoencoder
from medgen.transforms import CheckImaged, LoadLatentd, ResizeShorterSided

CONFIGS = Path(__file__).parents[2] / "bundles" / "cxr_latent_diffusion" / "configs"
SIDE, BATCH, STEPS, ROUNDS = 64, 8, 6, 7
AUGMENT_PROB = 0.1
READ = [
    LoadImaged("image", reader=MedicalImageReader, ensure_channel_first=True, image_only=True),
    ResizeShorterSided("image", size=SIDE, enlarge=False),
    CheckImaged("image", channels=1, min_shape=(SIDE, SIDE)),
    CenterSpatialCropd("image", roi_size=(SIDE, SIDE)),
]


def make_network(name: str) -> torch.nn.Module:
    """A network of the bundle's configs train.json, small_64.json and unconditional.json, with random weights."""
    config = ConfigParser(
        ConfigParser.load_config_files([CONFIGS / f"{part}.json" for part in ("train", "small_64", "unconditional")])
    )
    torch.manual_seed(0)
    return config.get_parsed_content(name)


def make_autoencoder(folder: Path) -> KLAutoencoder:
    """The autoencoder and its file."""
    autoencoder = make_network("autoencoder_def").to(memory_format=torch.channels_last)
    torch.save(autoencoder.state_dict(), folder / "autoencoder.pt")
    return autoencoder.eval().requires_grad_(False)


def make_data(folder: Path) -> Path:
    """As many PNGs as an epoch takes."""
    random, items = np.random.default_rng(0), []
    for number in range(BATCH * STEPS):
        Image.fromarray(random.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)).save(folder / f"{number}.png")
        items.append({"image": f"{number}.png", "patient": str(number)})
    write_datalist(folder / "datalist.json", "bench", "X-ray", {"training": items})
    return folder / "datalist.json"


def epoch(items: list[dict[str, Any]], transforms: list[Any], encoder: PosteriorEncoder | None) -> Callable[[], None]:
    """An epoch of the engine."""
    network = make_network("network_def")
    dataset = Dataset(items, Compose([*transforms, SelectItemsd("image")]))
    trainer = LatentDiffusionTrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=ResumableDataLoader(dataset, batch_size=BATCH),
        network=network,
        optimizer=torch.optim.AdamW(network.parameters(), lr=2.5e-5),
        loss=DiffusionLoss(
            DDPMScheduler(
                1000, "scaled_linear_beta", beta_start=0.0015, beta_end=0.0205, prediction_type="v_prediction"
            )
        ),
        encoder=encoder,
    )

    def run() -> None:
        trainer.state.max_epochs = trainer.state.epoch + 1
        trainer.run()

    return run


def seconds(run: Callable[[], Any], steps: int = STEPS) -> float:
    """Wall-clock seconds of a step."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) / steps


def run() -> list[tuple[str, float, str]]:
    """Measure the two in turn; a ratio of 0.5 is a step from latents in half of the time of one from pixels.

    Returns:
        (name, ratio, detail) per comparison.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        autoencoder, datalist = make_autoencoder(folder), make_data(folder)
        store = LatentStore(
            folder / "latents",
            datalist,
            ["training"],
            None,
            folder / "autoencoder.pt",
            (3, SIDE // 4, SIDE // 4),
            "bench",
        )
        store.begin()
        read, encode = Compose(READ), PosteriorInferer()
        with torch.no_grad():
            for item in store.todo:
                store.add(item["number"], encode(read(item)["image"][None, None], autoencoder)[0].numpy())
        store.finish()
        scaling = LatentScaling.read(folder / "latents" / "scaling.json")
        latents = epoch(
            load_latents(folder / "latents", datalist, "training"),
            [LoadLatentd("latent", scaling, augment_prob=AUGMENT_PROB)],
            None,
        )
        affine = RandAffined(
            "image",
            prob=AUGMENT_PROB,
            rotate_range=[np.deg2rad(5)],
            translate_range=[2, 2],
            scale_range=[0.01, 0.01],
            mode="bilinear",
        )
        from_pixels = [*READ, affine]
        pixels = epoch(load_datalist(datalist, "training"), from_pixels, PosteriorEncoder(autoencoder, scaling))
        seconds(latents), seconds(pixels)
        pairs = [(seconds(latents), seconds(pixels)) for _ in range(ROUNDS)]
    ratio = statistics.median(ours / theirs for ours, theirs in pairs)
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    detail = f"{BATCH / ours:.1f} images/s against {BATCH / theirs:.1f} ({torch.get_num_threads()} threads)"
    return [(f"training step of small_64.json, latents / pixels, {SIDE}×{SIDE}, batch {BATCH}", ratio, detail)]


if __name__ == "__main__":
    for name, ratio, detail in run():
        print(f"{name}: {ratio:.3f}, {detail}; median of {ROUNDS} pairs")
