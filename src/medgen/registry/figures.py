"""Which way a figure is better."""

from __future__ import annotations

__all__ = ["BOUNDS", "direction_of"]

HIGHER = (
    "accuracy",
    "auroc",
    "average_precision",
    "coverage",
    "dice",
    "haarpsi",
    "iou",
    "ms_ssim",
    "precision",
    "psnr",
)
HIGHER += ("recall", "sensitivity", "specificity", "ssim")
LOWER = ("fid", "frd", "hausdorff95_pixels", "kid", "l1", "l2", "loss", "lpips", "mae", "mdsi", "memorised_share")
LOWER += ("ms_gmsd", "mse", "surface_distance_pixels", "swd")
# ends of an interval's names
BOUNDS = ("low", "high")
# of real images, of spreads, of settings, and of diversity, where neither more nor less is better
NEITHER = {*BOUNDS, "kernel", "real", "reference", "samples", "sd", "test", "threshold"}


def direction_of(metric: str) -> str | None:
    """Which way a metric is better, by its name in ``metrics.json``.

    Args:
        metric: such as ``auroc_mse_full``, ``val_frd`` or ``ms_ssim``.

    Returns:
        "higher" or "lower"; None where that is not known, or neither is.
    """
    name = metric.removeprefix("val_")
    words = name.split("_")
    if words[-1] in NEITHER or "minus" in words:
        return None
    for direction, known in (("higher", HIGHER), ("lower", LOWER)):
        if any(name == key or name.startswith(f"{key}_") for key in known):
            return direction
    return None
