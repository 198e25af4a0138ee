"""Images from a latent diffusion or flow model: each from its seed, guided, from an image, or within a mask."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from monai.inferers import Inferer
from monai.networks.nets import AutoencoderKL
from monai.networks.schedulers import DDPMScheduler, RFlowScheduler
from monai.utils import convert_to_tensor
from torch import nn
from tqdm import tqdm

from medgen.data.stream import derive_seed
from medgen.errors import UserError
from medgen.inferers.generation import LARGEST_SEED
from medgen.inferers.latent_walk import slerp
from medgen.inferers.samplers import Sampler
from medgen.precision import autocast
from medgen.settings import check_between

if TYPE_CHECKING:
    from medgen.data.latents import LatentScaling

__all__ = ["LatentDiffusionSampler"]

logger = logging.getLogger(__name__)

LATENT_STREAM = 5  # of the numbers drawn from an image's seed: torch's seed itself is the weights'
LARGEST_GUIDANCE = 1000.0
ROUNDING = 1e-4  # a resized image may exceed [0, 1] by the rounding of float32


class LatentDiffusionSampler(Inferer):
    """Seeds to images in [0, 1].

    Args:
        noise_scheduler: of the training; see :class:`medgen.inferers.Sampler`.
        autoencoder: frozen, with ``encode`` and ``decode``.
        scaling: of its latents.
        latent_shape: (C, h, w).
        conditioner: values to keyword arguments of the network, and ``null``; None for a network without conditions.
        sampler: ``ddim``, ``ddpm``, ``pndm``, ``dpm++``, ``unipc`` or ``rflow``.
        num_steps: of the sampler.
        spacing: of its timesteps; None: the sampler's own.
        eta: of ``ddim``.
        guidance_scale: g of unconditional + g · (conditional − unconditional) (Ho and Salimans 2022, arXiv 2207.12598,
            with g = w + 1), in one forward of both: 1 is the conditional model and 0 the unconditional, in one forward
            of half the size.
        guidance_rescale: φ of Lin et al. 2024, arXiv 2305.08891, section 3.4: 0 changes nothing, 1 gives each image's
            prediction the standard deviation of the conditional one.
        strength: of an image-to-image walk, or of inpainting: the part of the training's timesteps that the images are
            noised by, above 0 to 1, where nothing of them is left: what lies under a mask then has no influence at all,
            since the encoder, which sees beyond the mask's edge, is given the surroundings in its place.
        amp: bfloat16 autocast of the network where the device has it.
        progress: a progress bar over the steps.

    Raises:
        UserError: a setting out of range, or a sampler for another kind of training.
    """

    def __init__(
        self,
        noise_scheduler: DDPMScheduler | RFlowScheduler,
        autoencoder: AutoencoderKL,
        scaling: LatentScaling,
        latent_shape: Sequence[int],
        conditioner: Callable[[Any], dict[str, torch.Tensor]] | None = None,
        sampler: str = "dpm++",
        num_steps: int = 20,
        spacing: str | None = None,
        eta: float = 0.0,
        guidance_scale: float = 7.0,
        guidance_rescale: float = 0.0,
        strength: float = 1.0,
        amp: bool = True,
        progress: bool = False,
    ) -> None:
        check_between(-LARGEST_GUIDANCE, LARGEST_GUIDANCE, guidance_scale=guidance_scale)
        check_between(0, 1, guidance_rescale=guidance_rescale, strength=strength)
        if strength == 0:
            raise UserError("strength must be above 0 and at most 1, got 0, which changes nothing; set --strength 0.5")
        self.sampler = Sampler(noise_scheduler, sampler, num_steps, spacing, eta, latent_shape)
        self.autoencoder, self.scaling, self.conditioner = autoencoder, scaling, conditioner
        self.latent_shape = tuple(latent_shape)
        self.guidance_scale, self.guidance_rescale, self.strength = guidance_scale, guidance_rescale, strength
        self.amp, self.progress = amp, progress

    @torch.inference_mode()
    def __call__(
        self,
        inputs: torch.Tensor | Sequence[int],
        network: nn.Module,
        *args: Any,
        prompts: str | Sequence[str] | None = None,
        negative_prompts: str | Sequence[str] | None = None,
        labels: torch.Tensor | Sequence[int] | None = None,
        images: torch.Tensor | None = None,
        masks: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Sample and decode.

        Args:
            inputs: seeds (B,), whole numbers from 0 to 2³² − 1.
            network: the denoising network, ``network(x, timesteps=t, **conditions)``.
            args: not used; part of the interface.
            prompts: one for each image, or one for all; None samples unconditionally.
            negative_prompts: in the place of no prompt; one for each image, or one for all.
            labels: classes (B,), for a network with classes; None samples unconditionally.
            images: (B, C, H, W) in [0, 1], to begin with.
            masks: (B, 1, H, W), 1 where the images are to be made anew; elsewhere they stay as they are.
            noise: (B, C, h, w) to begin with instead of the seeds'; see :meth:`interpolate`.
            kwargs: not used; part of the interface.

        Returns:
            images (B, C, H, W) in [0, 1] on the network's device.

        Raises:
            UserError: inputs that do not fit each other or the network, or a result that is not finite.
        """
        seeds = _whole(inputs)
        latents = self.sample_latents(
            seeds,
            network,
            prompts=prompts,
            negative_prompts=negative_prompts,
            labels=labels,
            images=images,
            masks=masks,
            noise=noise,
        )
        result = self.decode(latents)
        # before the clamp, which would turn an infinite value into a white pixel
        is_bad = ~result.isfinite().flatten(1).all(1)
        if is_bad.any():
            bad = [seed for seed, is_one in zip(seeds, is_bad.tolist(), strict=True) if is_one]
            raise UserError(
                f"images must be finite, got others for the seeds {', '.join(map(str, bad[:8]))}"
                f"{', …' if len(bad) > 8 else ''}; lower --guidance_scale, or see that the weights are those of a "
                "training that converged"
            )
        result = result.clamp(0, 1)
        if masks is not None:
            result = torch.where(_plain(masks, result).bool(), result, _plain(images, result))
        return result

    @torch.inference_mode()
    def sample_latents(
        self,
        seeds: Sequence[int],
        network: nn.Module,
        prompts: str | Sequence[str] | None = None,
        negative_prompts: str | Sequence[str] | None = None,
        labels: torch.Tensor | Sequence[int] | None = None,
        images: torch.Tensor | None = None,
        masks: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Whitened latents (B, C, h, w) in float32; arguments are those of a call."""
        self._check_images(len(seeds), images, masks)
        if masks is not None and not self.sampler.is_stochastic:
            logger.warning(
                f"{self.sampler.name} adds no noise on its way, so what it paints hardly follows the surroundings; "
                "--sampler ddpm --num_steps 100 does"
            )
        device = next(network.parameters()).device
        conditions = self._conditions(len(seeds), prompts, negative_prompts, labels)
        is_guided = len(conditions) == 2
        condition = {name: torch.cat([one[name] for one in conditions]).to(device) for name in conditions[0]}
        generators = self._generators(seeds)
        drawn = self._draw(generators)
        if noise is not None and noise.shape != drawn.shape:
            raise UserError(f"noise must be {tuple(drawn.shape)}, got {tuple(noise.shape)}; take that of interpolate")
        noise = (drawn if noise is None else noise).to(device)

        self.sampler.start(1.0 if images is None else self.strength)
        sample, known, is_new = noise, None, None
        if images is not None:
            is_hidden = masks is not None and self.strength == 1
            known = self.encode(_filled(_plain(images), _plain(masks).bool()) if is_hidden else images)
            if known.shape != noise.shape:
                raise UserError(
                    f"images must have the size of the bundle, which gives latents {self.latent_shape}, got "
                    f"{tuple(images.shape[1:])}, which give {tuple(known.shape[1:])}; resize them, or set --image_size"
                )
            # at full strength what is left of the images in a finite schedule's last level is left out, too
            sample = noise if self.strength == 1 else self.sampler.add_noise(known, noise, 0)
        if masks is not None:
            is_new = self._latent_masks(masks).to(device)
        steps = tqdm(self.sampler.timesteps.tolist(), desc="sampling", leave=False, disable=not self.progress)
        for index, timestep in enumerate(steps):
            if is_new is not None:
                # fresh noise at each level, so that the new part goes on meeting the known one (RePaint, Lugmayr et al.
                # 2022, arXiv 2201.09865, algorithm 1); a deterministic sampler has no step that could take it in
                around = self._draw(generators).to(device) if self.sampler.is_stochastic else noise
                sample = torch.where(is_new, sample, self.sampler.add_noise(known, around, index))
            output = self._predict(network, sample, timestep, condition, is_guided)
            sample = self.sampler.step(output, index, sample, generators)
        return sample if is_new is None else torch.where(is_new, sample, known)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Whitened latents (B, C, h, w) of images (B, C, H, W) in [0, 1], at the posterior's mean."""
        weight = next(self.autoencoder.parameters())
        return self.scaling.whiten(self.autoencoder.encode(_plain(images, weight))[0])

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W), not yet clamped to [0, 1], of whitened latents (B, C, h, w); in float32."""
        return self.autoencoder.decode(self.scaling.unwhiten(latents.float()))

    def interpolate(self, seed_a: int, seed_b: int, fractions: Iterable[float]) -> torch.Tensor:
        """Noise on the way from one seed's to another's, on a great circle (Shoemake 1985).

        A straight line would lead through noise of too small a norm, which the network never saw.

        Args:
            seed_a: at fraction 0.
            seed_b: at fraction 1.
            fractions: (B,), from 0 to 1.

        Returns:
            (B, C, h, w), for ``noise`` of a call.

        Raises:
            UserError: the sampler draws noise on the way, so that images would not change smoothly.
        """
        if self.sampler.is_stochastic:
            raise UserError(
                f"an interpolation needs a sampler without noise of its own, got {self.sampler.name} with eta "
                f"{self.sampler.eta:g}; set --sampler dpm++"
            )
        t = torch.tensor(list(fractions), dtype=torch.float32)
        a, b = (draw.expand(len(t), -1) for draw in self._draw(self._generators([seed_a, seed_b])).flatten(1).split(1))
        norm = torch.lerp(a.norm(dim=1), b.norm(dim=1), t)
        return (norm[:, None] * slerp(a, b, t)).view(-1, *self.latent_shape)

    def _generators(self, seeds: Sequence[int]) -> list[torch.Generator]:
        """One for each image, on the CPU: the same numbers on every device."""
        return [torch.Generator().manual_seed(derive_seed(seed, LATENT_STREAM)) for seed in seeds]

    def _draw(self, generators: Sequence[torch.Generator]) -> torch.Tensor:
        """Noise (B, C, h, w), float32 on the CPU."""
        return torch.stack([torch.randn(self.latent_shape, generator=generator) for generator in generators])

    def _check_images(self, batch: int, images: torch.Tensor | None, masks: torch.Tensor | None) -> None:
        """See that images and masks fit each other and the batch."""
        if masks is not None and images is None:
            raise UserError("masks need the images that they mark, got none; give images, or leave the masks out")
        if images is not None and (images.ndim != 4 or len(images) != batch):
            raise UserError(f"images must be ({batch}, C, H, W), one for each seed, got {tuple(images.shape)}")
        if images is not None and (
            not images.isfinite().all() or images.min() < -ROUNDING or images.max() > 1 + ROUNDING
        ):
            raise UserError("images must have values in [0, 1], got others; scale them as the training does")
        if masks is not None and masks.shape != (batch, 1, *images.shape[2:]):
            raise UserError(
                f"masks must be {(batch, 1, *images.shape[2:])}, the size of the images, got {tuple(masks.shape)}"
            )

    def _latent_masks(self, masks: torch.Tensor) -> torch.Tensor:
        """(B, 1, h, w) bool: a latent is made anew if one of its pixels is to be."""
        return nn.functional.adaptive_max_pool2d(_plain(masks).float(), self.latent_shape[1:]).bool()

    def _conditions(
        self,
        batch: int,
        prompts: str | Sequence[str] | None,
        negative_prompts: str | Sequence[str] | None,
        labels: torch.Tensor | Sequence[int] | None,
    ) -> list[dict[str, torch.Tensor]]:
        """The network's keyword arguments: [one] for a single forward, [unconditional, conditional] for guidance."""
        given = {"prompts": prompts, "labels": labels}
        kind = {None: None, "caption": "prompts", "label": "labels"}[getattr(self.conditioner, "key", None)]
        for name, values in given.items():
            if values is not None and name != kind:
                taken = f"takes {kind}" if kind else "has no conditions"
                raise UserError(f"{name} were given, but the network {taken}; leave them out, or see --conditioning")
        if negative_prompts is not None and prompts is None:
            raise UserError("negative_prompts need prompts to guide away from them, got none; set --prompts")
        if self.conditioner is None:
            return [{}]
        values = given[kind]
        if values is None:
            return [self.conditioner.null(batch)]
        if self.guidance_scale == 1:
            return [self.conditioner(_spread(values, batch, kind))]
        if negative_prompts is None:
            without = self.conditioner.null(batch)
        else:
            without = self.conditioner(_spread(negative_prompts, batch, "negative_prompts"))
        if self.guidance_scale == 0:
            return [without]
        return [without, self.conditioner(_spread(values, batch, kind))]

    def _predict(
        self,
        network: nn.Module,
        sample: torch.Tensor,
        timestep: float,
        condition: dict[str, torch.Tensor],
        is_guided: bool,
    ) -> torch.Tensor:
        """The network's output (B, C, h, w) in float32; guided, if the condition is that of both, of 2B."""
        inputs = torch.cat([sample, sample]) if is_guided else sample
        timesteps = torch.full((len(inputs),), timestep, device=sample.device)
        with autocast(sample.device, self.amp):
            output = network(inputs, timesteps=timesteps, **condition)
        # a copy: CUDA graphs of a compiled network write the next output where this one lies
        output = output.to(torch.float32, copy=True)
        if not is_guided:
            return output
        without, conditional = output.chunk(2)
        guided = without + self.guidance_scale * (conditional - without)
        if self.guidance_rescale:
            std = [part.flatten(1).std(1)[:, None, None, None] for part in (conditional, guided)]
            guided = torch.lerp(guided, guided * (std[0] / std[1]), self.guidance_rescale)
        return guided


