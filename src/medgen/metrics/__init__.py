"""Measurements that neither MONAI nor torchmetrics ship."""

from __future__ import annotations

from medgen.metrics.reconstruction import MultiScaleSSIM, ms_ssim_kernel_size, shrink_enlarge

__all__ = ["MultiScaleSSIM", "ms_ssim_kernel_size", "shrink_enlarge"]
