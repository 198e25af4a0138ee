"""Pictures that a person can look at while a model trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from PIL import Image

__all__ = ["ReconstructionGrid", "save_grid"]


def save_grid(rows: Sequence[torch.Tensor], path: str | Path, gap: int = 2) -> None:
    """Write rows of images as one 8-bit PNG.

    Args:
        rows: tensors (N, C, H, W) in [0, 1], C 1 or 3, equal shapes; values outside are clipped.
        path: the PNG.
        gap: white pixels between images.
    """
    batch = torch.stack([row.detach().float().cpu() for row in rows])  # (R, N, C, H, W)
    batch = torch.nn.functional.pad(batch, (0, gap, 0, gap), value=1.0)
    R, N, C, H, W = batch.shape
    picture = batch.permute(0, 3, 1, 4, 2).reshape(R * H, N * W, C)[: -gap or None, : -gap or None]
    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(pixels.squeeze(-1) if C == 1 else pixels)).save(path)


class ReconstructionGrid:
    """Writes originals over reconstructions over their absolute difference (×4) for the first images of a run.

    Attach it to an evaluator whose output is a list of dictionaries with ``image`` and ``pred``.

    Args:
        folder: where the PNGs go.
        name: file name without suffix; ``{epoch}`` is replaced.
        count: images in a row.
    """

    def __init__(self, folder: str | Path, name: str = "epoch_{epoch:04d}", count: int = 8) -> None:
        self.folder, self.name, self.count = Path(folder), name, count
        self._images: list[torch.Tensor] = []
        self._reconstructions: list[torch.Tensor] = []

    def attach(self, engine: Engine) -> None:
        """Register on an evaluator."""
        engine.add_event_handler(Events.EPOCH_STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.write)

    def start(self, engine: Engine) -> None:
        """Forget the images of the run before."""
        self._images, self._reconstructions = [], []

    def collect(self, engine: Engine) -> None:
        """Keep the first images of the first batches."""
        for item in engine.state.output[: self.count - len(self._images)]:
            self._images.append(torch.as_tensor(item["image"]).cpu())
            self._reconstructions.append(torch.as_tensor(item["pred"]).cpu())

    def write(self, engine: Engine) -> None:
        """Write the picture."""
        if idist.get_rank() > 0 or not self._images:
            return
        image, pred = torch.stack(self._images), torch.stack(self._reconstructions).float()
        path = self.folder / f"{self.name.format(epoch=engine.state.epoch)}.png"
        save_grid([image, pred, 4 * (image - pred).abs()], path)
