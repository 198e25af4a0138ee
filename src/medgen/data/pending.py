"""What is left to do of a long piece of work on a list of items."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from medgen.errors import UserError

__all__ = ["pending_groups"]


def pending_groups(
    items: Sequence[Mapping[str, Any]],
    is_finished: Callable[[Mapping[str, Any]], bool],
    group_size: int,
    resume: bool,
) -> list[Mapping[str, Any]]:
    """The items of those groups that are not finished.

    The list is cut into groups of ``group_size`` from its beginning, and a group with any item to do is done wholly.
    What works through the result in batches of ``group_size`` then meets the same batches as a run that was never
    interrupted, and so computes the same numbers to the last bit, although sums are rounded by the batch. Where many
    steps amplify that rounding (:class:`~medgen.inferers.StyleGAN2Projector` has figures), ``is_finished`` has to
    refuse results of another ``group_size``.

    Args:
        items: all items, in their order.
        is_finished: whether an item's result lies there; raises a UserError if it was made with other settings.
        group_size: items computed together.
        resume: False refuses to go on where any item is finished.

    Returns:
        Items, in their order; empty when nothing is left.

    Raises:
        UserError: there are results and ``resume`` is False, or ``group_size`` is below 1.
    """
    if group_size < 1:
        raise UserError(f"batch_size must be a whole number of at least 1, got {group_size}; set --batch_size")
    finished = [is_finished(item) for item in items]
    if any(finished) and not resume:
        raise UserError(
            f"{sum(finished)} of {len(items)} results are in the output folder already; keep them and do the rest with "
            "--resume true, or choose another --output_dir"
        )
    groups = range(0, len(items), group_size)
    unfinished = [start for start in groups if not all(finished[start : start + group_size])]
    return [item for start in unfinished for item in items[start : start + group_size]]
