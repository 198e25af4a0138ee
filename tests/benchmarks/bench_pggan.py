"""PGGANTrainer's step at each level against a plain loop of the same networks; on a GPU s/kimg in bfloat16 and float32.

A step is: discriminator with gradient penalty, generator, moving average; the newest level is fully in. The plain loop
is written as one reads the paper: upsampling, convolution and averaging apart, activations rather than weights scaled,
the default memory layout. Both start from the same weights and are compared before they are timed.

The CPU's configurations are ``small_64`` and the network of ``rsna_512`` up to 256×256 with a quarter of its channels;
the GPU's is ``rsna_512`` itself with its own batches.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F

from medgen.data.growth import GrowthSchedule
from medgen.engines import PGGANTrainer, exponential_moving_copy, pggan_setting
from medgen.networks import PGGAN_PRESETS, PGGANDiscriminator, PGGANGenerator
from medgen.settings import keep_freed_memory

ROUNDS = 5  # at least; small levels get more, about SECONDS of them
SECONDS = 1.0
LATENT_DIM = 128
CPU_LEVELS = {  # name: channels, images in a step of each level
    "small_64": (PGGAN_PRESETS["small_64"]["channels"], (16,) * 5),
    "rsna_512, a quarter wide": ((128, 128, 128, 128, 64, 32, 16), (16, 16, 16, 16, 8, 4, 4)),
}
GPU_STEPS = 10
GPU_BATCHES = dict(zip((4, 8, 16, 32, 64, 128, 256, 512), pggan_setting("rsna_512", "batch_sizes"), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# ours


class Stream:
    """What the trainer asks of its loader, standing still."""

    def __init__(self, schedule: GrowthSchedule) -> None:
        self.schedule, self.seed = schedule, 0
        self.images_seen, self.global_batch_size = 0, schedule.batch_sizes[0]

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter(())


def make_trainer(
    channels: Sequence[int], latent_dim: int, batches: Sequence[int], device: str, amp: bool = False
) -> PGGANTrainer:
    """A trainer that is put to any level by :func:`place_at`."""
    torch.manual_seed(0)
    generator = PGGANGenerator(channels, latent_dim).to(device)
    discriminator = PGGANDiscriminator(channels).to(device)
    images = [10 * batch for batch in batches]
    schedule = GrowthSchedule(generator.resolutions, batches, [0.001] * len(batches), images, [0] * len(batches))
    return PGGANTrainer(
        device=torch.device(device),
        max_epochs=1,
        max_images=sum(images),
        epoch_images=sum(images),
        train_data_loader=Stream(schedule),
        generator=generator,
        discriminator=discriminator,
        g_optimizer=make_adam(generator),
        d_optimizer=make_adam(discriminator),
        ema=exponential_moving_copy(generator),
        amp=amp,
    )


def make_adam(network: torch.nn.Module) -> torch.optim.Adam:
    """The paper's."""
    return torch.optim.Adam(network.parameters(), lr=0.001, betas=(0.0, 0.99), eps=1e-8)


def place_at(trainer: PGGANTrainer, level: int) -> Callable[[], None]:
    """The engine's own step at one level, on uint8 images that are in memory already."""
    schedule, loader = trainer.schedule, trainer.data_loader
    batch, side = schedule.batch_sizes[level], schedule.resolutions[level]
    images = torch.randint(0, 256, (batch, 1, side, side), dtype=torch.uint8, device=trainer.state.device)

    def step() -> None:
        loader.global_batch_size = batch
        loader.images_seen = schedule.level_start(level) + batch
        trainer.state.iteration += 1
        trainer._iteration(trainer, {"image": images})

    return step


# ---------------------------------------------------------------------------------------------------------------------
# the plain loop


class Scaled(torch.nn.Module):
    """A layer whose output is scaled: equalised learning rate as most write it."""

    def __init__(self, layer: torch.nn.Module, gain: float = math.sqrt(2)) -> None:
        super().__init__()
        self.layer, self.gain = layer, gain / math.sqrt(layer.weight[0].numel())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x) * self.gain
        # the output's bias stays unscaled, as ours is
        return y + self.bias.view(1, -1, *[1] * (y.ndim - 2))


def conv(inputs: int, outputs: int, side: int = 3, gain: float = math.sqrt(2)) -> Scaled:
    """Convolution in the default layout."""
    layer = Scaled(torch.nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False), gain)
    layer.bias = torch.nn.Parameter(torch.zeros(outputs))
    return layer


