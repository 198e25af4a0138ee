"""DCGAN and SNGAN: generator and discriminator of one family at any size from 16×16 to 512×512.

Written from Radford et al. 2016, "Unsupervised Representation Learning with Deep Convolutional Generative Adversarial
Networks" (arXiv 1511.06434), Miyato et al. 2018, "Spectral Normalization for Generative Adversarial Networks" (arXiv
1802.05957), and, for classes, Miyato & Koyama 2018, "cGANs with Projection Discriminator" (arXiv 1802.05637).

Legend of the shape suffixes:
    B  batch              H, W  height and width
    C  channels           Z     width of the latent space
    O  width of a layer   K     classes
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm as normalise_spectrum

from medgen.errors import UserError
from medgen.networks.stylegan2 import class_vectors

__all__ = ["DCGANDiscriminator", "DCGANGenerator"]

SIZES = (16, 32, 64, 128, 256, 512)
BASE_SIDE = 4  # of the first and the last convolution, which has the kernel of this size
LEAK = 0.2  # negative slope of every leaky ReLU; DCGAN, section 4
INIT_STD = 0.02  # of all weights; DCGAN, section 4


class _ClassNorm(nn.BatchNorm2d):
    """Batch normalisation with a gain and a bias for each class (Miyato & Koyama)."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(channels, affine=False)
        self.gain_KO = nn.Parameter(torch.empty(num_classes, channels))
        self.bias_KO = nn.Parameter(torch.empty(num_classes, channels))

    def forward(self, x: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        gain_BO, bias_BO = classes @ self.gain_KO, classes @ self.bias_KO
        return super().forward(x) * gain_BO[:, :, None, None] + bias_BO[:, :, None, None]


class DCGANGenerator(nn.Module):
    """Latents to images.

    z as a picture of one pixel, transposed convolutions to 4×4 and from there each to twice the side, batch
    normalisation and ReLU after all but the last, which tanh follows; no biases. The width at 4×4 is
    ``base_channels · image_size / 8`` and halves with each doubling of the side.

    Args:
        image_size: side of the images: 16, 32, 64, 128, 256 or 512.
        latent_dim: Z.
        out_channels: channels of the images: 1 for grey, 3 for colour.
        base_channels: width before the last convolution, 64 in the paper.
        num_classes: K; 0 for none. Each class has its own gains and biases of the batch normalisation.

    Raises:
        UserError: an argument outside its range.
    """

    def __init__(
        self,
        image_size: int = 64,
        latent_dim: int = 100,
        out_channels: int = 3,
        base_channels: int = 64,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        widths = _widths(image_size, base_channels)
        _check(1, latent_dim=latent_dim, out_channels=out_channels)
        _check(0, num_classes=num_classes)
        self.image_size, self.latent_dim, self.out_channels = image_size, latent_dim, out_channels
        self.base_channels, self.num_classes = base_channels, num_classes
        self.convs = nn.ModuleList([nn.ConvTranspose2d(latent_dim, widths[0], BASE_SIDE, bias=False)])
        for before, after in pairwise([*widths, out_channels]):
            self.convs.append(nn.ConvTranspose2d(before, after, 4, stride=2, padding=1, bias=False))
        self.norms = nn.ModuleList(
            _ClassNorm(width, num_classes) if num_classes else nn.BatchNorm2d(width) for width in widths
        )
        self.apply(_initialise)
        self.to(memory_format=torch.channels_last)  # the wide layers' gradients are a third faster

    def forward(self, z: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Images of latents.

        Args:
            z: (B, Z), N(0, 1).
            labels: class indices (B,) or vectors (B, K), for a network with classes.

        Returns:
            (B, C, H, W) in [-1, 1].

        Raises:
            UserError: shapes that do not fit.
        """
        if z.ndim != 2 or z.shape[1] != self.latent_dim:
            raise UserError(f"latents must be (B, {self.latent_dim}), got {tuple(z.shape)}; set latent_dim")
        classes_BK = class_vectors(labels, self.num_classes, z.shape[0])
        given = () if classes_BK is None else (classes_BK.to(z.dtype),)
        # on one pixel a transposed convolution is a product of matrices, and much faster so
        first_ZHWO = self.convs[0].weight.permute(0, 2, 3, 1)
        x = (z @ first_ZHWO.flatten(1)).unflatten(1, first_ZHWO.shape[1:]).permute(0, 3, 1, 2)
        for norm, conv in zip(self.norms, self.convs[1:], strict=True):
            x = conv(F.relu(norm(x, *given)))
        return torch.tanh(x)


class DCGANDiscriminator(nn.Module):
    """Images to logits; the sigmoid, if there is one, belongs to the loss.

    The generator's mirror image: convolutions to half the side down to 4×4, leaky ReLUs, batch normalisation after all
    but the first and the last, and a convolution of 4×4. With classes, ``logit += <V_y, sum of the last activations
    over their pixels>``: the projection of Miyato & Koyama.

    Spectral normalisation divides each weight (also V) by its largest singular value, as one iteration of the power
    method in each forward pass in training mode follows it (Miyato et al., algorithm 1); in evaluation mode the last
    estimate stays.

    Args:
        image_size: side of the images: 16, 32, 64, 128, 256 or 512.
        in_channels: channels of the images: 1 for grey, 3 for colour.
        base_channels: width after the first convolution, 64 in the paper.
        num_classes: K; 0 for none.
        spectral_norm: whether every weight is normalised: SNGAN.
        batch_norm: whether there is batch normalisation, as in DCGAN; without it the convolutions have biases, as in
            SNGAN.

    Raises:
        UserError: an argument outside its range.
    """

    def __init__(
        self,
        image_size: int = 64,
        in_channels: int = 3,
        base_channels: int = 64,
        num_classes: int = 0,
        spectral_norm: bool = False,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        widths = _widths(image_size, base_channels)[::-1]
        _check(1, in_channels=in_channels)
        _check(0, num_classes=num_classes)
        self.image_size, self.in_channels, self.base_channels = image_size, in_channels, base_channels
        self.num_classes, self.spectral_norm, self.batch_norm = num_classes, spectral_norm, batch_norm
        self.convs = nn.ModuleList()
        for before, after in pairwise([in_channels, *widths]):
            self.convs.append(nn.Conv2d(before, after, 4, stride=2, padding=1, bias=not batch_norm))
        self.convs.append(nn.Conv2d(widths[-1], 1, BASE_SIDE, bias=not batch_norm))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:]) if batch_norm else None
        self.projection = nn.Linear(num_classes, widths[-1], bias=False) if num_classes else None
        self.apply(_initialise)
        self.to(memory_format=torch.channels_last)
        if spectral_norm:
            for layer in [*self.convs, *([self.projection] if num_classes else [])]:
                normalise_spectrum(layer)

    def forward(self, image: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Logits.

        Args:
            image: (B, C, H, W) in [-1, 1].
            labels: class indices (B,) or vectors (B, K), for a network with classes.

        Returns:
            (B,), unbounded; more is more real.

        Raises:
            UserError: shapes that do not fit.
        """
        expected = (self.in_channels, self.image_size, self.image_size)
        if image.ndim != 4 or image.shape[1:] != expected:
            raise UserError(
                f"images must be (B, {', '.join(map(str, expected))}), got {tuple(image.shape)}; set image_size and "
                "in_channels as the images are"
            )
        classes_BK = class_vectors(labels, self.num_classes, len(image))
        weights, projection = self._weights(image.device.type)
        x = image
        for place, conv in enumerate(self.convs[:-1]):
            x = F.conv2d(x, weights[place], conv.bias, stride=2, padding=1)
            if self.norms is not None and place:
                x = self.norms[place - 1](x)
            x = F.leaky_relu(x, LEAK)
        # its kernel covers the picture: a product of matrices
        last_1HWO = weights[-1].permute(0, 2, 3, 1)
        logit_B = F.linear(x.permute(0, 2, 3, 1).flatten(1), last_1HWO.flatten(1), self.convs[-1].bias)[:, 0]
        if projection is not None:
            logit_B = logit_B + (F.linear(classes_BK.to(x.dtype), projection) * x.sum((2, 3))).sum(1)
        return logit_B

    def _weights(self, device: str) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """Weights of the convolutions and of the projection, each read once: reading is what iterates the power method.

        In full precision, since autocast would round the singular vectors.
        """
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            weights = [conv.weight for conv in self.convs]
            return weights, None if self.projection is None else self.projection.weight


def _widths(image_size: int, base_channels: int) -> list[int]:
    """Widths of the hidden layers, from 4×4 up to half the size."""
    if isinstance(image_size, bool) or image_size not in SIZES:
        raise UserError(f"image_size must be {', '.join(map(str, SIZES))}, got {image_size!r}; set --image_size 64")
    _check(1, base_channels=base_channels)
    levels = (image_size // (2 * BASE_SIDE)).bit_length()
    return [base_channels << level for level in range(levels)][::-1]


def _check(least: int, **values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{name} must be a whole number of at least {least}, got {value!r}; set --{name}")


def _initialise(module: nn.Module) -> None:
    """Weights N(0, 0.02) (DCGAN, section 4); those of batch normalisation N(1, 0.02) with biases of 0, as is custom."""
    if isinstance(module, _ClassNorm):
        nn.init.normal_(module.gain_KO, 1.0, INIT_STD)
        nn.init.zeros_(module.bias_KO)
    elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear | nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0, INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
