"""Walks from latent to latent, and images that share the styles of two."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medgen.data.datalist import list_files
from medgen.errors import UserError
from medgen.inferers.generation import GeneratorInferer, check_class, draw_latents
from medgen.networks import StyleGAN2Generator

__all__ = [
    "NO_SEED",
    "LatentWalkInferer",
    "StyleMixingInferer",
    "mixing_cells",
    "slerp",
    "walk_positions",
    "walk_segments",
]

SPACES = ("w", "z")
NO_SEED = -1  # of a place in the grid that shows no mixture but one of its sources


def slerp(a: torch.Tensor, b: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Unit vectors on the great circle from a to b (Shoemake 1985).

    In many dimensions the latents N(0, 1) lie near a sphere: a straight line between two leaves it, and the mapping
    network, which normalises them, would run through the middle of the line faster than at its ends.

    Args:
        a: (B, Z).
        b: (B, Z).
        t: (B,), 0 gives a's direction and 1 gives b's.

    Returns:
        (B, Z), of length 1.
    """
    a, b = torch.nn.functional.normalize(a), torch.nn.functional.normalize(b)
    t = t[:, None]
    angle = torch.acos((a * b).sum(1, keepdim=True).clamp(-1, 1))
    # equal directions have no great circle of their own, and the straight line is right there
    is_same = angle.sin() < 1e-6
    angle = torch.where(is_same, torch.ones_like(angle), angle)
    arc = (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()
    return torch.nn.functional.normalize(torch.where(is_same, torch.lerp(a, b, t), arc))


def walk_positions(anchors: int, frames: int, closed: bool) -> list[float]:
    """Where each frame stands on a walk whose anchors have the positions 0, 1, 2, …

    Args:
        anchors: latents on the way, at least two.
        frames: at least two.
        closed: whether the walk comes back to its first anchor; it stands there once, so that the film has no pause.

    Raises:
        UserError: too few.
    """
    if anchors < 2:
        raise UserError(f"an interpolation goes between two or more latents, got {anchors}; set --seeds to 0-3")
    if frames < 2:
        raise UserError(f"frames must be at least 2, got {frames}; set --frames to 25 or more for each latent")
    last = anchors if closed else anchors - 1
    return np.linspace(0, last, frames, endpoint=not closed).tolist()


def walk_segments(positions: torch.Tensor, anchors: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Between which anchors positions stand; after the last anchor comes the first.

    Args:
        positions: (B,), see :func:`walk_positions`.
        anchors: latents on the way.

    Returns:
        (B,) number of the anchor before, (B,) that of the one after, and (B,) float32 the way between them that is
        covered, from 0 up to 1.
    """
    start = positions.floor().long() % anchors
    return start, (start + 1) % anchors, (positions - positions.floor()).float()


class LatentWalkInferer(GeneratorInferer):
    """Images along a walk through W, in straight lines, or through Z, on great circles.

    Args:
        seeds: of the latents on the way; unless there are projections.
        projections: records of projected images (``.npz``), whose w are the latents on the way; they are not truncated.
            A folder, whose records are taken in natural order with those below it, or a list of files and folders.
        space: ``w`` or ``z``.
        class_index: class of all images, of a network with classes.
        truncation_psi: see :class:`GeneratorInferer`.
        truncation_cutoff: see :class:`GeneratorInferer`.
        noise_mode: see :class:`GeneratorInferer`; ``random`` is the first seed's for all frames, or they would flicker.

    Raises:
        UserError: a setting that no network can be given, fewer than two records, or one that cannot be read.
    """

    def __init__(
        self,
        seeds: Sequence[int] = (),
        projections: str | Path | Sequence[str | Path] | None = None,
        space: str = "w",
        class_index: int | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        noise_mode: str = "const",
    ) -> None:
        super().__init__(truncation_psi, truncation_cutoff, noise_mode)
        if space not in SPACES:
            raise UserError(f"space must be {' or '.join(SPACES)}, got {space!r}; set --space w")
        if projections is not None and space != "w":
            raise UserError("space must be w for projections, which have no z; set --space w")
        self.seeds, self.space, self.class_index = list(seeds), space, class_index
        self.projected = [] if projections is None else [_read_w(path) for path in _records(projections)]

    def __len__(self) -> int:
        """Latents on the way."""
        return len(self.projected) or len(self.seeds)

    def check(self, network: StyleGAN2Generator) -> None:
        """See that the settings fit a network, before weights are read.

        Raises:
            UserError: they do not.
        """
        super().check(network)
        check_class(self.class_index, network.num_classes, required=not self.projected)
        for w in self.projected:
            if w.shape != (network.num_ws, network.w_dim):
                raise UserError(
                    f"projections must hold w of shape {(network.num_ws, network.w_dim)} for this network, got "
                    f"{tuple(w.shape)}; set --preset as in the projection"
                )

    def __call__(self, inputs: torch.Tensor, network: StyleGAN2Generator, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Generate.

        Args:
            inputs: positions (B,) on the walk, see :func:`walk_positions`; after the last latent comes the first.
            network: the generator.
            args: not used; part of the interface.
            kwargs: not used; part of the interface.

        Returns:
            images (B, C, H, W) in [0, 1].
        """
        start, end, t = walk_segments(inputs, len(self))
        device = network.w_avg.device
        labels = None if self.class_index is None else torch.full_like(start, self.class_index, device=device)
        if self.space == "z":
            z = draw_latents(self.seeds, network.latent_dim)
            z = slerp(z[start], z[end], t).to(device)
            ws = network.mapping(z, labels, self.truncation_psi, self.truncation_cutoff, update_w_avg=False)
        else:
            if self.projected:
                anchors = torch.stack(self.projected).to(device)
            else:
                labels = None if labels is None else labels.new_full((len(self),), self.class_index)
                anchors = self.mapping(self.seeds, network, labels)
            ws = torch.lerp(anchors[start.to(device)], anchors[end.to(device)], t.to(device)[:, None, None])
        return self.synthesis(ws, network, [self.seeds[0] if self.seeds else 0] * len(inputs))


def _records(projections: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that are named, and those in the folders that are."""
    if not isinstance(projections, str | Path | Sequence):
        raise UserError(f"projections must be a folder or a list of files, got {projections!r}; set --projections")
    found = []
    for entry in [projections] if isinstance(projections, str | Path) else projections:
        path = Path(str(entry))
        found += [path / file for file in list_files(path) if file.endswith(".npz")] if path.is_dir() else [path]
    if len(found) < 2:
        raise UserError(
            f"projections must be a folder that holds two or more records (.npz), or a list of them, got {len(found)} "
            f"from {projections}; set --projections to the folder projections of a run of project.json"
        )
    return found


def _read_w(path: str | Path) -> torch.Tensor:
    """The w (L, W) of a projection."""
    from medgen.transforms import ProjectionRecord

    return torch.from_numpy(ProjectionRecord(path).w).float()


def mixing_cells(rows: Iterable[int], columns: Iterable[int]) -> list[dict[str, int]]:
    """The places of a mixing grid, row by row: sources on top and on the left, mixtures between them.

    Args:
        rows: seeds whose styles are kept.
        columns: seeds whose styles replace them.

    Returns:
        ``{"row": seed, "column": seed}``; :data:`NO_SEED` where a place has none.
    """
    columns = [NO_SEED, *columns]
    return [{"row": row, "column": column} for row in [NO_SEED, *rows] for column in columns]


class StyleMixingInferer(GeneratorInferer):
    """Images with the styles of one seed, some of them replaced by another's (StyleGAN, section 3.1).

    Args:
        layers: styles that are replaced, from 0, the coarsest.
        class_index: class of all images, of a network with classes.
        truncation_psi: see :class:`GeneratorInferer`.
        truncation_cutoff: see :class:`GeneratorInferer`.
        noise_mode: see :class:`GeneratorInferer`; ``random`` is that of the row's seed.

    Raises:
        UserError: a setting that no network can be given.
    """

    def __init__(
        self,
        layers: Sequence[int],
        class_index: int | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        noise_mode: str = "const",
    ) -> None:
        super().__init__(truncation_psi, truncation_cutoff, noise_mode)
        self.layers, self.class_index = list(layers), class_index

    def check(self, network: StyleGAN2Generator) -> None:
        """See that the settings fit a network, before weights are read.

        Raises:
            UserError: they do not.
        """
        super().check(network)
        check_class(self.class_index, network.num_classes, required=True)
        if max(self.layers) >= network.num_ws:
            raise UserError(
                f"layers must be from 0 to {network.num_ws - 1} for this network, got {max(self.layers)}; set --layers"
            )

    def __call__(
        self,
        inputs: torch.Tensor,
        network: StyleGAN2Generator,
        *args: Any,
        columns: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Generate.

        Args:
            inputs: seeds (B,) whose styles are kept; :data:`NO_SEED`: the column's image is shown as it is.
            network: the generator.
            args: not used; part of the interface.
            columns: seeds (B,) whose styles replace them; :data:`NO_SEED`: the row's image is shown as it is.
            kwargs: not used; part of the interface.

        Returns:
            images (B, C, H, W) in [0, 1]; white where there is no seed at all.
        """
        rows = [int(seed) for seed in inputs]
        columns = [int(seed) for seed in columns]
        kept = [column if row == NO_SEED else row for row, column in zip(rows, columns, strict=True)]
        given = [row if column == NO_SEED else column for row, column in zip(rows, columns, strict=True)]
        is_empty = torch.tensor([seed == NO_SEED for seed in kept])
        kept, given = ([max(seed, 0) for seed in seeds] for seeds in (kept, given))
        labels = None if self.class_index is None else torch.full((len(kept),), self.class_index)
        ws = self.mapping(kept, network, labels).clone()
        ws[:, self.layers] = self.mapping(given, network, labels)[:, self.layers]
        images = self.synthesis(ws, network, kept)
        images[is_empty.to(images.device)] = 1.0
        return images
