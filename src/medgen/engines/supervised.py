"""What the training loops of networks with a label for each image have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from monai.utils.enums import CommonKeys as Keys
from torch import nn

from medgen.data.stream import ResumableDataLoader
from medgen.engines.trainer import GenerativeTrainer

__all__ = ["LabelledTrainer"]


class LabelledTrainer(GenerativeTrainer):
    """One step of one optimiser per batch of images and labels.

    MONAI's SupervisedTrainer with the exact resume of the other trainings here.

    ``state.output[0]`` holds ``image``, ``label``, ``pred`` (logits) and the detached ``loss``.

    Args:
        device: where the network is.
        max_epochs: epochs to train.
        train_data_loader: batches with ``image`` (B, C, H, W) and ``label``.
        network: image to logits, alone or in DistributedDataParallel.
        optimizer: its optimiser.
        loss_function: of (logits, label), a scalar.
        seed: seed of all random numbers.
        amp: bfloat16 autocast where the device has it; the loss is computed in float32.
        train_handlers: MONAI or ignite handlers.
        components: more parts of the state, beside network and optimiser.
    """

    def __init__(
        self,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: ResumableDataLoader,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        seed: int = 0,
        amp: bool = False,
        train_handlers: Sequence | None = None,
        components: Mapping[str, Any] | None = None,
    ) -> None:
        self.network, self.optimizer, self.loss_function = network, optimizer, loss_function
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            train_data_loader=train_data_loader,
            components={"network": network, "optimizer": optimizer, **(components or {})},
            seed=seed,
            amp=amp,
            non_blocking=True,  # from pinned memory
            train_handlers=train_handlers,
        )

    def follow_step(self) -> None:
        """What comes after each step of the optimiser: nothing, unless a subclass says so."""

    def _iteration(self, engine: LabelledTrainer, batchdata: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
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
        self.follow_step()
        # a list, as of MONAI's own trainers after decollating: its loggers read the first entry
        return [{Keys.IMAGE: image, Keys.LABEL: label, Keys.PRED: logits.detach(), Keys.LOSS: loss.detach()}]
