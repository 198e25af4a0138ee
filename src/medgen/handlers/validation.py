"""When to validate."""

from __future__ import annotations

from ignite.engine import Engine, Events
from monai.engines import Evaluator
from monai.handlers import ValidationHandler

__all__ = ["ValidationAtIntervals"]


class ValidationAtIntervals(ValidationHandler):
    """Validates every ``interval`` epochs and after the last one.

    MONAI's own handler leaves out the last epochs where their number is no multiple of the interval, and validates
    never, and so saves no model, in a training shorter than one interval.

    Args:
        interval: epochs between validations.
        validator: evaluator to run.
    """

    def __init__(self, interval: int, validator: Evaluator) -> None:
        super().__init__(interval=interval, validator=validator)

    def attach(self, engine: Engine) -> None:
        """Register on a trainer."""

        def is_due(engine: Engine, epoch: int) -> bool:
            return epoch % self.interval == 0 or epoch == engine.state.max_epochs

        engine.add_event_handler(Events.EPOCH_COMPLETED(event_filter=is_due), self)
