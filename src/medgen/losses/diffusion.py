"""The training objective of diffusion models and of rectified flows."""

from __future__ import annotations

import torch
from monai.networks.schedulers import DDPMScheduler, RFlowScheduler
from monai.networks.schedulers.scheduler import Scheduler
from torch import nn

from medgen.errors import UserError

__all__ = ["DiffusionLoss"]


class DiffusionLoss(nn.Module):
    """Squared error of what a network predicts of a noised image, by MONAI's training schedulers.

    - :class:`monai.networks.schedulers.DDPMScheduler`: ``x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps`` with t from 0
      to T - 1; the prediction is of ``eps`` (Ho et al. 2020, arXiv 2006.11239, eq. 14), of ``x_0`` (``sample``), or of
      ``v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0`` (Salimans and Ho 2022, arXiv 2202.00512, section 4).
    - :class:`monai.networks.schedulers.RFlowScheduler`: ``x_t = (1 - t/T) x_0 + t/T eps``; the prediction is of the
      velocity ``x_0 - eps`` (Liu et al. 2023, arXiv 2209.03003, eq. 1, in MONAI's direction).

    Args:
        noise_scheduler: one of these two.
        snr_gamma: Min-SNR weighting (Hang et al. 2023, arXiv 2303.09556): the error of ``x_0`` is weighted by
            ``min(SNR, gamma)``, whatever is predicted; the paper's gamma is 5. None weights all timesteps alike.

    Raises:
        UserError: ``snr_gamma`` is not above 0, or given for a rectified flow, which has no such weighting.
    """

    def __init__(self, noise_scheduler: Scheduler, snr_gamma: float | None = None) -> None:
        super().__init__()
        self.noise_scheduler, self.snr_gamma = noise_scheduler, snr_gamma
        self.is_flow = isinstance(noise_scheduler, RFlowScheduler)
        if not self.is_flow and not isinstance(noise_scheduler, DDPMScheduler):
            raise UserError(
                "noise_scheduler must be MONAI's DDPMScheduler or RFlowScheduler, got "
                f"{type(noise_scheduler).__name__}; samplers are chosen for sampling, with --sampler"
            )
        if snr_gamma is not None:
            if isinstance(snr_gamma, bool) or not isinstance(snr_gamma, int | float) or not snr_gamma > 0:
                raise UserError(f"snr_gamma must be a number above 0 or null, got {snr_gamma!r}; set --snr_gamma 5")
            if self.is_flow:
                raise UserError("snr_gamma weights the timesteps of a diffusion, not of a rectified flow; set it null")

    def draw_timesteps(self, images: torch.Tensor) -> torch.Tensor:
        """Timesteps (B,) of a training step, from torch's generator: whole numbers, or real ones of a flow."""
        if self.is_flow:
            return self.noise_scheduler.sample_timesteps(images)
        steps = self.noise_scheduler.num_train_timesteps
        return torch.randint(0, steps, (len(images),), device=images.device)

    def fixed_timesteps(self, levels: int) -> list[float]:
        """``levels`` timesteps in the middle of as many equal parts of the schedule."""
        steps = self.noise_scheduler.num_train_timesteps
        middle = [(level + 0.5) * steps / levels for level in range(levels)]
        return middle if self.is_flow else [int(t) for t in middle]

    def add_noise(self, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """``x_t`` of ``x_0`` and the noise, in their shape (B, C, H, W)."""
        return self.noise_scheduler.add_noise(original_samples=images, noise=noise, timesteps=timesteps)

    def target(self, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the network should say of ``x_t``, (B, C, H, W)."""
        if self.is_flow:
            return images - noise
        kind = self.noise_scheduler.prediction_type
        if kind == "epsilon":
            return noise
        return images if kind == "sample" else self.noise_scheduler.get_velocity(images, noise, timesteps)

    def weights(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Weight (B,) of each image's squared error."""
        if self.snr_gamma is None:
            return torch.ones(len(timesteps), device=timesteps.device)
        alpha_bar = self.noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        snr = alpha_bar / (1 - alpha_bar)
        # the squared errors of eps and of v are SNR and SNR + 1 times that of x_0
        factor = {"epsilon": snr, "sample": torch.ones_like(snr)}.get(self.noise_scheduler.prediction_type, snr + 1)
        return snr.clamp(max=self.snr_gamma) / factor

    def forward(
        self, prediction: torch.Tensor, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Mean over the batch of the weighted mean squared error of each image: a scalar.

        Args:
            prediction: the network's, of ``x_t``, (B, C, H, W).
            images: ``x_0``, (B, C, H, W).
            noise: standard normal, (B, C, H, W).
            timesteps: (B,).
        """
        error = (prediction - self.target(images, noise, timesteps)).square().flatten(1).mean(1)
        return (self.weights(timesteps) * error).mean()
