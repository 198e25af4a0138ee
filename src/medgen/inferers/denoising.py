"""What a diffusion model is trained and validated on: latents of images, and fixed noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from monai.inferers import Inferer
from monai.networks.nets import AutoencoderKL
from torch import nn

from medgen.data.stream import derive_seed
from medgen.losses import DiffusionLoss

if TYPE_CHECKING:
    from medgen.data.latents import LatentScaling

__all__ = ["DenoisingInferer", "PosteriorEncoder"]

NOISE_STREAM = 4  # of the numbers drawn from an image's place in the validation


class PosteriorEncoder:
    """Images to whitened latents, for training and validation without a cache.

    Args:
        autoencoder: frozen.
        scaling: of its latents.
        sample: draw from the posterior, by torch's generator; False takes its mean.
    """

    def __init__(self, autoencoder: AutoencoderKL, scaling: LatentScaling, sample: bool = True) -> None:
        self.autoencoder, self.scaling, self.sample = autoencoder, scaling, sample

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) in float32 of images (B, 1, H, W) in [0, 1]; noise by torch's generator."""
        mean, std = self.autoencoder.encode(images)
        return self.scaling.whiten(mean + std * torch.randn_like(std) if self.sample else mean)


class DenoisingInferer(Inferer):
    """The training's objective at fixed timesteps and with fixed noise, so that it compares between epochs.

    Each image is noised to the same few levels, with noise from its own seed. Errors are not weighted.

    Args:
        loss: the objective.
        levels: timesteps, in the middle of as many equal parts of the schedule.
        conditioner: as in :class:`medgen.engines.LatentDiffusionTrainer`.
        encoder: images to whitened latents; None where inputs are latents.
    """

    def __init__(
        self,
        loss: DiffusionLoss,
        levels: int = 8,
        conditioner: Callable[[Any], dict[str, torch.Tensor]] | None = None,
        encoder: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.loss, self.levels, self.conditioner, self.encoder = loss, levels, conditioner, encoder

    def __call__(
        self,
        inputs: torch.Tensor,
        network: nn.Module,
        *args: Any,
        seeds: torch.Tensor | Sequence[int] = (),
        condition: Any = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Noise and predict.

        Args:
            inputs: latents (B, C, h, w), or images for the encoder.
            network: the denoising network.
            args: not used; part of the interface.
            seeds: whole numbers (B,): places of the images in the validation split.
            condition: captions or labels of the images, for the conditioner.
            kwargs: not used; part of the interface.

        Returns:
            ``pred`` and ``target``, (B, levels, C, h, w).
        """
        device = next(network.parameters()).device
        latents = torch.as_tensor(inputs).to(device)
        latents = latents if self.encoder is None else self.encoder(latents)
        conditions = {} if self.conditioner is None else self.conditioner(condition)
        predictions, targets = [], []
        for level, timestep in enumerate(self.loss.fixed_timesteps(self.levels)):
            noise = torch.stack([_noise(int(seed), level, latents.shape[1:]) for seed in seeds]).to(device)
            t = torch.full((len(latents),), timestep, device=device)
            noisy = self.loss.add_noise(latents, noise, t)
            predictions.append(network(noisy, timesteps=t, **conditions).float())
            targets.append(self.loss.target(latents, noise, t))
        return {"pred": torch.stack(predictions, 1), "target": torch.stack(targets, 1)}


def _noise(seed: int, level: int, shape: torch.Size) -> torch.Tensor:
    generator = torch.Generator().manual_seed(derive_seed(seed, NOISE_STREAM, level))
    return torch.randn(shape, generator=generator)
