"""Training of a network that draws masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from monai.utils.enums import CommonKeys as Keys
from torch import nn

from medgen.data.stream import ResumableDataLoader
from medgen.engines.trainer import GenerativeTrainer, unwrap

__all__ = ["SegmentationTrainer"]


class SegmentationTrainer(GenerativeTrainer):
    """One step of one optimiser per batch of images and masks.

    MONAI's SupervisedTrainer with the exact resume and the moving average of the other trainings here.

    ``state.output[0]`` holds ``image``, ``label``, ``pred`` (logits) and the detached ``loss``.

    Args:
        device: where the network is.
        max_epochs: epochs to train.
        train_data_loader: batches with ``image`` (B, C, H, W) in [0, 1] and ``label`` (B, 1, H, W), 0 or 1.
        network: image to logits (B, 1, H, W), alone or in DistributedDataParallel.
        optimizer: its optimiser.
        loss_function: of (logits, mask), a scalar.
        ema: ``torch.optim.swa_utils.AveragedModel`` of the network, or None.
        seed: seed of all random numbers.
        amp: bfloat16 autocast where the device has it; the loss is computed in float32.
        train_handlers: MONAI or ignite handlers.
        components: more parts of the state, beside network, optimiser and EMA.
    """

    def __init__(
        self,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: ResumableDataLoader,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        ema: nn.Module | None = None,
        seed: int = 0,
        amp: bool = False,
        train_handlers: Sequence | None = None,
        components: Mapping[str, Any] | None = None,
    ) -> None:
        self.network, self.optimizer, self.loss_function = network, optimizer, loss_function
        self.ema = ema
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            train_data_loader=train_data_loader,
            components={
                "network": network,
                "optimizer": optimizer,
                "ema": ema,
                **(components or {}),
            },
            seed=seed,
            amp=amp,
            non_blocking=True,  # from pinned memory
            train_handlers=train_handlers,
        )

    def _iteration(self, engine: SegmentationTrainer, batchdata: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
        batch = self.prepare_batch(batchdata, self.state.device, self.non_blocking)
        # batches carry MONAI's metadata; in the network it would only cost time
        image, mask = (part.as_tensor() if hasattr(part, "as_tensor") else part for part in batch)
        self.seed_step()
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            logits = self.network(image)
        loss = self.loss_function(logits.float(), mask)
        loss.backward()
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update_parameters(unwrap(self.network))
        # a list, as of MONAI's own trainers after decollating: its loggers read the first entry
        return [{Keys.IMAGE: image, Keys.LABEL: mask, Keys.PRED: logits.detach(), Keys.LOSS: loss.detach()}]
