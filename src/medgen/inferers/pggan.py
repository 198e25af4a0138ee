"""Images of a progressively grown generator: from seeds, along a walk, and at the levels that a training has kept."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from medgen.errors import UserError
from medgen.inferers.generation import SeedInferer, check_class, draw_latents
from medgen.inferers.latent_walk import slerp, walk_segments
from medgen.networks import PGGANGenerator
from medgen.weights import read_state_dict

__all__ = ["PGGANInferer", "PGGANWalkInferer", "check_resolution", "level_weights"]

LEVELS = "levels"  # folder beside the weights in which a training keeps those of each level's end


class PGGANInferer(SeedInferer):
    """Seeds to images in [0, 1], by a generator as far as it has grown.

    Args:
        truncation_psi: multiplies the normalised latent. The network divides each latent by its root mean square
            (Karras et al. 2018, section 4.2), so that the length of z itself is lost: what is shortened is what the
            first layer sees, which in training always has length √Z. 1 changes nothing, less than 1 moves all images
            towards one, and 0 gives that image (one for each class) for all seeds.

    Raises:
        UserError: it is no finite number.
    """

    def generate(self, seeds: Sequence[int], network: PGGANGenerator, labels: torch.Tensor | None) -> torch.Tensor:
        """Images (B, C, R, R) in [0, 1] of B seeds; see :meth:`SeedInferer.__call__`."""
        return self.render(draw_latents(seeds, network.latent_dim), network, labels)

    def render(self, z: torch.Tensor, network: PGGANGenerator, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Images of latents.

        Args:
            z: (B, Z) on any device.
            network: the generator.
            labels: class indices (B,) or vectors (B, K), for a network with classes.

        Returns:
            (B, C, R, R) in [0, 1] on the network's device, R the resolution that the network is grown to.
        """
        device = network.growth.device
        labels = None if labels is None else labels.to(device)
        images = network(z.to(device), labels, truncation_psi=self.truncation_psi)
        return images.float().add(1).div(2).clamp(0, 1)


class PGGANWalkInferer(PGGANInferer):
    """Images along a walk through Z, on great circles.

    Args:
        seeds: of the latents on the way.
        class_index: class of all images, of a network with classes.
        truncation_psi: see :class:`PGGANInferer`.

    Raises:
        UserError: a truncation that is no finite number.
    """

    def __init__(self, seeds: Sequence[int], class_index: int | None = None, truncation_psi: float = 1.0) -> None:
        super().__init__(truncation_psi)
        self.seeds, self.class_index = list(seeds), class_index

    def __len__(self) -> int:
        """Latents on the way."""
        return len(self.seeds)

    def check(self, network: PGGANGenerator) -> None:
        """See that the settings fit a network, before weights are read.

        Raises:
            UserError: they do not.
        """
        check_class(self.class_index, network.num_classes, required=True)

    def __call__(self, inputs: torch.Tensor, network: PGGANGenerator, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Generate.

        Args:
            inputs: positions (B,) on the walk, see :func:`medgen.inferers.walk_positions`; after the last latent comes
                the first.
            network: the generator.
            args: not used; part of the interface.
            kwargs: not used; part of the interface.

        Returns:
            images (B, C, R, R) in [0, 1].
        """
        start, end, t = walk_segments(inputs, len(self))
        anchors = draw_latents(self.seeds, network.latent_dim)
        # with a class beside it, the latent's length decides how much the class counts: the anchors' own is kept
        lengths = anchors.norm(dim=1)
        z = slerp(anchors[start], anchors[end], t) * torch.lerp(lengths[start], lengths[end], t)[:, None]
        labels = None if self.class_index is None else torch.full_like(start, self.class_index)
        return self.render(z, network, labels)


def check_resolution(resolution: int | None, resolutions: Sequence[int]) -> None:
    """See that a resolution is one of a network's levels.

    Raises:
        UserError: it is not.
    """
    if resolution is not None and (isinstance(resolution, bool) or resolution not in resolutions):
        raise UserError(
            f"resolution must be one of {', '.join(map(str, resolutions))} for this network, or null for as far as the "
            f"weights are grown, got {resolution!r}; set --resolution"
        )


def level_weights(model_path: str | os.PathLike[str], resolution: int | None) -> Path:
    """File of the weights that make images of a resolution.

    Those of each level's end lie in ``levels/`` beside the model: once a network has grown beyond a level, the layer
    that made that level's images is trained no more, and no longer fits the layers before it.

    Args:
        model_path: weights as far as they are grown.
        resolution: None for those.

    Returns:
        The model itself for None or for the resolution that it is grown to, else ``levels/0064.pt``.

    Raises:
        UserError: there are none for this resolution.
    """
    path = Path(model_path)
    if resolution is None or (path.is_file() and _grown_resolution(path) == resolution):
        return path
    folder = path.parent / LEVELS
    level = folder / f"{resolution:04d}.pt"
    if not level.is_file():
        there = sorted(int(file.stem) for file in folder.glob("*.pt") if file.stem.isdecimal())
        kept = f"holds those of {', '.join(map(str, there))}" if there else "holds none"
        own = f"{path} is grown to {_grown_resolution(path)}" if path.is_file() else f"there is no {path}"
        raise UserError(
            f"no weights for resolution {resolution}: {own}, {folder} {kept}; set --resolution to one of these"
        )
    return level


def _grown_resolution(path: Path) -> int:
    """Resolution that weights are grown to."""
    growth = read_state_dict(path).get("growth")
    if growth is None or growth.shape != (2,):
        raise UserError(
            f"{path} belongs to another architecture: it lacks growth of shape (2,), how far it is grown; name "
            "weights that cxr_pggan trained, or that medgen convert wrote for it"
        )
    return int(growth[0])
