"""Training of a network that draws masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from medgen.engines.supervised import LabelledTrainer
from medgen.engines.trainer import unwrap

__all__ = ["SegmentationTrainer"]


class SegmentationTrainer(LabelledTrainer):
    """One step of one optimiser per batch of images and masks, with a moving average of the network.

    Args:
        args: as of :class:`medgen.engines.LabelledTrainer`; ``image`` in [0, 1], ``label`` (B, 1, H, W), 0 or 1, and
            logits of that shape.
        ema: ``torch.optim.swa_utils.AveragedModel`` of the network, or None.
        components: more parts of the state, beside network, optimiser and EMA.
        kwargs: likewise.
    """

    def __init__(
        self,
        *args: Any,
        ema: nn.Module | None = None,
        components: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.ema = ema
        super().__init__(*args, components={"ema": ema, **(components or {})}, **kwargs)

    def follow_step(self) -> None:
        """The moving average follows the network."""
        if self.ema is not None:
            self.ema.update_parameters(unwrap(self.network))
