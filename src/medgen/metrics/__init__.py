"""Measurements of generative models: distances between image sets, diversity, paired quality, memorisation.

Importing this package imports neither MONAI nor torch: radiomic features are computed in a process per core, and MONAI's
import costs each of them ten seconds. What needs them is imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# public name -> module of this package that defines it
_HOME = {
    "MultiScaleSSIM": "reconstruction",
    "ms_ssim_kernel_size": "reconstruction",
    "shrink_enlarge": "reconstruction",
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
