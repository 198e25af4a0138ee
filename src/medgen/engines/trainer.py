"""Base of every training loop of the collection: a MONAI Trainer whose whole state is saved and resumed."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import ignite.distributed as idist
import torch
import torch.distributed as dist
from ignite.engine import EventEnum, Events
from monai.engines import Trainer
from monai.utils import convert_to_tensor
from monai.utils.enums import CommonKeys as Keys
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from medgen.data.stream import ResumableDataLoader, derive_seed
from medgen.errors import UserError
from medgen.precision import autocast
from medgen.preemption import Preempted, Termination
from medgen.weights import check_same_shapes

__all__ = ["GenerativeTrainer", "TrainingEvents", "autocast", "unwrap"]


KEPT_IMAGES = 8  # of the last step, in a checkpoint: as many as its pictures show


def unwrap(network: nn.Module) -> nn.Module:
    """The network itself, out of DistributedDataParallel."""
    return network.module if isinstance(network, DistributedDataParallel) else network


class TrainingEvents(EventEnum):
    """Events of a :class:`GenerativeTrainer` beside ignite's."""

    VALIDATION_DUE = "validation_due"  # it comes next, and may take as long as the epoch
    PREEMPTED = "preempted"  # the processes leave after it: what is to stay must be saved


class GenerativeTrainer(Trainer):
    """A :class:`monai.engines.Trainer` that repeats itself exactly.

    All random numbers of a step come from (seed, rank, images seen): torch's generators are reseeded before each step,
    and the data loader is a function of the same. Together with :meth:`training_state` this makes a resumed training
    end with the weights of an undisturbed one, bit for bit on the CPU.

    A training that goes on with another number of processes, and as many images in a step as before
    (:func:`medgen.engines.batch_per_process`), sees the same images in the same order with the same augmentation, and
    its learning rate, epochs and validations stay where they were. What is not the same: gradients are summed in
    another order, which rounds them otherwise; and what a network draws in a step (latents, noise, dropout), since that
    belongs to a rank. Such a training is another sample of the same, as with another seed.

    SIGTERM ends a training with :class:`medgen.preemption.Preempted`: all processes leave after the same step, or
    within the same validation, once :attr:`TrainingEvents.PREEMPTED` has had the state saved. After the last epoch
    nothing is left to save, and it ends as always.

    Subclasses implement ``_iteration`` and pass everything that has a ``state_dict`` to ``components``.

    Args:
        device: where the networks are.
        max_epochs: epochs to train.
        train_data_loader: endless loader; its ``len`` is the epoch.
        components: name -> object with ``state_dict`` and ``load_state_dict``: networks, optimisers, schedulers, EMA.
            None values are passed over (an optional component that is switched off).
        seed: seed of all random numbers of the training.
        amp: bfloat16 autocast where the device has it.
        train_handlers: MONAI or ignite handlers.
        kwargs: passed on to :class:`monai.engines.Trainer`.
    """

    def __init__(
        self,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: ResumableDataLoader,
        components: Mapping[str, Any],
        seed: int = 0,
        amp: bool = False,
        train_handlers: Sequence | None = None,
        **kwargs: Any,
    ) -> None:
        self.components = {name: part for name, part in components.items() if part is not None}
        self.seed = seed
        self.termination = Termination()
        self.epoch_end_due = False
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            data_loader=train_data_loader,
            event_names=[TrainingEvents],
            # MONAI's own amp is float16 with a scaler; see `autocast`
            amp=False,
            # batches stay batches: decollating costs time in every step and no postprocessing is done on them
            decollate=False,
            handlers=train_handlers,
            **kwargs,
        )
        self.use_amp = amp
        # each look waits for a GPU; on the CPU it costs nothing
        every = 1 if self.state.device.type == "cpu" else 10
        self.add_event_handler(Events.ITERATION_COMPLETED(every=every), lambda: self.check_finite())
        # after all handlers of the training
        self.add_event_handler(Events.STARTED, lambda: self._catch_up())
        self.add_event_handler(Events.ITERATION_COMPLETED, lambda: self._end_step())
        self.add_event_handler(Events.COMPLETED, lambda: setattr(self, "epoch_end_due", False))
        # once what an epoch's end does is done
        self.add_event_handler(Events.EPOCH_STARTED, lambda: self._leave_if_told())

    longer = "raise --max_epochs"  # what makes a training that is complete go on

    @property
    def images_seen(self) -> int:
        """Training images handed out so far, on all ranks."""
        return self.data_loader.images_seen

    @property
    def total_images(self) -> int:
        """Training images of the whole training."""
        return self.state.max_epochs * len(self.data_loader) * self.data_loader.global_batch_size

    @property
    def at_epoch_end(self) -> bool:
        """Whether the last step was the last of its epoch."""
        return self.state.iteration % len(self.data_loader) == 0

    @property
    def plan(self) -> str:
        """What the training will do, in words."""
        loader = self.data_loader
        return f"{self.state.max_epochs} epochs of {len(loader)} steps of {loader.global_batch_size} images"

    def run(self) -> None:
        """Train.

        Raises:
            Preempted: the process was told to end (SIGTERM); its exit code says that the same command goes on.
        """
        level = self.logger.level
        try:
            with self.termination:
                super().run()
        except Preempted:
            self.logger.setLevel(level)
            if dist.is_available() and dist.is_initialized():
                dist.destroy_process_group()  # a bundle's `finalize` is not reached
            raise

    def leave(self) -> None:
        """Have the state saved, and end: all processes, which have agreed to.

        Raises:
            Preempted: always.
        """
        self.fire_event(TrainingEvents.PREEMPTED)
        self.termination.wait()
        self.logger.setLevel(logging.CRITICAL)  # ignite would call this end an error
        raise Preempted

    def _leave_if_told(self) -> None:
        if self.termination.agreed():
            self.leave()

    def _end_step(self) -> None:
        # until all that an epoch's end does (validation) is done: a checkpoint saved before that says so
        self.epoch_end_due = self.at_epoch_end
        self._leave_if_told()

    def _catch_up(self) -> None:
        """Do what the end of an epoch does, if the training was told to end just before or in the middle of it."""
        if self.epoch_end_due and self.at_epoch_end:  # with another batch size the epoch may not be over
            self.fire_event(Events.EPOCH_COMPLETED)

    def count(self, images_seen: int) -> tuple[int, int]:
        """Iterations and epochs that were over when so many images had been seen."""
        iteration = images_seen // self.data_loader.global_batch_size
        return iteration, iteration // len(self.data_loader)

    def autocast(self) -> AbstractContextManager:
        """Context of mixed precision for this trainer's device."""
        return autocast(self.state.device, self.use_amp)

    @property
    def precision(self) -> str:
        """Precision of the networks' forward passes: ``bfloat16`` or ``float32``."""
        return "float32" if isinstance(self.autocast(), nullcontext) else "bfloat16"

    def check_finite(self) -> None:
        """See that all scalars of the last step are numbers: a training that has lost them never finds them again.

        Raises:
            UserError: one is infinite or not a number.
        """
        for name, value in (self.state.output or [{}])[0].items():
            if isinstance(value, torch.Tensor) and value.ndim:
                continue
            if not math.isfinite(value):
                raise UserError(
                    f"the {'loss' if name == Keys.LOSS else f'scalar {name}'} became {float(value)} at iteration "
                    f"{self.state.iteration}; resume from the last checkpoint, or start again with a lower learning "
                    "rate or --amp false"
                )

    def check_finite_weights(self) -> None:
        """See that no network holds infinity or NaN: a step can ruin it after its own loss was computed.

        Raises:
            UserError: names the network.
        """
        for name, part in self.components.items():
            values = unwrap(part).state_dict().values() if isinstance(part, nn.Module) else []
            if not all(value.isfinite().all() for value in values if value.is_floating_point()):
                raise UserError(
                    f"the {name} holds values that are not finite at iteration {self.state.iteration}, which is not "
                    "saved; resume from the last checkpoint with a lower learning rate, or choose other settings"
                )

    def update(self, optimizer: torch.optim.Optimizer, network: nn.Module, loss: torch.Tensor) -> None:
        """A step of an optimiser by the gradient of a loss, averaged over the processes.

        Not through DistributedDataParallel, whose hooks follow no double backward pass, and which expects a gradient of
        every parameter in every step.
        """
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if idist.get_world_size() > 1:
            # the same parameters have gradients in all processes: those that the loss depends on
            gradients = [p.grad for p in network.parameters() if p.grad is not None]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            flat /= idist.get_world_size()
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        optimizer.step()

    def share(self, *networks: nn.Module) -> None:
        """Hand the networks of rank 0 to all processes."""
        if idist.get_world_size() > 1:
            for network in networks:
                for value in network.state_dict().values():
                    dist.broadcast(value, 0)

    def seed_step(self) -> None:
        """Reseed torch's generators from (seed, rank, images seen): call first in every ``_iteration``."""
        torch.manual_seed(derive_seed(self.seed, 2, idist.get_rank(), self.images_seen))

    def training_state(self) -> dict[str, Any]:
        """Everything that a resumed training needs, as tensors and plain values: loads with ``weights_only=True``."""
        # the pictures that an epoch's end draws beside what a network makes
        images = self.state.output[0].get("image") if self.epoch_end_due and self.state.output else None
        return {
            "images_seen": self.images_seen,
            "epoch_end_due": self.epoch_end_due,
            "images": None if images is None else convert_to_tensor(images[:KEPT_IMAGES], device="cpu").clone(),
            "components": {name: unwrap(part).state_dict() for name, part in self.components.items()},
        }

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`training_state`.

        The position is the number of images seen, which means the same whatever the batch size and the number of
        processes: iteration and epoch follow from it.

        Raises:
            UserError: the state belongs to other networks: names the first part that does not fit.
        """
        extra = [name for name in state["components"] if name not in self.components]
        if extra:
            raise UserError(
                f"the checkpoint holds {', '.join(extra)}, which this training does not have; resume with the settings "
                "it was made with, or choose another --output_dir"
            )
        for name, part in self.components.items():
            part = unwrap(part)
            if name not in state["components"]:
                raise UserError(
                    f"the checkpoint holds no {name} ({', '.join(state['components'])}): it belongs to a training with "
                    "other settings; resume with the settings it was made with, or choose another --output_dir"
                )
            if isinstance(part, nn.Module):
                check_same_shapes(f"{name} of the checkpoint", part.state_dict(), state["components"][name])
            part.load_state_dict(state["components"][name])
        self.data_loader.images_seen = state["images_seen"]
        # epochs that are over: ignite counts the one it goes on with itself
        self.state.iteration, self.state.epoch = self.count(state["images_seen"])
        self.epoch_end_due = state.get("epoch_end_due", False)
        if state.get("images") is not None:
            self.state.output = [{"image": state["images"].to(self.state.device)}]
