"""Shares of a list of items, so that any number of processes work through it without a word between them."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence, Sized
from typing import Any, TypeVar

from medgen.errors import UserError

__all__ = ["parse_shard", "shard_line", "shard_of", "warn_of_missing"]

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

FORM = re.compile(r"([0-9]{1,9})/([0-9]{1,9})", re.ASCII)


def parse_shard(shard: Any) -> tuple[int, int] | None:
    """The setting ``--shard i/n``, the ``i``-th of ``n`` shares counted from 0.

    ``i`` is what a scheduler calls the index of an array's task (``JOB_COMPLETION_INDEX`` of an Indexed Job,
    ``SLURM_ARRAY_TASK_ID``).

    Args:
        shard: "0/4" to "3/4"; None, or "null" or "none" as a command line gives them, for all.

    Returns:
        ``i`` and ``n``; None for all.

    Raises:
        UserError: any other text.
    """
    if shard is None or (isinstance(shard, str) and shard.lower() in ("", "null", "none")):
        return None
    found = FORM.fullmatch(shard) if isinstance(shard, str) else None
    index, count = (int(number) for number in found.groups()) if found else (0, 0)
    if index >= count:
        raise UserError(f"shard must be i/n with i from 0 to n - 1, such as 0/4 to 3/4, got {shard!r}; set --shard")
    return index, count


def shard_of(items: Sequence[Item], shard: Any, group_size: int = 1) -> list[Item]:
    """A shard's items.

    The list is cut into groups of ``group_size`` from its beginning, as :func:`pending_groups` cuts it, and group ``g``
    belongs to shard ``g`` mod ``n``. Groups stay whole, since sums are rounded by the batch: each image then comes out
    with the bits that one process would have given it. They are dealt in turn and not in runs, since neighbours in a
    list are alike (one scanner, one size, one prompt): all shards then take about as long.

    Args:
        items: of all shards, in the same order in each.
        shard: see :func:`parse_shard`.
        group_size: items computed together.

    Returns:
        The items, in their order: all of them without a shard, none where there are more shards than groups.

    Raises:
        UserError: no such shard, or ``group_size`` is below 1.
    """
    check_group_size(group_size)
    part = parse_shard(shard)
    if part is None:
        return list(items)
    index, count = part
    return [item for number, item in enumerate(items) if number // group_size % count == index]


def check_group_size(group_size: int) -> None:
    """See that items computed together are at least one; raises a UserError."""
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise UserError(f"batch_size must be a whole number of at least 1, got {group_size!r}; set --batch_size")


def shard_line(shard: str, part: Sized, items: Sized, folder: Any) -> str:
    """What a shard says at its end.

    Args:
        shard: its name, i/n.
        part: its items.
        items: those of all shards.
        folder: of the results.
    """
    return (
        f"shard {shard}: {len(part)} of {len(items)} items are done in {folder}; when all shards are, the same command "
        "without --shard and with --resume true writes the tables and pictures"
    )


def warn_of_missing(missing: int, count: int, shard: Any = None) -> None:
    """Say what a run without a shard does that finds a part of its items done: it may merge shards too early.

    Args:
        missing: items to do.
        count: all items.
        shard: see :func:`parse_shard`; a shard says nothing, since most of what it finds is its own.
    """
    if 0 < missing < count and parse_shard(shard) is None:
        logger.warning(
            f"{missing:,} of {count:,} items are missing; this process does them now (if it merges shards: are all of "
            "them done?)"
        )
