"""Pictures that a person can look at while a model trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.nn import functional as F

from medgen.data.datalist import evenly
from medgen.inferers.generation import draw_latents
from medgen.output import atomic_file

__all__ = ["DiffusionGrid", "ReconstructionGrid", "SampleGrid", "save_comparison", "save_grid"]

CAPTION = 18  # height of a caption in pixels


def save_grid(rows: Sequence[torch.Tensor], path: str | Path, gap: int = 2, caption: str = "") -> None:
    """Write rows of images as one 8-bit PNG.

    Args:
        rows: tensors (N, C, H, W) in [0, 1], C 1 or 3, equal shapes; values outside are clipped.
        path: the PNG; written whole or not at all.
        gap: white pixels between images.
        caption: a line above the images.
    """
    batch = torch.stack([row.detach().float().cpu() for row in rows])  # (R, N, C, H, W)
    batch = F.pad(batch, (0, gap, 0, gap), value=1.0)
    R, N, C, H, W = batch.shape
    picture = batch.permute(0, 3, 1, 4, 2).reshape(R * H, N * W, C)[: -gap or None, : -gap or None]
    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    image = Image.fromarray(np.ascontiguousarray(pixels.squeeze(-1) if C == 1 else pixels))
    if caption:
        image = ImageOps.expand(image, (0, CAPTION, 0, 0), fill="white")
        ImageDraw.Draw(image).text((2, 0), caption, fill="black", font=ImageFont.load_default(CAPTION - 4))
    with atomic_file(path) as file:
        image.save(file, format="PNG")


class ReconstructionGrid:
    """Writes originals over reconstructions over their absolute difference (×4) for the first images of a run.

    Attach it to an evaluator whose output is a list of dictionaries with ``image`` and ``pred``. Smaller images are
    padded with black, to the right and below, to the size of the largest.

    Args:
        folder: where the PNGs go.
        name: file name without suffix; ``{epoch}`` is replaced.
        count: images in a row.
        total: images of the run, from which ``count`` are taken evenly, so that of a list in the order of its classes
            each is seen; None takes the first.
        between: keys of further images, a row each between originals and reconstructions.
    """

    def __init__(
        self,
        folder: str | Path,
        name: str = "epoch_{epoch:04d}",
        count: int = 8,
        total: int | None = None,
        between: Sequence[str] = (),
    ) -> None:
        self.folder, self.name, self.count = Path(folder), name, count
        self.keys = ("image", *between, "pred")
        self._shown = set(range(count)) if total is None else set(np.linspace(0, total - 1, count).round().tolist())
        self._seen = 0
        self._rows: list[list[torch.Tensor]] = [[] for _ in self.keys]

    def attach(self, engine: Engine) -> None:
        """Register on an evaluator."""
        engine.add_event_handler(Events.EPOCH_STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.write)

    def start(self, engine: Engine) -> None:
        """Forget the images of the run before."""
        self._rows, self._seen = [[] for _ in self.keys], 0

    def collect(self, engine: Engine) -> None:
        """Keep those images of a batch that will be shown."""
        for item in engine.state.output:
            if self._seen in self._shown:
                for row, key in zip(self._rows, self.keys, strict=True):
                    row.append(torch.as_tensor(item[key]).cpu())
            self._seen += 1

    def write(self, engine: Engine) -> None:
        """Write the picture."""
        if idist.get_rank() > 0 or not self._rows[0]:
            return
        _save_rows(self._rows, self.folder / f"{self.name.format(epoch=engine.state.epoch)}.png")


def save_comparison(
    path: str | Path,
    items: Sequence[Mapping[str, Any]],
    transform: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    keys: Sequence[str] = ("image", "pred"),
    count: int = 8,
) -> None:
    """Write what :class:`ReconstructionGrid` writes, from files that are there, in whatever run they were made.

    Args:
        path: the PNG.
        items: of a datalist, from which ``count`` are taken evenly; none, and nothing is written.
        transform: loads the images of an item.
        keys: of the original, of further images, and of the image whose difference from the original is shown.
        count: images in a row.
    """
    shown = [transform(item) for item in evenly(items, count)]
    if shown:
        _save_rows([[torch.as_tensor(item[key]) for item in shown] for key in keys], path)


def _save_rows(images: Sequence[Sequence[torch.Tensor]], path: str | Path) -> None:
    """Write rows of images, the last row's from the first being added as their absolute difference (×4)."""
    rows = [_padded_stack(row).float() for row in images]
    save_grid([*rows, 4 * (rows[0] - rows[-1]).abs()], path)


def _padded_stack(images: Sequence[torch.Tensor]) -> torch.Tensor:
    """(N, C, H, W) of images (C, h, w), each padded with zeros to the right and below."""
    H, W = (max(image.shape[axis] for image in images) for axis in (-2, -1))
    return torch.stack([F.pad(image, (0, W - image.shape[-1], 0, H - image.shape[-2])) for image in images])


