"""Inference of masks: probabilities, and how sure the network is of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import torch
from monai.inferers import Inferer
from torch import nn

from medgen.data.stream import derive_seed
from medgen.errors import UserError
from medgen.networks.dropout_unet import DropoutUNet

__all__ = ["SegmentationInferer", "with_noise_seeds"]


def with_noise_seeds(
    items: Sequence[Mapping[str, Any]], seed: int, data_root: str | os.PathLike[str]
) -> list[dict[str, Any]]:
    """Give each item of a datalist the seed of its dropout: a function of ``seed`` and the image's path alone.

    Args:
        items: with ``image``, a path below ``data_root``.
        seed: of the run.
        data_root: folder that the paths start from, so that moving the data changes nothing.

    Returns:
        Copies with ``noise_seed``.
    """

    def own(image: str) -> int:
        return derive_seed(
            seed, *PurePath(os.path.relpath(image, data_root)).as_posix().encode(errors="surrogateescape")
        )

    return [{**item, "noise_seed": own(item["image"])} for item in items]


class SegmentationInferer(Inferer):
    """Probability that each pixel is inside, and its spread when the network's dropout is kept on.

    Monte Carlo dropout (Gal and Ghahramani 2016): several forward passes with dropout are samples of what networks that
    explain the training data equally well would say.

    Args:
        passes: forward passes with dropout, the noise of each drawn from the image's seed; 0: one pass without.

    Raises:
        UserError: one pass, which has no spread, or fewer than none.
    """

    def __init__(self, passes: int = 0) -> None:
        super().__init__()
        if isinstance(passes, bool) or not isinstance(passes, int) or passes < 0 or passes == 1:
            raise UserError(f"mc_passes must be 0 (no dropout) or at least 2, got {passes!r}; set --mc_passes 20")
        self.passes = passes

    def __call__(
        self, inputs: torch.Tensor, network: nn.Module, seeds: Sequence[int] | torch.Tensor = (), **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """Segment a batch.

        Args:
            inputs: images (B, C, H, W).
            network: image to logits (B, 1, H, W); a :class:`~medgen.networks.DropoutUNet` where there are passes.
            seeds: of the dropout, one an image; not used without passes.
            kwargs: not used; part of the interface.

        Returns:
            ``probability`` (B, 1, H, W) in [0, 1], the mean of the passes; with passes also ``uncertainty``, their
            standard deviation, in [0, 0.5].
        """
        if not self.passes:
            return {"probability": torch.sigmoid(network(inputs))}
        return dict(zip(("probability", "uncertainty"), self._sample(inputs, network, seeds), strict=True))

    def _sample(
        self, inputs: torch.Tensor, network: DropoutUNet, seeds: Sequence[int] | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # sums in float64: a difference of squares, and thousands of passes
        total = squares = torch.zeros((), dtype=torch.float64, device=inputs.device)
        # one stream of noise an image for all passes: the first ten of twenty are those of ten
        with network.keep_dropout([int(seed) for seed in seeds]):
            for _ in range(self.passes):
                probability = torch.sigmoid(network(inputs)).double()
                total, squares = total + probability, squares + probability**2
        mean = total / self.passes
        deviation = (squares / self.passes - mean**2).clamp(min=0).sqrt()
        return mean.float(), deviation.float()
