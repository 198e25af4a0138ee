"""A training step of the autoencoder's engine against the same networks in a bare PyTorch loop."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from monai.data import Dataset
from monai.handlers import TensorBoardStatsHandler
from monai.networks.nets import PatchDiscriminator

from medgen.data.stream import ResumableDataLoader
from medgen.engines import AutoencoderKLTrainer
from medgen.handlers import TrainingProgress, scalars
from medgen.networks import KLAutoencoder, PosteriorReconstruction

SIDE, BATCH, STEPS, ROUNDS = 64, 8, 6, 9
IMAGES = torch.rand(BATCH * STEPS, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def networks() -> tuple[KLAutoencoder, PatchDiscriminator, torch.optim.Optimizer, torch.optim.Optimizer]:
    """The bundle's networks in its own configuration."""
    torch.manual_seed(0)
    autoencoder = KLAutoencoder(
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        num_res_blocks=2,
        channels=(64, 128, 128, 128),
        attention_levels=(False,) * 4,
        latent_channels=3,
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    ).to(memory_format=torch.channels_last)
    discriminator = PatchDiscriminator(spatial_dims=2, in_channels=1, out_channels=1, channels=64, num_layers_d=3)
    discriminator.to(memory_format=torch.channels_last)
    g_optimizer = torch.optim.Adam(autoencoder.parameters(), lr=5e-5)
    d_optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-4)
    return autoencoder, discriminator, g_optimizer, d_optimizer


def engine_epoch(folder: Path) -> Callable[[], None]:
    """An epoch in the engine with the bundle's handlers, data loader included, adversarial term on."""
    autoencoder, discriminator, g_optimizer, d_optimizer = networks()
    loader = ResumableDataLoader(Dataset([{"image": image} for image in IMAGES]), batch_size=BATCH)
    trainer = AutoencoderKLTrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=loader,
        autoencoder=PosteriorReconstruction(autoencoder),
        discriminator=discriminator,
        g_optimizer=g_optimizer,
        d_optimizer=d_optimizer,
        reconstruction_loss=torch.nn.L1Loss(),
        adversarial_start_epoch=0,
        train_handlers=[
            TrainingProgress("bench", keys=("loss", "reconstruction", "kl", "discriminator")),
            TensorBoardStatsHandler(log_dir=str(folder), iteration_log=10, output_transform=scalars),
        ],
    )

    def run() -> None:
        trainer.state.max_epochs = trainer.state.epoch + 1
        trainer.run()

    return run


def plain_epoch() -> Callable[[], None]:
    """The same epoch as one would write it in a script."""
    autoencoder, discriminator, g_optimizer, d_optimizer = networks()
    loader = torch.utils.data.DataLoader(IMAGES, batch_size=BATCH, shuffle=True)

    def run() -> None:
        for image in loader:
            mu, sigma = autoencoder.encode(image)
            reconstruction = autoencoder.decode(mu + sigma * torch.randn_like(sigma))
            kl = 0.5 * (mu**2 + sigma**2 - torch.log(sigma**2) - 1).sum((1, 2, 3)).mean()
            loss = (reconstruction - image).abs().mean() + 1e-8 * kl
            discriminator.requires_grad_(False)
            loss = loss + 0.005 * ((discriminator(reconstruction)[-1] - 1) ** 2).mean()
            discriminator.requires_grad_(True)
            g_optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
            g_optimizer.step()
            fake = (discriminator(reconstruction.detach())[-1] ** 2).mean()
            real = ((discriminator(image)[-1] - 1) ** 2).mean()
            d_optimizer.zero_grad()
            (0.005 * 0.5 * (fake + real)).backward()
            torch.nn.utils.clip_grad_norm_(discriminator.parameters(), 1.0)
            d_optimizer.step()

    return run


def seconds(run: Callable[[], None]) -> float:
    """Wall-clock seconds of a step."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) / STEPS


def run() -> list[tuple[str, float, str]]:
    """Measure the two in turn; a ratio of 1.05 is an engine that costs 5 %.

    Returns:
        (name, ratio, detail) per comparison.
    """
    with tempfile.TemporaryDirectory() as folder:
        engine, plain = engine_epoch(Path(folder)), plain_epoch()
        seconds(engine), seconds(plain)
        pairs = [(seconds(engine), seconds(plain)) for _ in range(ROUNDS)]
    ratio = statistics.median(ours / theirs for ours, theirs in pairs)
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    detail = f"{BATCH / ours:.1f} images/s against {BATCH / theirs:.1f} ({torch.get_num_threads()} threads)"
    return [(f"training step, engine / bare loop, {SIDE}×{SIDE}, batch {BATCH}", ratio, detail)]


if __name__ == "__main__":
    for name, ratio, detail in run():
        print(f"{name}: {ratio:.3f}, {detail}; median of {ROUNDS} pairs")