def dense(inputs: int, outputs: int, gain: float = math.sqrt(2)) -> Scaled:
    """Fully connected layer."""
    layer = Scaled(torch.nn.Linear(inputs, outputs, bias=False), gain)
    layer.bias = torch.nn.Parameter(torch.zeros(outputs))
    return layer


def norm(x: torch.Tensor) -> torch.Tensor:
    """Pixel normalisation."""
    return x / torch.sqrt(torch.mean(x**2, dim=1, keepdim=True) + 1e-8)


def activate(x: torch.Tensor) -> torch.Tensor:
    """Leaky ReLU into new memory."""
    return F.leaky_relu(x, 0.2)


class PlainGenerator(torch.nn.Module):
    """One level's generator."""

    def __init__(self, channels: Sequence[int], latent_dim: int) -> None:
        super().__init__()
        self.first = torch.nn.ModuleList(
            [dense(latent_dim, 16 * channels[0], math.sqrt(2) / 4), conv(channels[0], channels[0])]
        )
        self.blocks = torch.nn.ModuleList(
            torch.nn.ModuleList([conv(before, width), conv(width, width)]) for before, width in pairwise(channels)
        )
        self.to_rgb = conv(channels[-1], 1, 1, 1.0)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = norm(activate(self.first[0](norm(z)).view(len(z), -1, 4, 4)))
        x = norm(activate(self.first[1](x)))
        for conv0, conv1 in self.blocks:
            x = norm(activate(conv0(F.interpolate(x, scale_factor=2, mode="nearest"))))
            x = norm(activate(conv1(x)))
        return self.to_rgb(x)


