"""Being told to end: SIGTERM leads to a checkpoint, and to an exit code that means "again"."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

__all__ = ["AGAIN", "Preempted", "Termination", "shielded_workers"]

AGAIN = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, start the same command again


class Preempted(SystemExit):
    """Ends a process that was told to end, with :data:`AGAIN`, once its state is saved."""

    def __init__(self) -> None:
        super().__init__(AGAIN)


class Termination:
    """Whether the processes of a training have been told to end.

    A context, in which SIGTERM sets a flag and does nothing else: a second one changes nothing, one in the middle of a
    save does not disturb it. Ctrl+C stays what it is. Outside the main thread, where Python allows no handler, no
    process hears the signal by itself, and follows the others.

    Several processes go by :meth:`agreed`, since a cluster that takes one node of several tells that one alone: a
    collective over gloo on the CPU, whatever the backend of the training.

    After :class:`Preempted` the signal stays without effect, for a launcher sends another one to processes that are
    just ending; after every other end the handler is the one of before.
    """

    def __init__(self) -> None:
        self.requested = False  # this process has been told
        self.is_agreed = False  # and all know
        self.cause = "SIGTERM"
        self._before: Any = None
        self._group: Any = None
        self._process = 0

    def __enter__(self) -> Termination:
        from torch import distributed as dist

        self.requested = self.is_agreed = False
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        from torch import distributed as dist

        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None
        if self._before is not None and not isinstance(error, Preempted):
            signal.signal(signal.SIGTERM, self._before)
        self._before = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._process:
            self.requested = True
        else:  # forked off in the meantime, with this handler: its parent ends it so
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def agreed(self) -> bool:
        """Whether any process has been told to end: all must ask at the same place, and all get the same answer.

        Where a process has gone without a word (its node is lost), the others take it for yes.
        """
        told = self.requested  # read once: the signal may come between
        if self._group is not None and not self.is_agreed:
            import torch
            from torch import distributed as dist

            flag = torch.tensor(told, dtype=torch.uint8)
            try:
                dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
                told = bool(flag)
            except RuntimeError:  # the connection to it is closed
                if not told:
                    self.cause = "the end of another process"
                told = True
        self.is_agreed = self.is_agreed or told
        return self.is_agreed

    def wait(self) -> None:
        """Let all processes come here before any goes on: a launcher kills the rest soon after the first has ended."""
        if self._group is not None:
            from contextlib import suppress

            from torch import distributed as dist

            with suppress(RuntimeError):  # one has gone
                dist.barrier(self._group)


@contextmanager
def shielded_workers() -> Iterator[None]:
    """Context in which processes are started that no SIGTERM ends: the workers of a training's data loaders.

    SLURM sends the signal to all processes of a step. A worker that died of it would take its training down with a
    RuntimeError in the middle of a step. What the parent blocks, its forks block for good; they end with the parent,
    which they look for every few seconds, and when it says so.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
