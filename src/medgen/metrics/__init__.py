"""Measurements of generative models: distances between image sets, diversity, paired quality, memorisation.

Importing this package imports neither MONAI nor torch: radiomic features are computed in a process per core, and
MONAI's import costs each of them ten seconds. What needs them is imported on first use.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "anomaly": ["AnomalyScores", "body_region", "heat_map", "localisation_rate", "score_anomaly"],
        "arm_comparison": ["ArmFigure", "compare_arms"],
        "classification": ["classification_metrics", "pick_threshold"],
        "detection": [
            "auroc",
            "auroc_bootstrap",
            "auroc_delong",
            "auroc_source_subsampling",
            "average_precision",
            "average_precision_bootstrap",
            "delong_test",
            "permutation_power",
            "permutation_test",
            "permutation_tests",
            "sensitivity_at_specificity",
        ],
        "detection_table": ["detection_figures", "detection_report", "read_scores"],
        "distribution": [
            "FeatureSetMetric",
            "FrechetDistance",
            "FrechetDistanceMetric",
            "FrechetRadiomicDistance",
            "FrechetRadiomicDistanceMetric",
            "KernelDistance",
            "KernelDistanceMetric",
            "PRDC",
            "PRDCMetric",
            "SlicedWassersteinDistance",
            "SlicedWassersteinDistanceMetric",
        ],
        "diversity": ["pairwise_ms_ssim", "PairwiseMultiScaleSSIM", "PairwiseMultiScaleSSIMMetric"],
        "feature_set": ["extract_features", "FeatureSet"],
        "frd": ["frd_score"],
        "frechet": ["FeatureMoments", "frechet_distance"],
        "intervals": [
            "Baseline",
            "bootstrap_interval",
            "bootstrap_mean",
            "Estimate",
            "matched_distance",
            "prdc_intervals",
            "real_baseline",
        ],
        "kernel": ["kernel_distance"],
        "memorisation": ["audit_memorisation", "draw_worst_pairs", "MemorisationAudit"],
        "paired": ["HaarPSI", "match_pairs", "MDSI", "MultiScaleGMSD", "PAIRED_METRICS", "paired_quality"],
        "prdc": ["precision_recall_density_coverage"],
        "protocols": ["get_protocol", "make_extractor", "Protocol", "PROTOCOLS"],
        "radiomics": ["RadiomicsExtractor"],
        "reconstruction": ["ms_ssim_kernel_size", "MultiScaleSSIM", "shrink_enlarge"],
        "sliced_wasserstein": ["sliced_wasserstein_distance"],
    },
)
