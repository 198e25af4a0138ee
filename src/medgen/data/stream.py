"""Training data as an endless stream in which every item is a function of (seed, position) alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from monai import data
from monai.transforms import Randomizable
from torch.utils.data import Dataset, Sampler

from medgen.errors import UserError
from medgen.preemption import shielded_workers

__all__ = ["ResumableDataLoader", "SeedLoader", "ShieldedDataLoader", "derive_seed"]


def derive_seed(*parts: int) -> int:
    """One 32-bit seed from several non-negative integers, such as (seed, rank, images seen)."""
    # SeedSequence takes (1, 0) for (1,): the number of parts tells them apart
    return int(np.random.SeedSequence((len(parts), *parts)).generate_state(1)[0])


class _Positions(Sampler[int]):
    """Positions of this rank in the global stream, from the loader's own position on, without end."""

    def __init__(self, loader: ResumableDataLoader, rank: int, world_size: int) -> None:
        self.loader, self.rank, self.world_size = loader, rank, world_size

    def __iter__(self) -> Iterator[int]:
        position = self.loader.images_seen + self.rank
        while True:
            yield position
            position += self.world_size


class _AtPosition(Dataset):
    """Maps a position of the stream to an item of a dataset, with the random transforms seeded for that position."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self._pass, self._order = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> Any:
        n_pass, place = divmod(position, len(self.dataset))
        if n_pass != self._pass:
            order = np.random.default_rng(derive_seed(self.seed, n_pass)).permutation(len(self.dataset))
            self._pass, self._order = n_pass, order
        transform = getattr(self.dataset, "transform", None)
        if isinstance(transform, Randomizable):
            transform.set_random_state(seed=derive_seed(self.seed, 1, position))
        return self.dataset[int(self._order[place])]


class ShieldedDataLoader(data.DataLoader):
    """MONAI's data loader with workers that SIGTERM does not end (:func:`medgen.preemption.shielded_workers`).

    All loaders of a training, its validation's too, are of this kind: their process ends when its step is done. A
    worker that hangs in a read is killed, 5 seconds after it was told to end or when the process ends.
    """

    def __iter__(self) -> Iterator[Any]:
        """Start the workers."""
        with shielded_workers():
            batches = super().__iter__()
        for worker in getattr(batches, "_workers", ()):
            # torch and, as the process ends, multiprocessing mean SIGTERM by it, and the latter then waits without end
            worker._popen.terminate = worker._popen.kill
        return batches


class ResumableDataLoader(ShieldedDataLoader):
    """Data loader whose order and augmentation depend on (seed, position in the stream) and on nothing else.

    The stream has no end: each pass over the dataset is a permutation of its own. Batches do not depend on the number
    of workers, nor on where a training was interrupted: set :attr:`images_seen` before iterating. In a distributed run
    each rank takes every ``world_size``-th position.

    Args:
        dataset: a map-style dataset; the random transforms of a MONAI dataset's ``transform`` are reseeded per item.
        batch_size: images per rank and step.
        seed: seed of order and augmentation.
        num_workers: worker processes.
        epoch_images: images of an epoch, rounded up to whole steps, where epochs only say how often to validate, as
            in the training of GANs. Default: the dataset's.
        kwargs: passed on to :class:`monai.data.DataLoader`.

    Raises:
        UserError: the dataset holds fewer images than one step takes, or an epoch none.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int = 1,
        seed: int = 0,
        num_workers: int = 0,
        epoch_images: int | None = None,
        **kwargs: Any,
    ) -> None:
        rank, world_size = idist.get_rank(), idist.get_world_size()
        self.global_batch_size = batch_size * world_size
        if len(dataset) < self.global_batch_size:
            raise UserError(
                f"a training step takes {self.global_batch_size} images (batch_size {batch_size} × {world_size} "
                f"processes), the training split holds {len(dataset)}; lower --batch_size"
            )
        if epoch_images is None:
            self.epoch_length = len(dataset) // self.global_batch_size
        elif epoch_images > 0:
            self.epoch_length = -(-epoch_images // self.global_batch_size)
        else:
            raise UserError(f"epoch_images must be at least 1, got {epoch_images}; raise --tick_images")
        self.images_seen = 0
        super().__init__(
            _AtPosition(dataset, seed),
            batch_size=batch_size,
            sampler=_Positions(self, rank, world_size),
            num_workers=num_workers,
            **kwargs,
        )

    def __len__(self) -> int:
        """Steps in an epoch: whole batches in the dataset, or in ``epoch_images``."""
        return self.epoch_length

    def __iter__(self) -> Iterator[Any]:
        """Batches from position ``images_seen`` on; ``images_seen`` counts what was handed out, on all ranks."""
        for batch in super().__iter__():
            self.images_seen += self.global_batch_size
            yield batch


class SeedLoader:
    """Endless stream of seeds, of which none repeats, for a training on what a network draws itself.

    The seed at a position is a function of (seed, position): batches do not depend on where a training was interrupted
    or on the number of processes, of which each takes every ``world_size``-th position.

    Args:
        batch_size: seeds per rank and step.
        epoch_images: seeds of an epoch, rounded up to whole steps.
        seed: of the stream.

    Raises:
        UserError: an epoch, or a batch, of none.
    """

    def __init__(self, batch_size: int, epoch_images: int, seed: int = 0) -> None:
        if batch_size < 1 or epoch_images < 1:
            raise UserError(
                f"batch_size and tick_images must be at least 1, got {batch_size} and {epoch_images}; raise them"
            )
        self.rank, self.world_size = idist.get_rank(), idist.get_world_size()
        self.batch_size, self.global_batch_size = batch_size, batch_size * self.world_size
        self.seed, self.images_seen = seed, 0
        self.epoch_length = -(-epoch_images // self.global_batch_size)

    def __len__(self) -> int:
        """Steps in an epoch."""
        return self.epoch_length

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """``seed`` (B,) from position ``images_seen`` on; ``images_seen`` counts what was handed out, on all ranks."""
        while True:
            first = self.images_seen + self.rank
            positions = range(first, first + self.global_batch_size, self.world_size)
            self.images_seen += self.global_batch_size
            yield {"seed": torch.tensor([derive_seed(self.seed, 3, position) for position in positions])}
