"""Training of the progressive growing GAN, and a table of its schedules."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from ignite.engine import Events
from monai.utils.enums import CommonKeys as Keys

from medgen.data.growth import GrowthSchedule, GrowthStage
from medgen.data.pyramid import GrowingDataLoader
from medgen.engines.adversarial import AdversarialTrainer
from medgen.errors import UserError
from medgen.losses import critic_loss, gradient_penalty
from medgen.networks import PGGAN_PRESETS, PGGANDiscriminator, PGGANGenerator

__all__ = ["PGGAN_TRAINING", "PGGANTrainer", "check_groups", "growth_schedule", "pggan_setting"]

logger = logging.getLogger(__name__)

# One row a preset of the networks. batch_sizes: images in a step (all processes) from 4×4 up; lrs: of Adam;
# images: shown at each level; fade: of these, shown while the level fades in (never the first level); eps: of Adam.
_COLUMNS = ("batch_sizes", "lrs", "images", "fade_images", "eps")
_K = 1000
_ROWS: dict[str, tuple[Any, ...]] = {
    # appendix A.1 of the paper
    "paper_1024": (
        (16, 16, 16, 16, 16, 16, 14, 6, 3),
        (0.001,) * 9,
        (800 * _K, *(1600 * _K,) * 8),
        (0, *(800 * _K,) * 8),
        1e-8,
    ),
    # chestXray-PGGAN: 15 million images
    "rsna_512": (
        (128, 128, 128, 64, 32, 16, 8, 4),
        (*(0.001,) * 7, 0.0015),
        (600 * _K, *(1200 * _K,) * 6, 7200 * _K),
        (0, *(600 * _K,) * 7),
        1e-8,
    ),
    # CXR_PGGAN: four GPUs, each with a quarter of these images and its own minibatch standard deviation
    "cxr14_1024": (
        (64, 64, 64, 64, 64, 64, 56, 32, 12),
        (0.001,) * 9,
        (800 * _K, *(1600 * _K,) * 7, 2000 * _K),
        (0, *(800 * _K,) * 8),
        1e-7,
    ),
    "small_64": (
        (16, 16, 16, 16, 16),
        (0.001,) * 5,
        (20 * _K, 40 * _K, 50 * _K, 60 * _K, 60 * _K),
        (0, 20 * _K, 20 * _K, 20 * _K, 20 * _K),
        1e-8,
    ),
    "demo_32": ((16,) * 4, (0.002,) * 4, (2000, 3000, 3000, 4000), (0, 1000, 1000, 1000), 1e-8),
}  # fmt: skip
PGGAN_TRAINING: dict[str, dict[str, Any]] = {name: dict(zip(_COLUMNS, row, strict=True)) for name, row in _ROWS.items()}


def pggan_setting(preset: str, name: str) -> Any:
    """One entry of :data:`PGGAN_TRAINING`: what a bundle's JSON takes its defaults from.

    Raises:
        UserError: no such preset.
    """
    if preset not in PGGAN_TRAINING:
        raise UserError(f"preset must be one of {', '.join(PGGAN_PRESETS)}, got {preset!r}; set --preset")
    value = PGGAN_TRAINING[preset][name]
    return list(value) if isinstance(value, tuple) else value


def growth_schedule(
    resolutions: Sequence[int],
    batch_sizes: Sequence[int],
    lrs: Sequence[float],
    images: Sequence[int],
    fade_images: Sequence[int],
    batch_size: int | None = None,
) -> GrowthSchedule:
    """The schedule of a training, with at most ``batch_size`` images on each process.

    Args:
        resolutions: sides of the levels.
        batch_sizes: images in a step of each level, on all processes together.
        lrs: learning rates of the levels.
        images: shown at each level.
        fade_images: of these, while the level fades in.
        batch_size: what the memory of one device holds; None for any number.

    Raises:
        UserError: settings that make no schedule.
    """
    if batch_size is not None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise UserError(f"batch_size must be a whole number of at least 1, or null, got {batch_size!r}")
        # by torchrun's variable: a config asks before the processes have found each other
        most = batch_size * int(os.environ.get("WORLD_SIZE", "1"))
        if isinstance(batch_sizes, Sequence):  # otherwise the schedule says what it must be
            batch_sizes = [min(size, most) if isinstance(size, int) else size for size in batch_sizes]
    return GrowthSchedule(resolutions, batch_sizes, lrs, images, fade_images)


def check_groups(schedule: GrowthSchedule, group_size: int | None) -> None:
    """See before the training, not days later at its last level, that each process's batches make whole groups.

    Args:
        schedule: of the training.
        group_size: the discriminator's ``minibatch_group_size``.

    Raises:
        UserError: they do not, or several processes would see one image each.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    for resolution, total in zip(schedule.resolutions, schedule.batch_sizes, strict=True):
        batch_size = total // processes
        if group_size is not None and batch_size > group_size and batch_size % group_size:
            raise UserError(
                f"the {batch_size} images that a process sees in a step at {resolution}×{resolution} must be a "
                f"multiple of minibatch_group_size {group_size}, or fewer; change --batch_size or --batch_sizes"
            )
        if batch_size < 2:
            problem = (
                f"each process sees one image a step at {resolution}×{resolution}: the discriminator's minibatch "
                "standard deviation, which keeps the generator from collapsing, has nothing to see"
            )
            if processes > 1:
                enough = [max(size, 2 * processes) for size in schedule.batch_sizes]
                raise UserError(
                    f"{problem}; start fewer processes, or set --batch_sizes {str(enough).replace(' ', '')}"
                )
            logger.warning(f"{problem}; raise --batch_sizes")


