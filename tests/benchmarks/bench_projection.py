"""Projection of many images at once against a loop over single ones, and the whole step against the official code's.

The anchor was measured with the official code's reference path on two CPU cores: 64×64, one channel, ``channel_base``
4096, ``channel_max`` 64, Z = W = 128, two mapping layers, batches of 8. A step here is all of it: synthesis with
gradients for w and the noise maps, pixel and MS-SSIM loss, regulariser of the noise, Adam, standardised maps; the
statistics of W, the targets' features and the final render are in the time as well.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from medgen.inferers import StyleGAN2Projector
from medgen.networks import StyleGAN2Generator
from medgen.settings import keep_freed_memory

OFFICIAL_PROJECTION = 51.0  # image-steps/s
PRESET, STEPS, FULL_STEPS, ROUNDS = "small_64", 10, 1000, 5
BATCHES = (1, 8, 32)
LOOP_IMAGES = 4  # that the loop does in a round; its time goes with their number


def seconds(action: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def run() -> list[tuple[str, float, str]]:
    """Measure; a ratio above 1 is how many times faster than the other way.

    Returns:
        (name, ratio, detail) per comparison.
    """
    keep_freed_memory("cpu")  # as the bundle does
    torch.manual_seed(0)
    generator = StyleGAN2Generator.from_preset(PRESET).eval()
    images = F.avg_pool2d(torch.rand(max(BATCHES), 1, *generator.image_size), 5, 1, 2)
    projector = StyleGAN2Projector(steps=STEPS)

    def loop() -> None:
        for number in range(LOOP_IMAGES):
            projector(images[number : number + 1], generator)

    actions = {0: loop, **{n: lambda n=n: projector(images[:n], generator) for n in BATCHES}}
    for action in actions.values():
        action()
    # in turn, so that a busy moment of the machine meets them all
    times = [{name: seconds(action) for name, action in actions.items()} for _ in range(ROUNDS)]
    median = {name: statistics.median(row[name] for row in times) for name in actions}
    rate = {name: (name or LOOP_IMAGES) * STEPS / duration for name, duration in median.items()}  # image-steps/s
    results = [
        (
            f"projection, 64×64, batch {n} / loop over single images",
            rate[n] / rate[0],
            f"{60 * rate[n] / FULL_STEPS:.2f} images/min at {FULL_STEPS} steps against {60 * rate[0] / FULL_STEPS:.2f}",
        )
        for n in BATCHES
    ]
    detail = f"{rate[8]:.0f} image-steps/s against {OFFICIAL_PROJECTION:.0f}, loss and noise regulariser included"
    return [*results, ("projection, 64×64, batch 8 / official code", rate[8] / OFFICIAL_PROJECTION, detail)]


if __name__ == "__main__":
    for name, ratio, detail in run():
        print(f"{name}: {ratio:.2f} times as fast, {detail} ({torch.get_num_threads()} threads, median of {ROUNDS})")
