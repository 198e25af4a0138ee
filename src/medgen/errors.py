"""Errors that a person reads: one line, what was expected, what was got, what to do."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType, TracebackType

from medgen.preemption import AGAIN

__all__ = ["UserError", "end_when_told", "find_user_error", "one_line_errors", "without_secrets"]


class UserError(ValueError):
    """A mistake the user can mend.

    The message is one line: what was expected, what was got, what to do.
    """


# A DataLoader worker sends its exception home as text: the type is kept only for the outermost one.
_IN_TEXT = re.compile(r"^\s*medgen\.[\w.]+Error: (.+)$", re.MULTILINE)


def find_user_error(error: BaseException | None) -> str | None:
    """The message of the first :class:`UserError` along the chain of causes, or None.

    MONAI wraps what happens inside a config or a transform in ``RuntimeError``s of its own, and a DataLoader worker
    turns the whole chain into text; both are searched.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        in_text = _IN_TEXT.search(str(error))
        if in_text:
            return in_text.group(1).strip()
        if isinstance(error, UserError):
            return str(error)
        error = error.__cause__ or error.__context__
    return None


def one_line_errors() -> None:
    """Print a :class:`UserError` as one line instead of the framework's traceback; the exit status stays 1.

    Bundles call this first, in ``initialize``, and with it :func:`end_when_told`. Every other exception keeps its
    traceback, and so does this one when the environment variable ``MEDGEN_TRACEBACK`` is set.
    """
    end_when_told()
    if os.environ.get("MEDGEN_TRACEBACK"):
        return
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        message = find_user_error(error)
        if issubclass(kind, KeyboardInterrupt):
            print("interrupted; a training goes on from its last checkpoint with --resume true", file=sys.stderr)
        elif message is None:
            previous(kind, error, trace)
        else:
            print(f"error: {message}", file=sys.stderr)

    sys.excepthook = hook


def end_when_told() -> None:
    """End this process at SIGTERM at once, with :data:`medgen.preemption.AGAIN` and without any cleaning up.

    What is written whole or not at all is safe, as it is from SIGKILL. The first process of a container would ignore
    the signal, and keep its GPU until the grace period is over. A training's
    :class:`~medgen.preemption.Termination` takes the place of this where there is something to save.

    Nothing is changed outside the main thread, where something else already acts on the signal, and in the processes of
    torchrun: these are never the first ones, and the signal's default ends them even while they wait for each other in
    a library, where Python's handlers are not heard.
    """
    is_main_thread = threading.current_thread() is threading.main_thread()
    if not is_main_thread or "TORCHELASTIC_RUN_ID" in os.environ or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        return
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # forked off in the meantime, with this handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        with suppress(Exception):  # it may be in the middle of a write
            sys.stdout.flush()
        os.write(2, b"ended by SIGTERM; the same command does what is left\n")
        # an exception would be swallowed, or reported as another, by every bare "except" that it passes on its way
        os._exit(AGAIN)

    signal.signal(signal.SIGTERM, end)


def without_secrets(address: str) -> str:
    """An address as messages show it: without user and password, nor what stands after ``?`` and ``#``.

    Args:
        address: ``scheme://user:password@host/path?token=...``; what has no ``://`` in it is left as it is.
    """
    scheme, slashes, rest = address.partition("://")
    # a password may itself hold "/", "?", "#" and "@"
    return scheme + slashes + (re.split("[?#;]", rest.rpartition("@")[2])[0] if slashes else "")
