"""Stage 1's step against a plain loop, and stage 3 on a batch against one image after the other; 64×64, CPU.

Both pairs compute the same and are compared before they are timed: pairs of times in turn, medians of the ratios.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from medgen.data.stream import SeedLoader, derive_seed
from medgen.engines import BootstrapTrainer
from medgen.inferers import LatentOptimiser, draw_latents
from medgen.losses import inversion_loss
from medgen.networks import ConvNeXtEncoder, LatentGenerator, PGGANGenerator, begin_encoder
from medgen.settings import keep_freed_memory

ROUNDS = 5
BATCH, STEPS = 32, 20


def make_encoder(generator: LatentGenerator) -> ConvNeXtEncoder:
    """That of small_64.json."""
    torch.manual_seed(1)
    encoder = ConvNeXtEncoder(64, 1, generator.latent_shape, "z", size="atto", pooled_size=2, layer_scale=0.1)
    return begin_encoder(encoder, generator)


def seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def compare(name: str, ours: Callable[[], None], other: Callable[[], None], images: int) -> None:
    """Time both in turn and print the median of the ratios."""
    ours(), other()
    pairs = [(seconds(ours), seconds(other)) for _ in range(ROUNDS)]
    ratio = statistics.median(theirs / mine for mine, theirs in pairs)
    rate = statistics.median(images / mine for mine, _ in pairs)
    print(f"{name}: {rate:.1f} images/s, {ratio:.2f} times as fast")


def bench_first_stage(generator: LatentGenerator) -> None:
    """A step of the trainer, all its bookkeeping included, against a loop without any."""
    ours, plain = make_encoder(generator), make_encoder(generator)
    optimizers = [torch.optim.Adam(encoder.parameters(), lr=1e-4) for encoder in (ours, plain)]
    trainer = BootstrapTrainer(
        device="cpu",
        max_epochs=10**6,
        train_data_loader=SeedLoader(BATCH, BATCH),
        encoder=ours,
        generator=generator,
        optimizer=optimizers[0],
    )
    stream, positions = iter(trainer.data_loader), iter(range(0, 10**9, BATCH))

    def step() -> None:
        trainer.state.output = trainer._iteration(trainer, next(stream))
        trainer.check_finite()

    def plain_step() -> None:
        first = next(positions)
        z = draw_latents([derive_seed(0, 3, first + place) for place in range(BATCH)], generator.z_dim)
        with torch.no_grad():
            image = ((generator.network(z) + 1) / 2).clamp(0, 1)
        plain.train()
        loss = 2 * (1 - F.cosine_similarity(plain(image)[:, 0], z)).mean()
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()

    step(), plain_step()
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=2.1e-4)  # Adam's first step is a sign
    compare("stage 1, a step against a plain loop", step, plain_step, BATCH)


def bench_third_stage(generator: LatentGenerator) -> None:
    """A batch of images at once against each alone, as the source's notebook does it."""
    loss = inversion_loss(perceptual_weight=0, ms_ssim_weight=0.1, similarity_weight=0)
    optimiser, encoder = LatentOptimiser(loss, generator, steps=STEPS), make_encoder(generator).eval()
    images = torch.rand(BATCH, 1, 64, 64, generator=torch.Generator().manual_seed(2))
    whole = optimiser(images, encoder)["distance"]
    alone = torch.cat([optimiser(image[None], encoder)["distance"] for image in images])
    torch.testing.assert_close(whole, alone, rtol=5e-2, atol=1e-3)  # rounding grows over the steps
    compare(
        f"stage 3, {STEPS} steps of {BATCH} images at once against one after the other",
        lambda: optimiser(images, encoder),
        lambda: [optimiser(image[None], encoder) for image in images],
        BATCH,
    )


if __name__ == "__main__":
    keep_freed_memory("cpu")
    torch.manual_seed(0)
    frozen = LatentGenerator(PGGANGenerator.from_preset("small_64"))
    bench_first_stage(frozen)
    bench_third_stage(frozen)