class _GrowthState:
    """Where the training stands: what :class:`PGGANTrainer` adds to its checkpoints."""

    def __init__(self) -> None:
        self.iteration, self.phase = 0, 0

    def state_dict(self) -> dict[str, int]:
        return {"iteration": self.iteration, "phase": self.phase}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.iteration, self.phase = state["iteration"], state["phase"]


class PGGANTrainer(AdversarialTrainer):
    """Progressive growing by the Wasserstein loss with gradient penalty.

    Karras et al. 2018, arXiv 1710.10196, appendix A.1. A step is: position on the schedule; real images faded like
    generated ones; discriminator by :func:`medgen.losses.critic_loss` and :func:`medgen.losses.gradient_penalty`;
    generator; moving average. The optimisers forget their moments where a fade begins and where it ends. With classes,
    both networks also learn to have them recognised (AC-GAN, Odena et al. 2017, arXiv 1610.09585).

    A step takes as many images as the schedule has for its level, and an epoch as many steps as ``epoch_images`` need:
    its length in steps changes while the network grows.

    The minibatch standard deviation is of each process's own images (of all of them where ``minibatch_group_size`` is
    None): with another number of processes it is of other groups, whatever else stays the same.

    ``state.output[0]`` holds ``image`` (real, faded, [-1, 1]), ``pred`` (generated, the same size) and scalars:
    ``loss`` (of the generator), ``discriminator`` (of the critic, with the penalty), ``wasserstein`` (the critic's
    estimate E[D(x)] - E[D(G(z))]), ``gradient_penalty``, ``resolution``, ``alpha``, ``images_seen``; with classes
    ``classes_real`` and ``classes_fake``, cross-entropies.

    Args:
        device: where the networks are.
        max_epochs: epochs to train.
        epoch_images: images of an epoch.
        max_images: images to show in all, with which the last epoch ends.
        train_data_loader: batches for the schedule's levels.
        generator: of full size.
        discriminator: of the same size and classes.
        g_optimizer: of the generator; its learning rate is the schedule's.
        d_optimizer: of the discriminator, likewise.
        ema: copy of the generator that becomes its moving average (:func:`exponential_moving_copy`).
        ema_decay: of the moving average per step.
        gradient_penalty_weight: λ.
        gradient_penalty_target: norm of the gradient.
        drift: weight of the squared scores of real images.
        class_weight: of the cross-entropies.
        seed: of all random numbers.
        amp: bfloat16 autocast where the device has it.
        train_handlers: MONAI or ignite handlers.
        components: more parts of the state.

    Raises:
        UserError: networks that do not fit each other or the schedule, or a setting outside its range.
    """

    longer = "raise --max_images, or the last of --images, to train longer at full size"

    def __init__(
        self,
        device: torch.device | str,
        max_epochs: int,
        epoch_images: int,
        max_images: int,
        train_data_loader: GrowingDataLoader,
        generator: PGGANGenerator,
        discriminator: PGGANDiscriminator,
        g_optimizer: torch.optim.Optimizer,
        d_optimizer: torch.optim.Optimizer,
        ema: PGGANGenerator,
        ema_decay: float = 0.999,
        gradient_penalty_weight: float = 10.0,
        gradient_penalty_target: float = 1.0,
        drift: float = 0.001,
        class_weight: float = 1.0,
        seed: int = 0,
        amp: bool = False,
        train_handlers: Sequence | None = None,
        components: Mapping[str, Any] | None = None,
    ) -> None:
        if not 0 <= ema_decay < 1:
            raise UserError(f"ema_decay must be from 0 to below 1, got {ema_decay}; set it to 0.999")
        for name, value in {
            "gradient_penalty_weight": gradient_penalty_weight, "drift": drift, "class_weight": class_weight
        }.items():  # fmt: skip
            if not value >= 0:
                raise UserError(f"{name} must be 0 or more, got {value}; see the head of train.json")
        if not gradient_penalty_target > 0:
            raise UserError(f"gradient_penalty_target must be positive, got {gradient_penalty_target}; set it to 1")
        self.schedule = train_data_loader.schedule
        if tuple(self.schedule.resolutions) != generator.resolutions:
            raise UserError(
                f"the schedule has the levels {list(self.schedule.resolutions)}, the networks "
                f"{list(generator.resolutions)}; give batch_sizes, lrs, images and fade_images one entry for each level"
            )
        if not 1 <= max_images <= self.schedule.total_images:
            raise UserError(
                f"max_images must be from 1 to the schedule's {self.schedule.total_images}, got {max_images}; raise "
                "the last of --images to train longer at full size"
            )
        if epoch_images < max(self.schedule.batch_sizes):
            raise UserError(
                f"an epoch must hold at least one step, {max(self.schedule.batch_sizes)} images, got {epoch_images}; "
                "raise --tick_images"
            )
        check_groups(self.schedule, discriminator.minibatch_group_size)
        self.max_images, self.epoch_images = max_images, epoch_images
        self.ema_decay = ema_decay
        self.gradient_penalty_weight, self.gradient_penalty_target = gradient_penalty_weight, gradient_penalty_target
        self.drift, self.class_weight = drift, class_weight
        self._growth = _GrowthState()
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            train_data_loader=train_data_loader,
            generator=generator,
            discriminator=discriminator,
            g_optimizer=g_optimizer,
            d_optimizer=d_optimizer,
            ema=ema,
            components={"growth": self._growth, **(components or {})},
            seed=seed,
            amp=amp,
            train_handlers=train_handlers,
        )
        self._grow(self.schedule.at(0))
        self.add_event_handler(Events.ITERATION_COMPLETED, self._end_epoch)

    # -----------------------------------------------------------------------------------------------------------------
    # position

    @property
    def total_images(self) -> int:
        """Training images of the whole training."""
        return min(self.max_images, self.state.max_epochs * self.epoch_images)

    @property
    def at_epoch_end(self) -> bool:
        """Whether the last step was the last of its epoch."""
        return self.images_seen >= min(self.state.epoch * self.epoch_images, self.total_images)

    @property
    def plan(self) -> str:
        """What the training will do, in words."""
        sizes = self.schedule.resolutions
        return f"{self.total_images} images, from {sizes[0]}×{sizes[0]} to {sizes[-1]}×{sizes[-1]},"

    @property
    def at_level_end(self) -> bool:
        """Whether the last step was the last of its level, or of the training."""
        is_next = self.schedule.at(self.images_seen).resolution > self.generator.resolution
        return is_next or self.images_seen >= self.total_images

    @property
    def caption(self) -> str:
        """Where the training stands, for pictures."""
        side, alpha = self.generator.resolution, self.generator.alpha
        return f"{self.images_seen:,} images, {side} px, alpha {alpha:.2f}"

    def count(self, images_seen: int) -> tuple[int, int]:
        """Iterations and epochs that were over when so many images had been seen."""
        is_over = images_seen >= self.total_images
        return self._growth.iteration, self.state.max_epochs if is_over else images_seen // self.epoch_images

    def _end_epoch(self) -> None:
        if self.at_epoch_end:
            self.terminate_epoch()

    def _grow(self, stage: GrowthStage) -> None:
        for network in (self.generator, self.discriminator, self.ema):
            network.grow(stage.resolution, stage.alpha)
        for optimizer in (self.g_optimizer, self.d_optimizer):
            for group in optimizer.param_groups:
                group["lr"] = stage.lr
            if stage.phase != self._growth.phase:
                optimizer.state.clear()
        self._growth.phase = stage.phase

    # -----------------------------------------------------------------------------------------------------------------
    # one step

    def _iteration(self, engine: PGGANTrainer, batchdata: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
        stage = self.schedule.at(self.images_seen - self.data_loader.global_batch_size)
        self._grow(stage)
        device = self.state.device
        image = batchdata[Keys.IMAGE].to(device, non_blocking=self.non_blocking)
        image = faded(image.float() / 127.5 - 1, stage.alpha)
        label = self._label(batchdata.get(Keys.LABEL))
        label = None if label is None else label.to(device, non_blocking=self.non_blocking)
        self.seed_step()
        self.generator.train()
        self.discriminator.train()

        with torch.no_grad(), self.autocast():
            fake = self._generate(len(image), label)
        real_logits, fake_logits = self._judge(image), self._judge(fake)
        penalty = gradient_penalty(
            lambda x: self._judge(x)[:, 0], image, fake, self.gradient_penalty_weight, self.gradient_penalty_target
        )
        scalars = self._class_losses(label, real=real_logits, fake=fake_logits)
        d_loss = critic_loss(real_logits[:, 0], fake_logits[:, 0], self.drift) + penalty
        d_loss = d_loss + self.class_weight * sum(scalars.values())
        self.update(self.d_optimizer, self.discriminator, d_loss)
        self._average()

        self.discriminator.requires_grad_(False)
        with self.autocast():
            fake = self._generate(len(image), label)
        logits = self._judge(fake)
        g_loss = -logits[:, 0].mean() + self.class_weight * sum(self._class_losses(label, fake=logits).values())
        self.update(self.g_optimizer, self.generator, g_loss)
        self.discriminator.requires_grad_(True)

        self._growth.iteration = self.state.iteration
        scalars = {name: value.detach() for name, value in scalars.items()}
        scalars["wasserstein"] = (real_logits[:, 0].mean() - fake_logits[:, 0].mean()).detach()
        scalars["discriminator"], scalars["gradient_penalty"] = d_loss.detach(), penalty.detach()
        scalars |= {"resolution": stage.resolution, "alpha": stage.alpha, "images_seen": self.images_seen}
        # a list, as of MONAI's own trainers after decollating: its loggers read the first entry
        return [{Keys.IMAGE: image, Keys.PRED: fake.detach(), Keys.LOSS: g_loss.detach(), **scalars}]

    def _generate(self, count: int, label: torch.Tensor | None) -> torch.Tensor:
        # generated images get the classes of the batch: their frequencies are those of the training images
        z = torch.randn(count, self.generator.latent_dim, device=self.state.device)
        return self.generator(z, label).float()

    def _judge(self, image: torch.Tensor) -> torch.Tensor:
        with self.autocast():
            return self.discriminator(image).float()

    def _class_losses(self, label: torch.Tensor | None, **logits: torch.Tensor) -> dict[str, torch.Tensor]:
        if label is None:
            return {}
        return {f"classes_{name}": F.cross_entropy(value[:, 1:], label) for name, value in logits.items()}

    @torch.no_grad()
    def _average(self) -> None:
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.generator.parameters()), 1 - self.ema_decay)


def faded(image: torch.Tensor, alpha: float) -> torch.Tensor:
    """Real images as a growing generator would show them: its lower level's image comes through with weight 1 - alpha.

    Args:
        image: (B, C, H, W).
        alpha: weight of the newest level.

    Returns:
        (B, C, H, W), between the 2×2 means and the images themselves.
    """
    if alpha == 1:
        return image
    coarse = F.interpolate(F.avg_pool2d(image, 2), scale_factor=2.0, mode="nearest")
    return torch.lerp(coarse, image, alpha)