def _attach_at_intervals(handler: Callable[[Engine], None], engine: Engine, interval: int) -> None:
    """Register a handler for every ``interval`` epochs and the last."""

    def is_due(engine: Engine, epoch: int) -> bool:
        return epoch % interval == 0 or epoch == engine.state.max_epochs

    engine.add_event_handler(Events.EPOCH_COMPLETED(event_filter=is_due), handler)


class SampleGrid:
    """Writes what a generator makes of the same latents all through a training, below a row of training images.

    Attach it to a trainer whose output has ``image`` in [-1, 1]. Written every ``interval`` epochs and after the last.

    Args:
        network: ``network(z, labels=...)`` gives images in [-1, 1]: the moving average.
        folder: where the PNGs go.
        interval: epochs between pictures.
        name: file name without suffix; ``{images}``, the images seen so far, is replaced.
        rows: of generated images; with classes, classes take turns.
        columns: images in a row.
        seed: of the first image; the others follow, as in :class:`medgen.inferers.GeneratorInferer`.
        size: side that smaller images, those of a growing network, are enlarged to; None leaves them as they are. The
            trainer's ``caption``, if it has one, stands above the images.
    """

    def __init__(
        self,
        network: nn.Module,
        folder: str | Path,
        interval: int = 1,
        name: str = "samples_{images:09d}",
        rows: int = 4,
        columns: int = 8,
        seed: int = 0,
        size: int | None = None,
    ) -> None:
        self.size = size
        self.network, self.folder, self.interval, self.name = network, Path(folder), interval, name
        self.rows, self.columns, self.seed = rows, columns, seed

    def attach(self, engine: Engine) -> None:
        """Register on a trainer."""
        _attach_at_intervals(self, engine, self.interval)

    @torch.no_grad()
    def __call__(self, engine: Engine) -> None:
        """Write the picture."""
        if idist.get_rank() > 0:
            return
        device = engine.state.device
        real = engine.state.output[0]["image"][: self.columns].float().cpu()
        if len(real) < self.columns:  # a small batch: black places
            real = torch.cat([real, real.new_full((self.columns - len(real), *real.shape[1:]), -1)])
        rows = [real]
        # not torch's generator: the network's weights came from its first numbers, and latents that equal weights are
        # far from all others
        seeds = range(self.seed, self.seed + self.rows * self.columns)
        latents = draw_latents(seeds, self.network.latent_dim).to(device)
        for row, z in enumerate(latents.split(self.columns)):
            labels = None
            if self.network.num_classes:
                labels = (row * self.columns + torch.arange(self.columns, device=device)) % self.network.num_classes
            rows.append(self.network(z, labels=labels).float().cpu())
        if self.size is not None:
            rows = [F.interpolate(row, size=self.size, mode="nearest") for row in rows]
        path = self.folder / f"{self.name.format(images=engine.images_seen)}.png"
        save_grid([row / 2 + 0.5 for row in rows], path, caption=getattr(engine, "caption", ""))


class DiffusionGrid:
    """Writes what a diffusion model makes of the same seeds and prompts all through a training, below training images.

    Attach it to a trainer whose output has whitened latents under ``image``. Written every ``interval`` epochs and
    after the last.

    Args:
        sampler: :class:`medgen.inferers.LatentDiffusionSampler`.
        network: the denoising network: the moving average.
        folder: where the PNGs go.
        interval: epochs between pictures.
        conditions: the sampler's arguments for the images, such as ``{"prompts": [...]}``: lists of which images take
            their entries in turn.
        name: file name without suffix; ``{epoch}`` is replaced.
        rows: of generated images.
        columns: images in a row.
        seed: of the first image; the others follow.
    """

    def __init__(
        self,
        sampler: Callable[..., torch.Tensor],
        network: nn.Module,
        folder: str | Path,
        interval: int = 1,
        conditions: dict[str, Sequence[Any]] | None = None,
        name: str = "samples_{epoch:04d}",
        rows: int = 2,
        columns: int = 8,
        seed: int = 0,
    ) -> None:
        self.sampler, self.network, self.folder, self.interval = sampler, network, Path(folder), interval
        self.conditions = {key: values for key, values in (conditions or {}).items() if values}
        self.name, self.rows, self.columns, self.seed = name, rows, columns, seed

    def attach(self, engine: Engine) -> None:
        """Register on a trainer."""
        _attach_at_intervals(self, engine, self.interval)

    @torch.no_grad()
    def __call__(self, engine: Engine) -> None:
        """Write the picture."""
        if idist.get_rank() > 0:
            return
        self.network.eval()
        real = self.sampler.decode(engine.state.output[0]["image"][: self.columns]).cpu()
        rows = [torch.cat([real, real.new_zeros((self.columns - len(real), *real.shape[1:]))])]
        for row in range(self.rows):
            places = range(row * self.columns, (row + 1) * self.columns)
            given = {key: [values[place % len(values)] for place in places] for key, values in self.conditions.items()}
            seeds = [self.seed + place for place in places]
            rows.append(self.sampler(seeds, self.network, **given).cpu())
        save_grid(rows, self.folder / f"{self.name.format(epoch=engine.state.epoch)}.png")
