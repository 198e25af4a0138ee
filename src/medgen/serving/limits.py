"""What ends a request without being its fault: the server's time limit, and parts that do not lie on the server."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from time import monotonic

from medgen.errors import UserError

__all__ = ["ARRIVED", "LateError", "UnavailableError", "check_time", "seconds_left", "time_limit"]

#: when the request that is being answered had arrived, by the monotonic clock; None where that was not noted
ARRIVED: ContextVar[float | None] = ContextVar("arrived", default=None)
_END: ContextVar[float] = ContextVar("end", default=math.inf)


class UnavailableError(UserError):
    """The request is right, and this server lacks what it takes to answer it: HTTP 503."""


class LateError(UserError):
    """The time of the request is up: HTTP 504."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Limit what :func:`check_time` allows, from the arrival of the request on, or from now.

    Args:
        seconds: for the answer.
    """
    arrived = ARRIVED.get()
    token = _END.set((monotonic() if arrived is None else arrived) + seconds)
    try:
        yield
    finally:
        _END.reset(token)


def seconds_left() -> float:
    """Of the request that is being answered; the longest that a lock can wait where there is no limit."""
    return min(max(0.0, _END.get() - monotonic()), threading.TIMEOUT_MAX)


def check_time() -> None:
    """End what nobody waits for any more: a thread goes on computing after its client was told of the timeout.

    Raises:
        LateError: the time is up.
    """
    if not seconds_left():
        raise LateError(
            "the answer takes longer than the server's time limit; send fewer images, samples or steps, or start the "
            "server with more seconds in MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT"
        )
