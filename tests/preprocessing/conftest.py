"""What the tests of several commands share."""

from __future__ import annotations

import pytest
from here import convert_here

from preprocessing import _convert as c


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convert without the pool."""
    monkeypatch.setattr(c, "_pool", convert_here)
