"""Training of DCGAN and SNGAN, and a table of settings: the papers' and those of MedImageGAN's experiments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from monai.engines.utils import default_prepare_batch
from monai.utils.enums import CommonKeys as Keys
from torch import nn

from medgen.data.stream import ResumableDataLoader, derive_seed
from medgen.engines.adversarial import AdversarialTrainer
from medgen.errors import UserError
from medgen.losses import AdversarialLoss
from medgen.networks import DCGANDiscriminator, DCGANGenerator

__all__ = ["DCGAN_TRAINING", "DCGANTrainer", "dcgan_setting", "standing_statistics"]

STANDING_BATCHES, STANDING_BATCH = 16, 16  # by which statistics are measured
STANDING_STREAM = 3  # of random numbers, beside those of loader and steps

# One row a preset: side, images in a step (all processes), widths, Adam's learning rates, what D is to say of real and
# generated images, its layers, Adam's betas, the moving average's decay (0: none), and epochs.
_COLUMNS = (
    "image_size", "total_batch_size", "latent_dim", "base_channels", "g_lr", "d_lr", "real_label", "fake_label",
    "spectral_norm", "d_batch_norm", "loss", "d_steps", "beta0", "beta1", "ema_decay", "epochs",
)  # fmt: skip
_BCE, _HINGE = "non_saturating", "hinge"
_ROWS: dict[str, tuple[Any, ...]] = {
    # name             side batch   Z  base  G lr   D lr   real fake  SN    BN of D loss    n  beta0  beta1  EMA  epochs
    "dcgan":           (64, 128, 100, 64, 0.0002, 0.0002, 1.0, 0.0, False, True,  _BCE,   1, 0.5, 0.999, 0.999, 200),
    "sngan":           (64,  16, 128, 64, 0.0002, 0.0010, 1.0, 0.0, True,  False, _BCE,   1, 0.5, 0.999, 0.999, 200),
    # MedImageGAN: its experiments, one after the other, each with what the one before it had found
    "batch_128":       (64, 128, 100, 64, 0.0002, 0.0002, 1.0, 0.0, False, True,  _BCE,   1, 0.5, 0.999, 0.0, 200),
    "batch_64":        (64,  64, 100, 64, 0.0002, 0.0002, 1.0, 0.0, False, True,  _BCE,   1, 0.5, 0.999, 0.0, 200),
    "batch_16":        (64,  16, 100, 64, 0.0002, 0.0002, 1.0, 0.0, False, True,  _BCE,   1, 0.5, 0.999, 0.0, 200),
    "latent_128":      (64,  16, 128, 64, 0.0002, 0.0002, 1.0, 0.0, False, True,  _BCE,   1, 0.5, 0.999, 0.0, 200),
    "latent_256":      (64,  16, 256, 64, 0.0002, 0.0002, 1.0, 0.0, False, True,  _BCE,   1, 0.5, 0.999, 0.0, 200),
    "label_smoothing": (64,  16, 256, 64, 0.0002, 0.0002, 0.9, 0.0, False, True,  _BCE,   1, 0.5, 0.999, 0.0, 200),
    "spectral_norm":   (64,  16, 256, 64, 0.0002, 0.0002, 0.9, 0.0, True,  True,  _BCE,   1, 0.5, 0.999, 0.0, 200),
    "d_lr_10":         (64,  16, 256, 64, 0.0002, 0.0020, 0.9, 0.0, True,  True,  _BCE,   1, 0.5, 0.999, 0.0, 200),
    "d_lr_100":        (64,  16, 256, 64, 0.0002, 0.0200, 0.9, 0.0, True,  True,  _BCE,   1, 0.5, 0.999, 0.0, 200),
    "d_lr_100_long":   (64,  16, 256, 64, 0.0002, 0.0200, 0.9, 0.0, True,  True,  _BCE,   1, 0.5, 0.999, 0.0, 300),
    "sngan_128":      (128,  16, 256, 64, 0.0002, 0.0200, 0.9, 0.0, True,  True,  _BCE,   1, 0.5, 0.999, 0.0, 500),
    # two CPU cores
    "demo_32":         (32,  16,  64, 16, 0.0002, 0.0002, 1.0, 0.0, True,  False, _HINGE, 1, 0.5, 0.999, 0.99, 20),
}  # fmt: skip
DCGAN_TRAINING: dict[str, dict[str, Any]] = {name: dict(zip(_COLUMNS, row, strict=True)) for name, row in _ROWS.items()}


def dcgan_setting(preset: str, name: str) -> Any:
    """One entry of :data:`DCGAN_TRAINING`: what a bundle's JSON takes its defaults from.

    Raises:
        UserError: no such preset.
    """
    if preset not in DCGAN_TRAINING:
        raise UserError(f"preset must be one of {', '.join(DCGAN_TRAINING)}, got {preset!r}; set --preset")
    return DCGAN_TRAINING[preset][name]


class DCGANTrainer(AdversarialTrainer):
    """DCGAN and SNGAN: Radford et al. 2016, arXiv 1511.06434, and Miyato et al. 2018, arXiv 1802.05957.

    A step is: discriminator, on a batch of real images and as many generated ones, each with batch statistics of its
    own; in each ``d_steps``-th step then the generator, through the discriminator as it is now and by the same
    latents; moving average.

    Several processes normalise by the statistics of their own images; the running statistics are averaged over them.
    The moving average's statistics are measured at the end of each epoch; until then it has those of the last epoch.

    ``state.output[0]`` holds ``image`` and ``pred`` (generated, not augmented), both [-1, 1], and detached scalars:
    ``loss`` (of the generator; in a step that does not train it, by what the discriminator said before its update),
    ``discriminator`` (its loss), ``real_score`` and ``fake_score`` (mean ``sigmoid(D)`` before its update).

    Args:
        device: where the networks are.
        max_epochs: epochs to train.
        train_data_loader: batches with ``image`` (B, C, H, W) in [0, 1], and ``label`` (B,) for networks with classes.
        generator: put into training mode.
        discriminator: for the same size, channels and classes.
        g_optimizer: of the generator.
        d_optimizer: of the discriminator; a learning rate of its own makes it the two time-scale update rule (Heusel
            et al. 2017, arXiv 1706.08500).
        ema: copy of the generator that becomes its moving average (:func:`exponential_moving_copy`).
        loss: of both.
        d_steps: updates of the discriminator for one of the generator, each by a batch of its own.
        ema_decay: share of the moving average that stays at each of the generator's updates, at most (1 + n) / (10 + n)
            at the n-th; 0 for the generator itself.
        diff_augment: what the discriminator sees goes through it, such as :class:`medgen.transforms.DiffAugment`; None
            for no augmentation.
        labels: of all training images, for networks with classes: see :func:`standing_statistics`.
        seed: seed of all random numbers.
        amp: bfloat16 autocast of the networks where the device has it; losses and singular vectors stay in float32.
        prepare_batch: as in :class:`monai.engines.Trainer`.
        train_handlers: MONAI or ignite handlers.
        components: more parts of the state, beside networks, optimisers and EMA.

    Raises:
        UserError: networks that do not fit each other, or a setting outside its range.
    """

    def __init__(
        self,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: ResumableDataLoader,
        generator: DCGANGenerator,
        discriminator: DCGANDiscriminator,
        g_optimizer: torch.optim.Optimizer,
        d_optimizer: torch.optim.Optimizer,
        ema: DCGANGenerator,
        loss: AdversarialLoss,
        d_steps: int = 1,
        ema_decay: float = 0.999,
        diff_augment: Callable[[torch.Tensor], torch.Tensor] | None = None,
        labels: Sequence[int] | None = None,
        seed: int = 0,
        amp: bool = False,
        prepare_batch: Callable = default_prepare_batch,
        train_handlers: Sequence | None = None,
        components: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(d_steps, bool) or not isinstance(d_steps, int) or d_steps < 1:
            raise UserError(f"d_steps must be a whole number of at least 1, got {d_steps!r}; set --d_steps 1")
        if not 0 <= ema_decay < 1:
            raise UserError(f"ema_decay must be from 0 to below 1, got {ema_decay}; set it to 0.999")
        if generator.out_channels != discriminator.in_channels:
            raise UserError(
                f"the generator makes {generator.out_channels} channels, the discriminator takes "
                f"{discriminator.in_channels}; set network_def and discriminator_def to one"
            )
        self.loss, self.d_steps, self.ema_decay, self.diff_augment = loss, d_steps, ema_decay, diff_augment
        self.labels = labels
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            train_data_loader=train_data_loader,
            generator=generator,
            discriminator=discriminator,
            g_optimizer=g_optimizer,
            d_optimizer=d_optimizer,
            ema=ema,
            components=components,
            seed=seed,
            amp=amp,
            prepare_batch=prepare_batch,
            train_handlers=train_handlers,
        )

    def _iteration(self, engine: DCGANTrainer, batchdata: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
        image, label = self.prepare_batch(batchdata, self.state.device, self.non_blocking)[:2]
        # batches carry MONAI's metadata; in the network it would only cost time
        image = (image.as_tensor() if hasattr(image, "as_tensor") else image) * 2 - 1
        # generated images get the classes of the batch: their frequencies are those of the training images
        label = self._label(label)
        self.seed_step()
        self.generator.train()
        self.discriminator.train()
        trains_generator = self.state.iteration % self.d_steps == 0

        z = torch.randn(len(image), self.generator.latent_dim, device=self.state.device)
        with torch.set_grad_enabled(trains_generator), self.autocast():
            fake = self.generator(z, label)
        real_logits, fake_logits = self._judge(image, label), self._judge(fake.detach(), label)
        d_loss = self.loss.discriminator(real_logits, fake_logits)
        self.update(self.d_optimizer, self.discriminator, d_loss)

        if trains_generator:
            self.discriminator.requires_grad_(False)
            g_loss = self.loss.generator(self._judge(fake, label))
            self.update(self.g_optimizer, self.generator, g_loss)
            self.discriminator.requires_grad_(True)
        else:
            g_loss = self.loss.generator(fake_logits.detach())
        self._share_statistics(self.generator)
        self._share_statistics(self.discriminator)
        if trains_generator:
            self._average()
        if self.at_epoch_end:  # before anything looks at the average
            with self.autocast():
                standing_statistics(self.ema, self.seed, self.labels)
            self._share_statistics(self.ema)

        scalars = {
            "discriminator": d_loss.detach(),
            "real_score": real_logits.detach().sigmoid().mean(),
            "fake_score": fake_logits.detach().sigmoid().mean(),
        }
        # a list, as of MONAI's own trainers after decollating: its loggers read the first entry
        return [{Keys.IMAGE: image, Keys.PRED: fake.detach().float(), Keys.LOSS: g_loss.detach(), **scalars}]

    def _judge(self, image: torch.Tensor, label: torch.Tensor | None) -> torch.Tensor:
        if self.diff_augment is not None:
            image = self.diff_augment(image)
        with self.autocast():
            return self.discriminator(image, label).float()

    def _share_statistics(self, network: nn.Module) -> None:
        for norm in network.norms or []:
            self._mean_over_processes(norm.running_mean)
            self._mean_over_processes(norm.running_var)

    @torch.no_grad()
    def _average(self) -> None:
        """One step of the moving average of the weights, whose window grows with the training."""
        updates = self.state.iteration // self.d_steps
        # a small set's training is over before a decay of 0.999 has forgotten the untrained weights
        decay = min(self.ema_decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.generator.parameters()), 1 - decay)


@torch.no_grad()
def standing_statistics(generator: DCGANGenerator, seed: int = 0, labels: Sequence[int] | None = None) -> None:
    """Measure what a generator normalises by in evaluation (Brock et al. 2019, arXiv 1809.11096).

    Averaged weights make activations of smaller variance than the generator's: normalised by the generator's running
    statistics, copied or averaged, images come out grey. The statistics follow from weights, seed and the labels'
    frequencies alone: means over 16 batches of 16 latents.

    Args:
        generator: left in evaluation mode.
        seed: of latents and classes.
        labels: for a network with classes, those of the training images, in any order: the latents get classes as
            frequent as theirs; None for as many of each class.
    """
    n, device = STANDING_BATCHES * STANDING_BATCH, next(generator.parameters()).device
    draws = torch.Generator().manual_seed(derive_seed(seed, STANDING_STREAM))
    z = torch.randn(n, generator.latent_dim, generator=draws).to(device)
    classes = [None] * STANDING_BATCHES
    if generator.num_classes:
        found = torch.arange(generator.num_classes) if labels is None else torch.as_tensor(labels).sort().values
        # at even distances rather than by chance, which could forget a rare class
        found = found[(2 * torch.arange(n) + 1) * len(found) // (2 * n)][torch.randperm(n, generator=draws)]
        classes = found.to(device).split(STANDING_BATCH)
    momenta = [norm.momentum for norm in generator.norms]
    for norm in generator.norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
    generator.train()
    for z_of_batch, classes_of_batch in zip(z.split(STANDING_BATCH), classes, strict=True):
        generator(z_of_batch, classes_of_batch)
    generator.eval()
    for norm, momentum in zip(generator.norms, momenta, strict=True):
        norm.momentum = momentum
