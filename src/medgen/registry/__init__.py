"""MLflow model registry: whole bundles in, whole bundles out.

Importing this package does not import MLflow; the first use of one of its functions does.
"""

from __future__ import annotations

import lazy_loader

from medgen.output import disable_usage_reports

disable_usage_reports()  # before MLflow is imported

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "bundles": ["fetch", "fetch_model", "pull", "register_bundle"],
        "comparison": ["Comparison", "compare", "write_comparison"],
        "figures": ["direction_of"],
        "names": ["ResolvedModel", "resolve"],
        "runs": ["log_run"],
        "serving": ["serve"],
        "versions": ["Promotion", "RegisteredBundle", "VersionDetails", "list_models", "promote", "show"],
    },
)
