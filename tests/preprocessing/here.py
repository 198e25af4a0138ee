"""Conversion without the pool of processes, whose start takes most of a small run's time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from preprocessing import _convert as c


def convert_here(
    todo: Sequence[c.Job], task: c.Task, target: str, workers: int, record: Callable[[c.Outcome], None]
) -> None:
    """In the place of ``preprocessing._convert._pool``: one file after the other, in this process."""
    for job in todo:
        record(c.convert_file(job, task, target))
