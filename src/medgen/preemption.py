"""Being told to end: SIGTERM leads to a checkpoint, and to an exit code that means "again"."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

__all__ = ["AGAIN", "Preempted", "Termination", "shielded_workers"]

logger = logging.getLogger(__name__)

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
    just ending: a notebook that lives on gets its own handler back with the end of its next training. After every other
    end the handler is the one of before.

    Raises:
        UserError: the processes cannot reach each other over gloo.
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
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            try:
                self._group = dist.new_group(backend="gloo")
            except RuntimeError as error:
                from medgen.errors import UserError  # which imports this module

                what = str(error).partition("\n")[0]
                raise UserError(
                    f"the processes cannot reach each other over gloo ({what}); set GLOO_SOCKET_IFNAME to "
                    "the network interface that the nodes share, as NCCL_SOCKET_IFNAME"
                ) from error
        if threading.current_thread() is threading.main_thread():
            before = signal.signal(signal.SIGTERM, self._note)
            ended = getattr(before, "__self__", None)
            # a training of this process that was told to end has left its own
            self._before = ended._before if isinstance(ended, Termination) else before
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

        Where a process has gone without a word (its node is lost), the others take it for yes. Where they train over
        NCCL, they end then and there, with :data:`AGAIN` and without a checkpoint: a sum of gradients over NCCL that
        waits for the lost process holds up the GPU, and whoever reads a weight from it, for good.
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
                if "nccl" in dist.get_backend():
                    logger.warning("stopped by the end of another process; the checkpoint before stays the newest")
                    os._exit(AGAIN)
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
    which they look for every few seconds, and when it says so (:class:`medgen.data.ShieldedDataLoader`).
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