class PlainDiscriminator(torch.nn.Module):
    """One level's discriminator; averaging before the leaky ReLU, as in ours."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.from_rgb = conv(1, channels[-1], 1)
        self.blocks = torch.nn.ModuleList(
            torch.nn.ModuleList([conv(width, width), conv(width, before)]) for before, width in pairwise(channels)
        )
        width = channels[0]
        self.last = torch.nn.ModuleList([conv(width + 1, width), dense(16 * width, width), dense(width, 1, 1.0)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = activate(self.from_rgb(x))
        for conv0, conv1 in reversed(self.blocks):
            x = activate(F.avg_pool2d(conv1(activate(conv0(x))), 2))
        size = min(4, len(x))
        groups = x.view(size, -1, *x.shape[1:])
        stddev = torch.sqrt(groups.var(0, unbiased=False) + 1e-8).mean((1, 2, 3))
        stddev = stddev.repeat(size).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        x = activate(self.last[0](torch.cat([x, stddev], 1)))
        x = activate(self.last[1](x.view(len(x), -1)))
        return self.last[2](x)


def pairs(ours: torch.nn.Module, plain: torch.nn.Module, level: int) -> Iterator[tuple[torch.nn.Module, Scaled]]:
    """Layers of both, one beside the other."""
    first = ours.blocks[0]
    if isinstance(plain, PlainGenerator):
        yield from ((ours.to_rgb[level], plain.to_rgb), *zip((first.dense, first.conv), plain.first, strict=True))
    else:
        yield ours.from_rgb[level], plain.from_rgb
        yield from zip((first.conv, first.dense, first.out), plain.last, strict=True)
    for block, (conv0, conv1) in zip(ours.blocks[1 : level + 1], plain.blocks, strict=True):
        yield from ((block.conv0, conv0), (block.conv1, conv1))


def make_plain(trainer: PGGANTrainer, level: int, amp: bool = False) -> Callable[[], None]:
    """The plain loop's step at one level, from the trainer's weights; checked to be the same networks."""
    device = trainer.state.device
    channels, latent_dim = trainer.generator.channels[: level + 1], trainer.generator.latent_dim
    batch, side = trainer.schedule.batch_sizes[level], trainer.schedule.resolutions[level]
    generator = PlainGenerator(channels, latent_dim).to(device)
    discriminator = PlainDiscriminator(channels).to(device)
    for ours, plain in ((trainer.generator, generator), (trainer.discriminator, discriminator)):
        ours.grow(side)
        for layer, scaled in pairs(ours, plain, level):
            scaled.layer.weight.data.copy_(layer.weight)
            scaled.bias.data.copy_(layer.bias)
    with torch.no_grad():
        z = torch.randn(batch, latent_dim, device=device)
        image = generator(z)
        torch.testing.assert_close(trainer.generator(z), image, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(trainer.discriminator(image), discriminator(image), rtol=1e-3, atol=1e-3)
    average = exponential_moving_copy(generator)
    g_optimizer, d_optimizer = make_adam(generator), make_adam(discriminator)
    real = torch.rand(batch, 1, side, side, device=device) * 2 - 1

    def judge(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            return discriminator(x).float()

    def draw() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            return generator(torch.randn(batch, latent_dim, device=device)).float()

    def step() -> None:
        with torch.no_grad():
            fake = draw()
        of_real, of_fake = judge(real), judge(fake)
        t = torch.rand(batch, 1, 1, 1, device=device)
        mixed = (real + (fake - real) * t).requires_grad_()
        (gradient,) = torch.autograd.grad(judge(mixed).sum(), mixed, create_graph=True)
        penalty = 10 * ((gradient.view(batch, -1).norm(dim=1) - 1) ** 2).mean()
        d_optimizer.zero_grad()
        (of_fake.mean() - of_real.mean() + 0.001 * (of_real**2).mean() + penalty).backward()
        d_optimizer.step()
        discriminator.requires_grad_(False)
        g_optimizer.zero_grad()
        (-judge(draw()).mean()).backward()
        g_optimizer.step()
        discriminator.requires_grad_(True)
        with torch.no_grad():
            for averaged, parameter in zip(average.parameters(), generator.parameters(), strict=True):
                averaged.mul_(0.999).add_(parameter, alpha=0.001)

    return step


# ---------------------------------------------------------------------------------------------------------------------
# measuring


def seconds(step: Callable[[], None], repeats: int = 1) -> float:
    """Wall-clock seconds of one call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def medians(*steps: Callable[[], None]) -> list[float]:
    """Median seconds of each, taken in turn so that a busy moment of the machine meets them all."""
    first = [max(seconds(step), seconds(step)) for step in steps]
    rounds = max(ROUNDS, min(50, round(SECONDS / sum(first))))
    times = [[seconds(step) for step in steps] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def on_cpu(name: str) -> Iterator[tuple[str, float, str]]:
    """Images a second at each level."""
    channels, batches = CPU_LEVELS[name]
    trainer = make_trainer(channels, LATENT_DIM, batches, "cpu")
    for level, batch in enumerate(batches):
        ours, plain = medians(place_at(trainer, level), make_plain(trainer, level))
        side = trainer.schedule.resolutions[level]
        told = f"{batch / ours:.1f} images/s against {batch / plain:.1f}, batch {batch}"
        yield f"{name}, {side}×{side}, step / plain loop", plain / ours, told


def per_kimg(step: Callable[[], None], batch: int) -> tuple[float, float]:
    """Seconds per 1,000 images, and the most memory in GiB."""
    for _ in range(3):
        step()
    torch.cuda.reset_peak_memory_stats()
    duration = statistics.median(seconds(step, GPU_STEPS) for _ in range(3))
    return 1000 * duration / batch, torch.cuda.max_memory_allocated() / 2**30


def on_gpu(amp: bool) -> Iterator[tuple[str, float, str]]:
    """Seconds per 1,000 images at each level; one network at a time, so that memory is its own."""
    preset = PGGAN_PRESETS["rsna_512"]
    batches = list(GPU_BATCHES.values())
    trainer = make_trainer(preset["channels"], preset["latent_dim"], batches, "cuda", amp)
    for level, (side, batch) in enumerate(GPU_BATCHES.items()):
        ours, gigabytes = per_kimg(place_at(trainer, level), batch)
        plain, _ = per_kimg(make_plain(trainer, level, amp), batch)
        name = f"rsna_512, {side}×{side}, batch {batch}, {trainer.precision}, step / plain loop"
        yield name, plain / ours, f"{ours:.2f} s/kimg against {plain:.2f}, {gigabytes:.1f} GiB"


def run() -> Iterator[tuple[str, float, str]]:
    """Measure; a ratio above 1 is how many times faster than the plain loop.

    Yields:
        (name, ratio, detail) per comparison.
    """
    keep_freed_memory("cpu")  # as the bundle does
    for name in CPU_LEVELS:
        yield from on_cpu(name)
    if torch.cuda.is_available():
        for amp in (False, True):
            yield from on_gpu(amp)


if __name__ == "__main__":
    for name, ratio, detail in run():
        print(f"{name}: {ratio:.2f}, {detail}", flush=True)
    if not torch.cuda.is_available():
        print("no GPU here: seconds per 1,000 images were not measured")
