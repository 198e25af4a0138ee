"""Images from seeds: each its own latent, the same whatever batch it stands in."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.inferers import Inferer
from torch import nn

from medgen.data.stream import derive_seed
from medgen.errors import UserError
from medgen.networks import StyleGAN2Generator

__all__ = [
    "NOISE_MODES",
    "GeneratorInferer",
    "PrepareInputs",
    "SeedInferer",
    "check_class",
    "draw_latents",
    "parse_numbers",
]

NOISE_MODES = ("const", "random", "none")
LARGEST_SEED = 2**32 - 1  # of NumPy's Mersenne Twister
MOST_NUMBERS = 1_000_000  # of a setting
NOISE_STREAM = 1


def draw_latents(seeds: Sequence[int], latent_dim: int) -> torch.Tensor:
    """Latents z that depend on each image's own seed and not on the batch it stands in.

    NumPy's Mersenne Twister, whose stream is frozen, and which StyleGAN2's authors draw from, too: a seed that a paper
    names gives that paper's image with its network.

    Args:
        seeds: one for each image, from 0 to 2³² − 1.
        latent_dim: Z.

    Returns:
        (B, Z) float32, N(0, 1), on the CPU.

    Raises:
        UserError: a seed out of range.
    """
    for seed in seeds:
        if not 0 <= seed <= LARGEST_SEED:
            raise UserError(f"seeds must be from 0 to {LARGEST_SEED}, got {seed}; set --seeds")
    z = np.stack([np.random.RandomState(seed).randn(latent_dim) for seed in seeds])
    return torch.from_numpy(z.astype(np.float32))


def parse_numbers(numbers: int | str | Iterable[int], name: str, largest: int = LARGEST_SEED) -> list[int]:
    """Whole numbers and ranges of a setting.

    Args:
        numbers: ``7``, ``[1, 5]``, ``"0-49999"`` (both ends belong to it) or ``"1,5,7-9"``.
        name: of the setting, for messages.
        largest: number allowed; the smallest is 0.

    Returns:
        The numbers, at least one, in the order given; what is given twice stands there twice.

    Raises:
        UserError: not such numbers, or more than a million.
    """
    wanted = f"{name} must be whole numbers from 0 to {largest}, such as 7, 1,5,9 or 0-99"
    parts = numbers.split(",") if isinstance(numbers, str) else [numbers]
    if isinstance(numbers, Iterable) and not isinstance(numbers, str | Mapping):
        parts = numbers
    found: list[int] = []
    for part in parts:
        match = re.fullmatch(r"(\d{1,19})(?:-(\d{1,19}))?", str(part).strip(), re.ASCII)
        if match is None or isinstance(part, bool):
            raise UserError(f"{wanted}; got {str(part)!r:.40} in {str(numbers)!r:.80}; set --{name}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"{wanted}; got the range {first}-{last}, which ends before it begins; set --{name}")
        if last > largest:
            raise UserError(f"{wanted}; got {last}; set --{name}")
        if len(found) + last - first >= MOST_NUMBERS:
            raise UserError(f"{name} must be at most {MOST_NUMBERS:,} numbers, got more; set --{name} for each part")
        found.extend(range(first, last + 1))
    if not found:
        raise UserError(f"{wanted}; got none; set --{name}")
    return found


def check_class(class_index: int | None, num_classes: int, required: bool = False) -> None:
    """See that a class exists.

    Args:
        class_index: the class; None for none.
        num_classes: of the network; 0 for none.
        required: whether a network with classes must be given one.

    Raises:
        UserError: a class for a network without classes, or one that it has not, or none where one is required.
    """
    if class_index is None:
        if num_classes and required:
            raise UserError(
                f"class_index must be from 0 to {num_classes - 1} for this network, got null; set --class_index"
            )
        return
    if not num_classes:
        raise UserError(
            f"class_index must be null for a network without classes, got {class_index!r}; leave it out, or set "
            "--num_classes as in training"
        )
    if isinstance(class_index, bool) or not isinstance(class_index, int) or not 0 <= class_index < num_classes:
        raise UserError(
            f"class_index must be from 0 to {num_classes - 1}, or null, got {class_index!r}; set --class_index"
        )


class PrepareInputs:
    """What a SupervisedEvaluator hands to an inferer, where that is no image.

    Args:
        inputs: key of the inferer's first argument.
        extra: key of the batch for each further keyword argument; those that the batch lacks are left out.
    """

    def __init__(self, inputs: str, **extra: str) -> None:
        self.inputs, self.extra = inputs, extra

    def __call__(
        self, batchdata: Mapping[str, Any], device: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[Any, None, tuple[()], dict[str, Any]]:
        """Inputs, no target, and keyword arguments, as they are: the inferer moves what the network needs.

        Args:
            batchdata: the batch.
            device: not used; part of the interface.
            non_blocking: not used; part of the interface.
            kwargs: not used; part of the interface.
        """
        extra = {name: batchdata[key] for name, key in self.extra.items() if key in batchdata}
        return batchdata[self.inputs], None, (), extra


class SeedInferer(Inferer, ABC):
    """Seeds to images in [0, 1]; a subclass says how its network makes them.

    Args:
        truncation_psi: how much of the full variety; 1 changes nothing.

    Raises:
        UserError: it is no finite number.
    """

    def __init__(self, truncation_psi: float = 1.0) -> None:
        is_number = isinstance(truncation_psi, int | float) and not isinstance(truncation_psi, bool)
        if not is_number or not math.isfinite(truncation_psi):
            raise UserError(
                f"truncation_psi must be a finite number, got {truncation_psi!r}; set --truncation_psi to 1 for the "
                "full variety or 0.7 for fewer outliers"
            )
        self.truncation_psi = truncation_psi

    @abstractmethod
    def generate(self, seeds: Sequence[int], network: nn.Module, labels: torch.Tensor | None) -> torch.Tensor:
        """Images (B, C, H, W) in [0, 1] of B seeds, and of their classes where the network has any."""

    def __call__(
        self,
        inputs: torch.Tensor | Sequence[int] | None,
        network: nn.Module,
        *args: Any,
        seeds: torch.Tensor | Sequence[int] | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Generate.

        Args:
            inputs: the seeds (B,); or anything else, such as the real images of a validation, with ``seeds`` given.
            network: the generator.
            args: not used; part of the interface.
            seeds: whole numbers (B,) from 0 to 2³² − 1, where ``inputs`` are none.
            labels: class indices (B,) or vectors (B, K), for a network with classes.
            kwargs: not used; part of the interface.

        Returns:
            images (B, C, H, W) in [0, 1] on the network's device.

        Raises:
            UserError: seeds are no whole numbers or out of range, or labels or settings do not fit the network.
        """
        return self.generate(_whole(inputs if seeds is None else seeds), network, labels)


