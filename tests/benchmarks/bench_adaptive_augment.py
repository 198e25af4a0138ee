"""Augmentation on a CPU: time of a batch beside that of the discriminator, and why the filter is not a conv."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from medgen.networks import StyleGAN2Discriminator
from medgen.transforms import AdaptiveAugment
from medgen.transforms.adaptive_augment import SYM6, _Downsample, _Upsample

ROUNDS = 9
CASES = ((16, 1, 64), (8, 3, 128), (4, 1, 256))  # batch, channels, side


def medians(*steps: Callable[[], object]) -> list[float]:
    """Median milliseconds of each, taken in turn so that a busy moment of the machine meets them all."""
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(ROUNDS + 2):
        for step, column in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()
            column.append(1000 * (time.perf_counter() - start))
    return [statistics.median(column[2:]) for column in times]


def whole_batch() -> None:
    """Forward, and forward and backward, of the bgc preset, each round with parameters drawn anew."""
    print(f"{'batch':>14} {'p':>4} {'resampled':>9} {'forward ms':>10} {'+ backward':>10} {'of D':>5}")
    for batch, channels, side in CASES:
        torch.manual_seed(0)
        x = torch.randn(batch, channels, side, side)
        x_grad = x.clone().requires_grad_()
        discriminator = StyleGAN2Discriminator(side, channels, channel_base=4096 * side // 64, channel_max=64)

        def d_step(x: torch.Tensor = x_grad, discriminator: StyleGAN2Discriminator = discriminator) -> None:
            discriminator(x).sum().backward()

        for p in (0.2, 0.6, 1.0):
            augment = AdaptiveAugment.from_preset("bgc", p)
            forward, both, d_both = medians(
                lambda augment=augment, x=x: augment(x),
                lambda augment=augment, x=x_grad: augment(x).sum().backward(),
                d_step,
            )
            drawn = augment.draw(10_000)
            names = ("scale", "anisotropy", "pre_rotation", "post_rotation", "fractional_shift_x")
            neutral = AdaptiveAugment().draw(1)
            resampled = torch.stack([drawn[name] != neutral[name] for name in names]).any(0).double().mean()
            print(
                f"{batch:>3} × {channels} × {side:>3}² {p:>4.1f} {float(resampled):>9.0%} {forward:>10.1f} "
                f"{both:>10.1f} {both / d_both:>5.0%}"
            )


def filters() -> None:
    """Up- and downsampling as sums of shifted copies, each the other's derivative, and as strided convolutions."""
    taps = torch.tensor(SYM6)

    def by_convolution(x: torch.Tensor) -> torch.Tensor:
        y = F.conv_transpose2d(x, taps[None, None, None, :], stride=(1, 2))
        y = F.conv_transpose2d(y, taps[None, None, :, None], stride=(2, 1))
        y = F.conv2d(y, taps[None, None, :, None], stride=(2, 1))
        return F.conv2d(y, taps[None, None, None, :], stride=(1, 2))

    def by_copies(x: torch.Tensor) -> torch.Tensor:
        return _Downsample.apply(_Upsample.apply(x))

    print(f"\n{'2× up and down':>14} {'copies ms':>10} {'conv ms':>10} {'faster':>7}")
    for batch, _, side in CASES:
        x = torch.randn(batch, 1, side, side, requires_grad=True)
        torch.testing.assert_close(by_copies(x), by_convolution(x), rtol=0, atol=1e-5)
        copies, convolution = medians(
            lambda x=x: by_copies(x).sum().backward(), lambda x=x: by_convolution(x).sum().backward()
        )
        print(f"{batch:>3} × 1 × {side:>3}² {copies:>10.1f} {convolution:>10.1f} {convolution / copies:>6.1f}×")


def blitting() -> None:
    """Images that are only blitted beside the same ones resampled."""
    x = torch.randn(16, 1, 64, 64)
    augment = AdaptiveAugment(1.0, x_flip=1, rotate_90=1, integer_shift=1)
    turned = augment.draw(16)
    turned["post_rotation"] = torch.full_like(turned["post_rotation"], math.radians(1))
    drawn = augment.draw(16)
    blitted, resampled = medians(lambda: augment(x, drawn), lambda: augment(x, turned))
    print(f"\n 16 × 1 ×  64² blitted {blitted:.1f} ms, resampled {resampled:.1f} ms: {resampled / blitted:.1f}×")


if __name__ == "__main__":
    whole_batch()
    filters()
    blitting()
