"""Uses of an embedding: what latents of real images are good for.

Importing this package imports neither MONAI nor torch, which processes that compress images do without.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "augmentation_study": ["AugmentationStudy"],
        "compression": [
            "JPEG",
            "JPEG2000",
            "check_bits",
            "check_further",
            "compress",
            "decode_latents",
            "encode_latents",
            "fit_bytes",
            "select_split",
        ],
        "derived": ["check_space"],
        "directions": ["Directions", "ganspace", "move", "orthogonalise", "sefa"],
        "disentanglement": ["disentangle"],
        "factor_scores": ["factor_scores", "FactorScores"],
        "generator_study": ["GeneratorStudy"],
        "manipulation": ["changed_region", "manipulate", "parse_strengths"],
        "probes": ["Factor", "find_factors", "fit_probe", "Probe"],
        "runs": ["end_study", "Run", "run_all", "run_config", "Step"],
        "stylisation": ["StylisedSet", "select_images"],
    },
)
