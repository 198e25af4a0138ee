"""A trained generator, frozen, as a function of one of its latent spaces: what inversion needs to know of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from medgen.errors import UserError
from medgen.networks.pggan import PGGANGenerator, pixel_norm
from medgen.networks.stylegan2 import StyleGAN2Generator

__all__ = ["LatentGenerator", "LatentStatistics", "latent_statistics"]

W_AVG_SAMPLES, W_AVG_SEED = 10_000, 123  # of StyleGAN2's published projector
MAPPING_BATCH = 1000  # latents mapped at once for the statistics
SPACES = {PGGANGenerator: ("z",), StyleGAN2Generator: ("w+", "w")}  # of each family, its usual one first


@dataclass(frozen=True)
class LatentStatistics:
    """Where w lies.

    Args:
        mean: (W,).
        std: ``√(Σ ‖w - mean‖² / n)``, a length and not a deviation for each axis.
    """

    mean: torch.Tensor
    std: float


def latent_statistics(
    network: StyleGAN2Generator,
    label: torch.Tensor | None = None,
    samples: int = W_AVG_SAMPLES,
    seed: int = W_AVG_SEED,
) -> LatentStatistics:
    """Mean and spread of w over random z.

    Args:
        network: the generator.
        label: class vector (K,) of a generator with classes.
        samples: z to draw.
        seed: of NumPy's ``RandomState``, as published.
    """
    z = torch.from_numpy(np.random.RandomState(seed).randn(samples, network.latent_dim)).float()
    device, ws = network.w_avg.device, []
    with torch.no_grad():
        for part in z.split(MAPPING_BATCH):
            labels = None if label is None else label.to(device).expand(len(part), -1)
            ws.append(network.mapping(part.to(device), labels, update_w_avg=False)[:, 0].double().cpu())
    w = torch.cat(ws)
    mean = w.mean(0)
    return LatentStatistics(mean.float(), math.sqrt((w - mean).square().sum().item() / samples))


class LatentGenerator(nn.Module):
    """A generator as a function of one latent space, with what an inversion has to know of that space.

    Latents have the shape (B, L, D): L styles, 1 but for W+, of D numbers.

    ``z``: of a progressive GAN, which normalises its latent, so that no inversion can tell its length: latents are
    points on the sphere ``mean(z²) = 1``, with the one-hot class, if there are any, as further numbers. ``w`` and
    ``w+``: of StyleGAN2, where a class has done its work in the mapping from z.

    Its weights take no gradient, and it stays in evaluation mode, whatever :meth:`train` is told.

    Args:
        network: the generator.
        space: "z", "w" or "w+"; None for the family's usual one: Z of a progressive GAN, W+ of StyleGAN2.
        sha256: of the file of its weights, by which latents know their generator.

    Attributes:
        latent_shape: (L, D).
        image_size: (height, width).
        channels: of the images.
        mean: (L, D), of random latents; in Z 0, whose image is the one that truncation leads to.
        std: root of the mean variance of a number.
        z_dim: Z.

    Raises:
        UserError: a network of another family, or a space that it does not have.
    """

    def __init__(self, network: nn.Module, space: str | None = None, sha256: str = "") -> None:
        super().__init__()
        family = next((family for family in SPACES if isinstance(network, family)), None)
        if family is None:
            raise UserError(
                f"an inversion takes a {' or a '.join(f.__name__ for f in SPACES)}, got {type(network).__name__}; "
                "name the bundle of one with --generator"
            )
        if space is not None and space not in SPACES[family]:
            raise UserError(
                f"space must be {' or '.join(SPACES[family])} for a {family.__name__}, got {space!r}; set --space"
            )
        self.network, self.sha256 = network.eval().requires_grad_(False), sha256
        self.space = SPACES[family][0] if space is None else space
        self.z_dim = network.latent_dim
        if self.space == "z":
            self.latent_shape: tuple[int, int] = (1, network.latent_dim + network.num_classes)
            self.image_size: tuple[int, int] = (network.resolution, network.resolution)
            self.channels: int = network.out_channels
            mean, std = torch.zeros(self.latent_shape), 1.0
        else:
            self.latent_shape = (network.num_ws if self.space == "w+" else 1, network.w_dim)
            self.image_size = tuple(network.image_size)
            self.channels = network.synthesis.blocks[-1].to_image.bias.numel()
            mean, std = self._statistics_of_w()
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def train(self, mode: bool = True) -> LatentGenerator:
        """Stay in evaluation mode: the generator is a ruler, not a student."""
        return super().train(False)

    @property
    def is_spherical(self) -> bool:
        """Whether latents are points of the sphere ``mean(z²) = 1``."""
        return self.space == "z"

    @property
    def num_classes(self) -> int:
        """K of the network; 0 for none."""
        return self.network.num_classes

    def from_z(self, z: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Latents of random z.

        Args:
            z: (B, Z), N(0, 1).
            labels: class indices (B,), for a network with classes.

        Returns:
            (B, L, D).
        """
        if self.space == "z":
            return self.network.normalise(z, labels)[:, None]
        ws = self.network.mapping(z, labels, update_w_avg=False)
        return ws if self.space == "w+" else ws[:, :1]

    def nearest(self, latents: torch.Tensor) -> torch.Tensor:
        """The points of the space that are nearest to (B, L, D) numbers: on its sphere, or as they are."""
        return pixel_norm(latents.flatten(0, 1)).view_as(latents) if self.is_spherical else latents

    def relative_error(self, latents: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """Mean square error in units of the latents' variance, (B,).

        In W it is the share of the variance that stays unexplained: 1 for the mean. On the sphere it is
        ``2 · (1 - cos)``, 2 for random latents: a distance that the generator can see, unlike one of lengths.
        """
        return (latents - truth).square().mean((1, 2)) / self.std.square()

    def cosine(self, latents: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """Cosine of the deviations from the mean, (B,): 0 by chance, 1 at best."""
        pair = (latents - self.mean).flatten(1), (truth - self.mean).flatten(1)
        return nn.functional.cosine_similarity(*pair, dim=1)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Images of latents, with the noise maps that are stored with the weights.

        Args:
            latents: (B, L, D).

        Returns:
            (B, C, H, W), nominally in [0, 1] and not clipped, so that the gradient of a value outside leads back.

        Raises:
            UserError: latents of another space.
        """
        if tuple(latents.shape[1:]) != self.latent_shape:
            raise UserError(
                f"latents must be (B, {', '.join(map(str, self.latent_shape))}) for this generator's space "
                f"{self.space}, got {tuple(latents.shape)}; use latents of this generator, or set --space"
            )
        if self.space == "z":
            images = self.network.synthesis(self.nearest(latents)[:, 0])
        else:
            images = self.network.synthesis(latents if self.space == "w+" else latents[:, 0])
        return (images.float() + 1) / 2

    def _statistics_of_w(self) -> tuple[torch.Tensor, float]:
        labels = torch.eye(self.num_classes) if self.num_classes else [None]
        of_classes = [latent_statistics(self.network, label) for label in labels]
        means = torch.stack([each.mean for each in of_classes])
        mean = means.mean(0)
        # variance within the classes and between them
        total = sum(each.std**2 for each in of_classes) / len(of_classes) + (means - mean).square().sum(1).mean().item()
        return mean.expand(self.latent_shape).clone(), math.sqrt(total / len(mean))
