"""StyleGAN2Trainer by phase on the CPU; on a GPU s/kimg at 256 and 512 pixels, memory, share of the peak FLOPs.

The CPU's configuration is that of bench_stylegan2.py: 64×64, one channel, ``small_64``, batch 16. The GPU's are ADA's
own: ``auto_256`` and ``auto_512`` with bfloat16 in their four highest resolutions, and ``stylegan2_512`` in float32;
regularisers as they come, augmentation ``bgc`` at p = 0.5.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from monai.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from medgen.data.stream import ResumableDataLoader
from medgen.engines import StyleGAN2Trainer, exponential_moving_copy, stylegan2_setting
from medgen.losses import PathLengthRegulariser, lazy_adam_settings
from medgen.networks import StyleGAN2Discriminator, StyleGAN2Generator
from medgen.settings import keep_freed_memory
from medgen.transforms import AdaptiveAugment

ROUNDS = 5
PEAK_TFLOPS = 989.0  # dense bfloat16 of an H100 SXM or H200, NVIDIA's data sheet
GPU_RUNS = (  # preset, batch, compile
    ("auto_256", 32, False),
    ("auto_256", 32, True),
    ("auto_512", 16, False),
    ("auto_512", 16, True),
    ("stylegan2_512", 16, False),
)
GPU_STEPS = 32  # two rounds of R1, eight of the path length


def make_trainer(preset: str, batch: int, device: str, compile: bool = False, p: float = 0.0) -> StyleGAN2Trainer:
    """A trainer on random images that are in memory already."""
    torch.manual_seed(0)
    generator = StyleGAN2Generator.from_preset(preset).to(device)
    discriminator = StyleGAN2Discriminator.from_preset(preset).to(device)
    lr = stylegan2_setting(preset, "lr")
    images = torch.rand(batch, 1, *generator.image_size)
    return StyleGAN2Trainer(
        device=torch.device(device),
        max_epochs=1,
        train_data_loader=ResumableDataLoader(Dataset([{"image": image} for image in images]), batch_size=batch),
        generator=generator,
        discriminator=discriminator,
        g_optimizer=torch.optim.Adam(generator.parameters(), **lazy_adam_settings(lr, (0.0, 0.99), 4)),
        d_optimizer=torch.optim.Adam(discriminator.parameters(), **lazy_adam_settings(lr, (0.0, 0.99), 16)),
        ema=exponential_moving_copy(generator),
        augment=AdaptiveAugment.from_preset("bgc", p=p),
        path_length=PathLengthRegulariser(),
        r1_gamma=stylegan2_setting(preset, "r1_gamma"),
        compile=compile,
    )


def medians(*steps: Callable[[], object]) -> list[float]:
    """Median seconds of each, taken in turn so that a busy moment of the machine meets them all."""
    times: list[list[float]] = [[] for _ in steps]
    for number in range(ROUNDS + 2):
        for step, taken in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()
            if number > 1:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def phases() -> list[tuple[str, float, str]]:
    """What a step consists of, on the CPU."""
    batch = 16
    trainer = make_trainer("small_64", batch, "cpu")
    image = torch.rand(batch, 1, 64, 64) * 2 - 1

    def steps(number: int, p: float) -> Callable[[], None]:
        """The step without regularisers: its number is one in which none is due."""

        def step() -> None:
            trainer.augment.p = p
            trainer.state.iteration = number + 1
            trainer._iteration(trainer, {"image": (image + 1) / 2})

        return step

    plain, augmented, path, r1, average = medians(
        steps(1, 0.0),
        steps(1, 1.0),
        lambda: trainer._regularise_path_length(batch, None),
        lambda: trainer._regularise_gradient(image, None),
        trainer._average,
    )
    whole = plain + path / 4 + r1 / 16
    told = (
        f"{batch / whole:.1f} images/s with regularisers, {batch / plain:.1f} without; a step of {1e3 * plain:.0f} ms "
        f"(moving average {1e3 * average:.1f}), path length {1e3 * path:.0f} ms in each 4th, R1 {1e3 * r1:.0f} ms in "
        f"each 16th"
    )
    return [
        ("step with its regularisers / without", whole / plain, told),
        ("step with bgc at p = 1 / without", augmented / plain, f"{1e3 * augmented:.0f} ms against {1e3 * plain:.0f}"),
    ]


def on_gpu(preset: str, batch: int, compile: bool) -> tuple[str, float, str]:
    """Seconds per 1,000 images of the engine's own steps, regularisers and all."""
    trainer = make_trainer(preset, batch, "cuda", compile, p=0.5)
    data = {"image": torch.rand(batch, 1, *trainer.generator.image_size, device="cuda")}

    def step(number: int) -> None:
        trainer.state.iteration = number + 1
        trainer._iteration(trainer, data)

    for number in range(18):  # compiles what will be needed
        step(number)
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for number in range(GPU_STEPS):
        step(number)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    with FlopCounterMode(display=False) as counter:
        if not compile:  # it counts what eager code calls
            for number in range(16):
                step(number)
    share = ""
    if not compile and "bfloat16" in trainer.precision:
        rate = counter.get_total_flops() / 16 * GPU_STEPS / seconds
        share = f", {rate / 1e12 / PEAK_TFLOPS:.1%} of the peak in bfloat16"
    gigabytes = torch.cuda.max_memory_allocated() / 2**30
    per_kimg = seconds / (batch * GPU_STEPS) * 1000
    name = f"{preset}, batch {batch}, {trainer.precision}{', compiled' if compile else ''}"
    return name, 1.0, f"{per_kimg:.1f} s/kimg, {gigabytes:.1f} GiB{share}"


def run() -> list[tuple[str, float, str]]:
    """Measure; a ratio above 1 is how many times longer. On a GPU the detail is the result.

    Returns:
        (name, ratio, detail) per comparison.
    """
    keep_freed_memory("cpu")  # as the bundle does
    results = phases()
    if torch.cuda.is_available():
        results += [on_gpu(*settings) for settings in GPU_RUNS]
    return results


if __name__ == "__main__":
    for name, ratio, detail in run():
        print(f"{name}: {ratio:.2f}, {detail}")
    if not torch.cuda.is_available():
        print("no GPU here: seconds per 1,000 images at 256 and 512 were not measured")
