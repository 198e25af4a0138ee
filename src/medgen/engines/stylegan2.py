"""Training of StyleGAN2 with adaptive discriminator augmentation, and a table of its settings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ignite.distributed as idist
import torch
import torch.distributed as dist
from monai.engines.utils import default_prepare_batch
from monai.utils.enums import CommonKeys as Keys

from medgen.data.stream import ResumableDataLoader
from medgen.engines.adversarial import AdversarialTrainer
from medgen.errors import UserError
from medgen.losses import PathLengthRegulariser, discriminator_loss, generator_loss, r1_penalty
from medgen.networks import STYLEGAN2_PRESETS, StyleGAN2Discriminator, StyleGAN2Generator
from medgen.transforms import AdaptiveAugment, AugmentController

__all__ = ["STYLEGAN2_TRAINING", "StyleGAN2Trainer", "stylegan2_setting"]

logger = logging.getLogger(__name__)

R1_INTERVAL = 16  # steps; StyleGAN2, appendix B
STYLE_MIXING = 0.9  # StyleGAN, appendix C

# One row a preset of the networks: images in a step (all processes), learning rate of both networks, β₁ of Adam, weight
# of R1, half-life of the moving average in images, its share of the images seen so far (0: no ramp-up), and the number
# of images whose standard deviation the discriminator sees.
_COLUMNS = ("total_batch_size", "lr", "beta0", "r1_gamma", "ema_images", "ema_rampup", "minibatch_group_size")
_ROWS: dict[str, tuple[Any, ...]] = {
    # name            batch  lr     beta0  gamma    EMA    ramp group
    "stylegan2_1024": (32, 0.0020, 0.0, 10.0000, 10_000, 0.00, 4),  # StyleGAN2, configuration F; ADA's cfg stylegan2
    "stylegan2_512":  (32, 0.0020, 0.0, 10.0000, 10_000, 0.00, 4),
    "paper_256":      (64, 0.0025, 0.0,  1.0000, 20_000, 0.00, 8),  # ADA, appendix C
    "auto_512":       (64, 0.0025, 0.0,  0.8192, 20_000, 0.05, 4),  # cfg auto, 8 GPUs: gamma 0.0002 · side² / batch
    "auto_256":       (64, 0.0025, 0.0,  0.2048, 20_000, 0.05, 4),
    "anomaly_source": (32, 0.0020, 0.9, 10.0000, 10_000, 0.00, 4),  # Woodland et al.
    "small_64":       (16, 0.0025, 0.0,  0.2000,  5_000, 0.05, 4),
    "small_32":       (16, 0.0025, 0.0,  0.1000,  5_000, 0.05, 4),
    "demo_64":        (16, 0.0025, 0.0,  0.2000,  2_000, 0.05, 4),
}  # fmt: skip
STYLEGAN2_TRAINING: dict[str, dict[str, Any]] = {
    name: dict(zip(_COLUMNS, row, strict=True)) for name, row in _ROWS.items()
}


def stylegan2_setting(preset: str, name: str) -> Any:
    """One entry of :data:`STYLEGAN2_TRAINING`: what a bundle's JSON takes its defaults from.

    Raises:
        UserError: no such preset.
    """
    if preset not in STYLEGAN2_TRAINING:
        raise UserError(f"preset must be one of {', '.join(STYLEGAN2_PRESETS)}, got {preset!r}; set --preset")
    return STYLEGAN2_TRAINING[preset][name]


class StyleGAN2Trainer(AdversarialTrainer):
    """StyleGAN2 with lazy regularisation and adaptive discriminator augmentation (ADA).

    Karras et al. 2020, arXiv 1912.04958, and Karras et al. 2020, arXiv 2006.06676. A step is: generator by the
    non-saturating loss, with style mixing; path length regularisation in each ``path_length.interval``-th step;
    discriminator by the logistic loss; R1 in each ``r1_interval``-th step; moving average; control of the augmentation.
    Each regularisation is a backward pass and an optimiser step of its own: give the optimisers
    :func:`medgen.losses.lazy_adam_settings`. The discriminator sees augmented images only, real and generated.

    The minibatch standard deviation is of groups of each process's own images: with another number of processes the
    groups are others, of the same size as long as one fits into a process's share.

    ``state.output[0]`` holds ``image``, ``pred`` (generated, not augmented, [-1, 1]) and detached scalars: ``loss`` (of
    the generator), ``discriminator``, ``real_sign`` (mean sign of D(real), which rises towards 1 as D overfits),
    ``augment_p``, and, in the steps that compute them, ``r1`` and ``path_length`` (penalties with their weights).

    Args:
        device: where the networks are.
        max_epochs: epochs to train.
        train_data_loader: batches with ``image`` (B, C, H, W) in [0, 1], and ``label`` (B,) for networks with classes.
        generator: trained with noise drawn anew and put into training mode.
        discriminator: for the same size, channels and classes.
        g_optimizer: of the generator.
        d_optimizer: of the discriminator.
        ema: copy of the generator that becomes its moving average (:func:`exponential_moving_copy`).
        augment: what the discriminator sees goes through it; None for no augmentation.
        augment_controller: sets ``augment.p``; None leaves it as it is.
        path_length: regulariser of the generator; None for none.
        r1_gamma: weight of R1; 0 for none.
        r1_interval: steps from one R1 to the next.
        style_mixing: probability that a batch takes a second w from a random layer on.
        ema_images: half-life of the moving average in images.
        ema_rampup: the half-life is at most this share of the images seen so far; 0 for no such limit.
        freeze_d: layers of the discriminator, from the image on, that stay as they are (freeze-D).
        compile: whether the first-order passes run through ``torch.compile``, which cannot differentiate twice: the
            regularisers never do.
        seed: seed of all random numbers.
        prepare_batch: as in :class:`monai.engines.Trainer`.
        train_handlers: MONAI or ignite handlers.
        components: more parts of the state, beside networks, optimisers, EMA, regulariser and controller.

    Raises:
        UserError: networks that do not fit each other, or a setting outside its range.
    """

    def __init__(
        self,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: ResumableDataLoader,
        generator: StyleGAN2Generator,
        discriminator: StyleGAN2Discriminator,
        g_optimizer: torch.optim.Optimizer,
        d_optimizer: torch.optim.Optimizer,
        ema: StyleGAN2Generator,
        augment: AdaptiveAugment | None = None,
        augment_controller: AugmentController | None = None,
        path_length: PathLengthRegulariser | None = None,
        r1_gamma: float = 10.0,
        r1_interval: int = R1_INTERVAL,
        style_mixing: float = STYLE_MIXING,
        ema_images: float = 10_000,
        ema_rampup: float = 0.0,
        freeze_d: int = 0,
        compile: bool = False,
        seed: int = 0,
        prepare_batch: Callable = default_prepare_batch,
        train_handlers: Sequence | None = None,
        components: Mapping[str, Any] | None = None,
    ) -> None:
        if not 0 <= style_mixing <= 1:
            raise UserError(f"style_mixing must be a probability from 0 to 1, got {style_mixing}; set it to 0.9")
        if not (ema_images >= 0 and ema_rampup >= 0):
            raise UserError(
                f"ema_images and ema_rampup must be 0 or more, got {ema_images} and {ema_rampup}; set them to 10000 "
                "and 0.05"
            )
        if r1_interval < 1 or not r1_gamma >= 0:
            raise UserError(
                f"r1_interval must be at least 1 and r1_gamma at least 0, got {r1_interval} and {r1_gamma}; set them "
                "to 16 and 10"
            )
        if train_data_loader.batch_size < 2 <= discriminator.minibatch_group_size:
            logger.warning(
                "each process sees one image a step: the discriminator's minibatch standard deviation, which keeps the "
                "generator from collapsing, has nothing to see; raise --batch_size"
            )
        discriminator.freeze_layers(freeze_d)  # a wrong number is told now, not in the first step
        self.augment, self.augment_controller = augment, augment_controller
        self.path_length = path_length.to(device) if path_length is not None else None
        self.r1_gamma, self.r1_interval = r1_gamma, r1_interval
        self.style_mixing = style_mixing
        self.ema_images, self.ema_rampup = ema_images, ema_rampup
        self.freeze_d = freeze_d
        self._synthesise = torch.compile(generator.synthesis) if compile else generator.synthesis
        self._judge = torch.compile(discriminator) if compile else discriminator
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            train_data_loader=train_data_loader,
            generator=generator,
            discriminator=discriminator,
            g_optimizer=g_optimizer,
            d_optimizer=d_optimizer,
            ema=ema,
            components={"path_length": path_length, "augment": augment_controller, **(components or {})},
            seed=seed,
            prepare_batch=prepare_batch,
            train_handlers=train_handlers,
        )

    @property
    def precision(self) -> str:
        """``float32``, or in how many resolutions the activations are ``bfloat16``."""
        count = sum(block.dtype is torch.bfloat16 for block in self.generator.synthesis.blocks)
        return f"bfloat16 in the {count} highest resolutions, float32 below" if count else "float32"

    # -----------------------------------------------------------------------------------------------------------------
    # one step

    def _iteration(self, engine: StyleGAN2Trainer, batchdata: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
        image, label = self.prepare_batch(batchdata, self.state.device, self.non_blocking)[:2]
        # batches carry MONAI's metadata; in the network it would only cost time
        image = (image.as_tensor() if hasattr(image, "as_tensor") else image) * 2 - 1
        # generated images get the classes of the batch: their frequencies are those of the training images
        label = self._label(label)
        self.seed_step()
        step = self.state.iteration - 1
        self.generator.train()
        self.discriminator.train()

        scalars: dict[str, Any] = {}
        self.discriminator.requires_grad_(False)
        fake = self._generate(len(image), label)
        loss = generator_loss(self._judge(self._augmented(fake), label).float())
        self.update(self.g_optimizer, self.generator, loss)
        if self.path_length is not None and self.path_length.weight and step % self.path_length.interval == 0:
            scalars["path_length"] = self._regularise_path_length(len(image), label)

        self._unfreeze_discriminator()
        self.generator.requires_grad_(False)
        with torch.no_grad():
            fake = self._generate(len(image), label)
        fake_logits = self._judge(self._augmented(fake), label).float()
        real_logits = self._judge(self._augmented(image), label).float()
        d_loss = discriminator_loss(real_logits, fake_logits)
        self.update(self.d_optimizer, self.discriminator, d_loss)
        if self.r1_gamma and step % self.r1_interval == 0:
            scalars["r1"] = self._regularise_gradient(image, label)
        self.generator.requires_grad_(True)

        self._average()
        sign_sum = real_logits.detach().sign().sum()
        if idist.get_world_size() > 1:
            dist.all_reduce(sign_sum)
        count = self.data_loader.global_batch_size
        if self.augment_controller is not None:
            self.augment_controller.update(sign_sum, count)
        scalars["augment_p"] = self.augment.p if self.augment is not None else 0.0
        scalars["real_sign"] = sign_sum / count
        scalars["discriminator"] = d_loss.detach()
        # a list, as of MONAI's own trainers after decollating: its loggers read the first entry
        return [{Keys.IMAGE: image, Keys.PRED: fake, Keys.LOSS: loss.detach(), **scalars}]

    def _latents(self, count: int) -> torch.Tensor:
        return torch.randn(count, self.generator.latent_dim, device=self.state.device)

    def _styles(self, count: int, label: torch.Tensor | None) -> torch.Tensor:
        """W+ with style mixing: from a random layer on, the w of a second latent (StyleGAN, section 3.1)."""
        ws_BLW = self.generator.mapping(self._latents(count), label)
        # both drawn in any case, on the CPU: no step waits for a GPU, and the stream of numbers is the same
        mixes = float(torch.rand(())) < self.style_mixing
        layer = int(torch.randint(1, self.generator.num_ws, ()))
        if not mixes:
            return ws_BLW
        others_BLW = self.generator.mapping(self._latents(count), label, update_w_avg=False)
        return torch.cat([ws_BLW[:, :layer], others_BLW[:, layer:]], 1)

    def _noise(self, count: int) -> list[torch.Tensor]:
        # drawn here and not inside the network: a compiled one has random numbers of its own, which repeat nothing
        sizes = self.generator.synthesis.noise_sizes
        return [torch.randn(count, 1, *size, device=self.state.device) for size in sizes]

    def _generate(self, count: int, label: torch.Tensor | None) -> torch.Tensor:
        return self._synthesise(self._styles(count, label), self._noise(count))

    def _augmented(self, image: torch.Tensor) -> torch.Tensor:
        return image if self.augment is None else self.augment(image)

    def _regularise_path_length(self, count: int, label: torch.Tensor | None) -> torch.Tensor:
        count = self.path_length.batch_size(count)
        ws_BLW = self._styles(count, None if label is None else label[:count])
        penalty = self.path_length(self.generator.synthesis(ws_BLW, self._noise(count)), ws_BLW)
        self.update(self.g_optimizer, self.generator, penalty)
        self._mean_over_processes(self.path_length.mean)
        return penalty.detach()

    def _regularise_gradient(self, image: torch.Tensor, label: torch.Tensor | None) -> torch.Tensor:
        image = image.detach().requires_grad_()
        logits = self.discriminator(self._augmented(image), label).float()
        penalty = r1_penalty(logits, image, self.r1_gamma, self.r1_interval)
        # R1 does not depend on the last bias, the label's path or a frozen layer: their gradients stay None
        self.update(self.d_optimizer, self.discriminator, penalty)
        return penalty.detach()

    def _unfreeze_discriminator(self) -> None:
        self.discriminator.requires_grad_(True)
        self.discriminator.freeze_layers(self.freeze_d)

    @torch.no_grad()
    def _average(self) -> None:
        """One step of the moving average; ADA's code gives it a half-life in images that grows with the training."""
        self._mean_over_processes(self.generator.w_avg)
        half_life = self.ema_images
        if self.ema_rampup:
            half_life = min(half_life, self.ema_rampup * self.images_seen)
        decay = 0.5 ** (self.data_loader.global_batch_size / half_life) if half_life else 0.0
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.generator.parameters()), 1 - decay)
        for average, buffer in zip(self.ema.buffers(), self.generator.buffers(), strict=True):
            average.copy_(buffer)
