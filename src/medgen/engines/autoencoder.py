"""Training of an autoencoder with KL-regularised latents and a patch discriminator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from monai.engines.utils import default_prepare_batch
from monai.losses import PatchAdversarialLoss
from monai.utils.enums import CommonKeys as Keys
from torch import nn

from medgen.data.stream import ResumableDataLoader
from medgen.engines.trainer import GenerativeTrainer, unwrap
from medgen.losses import GaussianKLLoss

__all__ = ["AutoencoderKLTrainer"]


class AutoencoderKLTrainer(GenerativeTrainer):
    """One generator and, after a warm-up, one discriminator update per batch.

    Rombach et al. 2022, arXiv 2112.10752, section 3.1 and appendix G, with the terms of the latent diffusion model for
    chest radiographs: reconstruction + perceptual + KL + least-squares adversarial (no activation, targets 1 and 0).
    MONAI's AdversarialTrainer takes no KL term and no posterior, and stops at a generator that returns a tuple.

    A discriminator with batch normalisation takes its statistics from each process's own images: with another number of
    processes they are those of smaller or larger batches.

    ``state.output[0]`` holds ``image``, ``pred`` and detached scalars: ``loss`` (of the generator, all terms with their
    weights) and, unweighted, ``reconstruction``, ``perceptual``, ``kl`` (nats per image), ``adversarial`` and
    ``discriminator``.

    Args:
        device: where the networks are.
        max_epochs: epochs to train.
        train_data_loader: batches with ``image`` (B, C, H, W) in [0, 1].
        autoencoder: :class:`medgen.networks.PosteriorReconstruction`, alone or in DistributedDataParallel.
        discriminator: patch discriminator: a list of features whose last entry are the logits.
        g_optimizer: optimiser of the autoencoder.
        d_optimizer: optimiser of the discriminator.
        reconstruction_loss: of (reconstruction, image), a scalar.
        perceptual_loss: of (reconstruction, image), a scalar; None leaves the term out.
        perceptual_weight: weight of the perceptual term.
        kl_weight: weight of the KL term, which is summed over a latent.
        adversarial_weight: weight of the adversarial term, in the discriminator's loss as well.
        adversarial_start_epoch: epochs trained before the adversarial term and the discriminator join.
        clip_grad_norm: largest gradient norm of either network; None does not clip.
        ema: ``torch.optim.swa_utils.AveragedModel`` of the autoencoder, or None.
        seed: seed of all random numbers.
        amp: bfloat16 autocast where the device has it; losses are computed in float32.
        prepare_batch: as in :class:`monai.engines.Trainer`.
        train_handlers: MONAI or ignite handlers.
        components: more parts of the state, beside networks, optimisers and EMA.
    """

    def __init__(
        self,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: ResumableDataLoader,
        autoencoder: nn.Module,
        discriminator: nn.Module,
        g_optimizer: torch.optim.Optimizer,
        d_optimizer: torch.optim.Optimizer,
        reconstruction_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        perceptual_loss: nn.Module | None = None,
        perceptual_weight: float = 0.002,
        kl_weight: float = 1e-8,
        adversarial_weight: float = 0.005,
        adversarial_start_epoch: int = 5,
        clip_grad_norm: float | None = 1.0,
        ema: nn.Module | None = None,
        seed: int = 0,
        amp: bool = False,
        prepare_batch: Callable = default_prepare_batch,
        train_handlers: Sequence | None = None,
        components: Mapping[str, Any] | None = None,
    ) -> None:
        self.autoencoder, self.discriminator = autoencoder, discriminator
        self.g_optimizer, self.d_optimizer = g_optimizer, d_optimizer
        self.reconstruction_loss = reconstruction_loss
        self.perceptual_loss = perceptual_loss.to(device) if perceptual_loss is not None else None
        self.kl_loss = GaussianKLLoss()
        # MONAI's default puts a LeakyReLU between logits and least squares
        self.adversarial_loss = PatchAdversarialLoss(criterion="least_squares", no_activation_leastsq=True)
        self.perceptual_weight, self.kl_weight = perceptual_weight, kl_weight
        self.adversarial_weight, self.adversarial_start_epoch = adversarial_weight, adversarial_start_epoch
        self.clip_grad_norm = clip_grad_norm
        self.ema = ema
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            train_data_loader=train_data_loader,
            components={
                "network": unwrap(autoencoder).network,
                "discriminator": discriminator,
                "g_optimizer": g_optimizer,
                "d_optimizer": d_optimizer,
                "ema": ema,
                **(components or {}),
            },
            seed=seed,
            amp=amp,
            prepare_batch=prepare_batch,
            non_blocking=True,  # from pinned memory
            train_handlers=train_handlers,
        )

    def _iteration(self, engine: AutoencoderKLTrainer, batchdata: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
        image, _ = self.prepare_batch(batchdata, self.state.device, self.non_blocking)
        # batches carry MONAI's metadata; in the network it would only cost time
        image = image.as_tensor() if hasattr(image, "as_tensor") else image
        adversarial = self.state.epoch > self.adversarial_start_epoch
        self.seed_step()

        self.autoencoder.train()
        self.g_optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            reconstruction, mu, sigma = self.autoencoder(image, self._noise(image))
        reconstruction, mu, sigma = reconstruction.float(), mu.float(), sigma.float()
        terms = {"reconstruction": self.reconstruction_loss(reconstruction, image), "kl": self.kl_loss(mu, sigma)}
        loss = terms["reconstruction"] + self.kl_weight * terms["kl"]
        if self.perceptual_loss is not None:
            # in float32: a difference of nearly equal features, of which bfloat16 keeps too few digits
            terms["perceptual"] = self.perceptual_loss(reconstruction, image)
            loss = loss + self.perceptual_weight * terms["perceptual"]
        if adversarial:
            terms["adversarial"] = self._generator_adversarial_loss(reconstruction)
            loss = loss + self.adversarial_weight * terms["adversarial"]
        loss.backward()
        self._step(self.g_optimizer, self.autoencoder)
        if self.ema is not None:
            self.ema.update_parameters(unwrap(self.autoencoder).network)

        if adversarial:
            terms["discriminator"] = self._train_discriminator(image, reconstruction.detach())
        scalars = {name: term.detach() for name, term in terms.items()}
        # a list, as of MONAI's own trainers after decollating: its loggers read the first entry
        return [{Keys.IMAGE: image, Keys.PRED: reconstruction.detach(), Keys.LOSS: loss.detach(), **scalars}]

    def _noise(self, image: torch.Tensor) -> torch.Tensor:
        network = unwrap(self.autoencoder).network
        factor = 2 ** (len(network.encoder.channels) - 1)
        shape = (image.shape[0], network.latent_channels, *(side // factor for side in image.shape[2:]))
        return torch.randn(shape, device=image.device)

    def _generator_adversarial_loss(self, reconstruction: torch.Tensor) -> torch.Tensor:
        # not through DistributedDataParallel: its gradients are the generator's, and the discriminator's own are
        # switched off, which saves computing them only to throw them away
        network = unwrap(self.discriminator).requires_grad_(False).train()
        with self.autocast():
            logits = network(reconstruction)[-1]
        loss = self.adversarial_loss(logits.float(), target_is_real=True, for_discriminator=False)
        network.requires_grad_(True)
        return loss

    def _train_discriminator(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        self.d_optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            # two passes: batch normalisation of real and fake images together would tell them apart by their batch
            logits_fake = self.discriminator(fake)[-1]
            logits_real = self.discriminator(real)[-1]
        loss_fake = self.adversarial_loss(logits_fake.float(), target_is_real=False, for_discriminator=True)
        loss_real = self.adversarial_loss(logits_real.float(), target_is_real=True, for_discriminator=True)
        loss = 0.5 * (loss_fake + loss_real)
        (self.adversarial_weight * loss).backward()
        self._step(self.d_optimizer, self.discriminator)
        return loss

    def _step(self, optimizer: torch.optim.Optimizer, network: nn.Module) -> None:
        if self.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(network.parameters(), self.clip_grad_norm)
        optimizer.step()
