"""Pictures as the base64 text of requests and answers."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image


def as_base64(pixels: np.ndarray, kind: str = "PNG") -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=kind)
    return base64.b64encode(file.getvalue()).decode()


def picture(text: str) -> np.ndarray:
    """Pixels of a base64 PNG."""
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        return np.asarray(image)
