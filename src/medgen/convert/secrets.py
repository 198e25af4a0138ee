"""Addresses as messages show them."""

from __future__ import annotations

import re

__all__ = ["without_secrets"]


def without_secrets(address: str) -> str:
    """An address without a user, a password, or what stands after ``?`` and ``#``, where tokens are.

    Args:
        address: ``scheme://user:password@host/path?token=...``; what has no ``://`` in it is left as it is.
    """
    scheme, slashes, rest = address.partition("://")
    # a password may itself hold "/", "?", "#" and "@"
    return scheme + slashes + (re.split("[?#;]", rest.rpartition("@")[2])[0] if slashes else "")
