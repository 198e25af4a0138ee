"""Samplers of diffusion and flow models behind one interface, with timesteps that are stated and kept to."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from monai.networks.schedulers import DDPMScheduler, RFlowScheduler
from monai.networks.schedulers.rectified_flow import timestep_transform

from medgen.errors import UserError
from medgen.settings import check_between, check_whole

__all__ = ["SAMPLERS", "SPACINGS", "Sampler"]

SPACINGS = ("leading", "trailing", "linspace", "quadratic")
SAMPLERS = {  # and the spacing that each takes unless told otherwise
    "ddim": "leading",
    "dpm++": "quadratic",
    "unipc": "quadratic",
    "pndm": "quadratic",
    "ddpm": "linspace",
    "rflow": "trailing",
}
LEAST_COVERED = 0.9  # of the training's timesteps, by leading spacing
SOLVERS = {  # of diffusers
    "dpm++": ("diffusers.schedulers.scheduling_dpmsolver_multistep", "DPMSolverMultistepScheduler"),
    "unipc": ("diffusers.schedulers.scheduling_unipc_multistep", "UniPCMultistepScheduler"),
}
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)  # PNDM, equation 12: newest first


class Sampler:
    """From noise to latents in few steps, by the solver of that name.

    ==========  ===========================================================================================
    ``ddim``    Song et al. 2021, arXiv 2010.02502, equation 12
    ``ddpm``    the same with eta 1: the ancestral sampling of Ho et al. 2020, at any number of steps
    ``pndm``    Liu et al. 2022, arXiv 2202.09778, pseudo linear multi-step (one evaluation more than steps)
    ``dpm++``   DPM-Solver++(2M), Lu et al. 2022, arXiv 2211.01095, as in ``diffusers``
    ``unipc``   UniPC of order 2 with B2(h), Zhao et al. 2023, arXiv 2302.04867, as in ``diffusers``
    ``rflow``   Euler's method for a network trained with MONAI's RFlowScheduler
    ==========  ===========================================================================================

    All walk down the same lists of timesteps t, those of n steps among T, and end at the clean latents (final alpha 1):

    =============  ===========================================================  =================
    ``leading``    i · (T // n), i = n − 1 … 0                                  980, 960 … 20, 0
    ``trailing``   round(T − i · T / n) − 1, i = 0 … n − 1                      999, 979 … 39, 19
    ``linspace``   (T − 1) · i / (n − 1), rounded                               999, 979 … 20, 0
    ``quadratic``  (T − 1) · (i / (n − 1))², rounded, but i at least            999, 959 … 1, 0
    =============  ===========================================================  =================

    (n = 50, T = 1000). ``leading`` is the list of generative_chestxray and of Stable Diffusion; it begins below the
    noise that the latents are drawn with. ``quadratic`` (Song et al. 2021, appendix D.3) has steps of nearly equal size
    in the noise's standard deviation where there is little noise; the solvers of higher order need it: with the others
    their error is that of the last, longest step. ``rflow`` starts at T, where its noise is pure: T − i · T / n.

    MONAI 1.6.1 and ``diffusers`` 0.42 step by T // n down any list in DDIM and PNDM, which is right for ``leading``
    alone; here the step goes to the next timestep of the list. What the network puts out is turned into the clean
    latents or the noise before anything is combined over steps: PNDM over v-predictions at several noise levels would
    be of order 1.

    Args:
        noise_scheduler: of the training: a DDPMScheduler, whose betas and prediction type are taken (its clipping is
            not), or an RFlowScheduler.
        name: a key of :data:`SAMPLERS`.
        num_steps: from 1 to the training's number of timesteps.
        spacing: one of :data:`SPACINGS`; None: the sampler's own.
        eta: of ``ddim``, from 0 (deterministic) to 1 (as ``ddpm``).
        latent_shape: (C, h, w), for an RFlowScheduler whose timesteps depend on the size.

    Raises:
        UserError: a setting out of range, or a sampler for another kind of training.
    """

    def __init__(
        self,
        noise_scheduler: DDPMScheduler | RFlowScheduler,
        name: str = "dpm++",
        num_steps: int = 20,
        spacing: str | None = None,
        eta: float = 0.0,
        latent_shape: Sequence[int] | None = None,
    ) -> None:
        if name not in SAMPLERS:
            raise UserError(f"sampler must be one of {', '.join(SAMPLERS)}, got {name!r}; set --sampler dpm++")
        is_flow = isinstance(noise_scheduler, RFlowScheduler)
        if not is_flow and not isinstance(noise_scheduler, DDPMScheduler):
            raise UserError(
                f"noise_scheduler must be a DDPMScheduler or an RFlowScheduler of MONAI, got "
                f"{type(noise_scheduler).__name__}; name in noise_scheduler the one of the training"
            )
        if (name == "rflow") != is_flow:
            fitting = "rflow" if is_flow else ", ".join(other for other in SAMPLERS if other != "rflow")
            raise UserError(
                f"sampler must be {fitting} for a network trained with {type(noise_scheduler).__name__}, got {name}; "
                "set --sampler"
            )
        spacing = SAMPLERS[name] if spacing is None else spacing
        fitting = ("trailing",) if is_flow else SPACINGS
        if spacing not in fitting:
            raise UserError(f"spacing of {name} must be {' or '.join(fitting)}, got {spacing!r}; set --spacing")
        self.num_train_timesteps = noise_scheduler.num_train_timesteps
        check_whole(num_steps=num_steps)
        if num_steps > self.num_train_timesteps:
            raise UserError(
                f"num_steps must be from 1 to {self.num_train_timesteps}, the timesteps of the training, got "
                f"{num_steps}; set --num_steps to 20"
            )
        covered = num_steps * (self.num_train_timesteps // num_steps)
        if spacing == "leading" and (num_steps == 1 or covered < LEAST_COVERED * self.num_train_timesteps):
            first = (num_steps - 1) * (self.num_train_timesteps // num_steps)
            raise UserError(
                f"num_steps of leading spacing must be a divisor of {self.num_train_timesteps} above 1, or near one: "
                f"{num_steps} would begin at timestep {first}, where the noise is not pure; set --spacing linspace"
            )
        check_between(0, 1, eta=eta)
        if eta and name != "ddim":
            raise UserError(f"eta is a setting of ddim, got {eta} for {name}; leave it out, or set --sampler ddim")

        self.name, self.num_steps, self.spacing = name, num_steps, spacing
        self.eta = 1.0 if name == "ddpm" else float(eta)
        self.prediction_type = str(noise_scheduler.prediction_type)
        self._noise_scheduler, self._latent_shape = noise_scheduler, latent_shape
        if not is_flow:
            self._alphas_cumprod = torch.cumprod(1 - noise_scheduler.betas.double().cpu(), 0)
        if name in SOLVERS:
            module, solver = SOLVERS[name]
            self._solver = getattr(importlib.import_module(module), solver)(
                num_train_timesteps=self.num_train_timesteps,
                trained_betas=noise_scheduler.betas.tolist(),
                prediction_type="sample",
                solver_order=2,
                thresholding=False,
                final_sigmas_type="zero",
            )
        self.start()

    @property
    def is_stochastic(self) -> bool:
        """Whether noise is added on the way."""
        return self.eta > 0

    def start(self, strength: float = 1.0) -> None:
        """Forget the steps taken, and set ``timesteps`` and ``levels`` for new ones.

        ``timesteps`` (evaluations of the network,) lies on the CPU: int64, or float32 for a rectified flow. ``levels``
        has for each the factors (of the latents, of the noise) in its input, and (1, 0) for the end.

        Args:
            strength: part of the training's timesteps, from the clean end, that is walked through, for a start from
                noised latents. Below 1 the list is made for that part alone: it begins at timestep
                round(strength · T) − 1 (a flow: strength · T) whatever the spacing and the number of steps, and takes
                steps as long as at strength 1, so fewer. ``leading`` becomes ``linspace``, since it would begin lower.
        """
        total, num_steps = self.num_train_timesteps, self.num_steps
        if strength < 1:
            total = max(1, round(strength * total))
            # steps grow with the square root of the timestep in a quadratic list
            share = math.sqrt(strength) if self.spacing == "quadratic" else strength
            num_steps = min(total, max(1, round(share * num_steps)))
        if self.name == "rflow":
            steps = _flow_timesteps(self._noise_scheduler, num_steps, self._latent_shape, strength)
            noise = (steps / self.num_train_timesteps).tolist()
            levels = [(1 - level, level) for level in noise]
        else:
            spacing = "linspace" if strength < 1 and self.spacing == "leading" else self.spacing
            steps = _timesteps(spacing, num_steps, total)
            alphas_cumprod = self._alphas_cumprod[steps]
            levels = list(zip(alphas_cumprod.sqrt().tolist(), (1 - alphas_cumprod).sqrt().tolist(), strict=True))
        chosen = list(range(num_steps))
        if self.name == "pndm" and num_steps > 1:
            chosen.insert(1, 1)  # the first step is taken twice, the second time by Heun's method
        self.timesteps = steps[chosen]
        self.levels = [*(levels[index] for index in chosen), (1.0, 0.0)]
        self._noises: list[torch.Tensor] = []
        if self.name in SOLVERS:
            self._solver.set_timesteps(len(chosen))
            # by the attributes, as UniPC takes no list
            self._solver.timesteps = self.timesteps
            self._solver.sigmas = torch.tensor([noise / signal for signal, noise in self.levels])

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, index: int) -> torch.Tensor:
        """Latents with as much noise as the evaluation of that index expects; none for the index after the last."""
        signal, sigma = self.levels[index]
        return signal * latents + sigma * noise

    def predict(self, output: torch.Tensor, index: int, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Clean latents and noise by what the network put out.

        Args:
            output: of the network (B, C, h, w), of the training's prediction type.
            index: of the evaluation.
            sample: input of the network (B, C, h, w).

        Returns:
            x₀ and epsilon (B, C, h, w).
        """
        signal, sigma = self.levels[index]
        if self.prediction_type == "epsilon":
            return (sample - sigma * output) / signal, output
        if self.prediction_type == "sample":
            return output, (sample - signal * output) / sigma
        if self.name == "rflow":  # v = x₀ − epsilon, x = (1 − t) x₀ + t epsilon
            return sample + sigma * output, sample - signal * output
        # Salimans and Ho 2022, arXiv 2202.00512, appendix D
        return signal * sample - sigma * output, signal * output + sigma * sample

    def step(
        self,
        output: torch.Tensor,
        index: int,
        sample: torch.Tensor,
        generators: Sequence[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """The next sample.

        Args:
            output: of the network (B, C, h, w) for the timestep of that index; the indices come in order from 0.
            index: of the evaluation, in ``timesteps``.
            sample: input of the network (B, C, h, w).
            generators: on the CPU, one for each image, for a stochastic sampler: so that an image does not depend on
                the batch that it stands in.

        Returns:
            (B, C, h, w), the input of the next evaluation, or the latents.
        """
        clean, noise = self.predict(output, index, sample)
        if self.name in SOLVERS:
            return self._solver.step(clean, self.timesteps[index], sample).prev_sample
        (signal, sigma), (next_signal, next_sigma) = self.levels[index], self.levels[index + 1]
        if self.name == "pndm":
            clean, noise = self._multistep(noise, index, sample)
        # eta 1 gives the variance of the posterior q(x_next | x, x₀)
        std = self.eta * next_sigma / sigma * math.sqrt(max(0.0, 1 - (signal / next_signal) ** 2)) if self.eta else 0.0
        result = next_signal * clean + math.sqrt(max(0.0, next_sigma**2 - std**2)) * noise
        if std:
            drawn = [torch.randn(sample.shape[1:], generator=generator) for generator in generators]
            result = result + std * torch.stack(drawn).to(result)
        return result

    def _multistep(self, noise: torch.Tensor, index: int, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x₀ and the noise of PNDM's step: a mean of the last steps', and of both ends in the first."""
        if index == 0:
            self._first_sample = sample
        if index == 1:
            noise, sample, index = (self._noises[-1] + noise) / 2, self._first_sample, 0
        elif index < len(self.timesteps) - 1:  # the last step leads out of the schedule: nothing is extrapolated there
            self._noises = [noise, *self._noises[:3]]
            weights = ADAMS_BASHFORTH[len(self._noises) - 1]
            noise = sum(weight * past for weight, past in zip(weights, self._noises, strict=True))
        signal, sigma = self.levels[index]
        return (sample - sigma * noise) / signal, noise


def _timesteps(spacing: str, num_steps: int, num_train_timesteps: int) -> torch.Tensor:
    """The list of that spacing (see :class:`Sampler`), (num_steps,) int64."""
    if spacing == "leading":
        steps = np.arange(num_steps)[::-1] * (num_train_timesteps // num_steps)
    elif spacing == "trailing":
        steps = np.round(num_train_timesteps - np.arange(num_steps) * num_train_timesteps / num_steps) - 1
    else:
        steps = np.linspace(num_train_timesteps - 1, 0, num_steps)
        if spacing == "quadratic":
            # no timestep twice: where the parabola is flatter than the whole numbers, these are taken
            steps = np.maximum(steps**2 / max(1, num_train_timesteps - 1), np.arange(num_steps)[::-1])
        steps = np.round(steps)
    return torch.from_numpy(steps.astype(np.int64))


def _flow_timesteps(
    noise_scheduler: RFlowScheduler, num_steps: int, latent_shape: Sequence[int] | None, strength: float
) -> torch.Tensor:
    """Timesteps strength · T, in equal steps down to one above 0, (num_steps,) float32; whole where the training's are.

    Not by ``set_timesteps``: it rounds them to float16, and ``step`` rounds the next one down to a whole number.
    """
    total = noise_scheduler.num_train_timesteps
    steps = total * (1 - torch.arange(num_steps, dtype=torch.float64) / num_steps)
    if noise_scheduler.use_timestep_transform:
        if latent_shape is None:
            raise UserError("an RFlowScheduler with use_timestep_transform needs the latent_shape, got none; name it")
        # as the training does in sample_timesteps
        steps = timestep_transform(
            steps,
            input_img_size_numel=math.prod(latent_shape[1:]),
            base_img_size_numel=noise_scheduler.base_img_size_numel,
            num_train_timesteps=total,
            spatial_dim=len(latent_shape) - 1,
        )
    steps = strength * steps
    is_whole = noise_scheduler.use_discrete_timesteps and not noise_scheduler.use_timestep_transform
    return (steps.round().clamp(min=1) if is_whole else steps).float()
