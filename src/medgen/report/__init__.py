"""One page that says how good a set of generated images is: ``medgen report``.

Importing this package imports neither MONAI nor torch: `medgen --help` asks it for a help line.
"""

from __future__ import annotations

from typing import Any

__all__ = ["DEFAULT_PROTOCOLS", "make_report"]

DEFAULT_PROTOCOLS = ("frd_v1", "radiomics")  # need no weights


def make_report(*args: Any, **kwargs: Any) -> Any:
    """See :func:`medgen.report.measure.make_report`."""
    from medgen.report import measure

    return measure.make_report(*args, **kwargs)
