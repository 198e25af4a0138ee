"""Images to latents and back: an encoder with the generator that it inverts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer

from medgen.data.stream import derive_seed
from medgen.inferers.generation import draw_latents
from medgen.losses import ProjectionLoss
from medgen.networks import LatentEncoder, LatentGenerator

__all__ = ["BootstrapInferer", "InversionInferer", "draw_pairs"]


def draw_pairs(seeds: Sequence[int], generator: LatentGenerator) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents that are known, and their images.

    Args:
        seeds: one for each pair; of a generator with classes, they take turns.
        generator: the generator.

    Returns:
        latents (B, L, D), and images (B, C, H, W) clipped to [0, 1], as real ones are.
    """
    latents = _draw(seeds, generator)
    return latents, generator(latents).float().clamp(0, 1)


def _draw(seeds: Sequence[int], generator: LatentGenerator) -> torch.Tensor:
    device = generator.mean.device
    z = draw_latents(seeds, generator.z_dim).to(device)
    labels = None
    if generator.num_classes:
        labels = torch.tensor([seed % generator.num_classes for seed in seeds], device=device)
    return generator.from_z(z, labels).float()


class InversionInferer(Inferer):
    """One pass of an encoder, and what the generator makes of its latents.

    Args:
        generator: that the encoder inverts.
        loss: distance of images; None for none.
    """

    def __init__(self, generator: LatentGenerator, loss: ProjectionLoss | None = None) -> None:
        self.generator, self.loss = generator, loss

    def __call__(self, inputs: torch.Tensor, network: LatentEncoder, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Invert.

        Args:
            inputs: images (B, C, H, W) in [0, 1].
            network: the encoder.
            args: not used; part of the interface.
            kwargs: not used; part of the interface.

        Returns:
            ``latent`` (B, L, D), ``reconstruction`` (B, C, H, W) clipped to [0, 1], and with a loss ``distance`` (B,)
            of the reconstruction before it was clipped.
        """
        images = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        latents = network(images).float()
        raw = self.generator(latents)
        found = {"latent": latents, "reconstruction": raw.clamp(0, 1)}
        if self.loss is not None:
            found["distance"] = self.loss(raw, self.loss.prepare(images))
        return found


class BootstrapInferer(InversionInferer):
    """How well an encoder finds the latents of images whose latents are known.

    Args:
        generator: that the encoder inverts.
    """

    def __call__(self, inputs: torch.Tensor, network: LatentEncoder, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Draw and invert.

        Args:
            inputs: seeds (B,).
            network: the encoder.
            args: not used; part of the interface.
            kwargs: not used; part of the interface.

        Returns:
            ``image``, ``reconstruction`` (B, C, H, W), ``latent``, ``truth`` (B, L, D), ``latent_error`` (B,) (see
            :meth:`medgen.networks.LatentGenerator.relative_error`) and ``cosine`` (B,); both with the latents of
            other images, ``chance_error`` and ``chance_cosine``.
        """
        seeds = [int(seed) for seed in inputs]
        truth, images = draw_pairs(seeds, self.generator)
        found = super().__call__(images, network)
        others = _draw([derive_seed(seed, 5) for seed in seeds], self.generator)
        measured = {"image": images, "truth": truth}
        for names, latents in ((("latent_error", "cosine"), truth), (("chance_error", "chance_cosine"), others)):
            measures = (self.generator.relative_error, self.generator.cosine)
            measured |= {name: of(found["latent"], latents) for name, of in zip(names, measures, strict=True)}
        return found | measured
