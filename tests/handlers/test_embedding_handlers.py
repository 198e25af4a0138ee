"""Embeddings that a run writes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.handlers import MeanSquaredError
from monai.metrics import MultiScaleSSIMMetric
from skimage.metrics import peak_signal_noise_ratio

from medgen.data import Embedding
from medgen.handlers import EmbeddingWriter, inversion_metrics
from medgen.networks import LatentGenerator, PGGANGenerator


@pytest.fixture
def batches():
    """Two batches of an evaluator's output: images of 64 pixels, noisy copies, and latents."""
    draws = torch.Generator().manual_seed(0)
    images = torch.rand(3, 1, 64, 64, generator=draws)
    noisy = (images + 0.1 * torch.randn(images.shape, generator=draws)).clamp(0, 1)
    latents = torch.randn(3, 1, 4, generator=draws)
    items = [{"image": i, "pred": p, "latent": z} for i, p, z in zip(images, noisy, latents, strict=True)]
    return [items[:2], items[2:]]


def run(writer: EmbeddingWriter, batches: list) -> None:
    engine = Engine(lambda engine, batch: batch)
    engine.state.metric_details = {}
    engine.state.model_sha256 = "b" * 64
    for name, metric in inversion_metrics().items():
        metric.attach(engine, name)
    writer.attach(engine)
    engine.run(batches)


def make_writer(folder, items) -> EmbeddingWriter:
    generator = LatentGenerator(PGGANGenerator(channels=[4, 4], latent_dim=4), sha256="a" * 64)
    return EmbeddingWriter(folder / "embedding", items, generator, "encoder", folder / "data")


def test_embedding_has_what_the_datalist_says_and_the_figures_of_each_image(tmp_path, batches):
    about = {"patient": "7", "labels": [], "age": 50, "split": "test"}
    items = [{"image": str(tmp_path / "data" / "sub" / f"{n}.png"), **about, "mask": "m.png"} for n in range(3)]
    run(make_writer(tmp_path, items), batches)
    found = Embedding.read(tmp_path / "embedding", "a" * 64)
    entries = [entry for batch in batches for entry in batch]
    np.testing.assert_array_equal(found.latents, torch.stack([entry["latent"] for entry in entries]).numpy())
    assert (found.space, found.encoder_sha256, found.stage, found.std) == ("z", "b" * 64, "encoder", 1.0)
    ms_ssim = MultiScaleSSIMMetric(spatial_dims=2, kernel_size=3)
    for number, (item, entry) in enumerate(zip(found.items, entries, strict=True)):
        image, pred = entry["image"].double().numpy(), entry["pred"].double().numpy()
        expected = {"image": f"sub/{number}.png", **about}
        expected |= {
            "mse": pytest.approx(((image - pred) ** 2).mean(), rel=1e-5),
            "psnr": pytest.approx(peak_signal_noise_ratio(image, pred, data_range=1), rel=1e-5),
            "ms_ssim": pytest.approx(ms_ssim(entry["pred"][None], entry["image"][None]).item(), rel=1e-5),
        }
        assert item == expected


def test_second_run_forgets_the_first(tmp_path, batches):
    writer = make_writer(tmp_path, [{"image": str(tmp_path / "data" / f"{n}.png"), "patient": n} for n in range(3)])
    for _ in range(2):
        run(writer, batches)
        assert len(Embedding.read(tmp_path / "embedding")) == 3


def test_mean_square_error_is_the_first_metric():
    assert isinstance(next(iter(inversion_metrics().values())), MeanSquaredError)  # an evaluator's key metric
