"""When to validate."""

from __future__ import annotations

from ignite.engine import Engine, Events
from monai.engines import Evaluator
from monai.handlers import ValidationHandler

from medgen.engines.trainer import GenerativeTrainer, TrainingEvents

__all__ = ["ValidationAtIntervals"]


class ValidationAtIntervals(ValidationHandler):
    """Validates every ``interval`` epochs and after the last one.

    MONAI's own handler leaves out the last epochs where their number is no multiple of the interval, and validates
    never, and so saves no model, in a training shorter than one interval.

    The epoch's last step is saved before (:attr:`~medgen.engines.trainer.TrainingEvents.VALIDATION_DUE`), so that a
    process that is killed in the middle of a validation loses nothing but its own time, and it is made anew after the
    training was resumed. One that is told to end (:mod:`medgen.preemption`) breaks it off. Shards differ in length, so
    that processes cannot ask each other after each batch. Each asks once: when it is told to end, or after its last
    batch, before the metrics of all are put together. Where a cluster takes one of several nodes it may so wait for the
    others until it is killed; they then end as well.

    Args:
        interval: epochs between validations.
        validator: evaluator to run.
    """

    def __init__(self, interval: int, validator: Evaluator) -> None:
        super().__init__(interval=interval, validator=validator)

    def attach(self, engine: GenerativeTrainer) -> None:
        """Register on a trainer."""

        def is_due(engine: Engine, epoch: int) -> bool:
            return epoch % self.interval == 0 or epoch == engine.state.max_epochs

        engine.add_event_handler(Events.EPOCH_COMPLETED(event_filter=is_due), self)
        self.validator.add_event_handler(Events.ITERATION_COMPLETED, self.stop_if_told, engine)

    def __call__(self, engine: GenerativeTrainer) -> None:
        """Validate.

        Raises:
            Preempted: the processes were told to end.
        """
        engine.fire_event(TrainingEvents.VALIDATION_DUE)
        super().__call__(engine)
        if engine.termination.is_agreed:
            engine.leave()

    def stop_if_told(self, validator: Evaluator, engine: GenerativeTrainer) -> None:
        """Break the validation off where a process has been told to end."""
        is_last = validator.state.iteration == validator.state.epoch_length
        if (is_last or engine.termination.requested) and engine.termination.agreed():
            validator.terminate(skip_completed=True)
