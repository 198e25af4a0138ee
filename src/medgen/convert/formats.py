"""Formats that networks are exported in; apart from the code, for a command line that has not imported torch yet."""

from __future__ import annotations

__all__ = ["FORMATS", "TOLERANCE"]

FORMATS = {"torchscript": ".ts", "torch_export": ".pt2", "onnx": ".onnx"}
# of the output's range: ONNX was measured to differ by up to 2e-6 on the networks of all bundles, the others by nothing
TOLERANCE = 1e-4
