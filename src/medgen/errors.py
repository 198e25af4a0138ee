"""Errors that a person reads: one line, what was expected, what was got, what to do."""

from __future__ import annotations

import os
import re
import sys
from types import TracebackType

__all__ = ["UserError", "find_user_error", "one_line_errors", "without_secrets"]


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

    Bundles call this first, in ``initialize``. Every other exception keeps its traceback, and so does this one when
    the environment variable ``MEDGEN_TRACEBACK`` is set.
    """
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


def without_secrets(address: str) -> str:
    """An address as messages show it: without user and password, nor what stands after ``?`` and ``#``.

    Args:
        address: ``scheme://user:password@host/path?token=...``; what has no ``://`` in it is left as it is.
    """
    scheme, slashes, rest = address.partition("://")
    # a password may itself hold "/", "?", "#" and "@"
    return scheme + slashes + (re.split("[?#;]", rest.rpartition("@")[2])[0] if slashes else "")