class GeneratorInferer(SeedInferer):
    """Seeds to images in [0, 1], by a StyleGAN2 generator.

    Args:
        truncation_psi: distance from the mean w is multiplied by this (StyleGAN, appendix B); 1 changes nothing, 0
            gives the mean image.
        truncation_cutoff: how many layers, from the coarsest, are truncated; None for all.
        noise_mode: ``const`` takes the noise maps stored with the weights, ``random`` draws them from each image's
            seed, ``none`` leaves noise out.

    Raises:
        UserError: a value that no network can be given.
    """

    def __init__(
        self, truncation_psi: float = 1.0, truncation_cutoff: int | None = None, noise_mode: str = "const"
    ) -> None:
        super().__init__(truncation_psi)
        if truncation_cutoff is not None and (
            isinstance(truncation_cutoff, bool) or not isinstance(truncation_cutoff, int) or truncation_cutoff < 0
        ):
            raise UserError(
                f"truncation_cutoff must be a number of layers of at least 0 or null, got {truncation_cutoff!r}; set "
                "--truncation_cutoff"
            )
        if noise_mode not in NOISE_MODES:
            raise UserError(f"noise_mode must be {', '.join(NOISE_MODES)}, got {noise_mode!r}; set --noise_mode const")
        self.truncation_cutoff = truncation_cutoff
        self.noise_mode = noise_mode

    def check(self, network: StyleGAN2Generator) -> None:
        """See that the settings fit a network, before weights are read.

        Raises:
            UserError: more layers are to be truncated than there are.
        """
        if self.truncation_cutoff is not None and self.truncation_cutoff > network.num_ws:
            raise UserError(
                f"truncation_cutoff must be from 0 to {network.num_ws} layers for this network, or null for all, got "
                f"{self.truncation_cutoff}; set --truncation_cutoff"
            )

    def mapping(
        self, seeds: Sequence[int] | torch.Tensor, network: StyleGAN2Generator, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Truncated W+ of seeds, (B, L, W); arguments are those of a call."""
        device = network.w_avg.device
        z = draw_latents(_whole(seeds), network.latent_dim).to(device)
        labels = None if labels is None else labels.to(device)
        return network.mapping(z, labels, self.truncation_psi, self.truncation_cutoff, update_w_avg=False)

    def synthesis(
        self, ws: torch.Tensor, network: StyleGAN2Generator, seeds: Sequence[int] | torch.Tensor
    ) -> torch.Tensor:
        """Images in [0, 1] of W+ (B, L, W); the seeds are those of ``random`` noise."""
        noise: str | list[torch.Tensor] = self.noise_mode
        if noise == "random":
            # of the seed itself, torch's Mersenne Twister would have the very state that NumPy's draws z from
            noise = network.draw_noise([derive_seed(seed, NOISE_STREAM) for seed in _whole(seeds)])
        return network.synthesis(ws, noise).float().add(1).div(2).clamp(0, 1)

    def generate(self, seeds: Sequence[int], network: StyleGAN2Generator, labels: torch.Tensor | None) -> torch.Tensor:
        """Images (B, C, H, W) in [0, 1] of B seeds; see :meth:`SeedInferer.__call__`."""
        return self.synthesis(self.mapping(seeds, network, labels), network, seeds)


def _whole(seeds: Any) -> list[int]:
    """Seeds as Python's whole numbers."""
    if isinstance(seeds, torch.Tensor):
        if seeds.ndim != 1 or seeds.is_floating_point():
            raise UserError(f"seeds must be whole numbers (B,), got {seeds.dtype} of shape {tuple(seeds.shape)}")
        return seeds.tolist()
    return [int(seed) for seed in seeds]
