"""What is left to do of a long piece of work on a list of items."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from medgen.data.shard import check_group_size, warn_of_missing
from medgen.errors import UserError

__all__ = ["group_batches", "pending_groups"]


def pending_groups(
    items: Sequence[Mapping[str, Any]],
    is_finished: Callable[[Mapping[str, Any]], bool],
    group_size: int,
    resume: bool,
    listed: Sequence[Mapping[str, Any]] | None = None,
    shard: str | None = None,
) -> list[Mapping[str, Any]]:
    """The items of those groups that are not finished.

    The list is cut into groups of ``group_size`` from its beginning, and a group with any item to do is done wholly.
    What works through the result in batches of ``group_size`` then meets the same batches as a run that was never
    interrupted, and so computes the same numbers to the last bit, although sums are rounded by the batch. Where many
    steps amplify that rounding (:class:`~medgen.inferers.StyleGAN2Projector` has figures), ``is_finished`` has to
    refuse results of another ``group_size``. The items of a shard (:func:`shard_of`) are whole groups already.

    Args:
        items: all items, or those of a shard, in their order.
        is_finished: whether an item's result lies there; raises a UserError if it was made with other settings.
        group_size: items computed together.
        resume: False refuses to go on where any item is finished.
        listed: the items before some were taken out, such as images that cannot be read: it is this list that is cut,
            since one shard knows nothing of the images that another found unreadable. Groups that lost an item are
            smaller, and batches come from :func:`group_batches`.
        shard: whose items these are; without, a warning says how many of several are missing.

    Returns:
        Items, in their order; empty when nothing is left.

    Raises:
        UserError: there are results and ``resume`` is False, or ``group_size`` is below 1.
    """
    check_group_size(group_size)
    finished = [is_finished(item) for item in items]
    if any(finished) and not resume:
        raise UserError(
            f"{sum(finished)} of {len(items)} results are in the output folder already; keep them and do the rest with "
            "--resume true, or choose another --output_dir"
        )
    warn_of_missing(finished.count(False), len(items), shard)
    groups = _groups(items, items if listed is None else listed, group_size)
    unfinished = {group for group, done in zip(groups, finished, strict=True) if not done}
    return [item for item, group in zip(items, groups, strict=True) if group in unfinished]


def group_batches(
    pending: Sequence[Mapping[str, Any]], listed: Sequence[Mapping[str, Any]], group_size: int
) -> list[list[int]]:
    """Batches for a data loader, a group each, of what :func:`pending_groups` has left of ``listed``.

    Args:
        pending: what is left to do.
        listed: the list that was cut into groups.
        group_size: of the groups.

    Returns:
        Positions in ``pending``, for a ``batch_sampler``.
    """
    check_group_size(group_size)
    numbered = enumerate(_groups(pending, listed, group_size))
    return [[place for place, _ in group] for _, group in itertools.groupby(numbered, key=lambda pair: pair[1])]


def _groups(items: Sequence[Mapping[str, Any]], listed: Iterable[Mapping[str, Any]], group_size: int) -> list[int]:
    """The group of each item: its place in ``listed``, by its image, over the size."""
    if items is listed:
        return [place // group_size for place in range(len(items))]
    group_of = {item["image"]: place // group_size for place, item in enumerate(listed)}
    return [group_of[item["image"]] for item in items]
