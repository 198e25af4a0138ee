"""Training of an encoder that inverts a frozen generator: on its own images first, then on real ones."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Events
from monai.engines.utils import default_prepare_batch
from monai.utils.enums import CommonKeys as Keys
from torch import nn

from medgen.data.stream import derive_seed
from medgen.engines.trainer import GenerativeTrainer
from medgen.errors import UserError
from medgen.inferers.inversion import draw_pairs
from medgen.losses import ProjectionLoss, discriminator_loss, generator_loss, r1_penalty
from medgen.networks import LatentDiscriminator, LatentEncoder, LatentGenerator, PyramidEncoder
from medgen.weights import state_digest

__all__ = ["BootstrapTrainer", "EncoderTrainer", "InversionTrainer", "StylePool"]


class EncoderTrainer(GenerativeTrainer):
    """Base of both stages: a frozen generator, an encoder, and the proof that the first has not changed.

    Several processes average their gradients after the backward pass.

    Args:
        device: where the networks are.
        max_epochs: epochs to train.
        train_data_loader: endless loader.
        encoder: images in [0, 1] to latents.
        generator: that it inverts.
        optimizer: of the encoder.
        components: more parts of the state; None values are passed over.
        kwargs: passed on to :class:`GenerativeTrainer`.

    Raises:
        UserError: the encoder was built for another generator.
    """

    def __init__(
        self,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: Any,
        encoder: LatentEncoder,
        generator: LatentGenerator,
        optimizer: torch.optim.Optimizer,
        components: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        encoder.check_generator(generator)
        self.encoder, self.generator, self.optimizer = encoder, generator, optimizer
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            train_data_loader=train_data_loader,
            # the generator is no component: nothing of it is ever written or read
            components={"network": encoder, "optimizer": optimizer, **(components or {})},
            non_blocking=True,  # from pinned memory
            **kwargs,
        )
        self.share(encoder)
        self._before = state_digest(generator.network)
        self.add_event_handler(Events.COMPLETED, lambda: self.check_generator_unchanged())

    def check_generator_unchanged(self) -> None:
        """See that the generator's weights and buffers are those that the training began with.

        Raises:
            UserError: they are not: latents found so far belong to no generator that is on a disk.
        """
        if state_digest(self.generator.network) != self._before:
            raise UserError(
                "the generator changed during the training of its encoder, which must not be; look which handler or "
                "component trains it, and start again"
            )

    def _iteration(self, engine: EncoderTrainer, batchdata: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
        self.seed_step()
        # in each step: a preview that leaves the network in evaluation mode must not decide how it trains
        self.encoder.train()
        return [self._step(batchdata)]

    @abstractmethod
    def _step(self, batchdata: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """One update; returns images, reconstructions and detached scalars."""


class BootstrapTrainer(EncoderTrainer):
    """Stage 1: the generator's own images, whose latents are known. No data set is needed, and none repeats.

    The loss is :meth:`~medgen.networks.LatentGenerator.relative_error`: on the sphere of a progressive GAN, whose
    generator normalises its latent, lengths cannot be recovered and do not count; an error in W counts relative to
    the variance there. With ``image_weight`` above 0 the distance of the reconstruction from the image is added.

    ``state.output[0]`` holds ``image`` and ``pred`` in [0, 1], ``loss``, ``latent_error`` and ``cosine``.

    Args:
        train_data_loader: :class:`medgen.data.SeedLoader`.
        image_loss: for the image term; None where its weight is 0.
        image_weight: weight of the image term.
        kwargs: passed on to :class:`EncoderTrainer`.

    Raises:
        UserError: a weight without a loss, or a negative one.
    """

    def __init__(self, *, image_loss: ProjectionLoss | None = None, image_weight: float = 0.0, **kwargs: Any) -> None:
        if not image_weight >= 0 or (image_weight and image_loss is None):
            raise UserError(
                f"image_weight must be 0, or more with an image_loss, got {image_weight}; set --image_weight 0"
            )
        self.image_loss, self.image_weight = image_loss, image_weight
        super().__init__(**kwargs)

    def _step(self, batchdata: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        with torch.no_grad(), self.autocast():
            truth, image = draw_pairs(batchdata["seed"].tolist(), self.generator)
        with self.autocast():
            latents = self.encoder(image).float()
        error = self.generator.relative_error(latents, truth).mean()
        loss, pred = error, None
        if self.image_weight:
            with self.autocast():
                pred = self.generator(latents)
            distance = self.image_loss(pred, self.image_loss.prepare(image)).mean()
            loss = loss + self.image_weight * distance
        self.update(self.optimizer, self.encoder, loss)
        scalars = {"latent_error": error.detach(), "cosine": self.generator.cosine(latents, truth).detach().mean()}
        if self.image_weight:
            scalars["image_distance"] = distance.detach()
        return {Keys.IMAGE: image, Keys.LOSS: loss.detach(), **scalars}


class StylePool(nn.Module):
    """Styles that the encoder made in earlier steps: the discriminator must not forget them (Shrivastava et al. 2017,
    arXiv 1612.07828, section 2.3).

    Until it is full it keeps what comes; then half of a batch, at most half of the pool, is exchanged for older styles.

    Args:
        size: styles kept; 0 keeps none.
        width: D.
    """

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("styles", torch.zeros(size, width))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def exchange(self, styles: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """(N, D) styles to as many, some of them older.

        Args:
            styles: of this step.
            generator: of random numbers, on the CPU; None for torch's own.
        """
        size, count = len(self.styles), int(self.count)
        # their order is random, so that a batch with more styles than fit leaves some of each image
        rows = torch.randperm(len(styles), generator=generator).to(styles.device)
        if count < size:
            kept = rows[: size - count]
            self.styles[count : count + len(kept)] = styles[kept]
            self.count.fill_(count + len(kept))
            return styles
        exchanged = rows[: min(len(styles), size) // 2]
        places = torch.randperm(size, generator=generator)[: len(exchanged)].to(styles.device)
        out = styles.clone()
        out[exchanged] = self.styles[places]
        self.styles[places] = styles[exchanged]
        return out


class InversionTrainer(EncoderTrainer):
    """Stage 2: real images, whose latents nobody knows; what counts is the reconstruction.

    The objective is an image distance, and in W+ (e4e: Tov et al. 2021, arXiv 2102.02766) two terms that keep styles
    where the generator is at its best: the length of the deltas (section 4.1, equation 2) and a discriminator of
    styles (section 4.2, non-saturating, R1). Deltas join one by one (``PyramidEncoder.stage``).

    ``state.output[0]`` holds ``image`` and ``pred`` in [0, 1], ``loss``, ``distance`` and what terms there are.

    Args:
        device: where the networks are.
        train_data_loader: batches with ``image`` (B, C, H, W) in [0, 1].
        loss: distance of images.
        delta_weight: weight of the deltas' mean length, in units of the latents' deviation.
        latent_discriminator: judge of styles; None leaves the term out.
        d_optimizer: of the judge.
        adversarial_weight: weight of its term for the encoder.
        r1_gamma: of its R1 penalty.
        r1_interval: steps from one R1 penalty to the next.
        pool_size: of :class:`StylePool`.
        progressive_start: images before the first delta joins; None: all take part from the start.
        progressive_images: images from one delta to the next.
        prepare_batch: as in :class:`monai.engines.Trainer`.
        components: more parts of the state, beside networks and optimisers.
        kwargs: passed on to :class:`EncoderTrainer`.

    Raises:
        UserError: settings that do not fit each other.
    """

    def __init__(
        self,
        *,
        device: torch.device | str,
        loss: ProjectionLoss,
        delta_weight: float = 0.0,
        latent_discriminator: LatentDiscriminator | None = None,
        d_optimizer: torch.optim.Optimizer | None = None,
        adversarial_weight: float = 0.1,
        r1_gamma: float = 10.0,
        r1_interval: int = 16,
        pool_size: int = 50,
        progressive_start: int | None = None,
        progressive_images: int = 16_000,
        prepare_batch: Callable = default_prepare_batch,
        components: Mapping[str, Any] | None = None,
        train_handlers: Sequence | None = None,
        **kwargs: Any,
    ) -> None:
        encoder = kwargs["encoder"]
        if progressive_start is not None and not isinstance(encoder, PyramidEncoder):
            raise UserError(
                f"progressive_start must be null for a {type(encoder).__name__}, which has no deltas, got "
                f"{progressive_start}; leave it out"
            )
        if (latent_discriminator is None) != (d_optimizer is None):
            raise UserError("latent_discriminator and d_optimizer must come together, got one of them; set both")
        self.loss = loss
        self.delta_weight, self.adversarial_weight = delta_weight, adversarial_weight
        self.latent_discriminator, self.d_optimizer = latent_discriminator, d_optimizer
        self.r1_gamma, self.r1_interval = r1_gamma, r1_interval
        self.progressive_start, self.progressive_images = progressive_start, progressive_images
        if delta_weight and encoder.latent_shape[0] == 1:
            raise UserError(
                f"delta_weight must be 0 for an encoder of one style, which has no deltas, got {delta_weight}; leave "
                "it out"
            )
        if isinstance(encoder, PyramidEncoder) and progressive_start is None:
            encoder.stage = encoder.latent_shape[0] - 1
        self.pool = None
        if latent_discriminator is not None:
            self.pool = StylePool(pool_size, encoder.latent_shape[1]).to(device)
        super().__init__(
            device=device,
            prepare_batch=prepare_batch,
            components={
                "latent_discriminator": latent_discriminator,
                "d_optimizer": d_optimizer,
                "pool": self.pool,
                **(components or {}),
            },
            train_handlers=train_handlers,
            **kwargs,
        )
        if latent_discriminator is not None:
            self.share(latent_discriminator)

    def _step(self, batchdata: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        image, _ = self.prepare_batch(batchdata, self.state.device, self.non_blocking)
        # batches carry MONAI's metadata; in the network it would only cost time
        image = image.as_tensor() if hasattr(image, "as_tensor") else image
        if self.progressive_start is not None:
            self.encoder.stage = self._stage()
        with self.autocast():
            latents = self.encoder(image).float()
            pred = self.generator(latents)
        # in float32: a difference of nearly equal features, of which bfloat16 keeps too few digits
        distance = self.loss(pred.float(), self.loss.prepare(image)).mean()
        scalars = {"distance": distance.detach()}
        loss = distance
        if self.delta_weight:
            deltas = (latents[:, 1:] - latents[:, :1]) / self.generator.std
            length = deltas.norm(dim=2).sum(1).mean()
            scalars["delta"] = length.detach()
            loss = loss + self.delta_weight * length
        if self.latent_discriminator is not None:
            self.latent_discriminator.requires_grad_(False)
            adversarial = generator_loss(self.latent_discriminator(self._standardised(self._distinct(latents))))
            self.latent_discriminator.requires_grad_(True)
            scalars["adversarial"] = adversarial.detach()
            loss = loss + self.adversarial_weight * adversarial
        self.update(self.optimizer, self.encoder, loss)
        if self.latent_discriminator is not None:
            scalars["discriminator"] = self._train_discriminator(latents.detach())
        if isinstance(self.encoder, PyramidEncoder):
            scalars["stage"] = self.encoder.stage
        return {Keys.IMAGE: image, Keys.PRED: pred.detach(), Keys.LOSS: loss.detach(), **scalars}

    def _stage(self) -> int:
        """Deltas in use now."""
        before = self.images_seen - self.data_loader.global_batch_size  # those of this step are counted already
        if before < self.progressive_start:
            return 0
        joined = 1 + (before - self.progressive_start) // self.progressive_images
        return min(joined, self.encoder.latent_shape[0] - 1)

    def _distinct(self, latents: torch.Tensor) -> torch.Tensor:
        """The styles that are not copies of the first: those whose deltas are in use."""
        return latents[:, : self.encoder.stage + 1] if isinstance(self.encoder, PyramidEncoder) else latents

    def _pooled(self, styles: torch.Tensor) -> torch.Tensor:
        """This process's styles, some exchanged: all processes keep one pool, which a checkpoint can hold."""
        rank, size = idist.get_rank(), idist.get_world_size()
        gathered = idist.all_gather(styles.contiguous()) if size > 1 else styles
        generator = torch.Generator().manual_seed(derive_seed(self.seed, 7, self.images_seen))
        return self.pool.exchange(gathered, generator).chunk(size)[rank]

    def _standardised(self, latents: torch.Tensor) -> torch.Tensor:
        """The first L styles (B, L, D) as (B · L, D), in units of the latents' deviation."""
        return ((latents - self.generator.mean[: latents.shape[1]]) / self.generator.std).flatten(0, 1)

    def _train_discriminator(self, latents: torch.Tensor) -> torch.Tensor:
        count, generator = len(latents), self.generator
        z = torch.randn(count, generator.z_dim, device=latents.device)
        labels = torch.randint(generator.num_classes, (count,), device=z.device) if generator.num_classes else None
        with torch.no_grad():
            real = generator.from_z(z, labels)
        # one style an image of the mapping network, whose styles are all the same, and all styles of the encoder
        real, fake = self._standardised(real[:, :1]), self._pooled(self._standardised(self._distinct(latents)))
        penalise = self.r1_gamma and (self.state.iteration - 1) % self.r1_interval == 0
        real = real.requires_grad_(bool(penalise))
        logits = self.latent_discriminator(real)
        d_loss = discriminator_loss(logits, self.latent_discriminator(fake))
        loss = d_loss + r1_penalty(logits, real, self.r1_gamma, self.r1_interval) if penalise else d_loss
        self.update(self.d_optimizer, self.latent_discriminator, loss)
        return d_loss.detach()
