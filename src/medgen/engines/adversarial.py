"""What the training loops of all GANs have in common."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any

import ignite.distributed as idist
import torch
import torch.distributed as dist
from torch import nn

from medgen.data.stream import ResumableDataLoader
from medgen.engines.trainer import GenerativeTrainer
from medgen.errors import UserError

__all__ = ["AdversarialTrainer", "batch_per_process", "exponential_moving_copy"]


def batch_per_process(total: int) -> int:
    """A process's share of the images in a step, by torchrun's WORLD_SIZE.

    With it a training that is stopped on one number of processes goes on with another: a step takes as many images as
    before, so that learning rate, epochs and checkpoints keep their meaning (:class:`GenerativeTrainer` says what stays
    the same and what does not).

    Raises:
        UserError: the processes cannot share them evenly.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if total % processes:
        raise UserError(
            f"{processes} processes cannot share the preset's {total} images of a step evenly; set --batch_size, which "
            "is each process's own, or start another number of processes"
        )
    return total // processes


def exponential_moving_copy(network: nn.Module) -> nn.Module:
    """A copy for the moving average: in evaluation mode, without gradients."""
    return copy.deepcopy(network).eval().requires_grad_(False)


class AdversarialTrainer(GenerativeTrainer):
    """Base of the trainers with a generator, a discriminator and a moving average of the generator.

    Several processes average their gradients after each backward pass instead of going through
    DistributedDataParallel, whose hooks do not follow a penalty's double backward pass; the networks of rank 0 are
    handed to all at the start.

    Args:
        device: where the networks are.
        max_epochs: epochs to train.
        train_data_loader: endless loader.
        generator: with ``image_size`` and ``num_classes``.
        discriminator: for the same size and classes.
        g_optimizer: of the generator.
        d_optimizer: of the discriminator.
        ema: copy of the generator that becomes its moving average (:func:`exponential_moving_copy`).
        components: more parts of the state; None values are passed over.
        train_handlers: MONAI or ignite handlers.
        kwargs: passed on to :class:`GenerativeTrainer`.

    Raises:
        UserError: networks that do not fit each other.
    """

    longer = "raise --max_images"

    def __init__(
        self,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: ResumableDataLoader,
        generator: nn.Module,
        discriminator: nn.Module,
        g_optimizer: torch.optim.Optimizer,
        d_optimizer: torch.optim.Optimizer,
        ema: nn.Module,
        components: Mapping[str, Any] | None = None,
        train_handlers: Sequence | None = None,
        **kwargs: Any,
    ) -> None:
        for name in ("image_size", "num_classes"):
            of_g, of_d = getattr(generator, name), getattr(discriminator, name)
            if of_g != of_d:
                raise UserError(
                    f"the generator has {name} {of_g}, the discriminator {of_d}; set network_def and discriminator_def "
                    "to one"
                )
        self.generator, self.discriminator, self.ema = generator, discriminator, ema
        self.g_optimizer, self.d_optimizer = g_optimizer, d_optimizer
        networks = {"generator": generator, "discriminator": discriminator, "ema": ema}
        optimizers = {"g_optimizer": g_optimizer, "d_optimizer": d_optimizer}
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            train_data_loader=train_data_loader,
            components={**networks, **optimizers, **(components or {})},
            train_handlers=train_handlers,
            non_blocking=True,  # from pinned memory
            **kwargs,
        )
        self.share(generator, discriminator, ema)

    def _label(self, label: torch.Tensor | None) -> torch.Tensor | None:
        """The batch's classes for a network that has some; None for one that has none.

        Raises:
            UserError: the images have none.
        """
        if not self.generator.num_classes:
            return None
        if label is None:
            raise UserError(
                f"a network with {self.generator.num_classes} classes needs a label for each image, the datalist has "
                "none; add the label to its items or set --num_classes 0"
            )
        return label.as_tensor() if hasattr(label, "as_tensor") else label

    def _mean_over_processes(self, value: torch.Tensor) -> None:
        if idist.get_world_size() > 1:
            dist.all_reduce(value)
            value /= idist.get_world_size()
