"""Training of a diffusion model, or a rectified flow, in the latent space of a frozen autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from monai.engines.utils import default_prepare_batch
from monai.utils.enums import CommonKeys as Keys
from torch import nn

from medgen.data.stream import ResumableDataLoader
from medgen.engines.trainer import GenerativeTrainer, unwrap
from medgen.errors import UserError
from medgen.losses import DiffusionLoss

__all__ = ["LatentDiffusionTrainer", "warmup"]


def warmup(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler | None:
    """Learning rates that rise linearly over the first ``steps`` steps; None for 0."""
    if steps <= 0:
        return None
    return torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / (steps + 1), total_iters=steps)


class LatentDiffusionTrainer(GenerativeTrainer):
    """One step of the denoising objective per batch, with a moving average of the weights.

    Rombach et al. 2022, arXiv 2112.10752, section 3.2. Batches hold whitened latents drawn when they were loaded
    (:class:`medgen.transforms.LoadLatentd`), or images, which ``encoder`` brings to latents in each step.

    ``state.output[0]`` holds ``image``, the latents (B, C, h, w), and the detached scalars ``loss`` and ``grad_norm``.

    Args:
        device: where the networks are.
        max_epochs: epochs to train.
        train_data_loader: batches with ``image``, and the key of the conditioner.
        network: :class:`monai.networks.nets.DiffusionModelUNet`, alone or in DistributedDataParallel.
        optimizer: of the network.
        loss: the objective, which also noises the images and draws the timesteps.
        ema: copy of the network that becomes its moving average
            (:func:`medgen.engines.exponential_moving_copy`); None for none.
        ema_decay: of the moving average per step.
        lr_scheduler: stepped after each step; None for a constant learning rate.
        conditioner: what turns captions or labels into the network's arguments; None for an unconditional model.
        encoder: images to whitened latents, :class:`medgen.inferers.PosteriorEncoder`; None where batches hold latents.
        clip_grad_norm: largest norm of the gradient; 0 does not clip.
        compile: whether the network runs through ``torch.compile``.
        seed: of all random numbers.
        amp: bfloat16 autocast where the device has it; the loss is computed in float32.
        train_handlers: MONAI or ignite handlers.
        components: more parts of the state, beside network, optimiser, moving average and learning rate.

    Raises:
        UserError: ``ema_decay`` is outside [0, 1) or ``clip_grad_norm`` below 0.
    """

    def __init__(
        self,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: ResumableDataLoader,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: DiffusionLoss,
        ema: nn.Module | None = None,
        ema_decay: float = 0.9999,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        conditioner: Callable[[Any], dict[str, torch.Tensor]] | None = None,
        encoder: Callable[[torch.Tensor], torch.Tensor] | None = None,
        clip_grad_norm: float = 1.0,
        compile: bool = False,
        seed: int = 0,
        amp: bool = False,
        train_handlers: Sequence | None = None,
        components: Mapping[str, Any] | None = None,
    ) -> None:
        if not 0 <= ema_decay < 1:
            raise UserError(f"ema_decay must be at least 0 and below 1, got {ema_decay}; set --ema_decay 0.9999")
        if not clip_grad_norm >= 0:
            raise UserError(f"clip_grad_norm must be 0 or more, got {clip_grad_norm}; set --clip_grad_norm 1")
        self.network, self.optimizer, self.loss = network, optimizer, loss
        self.ema, self.ema_decay, self.lr_scheduler = ema, ema_decay, lr_scheduler
        self.conditioner, self.encoder = conditioner, encoder
        self.clip_grad_norm = clip_grad_norm or float("inf")
        self._predict = torch.compile(network) if compile else network
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            train_data_loader=train_data_loader,
            components={
                "network": network,
                "optimizer": optimizer,
                "ema": ema,
                "lr_scheduler": lr_scheduler,
                **(components or {}),
            },
            seed=seed,
            amp=amp,
            prepare_batch=default_prepare_batch,
            non_blocking=True,  # from pinned memory
            train_handlers=train_handlers,
        )

    def _iteration(self, engine: LatentDiffusionTrainer, batchdata: Mapping[str, Any]) -> list[dict[str, Any]]:
        images, _ = self.prepare_batch(batchdata, self.state.device, self.non_blocking)
        # batches may carry MONAI's metadata; in the network it would only cost time
        images = images.as_tensor() if hasattr(images, "as_tensor") else images
        self.seed_step()
        latents = images if self.encoder is None else self.encoder(images)
        noise = torch.randn_like(latents)
        timesteps = self.loss.draw_timesteps(latents)
        condition = {} if self.conditioner is None else self.conditioner(batchdata[self.conditioner.key])

        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            prediction = self._predict(self.loss.add_noise(latents, noise, timesteps), timesteps=timesteps, **condition)
        loss = self.loss(prediction.float(), latents, noise, timesteps)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.clip_grad_norm)
        self.optimizer.step()
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        if self.ema is not None:
            self._update_ema()
        return [{Keys.IMAGE: latents, Keys.LOSS: loss.detach(), "grad_norm": norm.detach()}]

    @torch.no_grad()
    def _update_ema(self) -> None:
        steps = self.images_seen / self.data_loader.global_batch_size
        # the average over what was seen so far, until that is longer than the decay's memory: without it, random first
        # weights stay in the average for thousands of steps
        decay = min(self.ema_decay, (1 + steps) / (10 + steps))
        source = unwrap(self.network)
        torch._foreach_lerp_(list(self.ema.parameters()), list(source.parameters()), 1 - decay)
