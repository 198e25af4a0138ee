"""Training of a classifier for a fixed number of steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ignite.distributed as idist
import torch
import torch.distributed as dist

from medgen.engines.supervised import LabelledTrainer
from medgen.engines.trainer import TrainingEvents, unwrap

__all__ = ["ClassificationTrainer"]


class ClassificationTrainer(LabelledTrainer):
    """One step of one optimiser per batch of images and classes.

    An epoch is what the loader says it is (``epoch_images``): with a number of images that does not depend on the data
    set, trainings on 100 and on 10,000 images take the same number of steps.

    Of several processes each has its own statistics of batch normalisation; those of rank 0 are saved, and handed to
    all before a validation.

    Args:
        args: as of :class:`medgen.engines.LabelledTrainer`; ``label`` (B,), a class from 0 each, and logits (B, K).
        lr_scheduler: stepped after each step; None for a constant learning rate.
        components: more parts of the state, beside network, optimiser and learning rate.
        kwargs: likewise.
    """

    longer = "train anew with another --max_steps, which the learning rate follows"

    def __init__(
        self,
        *args: Any,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        components: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.lr_scheduler = lr_scheduler
        super().__init__(*args, components={"lr_scheduler": lr_scheduler, **(components or {})}, **kwargs)
        self.add_event_handler(TrainingEvents.VALIDATION_DUE, lambda: self._share_statistics())

    def follow_step(self) -> None:
        """The learning rate goes on."""
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()

    def _share_statistics(self) -> None:
        if idist.get_world_size() > 1:
            for value in unwrap(self.network).buffers():
                dist.broadcast(value, 0)
