"""The precision that networks compute in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["autocast"]


def autocast(device: torch.device, amp: bool) -> AbstractContextManager:
    """bfloat16 autocast where ``amp`` is wanted and the device computes in it; otherwise nothing.

    bfloat16 has float32's range, so that no gradient scaler is needed. On the CPU, networks stay in float32: most
    processors emulate bfloat16, and runs are meant to repeat bit for bit.
    """
    if amp and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()
