"""One page that says how good a set of generated images is: ``medgen report``.

Importing this package imports neither MONAI nor torch: `medgen --help` asks it for a help line.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"files": ["make_report"], "measurements": ["Distance", "Measurements"]}
)
