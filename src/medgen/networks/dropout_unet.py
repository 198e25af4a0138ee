"""U-Net with Gaussian dropout, which can be kept on to see how sure the network is.

Shapes: B images, C channels, H rows, W columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from monai.networks.blocks import Convolution, UpSample
from monai.networks.layers import Conv, Dropout, Pool
from torch import nn

from medgen.errors import UserError

__all__ = ["DropoutUNet", "GaussianDropout"]


class GaussianDropout(nn.Module):
    """Multiplies each activation by its own draw from N(1, p / (1 - p)) in training; nothing at evaluation.

    Srivastava et al. 2014, section 10: mean and variance are those of dropout with rate p, and as the mean is 1
    nothing is rescaled at evaluation. PyTorch has none.

    Args:
        p: rate of the dropout it stands for, 0 (nothing) to below 1.

    Raises:
        UserError: ``p`` is out of range.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise UserError(f"dropout must be from 0 to below 1, got {p}; set --dropout")
        self.p = float(p)
        self.std = math.sqrt(p / (1 - p))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape to the same shape."""
        if self.training and self.std > 0:
            return x * (1 + self.std * torch.randn_like(x))
        return x

    def extra_repr(self) -> str:
        """The rate."""
        return f"p={self.p}"


# MONAI's blocks take their dropout from this table by name
Dropout.add_factory_callable("gaussian", lambda dim: GaussianDropout)


class DropoutUNet(nn.Module):
    """U-Net (Ronneberger et al. 2015) with Gaussian dropout after each pair of convolution and ReLU.

    Two 3×3 convolutions a level, each followed by instance normalisation without gain and shift (MONAI's plain
    ``INSTANCE``), ReLU and dropout; 2×2 max pooling down, 2×2
    transposed convolution up; a 1×1 convolution to the logits, which no dropout follows.

    Args:
        spatial_dims: 2 or 3.
        in_channels: of the image.
        out_channels: of the logits.
        channels: widths from the full size down. Sides of an image must be multiples of ``2 ** (len(channels) - 1)``
            and at least twice that, for what is normalised at the last level to have a deviation.
        dropout: rate p of the dropout, 0 to below 1.
    """

    def __init__(
        self,
        spatial_dims: int = 2,
        in_channels: int = 1,
        out_channels: int = 1,
        channels: Sequence[int] = (32, 64, 128, 256, 256),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if len(channels) < 2:
            raise UserError(f"channels must name at least two levels, got {list(channels)}")

        def two_convolutions(in_width: int, width: int) -> nn.Sequential:
            return nn.Sequential(
                *(
                    Convolution(
                        spatial_dims,
                        before,
                        width,
                        adn_ordering="NAD",
                        act="RELU",
                        norm="INSTANCE",
                        dropout=("gaussian", {"p": dropout}),
                        bias=False,  # the normalisation would take it out, and adds none of its own
                    )
                    for before in (in_width, width)
                )
            )

        self.channels = tuple(channels)
        self.pool = Pool["MAX", spatial_dims](2)
        self.down = nn.ModuleList(two_convolutions(*widths) for widths in pairwise((in_channels, *channels)))
        rising = list(pairwise(reversed(channels)))
        self.enlarge = nn.ModuleList(UpSample(spatial_dims, deep, width, mode="deconv") for deep, width in rising)
        self.up = nn.ModuleList(two_convolutions(2 * width, width) for _, width in rising)
        self.head = Conv["CONV", spatial_dims](channels[0], out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of an image.

        Args:
            x: (B, in_channels, H, W), [0, 1].

        Returns:
            (B, out_channels, H, W).
        """
        skips: list[torch.Tensor] = []
        for number, block in enumerate(self.down):
            x = block(x if number == 0 else self.pool(x))
            skips.append(x)
        x = skips.pop()
        for enlarge, block in zip(self.enlarge, self.up):  # noqa: B905 - TorchScript knows no strict
            x = block(torch.cat([skips.pop(), enlarge(x)], dim=1))
        return self.head(x)

    @contextmanager
    def keep_dropout(self, seeds: Sequence[int]) -> Iterator[None]:
        """Dropout stays on at evaluation inside this context, with noise of each image's own seed.

        One forward pass with it on is one sample of Monte Carlo dropout (Gal and Ghahramani 2016). What an image gets
        is a function of its seed and of the kind of device, whatever else is in the batch: a GPU draws other numbers
        than a CPU.

        Args:
            seeds: one an image of the batches that are passed through.

        Yields:
            Nothing.
        """
        # where the network is: PyTorch draws on one core of the CPU, and a GPU would wait for that most of the time
        device = self.head.weight.device
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

        def with_noise(module: GaussianDropout, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            (x,) = args
            if len(x) != len(generators):
                raise ValueError(f"expected a seed for each of {len(x)} images, got {len(generators)}")
            # in the layers' order from one stream an image
            draws = [torch.randn(x.shape[1:], generator=generator, device=device) for generator in generators]
            return x * (1 + module.std * torch.stack(draws).to(x))

        layers = [module for module in self.modules() if isinstance(module, GaussianDropout) and module.std > 0]
        hooks = [layer.register_forward_hook(with_noise) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
