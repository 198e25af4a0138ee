"""StyleGAN2 on two CPU cores: the training step by phase, the projection step, and why the layers are as they are.

The anchors were measured with the official code's reference path in the same configuration on two CPU cores: 64×64, one
channel, ``channel_base`` 4096, ``channel_max`` 64, Z = W = 128, two mapping layers; training in batches of 16 with
generator and discriminator steps and no regulariser, projection in batches of 8.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from medgen.networks import StyleGAN2Discriminator, StyleGAN2Generator
from medgen.networks.stylegan2 import Blur
from medgen.settings import keep_freed_memory

OFFICIAL_TRAINING = 11.0  # images/s
OFFICIAL_PROJECTION = 51.0  # image-steps/s
PRESET, ROUNDS = "small_64", 7
TRAIN_BATCH, PROJECT_BATCH = 16, 8


def seconds(step: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def medians(*steps: Callable[[], object]) -> list[float]:
    """Median seconds of each, taken in turn so that a busy moment of the machine meets them all."""
    for step in steps:
        step(), step()
    times = [[seconds(step) for step in steps] for _ in range(ROUNDS)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def training_steps() -> tuple[Callable[[], None], Callable[[], None]]:
    """A generator step and a discriminator step with the non-saturating loss and Adam, noise drawn anew."""
    torch.manual_seed(0)
    generator, discriminator = StyleGAN2Generator.from_preset(PRESET), StyleGAN2Discriminator.from_preset(PRESET)
    g_optimizer, d_optimizer = (
        torch.optim.Adam(network.parameters(), lr=0.002, betas=(0.0, 0.99), eps=1e-8)
        for network in (generator, discriminator)
    )
    real = torch.randn(TRAIN_BATCH, 1, *generator.image_size)

    def g_step() -> None:
        discriminator.requires_grad_(False)
        g_optimizer.zero_grad()
        fake = generator(torch.randn(TRAIN_BATCH, generator.latent_dim), noise="random")
        F.softplus(-discriminator(fake)).mean().backward()
        g_optimizer.step()
        discriminator.requires_grad_(True)

    def d_step() -> None:
        d_optimizer.zero_grad()
        with torch.no_grad():
            fake = generator(torch.randn(TRAIN_BATCH, generator.latent_dim), noise="random")
        F.softplus(discriminator(fake)).mean().backward()
        F.softplus(-discriminator(real)).mean().backward()
        d_optimizer.step()

    return g_step, d_step


def projection_step(batch: int) -> Callable[[], None]:
    """Forward and backward of a frozen generator with respect to one w and all noise maps of each image, and Adam."""
    torch.manual_seed(0)
    generator = StyleGAN2Generator.from_preset(PRESET).eval().requires_grad_(False)
    target = torch.randn(batch, 1, *generator.image_size)
    w = torch.randn(batch, generator.w_dim, requires_grad=True)
    noise = [noise.requires_grad_() for noise in generator.draw_noise(range(batch))]
    optimizer = torch.optim.Adam([w, *noise], lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        (generator.synthesis(w, noise) - target).square().sum().backward()
        optimizer.step()

    return step


def layer_variants() -> list[tuple[str, float, str]]:
    """Forward and backward of one 64-channel layer to 64×64, as it is done and as it could be done."""
    torch.manual_seed(0)
    channels, side = 64, 64
    x = torch.randn(TRAIN_BATCH, channels, side, side).to(memory_format=torch.channels_last).requires_grad_()
    low = torch.randn(TRAIN_BATCH, channels, side // 2, side // 2)
    low = low.to(memory_format=torch.channels_last).requires_grad_()
    style = torch.randn(TRAIN_BATCH, channels, requires_grad=True)
    weight = torch.randn(channels, channels, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    folded = torch.randn(channels, channels, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    phases = torch.randn(4 * channels, channels, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    blur = Blur(channels, padding=1, gain=4.0)

    def demodulation(weights: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
        return (weights.square().sum(dims) + 1e-8).rsqrt()

    def scaled_activations() -> None:
        scale = (style.square() @ weight.square().sum((2, 3)).T + 1e-8).rsqrt()
        y = F.conv2d(x * style[:, :, None, None], weight, padding=1) * scale[:, :, None, None]
        y.backward(torch.ones_like(y))

    def weights_per_sample() -> None:
        weights = weight * style[:, None, :, None, None]
        weights = weights * demodulation(weights, (2, 3, 4))[:, :, None, None, None]
        y = F.conv2d(x.reshape(1, -1, side, side), weights.flatten(0, 1), padding=1, groups=TRAIN_BATCH)
        y = y.reshape(TRAIN_BATCH, -1, side, side).contiguous(memory_format=torch.channels_last)
        y.backward(torch.ones_like(y))

    def default_layout() -> None:
        scale = (style.square() @ weight.square().sum((2, 3)).T + 1e-8).rsqrt()
        y = F.conv2d(x.contiguous() * style[:, :, None, None], weight.contiguous(), padding=1) * scale[:, :, None, None]
        y.backward(torch.ones_like(y))

    def filter_apart() -> None:
        y = blur(F.conv_transpose2d(low, weight, stride=2))
        y.backward(torch.ones_like(y))

    def filter_folded() -> None:
        y = F.conv_transpose2d(low, folded, stride=2, padding=2)
        y.backward(torch.ones_like(y))

    def four_phases() -> None:
        y = F.pixel_shuffle(F.conv2d(low, phases, padding=1), 2)
        y.backward(torch.ones_like(y))

    results = []
    for ours, others in (
        (scaled_activations, (weights_per_sample, default_layout)),
        (filter_apart, (filter_folded, four_phases)),
    ):
        mine, *theirs = medians(ours, *others)
        for other, duration in zip(others, theirs, strict=True):
            name = f"layer to {side}×{side}, {ours.__name__} / {other.__name__}".replace("_", " ")
            results.append((name, duration / mine, f"{1e3 * mine:.1f} ms against {1e3 * duration:.1f} ms"))
    return results


def run() -> list[tuple[str, float, str]]:
    """Measure; a ratio above 1 is how many times faster than the other way.

    Returns:
        (name, ratio, detail) per comparison.
    """
    keep_freed_memory("cpu")  # as the bundle does
    g_time, d_time = medians(*training_steps())
    rate = TRAIN_BATCH / (g_time + d_time)
    detail = (
        f"{rate:.1f} images/s against {OFFICIAL_TRAINING:.0f}; generator step {1e3 * g_time:.0f} ms, discriminator "
        f"step {1e3 * d_time:.0f} ms"
    )
    results = [(f"training, 64×64, batch {TRAIN_BATCH} / official code", rate / OFFICIAL_TRAINING, detail)]
    (duration,) = medians(projection_step(PROJECT_BATCH))
    rate = PROJECT_BATCH / duration
    detail = f"{rate:.0f} image-steps/s against {OFFICIAL_PROJECTION:.0f}"
    results.append((f"projection, 64×64, batch {PROJECT_BATCH} / official code", rate / OFFICIAL_PROJECTION, detail))
    single, many = medians(projection_step(1), projection_step(32))
    detail = f"{32 / many:.0f} image-steps/s against {1 / single:.0f}"
    results.append(("projection, 64×64, batch 32 / batch 1", 32 * single / many, detail))
    return results + layer_variants()


if __name__ == "__main__":
    for name, ratio, detail in run():
        print(f"{name}: {ratio:.1f} times as fast, {detail} ({torch.get_num_threads()} threads, median of {ROUNDS})")
