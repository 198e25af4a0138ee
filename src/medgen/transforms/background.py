"""Applies a transform in threads, beside whatever comes next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from monai.transforms import Transform

from medgen.errors import UserError

__all__ = ["InBackground"]

WAITING = 4  # items for each thread: they keep it busy while the next batch comes; more would only fill the memory


class InBackground(Transform):
    """Hand items to threads that write them while the network makes the next ones.

    Encoding a PNG takes as long as a GPU takes to draw it, and Python's lock is free meanwhile. An error comes up at
    one of the next items, or in :meth:`finish`, which has to be called after the last.

    Threads get copies of an item's tensors, on the CPU: the items of a decollated batch are views of it, and one that
    waits would keep the whole batch in the GPU's memory.

    Args:
        transform: what to do with each item; what it returns is dropped.
        num_workers: threads; 0 does it at once.

    Raises:
        UserError: ``num_workers`` is below 0.
    """

    def __init__(self, transform: Callable[[Mapping[Hashable, Any]], Any], num_workers: int = 4) -> None:
        if num_workers < 0:
            raise UserError(f"num_workers must be at least 0, got {num_workers}")
        self.transform = transform
        self.num_workers = num_workers
        self._pool = ThreadPoolExecutor(num_workers) if num_workers else None
        self._waiting: deque[Future] = deque()

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        """Begin with one item and return it as it is."""
        if self._pool is None:
            self.transform(data)
            return data
        while self._waiting and (self._waiting[0].done() or len(self._waiting) >= WAITING * self.num_workers):
            self._waiting.popleft().result()
        own = {
            key: value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value
            for key, value in data.items()
        }
        self._waiting.append(self._pool.submit(self.transform, own))
        return data

    def finish(self) -> None:
        """Wait for all items begun; raises what one of them raised."""
        while self._waiting:
            self._waiting.popleft().result()