def _whole(seeds: torch.Tensor | Sequence[int]) -> list[int]:
    """Seeds as Python's whole numbers."""
    if isinstance(seeds, torch.Tensor) and (seeds.ndim != 1 or seeds.is_floating_point()):
        raise UserError(f"seeds must be whole numbers (B,), got {seeds.dtype} of shape {tuple(seeds.shape)}")
    numbers = [int(seed) for seed in seeds]
    for seed in numbers:
        if not 0 <= seed <= LARGEST_SEED:
            raise UserError(f"seeds must be from 0 to {LARGEST_SEED}, got {seed}; set --seeds")
    return numbers


def _plain(images: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """Images without MONAI's metadata, of the device and type of another tensor."""
    images = convert_to_tensor(images, track_meta=False)
    return images if like is None else images.to(like)


def _filled(images: torch.Tensor, is_new: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W) whose masked pixels (B, 1, H, W) are taken from the others alone.

    From the mask's edge inwards, each pixel becomes the mean of its neighbours that are known or were filled before.
    """
    known = (~is_new.to(images.device)).to(images)
    filled = images * known
    while (known.amax((1, 2, 3)) > known.amin((1, 2, 3))).any():
        # avg_pool2d divides both by 9, at the image's border, too
        weights = nn.functional.avg_pool2d(known, 3, stride=1, padding=1)
        means = nn.functional.avg_pool2d(filled, 3, stride=1, padding=1) / weights.clamp(min=1 / 9)
        filled = torch.where(known > 0, filled, means)
        known = (weights > 0).to(known)
    return filled


def _spread(values: Any, batch: int, name: str) -> Any:
    """Conditions, one for each image."""
    values = [values] * batch if isinstance(values, str) else values
    if len(values) != batch:
        raise UserError(f"{name} must be one for each of {batch} images, or one for all, got {len(values)}")
    return values
