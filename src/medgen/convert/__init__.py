"""Reading other projects' weights. No pickle is executed: :mod:`medgen.convert.restricted` builds tensors only."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# public name -> module of this package that defines it
_HOME = {
    "Record": "restricted",
    "StoredTensor": "restricted",
    "module_state_dict": "restricted",
    "read_module_weights": "restricted",
    "read_records": "restricted",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
