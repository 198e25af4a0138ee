"""Measurements of generative models: distances between image sets, diversity, paired quality, memorisation.

Importing this package imports neither MONAI nor torch: radiomic features are computed in a process per core, and
MONAI's import costs each of them ten seconds. What needs them is imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# public name -> module of this package that defines it
_HOME = {
    "audit_memorisation": "memorisation",
    "Baseline": "intervals",
    "bootstrap_interval": "intervals",
    "bootstrap_mean": "intervals",
    "draw_worst_pairs": "memorisation",
    "Estimate": "intervals",
    "extract_features": "feature_set",
    "FeatureMoments": "frechet",
    "FeatureSet": "feature_set",
    "FeatureSetMetric": "distribution",
    "frd_score": "frd",
    "frechet_distance": "frechet",
    "FrechetDistance": "distribution",
    "FrechetDistanceMetric": "distribution",
    "FrechetRadiomicDistance": "distribution",
    "FrechetRadiomicDistanceMetric": "distribution",
    "get_protocol": "protocols",
    "HaarPSI": "paired",
    "kernel_distance": "kernel",
    "KernelDistance": "distribution",
    "KernelDistanceMetric": "distribution",
    "make_extractor": "protocols",
    "match_pairs": "paired",
    "MDSI": "paired",
    "MemorisationAudit": "memorisation",
    "ms_ssim_kernel_size": "reconstruction",
    "MultiScaleGMSD": "paired",
    "MultiScaleSSIM": "reconstruction",
    "PAIRED_METRICS": "paired",
    "paired_quality": "paired",
    "pairwise_ms_ssim": "diversity",
    "PairwiseMultiScaleSSIM": "diversity",
    "PairwiseMultiScaleSSIMMetric": "diversity",
    "PRDC": "distribution",
    "prdc_intervals": "intervals",
    "PRDCMetric": "distribution",
    "precision_recall_density_coverage": "prdc",
    "Protocol": "protocols",
    "PROTOCOLS": "protocols",
    "RadiomicsExtractor": "radiomics",
    "real_baseline": "intervals",
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
