"""Training of a classifier for a fixed number of steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ignite.distributed as idist
import torch
import torch.distributed as dist
from monai.utils.enums import CommonKeys as Keys
from torch import nn

from medgen.data.stream import ResumableDataLoader
from medgen.engines.trainer import GenerativeTrainer, TrainingEvents, unwrap

__all__ = ["ClassificationTrainer"]


class ClassificationTrainer(GenerativeTrainer):
    """One step of one optimiser per batch of images and classes.

    MONAI's SupervisedTrainer with the exact resume of the other trainings here. An epoch is what the loader says it is
    (``epoch_images``): with a number of images that does not depend on the data set, trainings on 100 and on 10,000
    images take the same number of steps.

    Of several processes each has its own statistics of batch normalisation; those of rank 0 are saved, and handed to
    all before a validation.

    ``state.output[0]`` holds ``image``, ``label``, ``pred`` (logits) and the detached ``loss``.

    Args:
        device: where the network is.
        max_epochs: epochs to train.
        train_data_loader: batches with ``image`` (B, C, H, W) and ``label`` (B,), a class from 0 each.
        network: image to logits (B, K), alone or in DistributedDataParallel.
        optimizer: its optimiser.
        loss_function: of (logits, classes), a scalar.
        lr_scheduler: stepped after each step; None for a constant learning rate.
        seed: seed of all random numbers.
        amp: bfloat16 autocast where the device has it; the loss is computed in float32.
        train_handlers: MONAI or ignite handlers.
        components: more parts of the state, beside network, optimiser and learning rate.
    """

    longer = "train anew with another --max_steps, which the learning rate follows"

    def __init__(
        self,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: ResumableDataLoader,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        seed: int = 0,
        amp: bool = False,
        train_handlers: Sequence | None = None,
        components: Mapping[str, Any] | None = None,
    ) -> None:
        self.network, self.optimizer, self.loss_function = network, optimizer, loss_function
        self.lr_scheduler = lr_scheduler
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            train_data_loader=train_data_loader,
            components={
                "network": network,
                "optimizer": optimizer,
                "lr_scheduler": lr_scheduler,
                **(components or {}),
            },
            seed=seed,
            amp=amp,
            non_blocking=True,  # from pinned memory
            train_handlers=train_handlers,
        )
        self.add_event_handler(TrainingEvents.VALIDATION_DUE, lambda: self._share_statistics())

    def _iteration(self, engine: ClassificationTrainer, batchdata: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
        batch = self.prepare_batch(batchdata, self.state.device, self.non_blocking)
        # batches carry MONAI's metadata; in the network it would only cost time
        image, label = (part.as_tensor() if hasattr(part, "as_tensor") else part for part in batch)
        self.seed_step()
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            logits = self.network(image)
        loss = self.loss_function(logits.float(), label)
        loss.backward()
        self.optimizer.step()
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        # a list, as of MONAI's own trainers after decollating: its loggers read the first entry
        return [{Keys.IMAGE: image, Keys.LABEL: label, Keys.PRED: logits.detach(), Keys.LOSS: loss.detach()}]

    def _share_statistics(self) -> None:
        if idist.get_world_size() > 1:
            for value in unwrap(self.network).buffers():
                dist.broadcast(value, 0)
