"""Joining a process group."""

from __future__ import annotations

import pytest

from medgen import distributed
from medgen.errors import UserError


def test_overlay_without_torchrun_says_how_to_start_it(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match=r"torchrun --nproc_per_node=N -m monai\.bundle run"):
        distributed.start()
