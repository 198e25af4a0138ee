"""Pictures of a report, as data URIs: the page opens without a network and without files beside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

__all__ = ["feature_bars", "figure_png_uri", "image_grid", "intensity_histograms", "png_uri", "similarity_histogram"]

SAMPLES_COLOUR, REFERENCE_COLOUR, LIMIT_COLOUR = "#c2410c", "#1d4ed8", "#111827"
CELL = 160  # pixels of one image of a grid, at most
GAP = 3


def png_uri(pixels: np.ndarray) -> str:
    """An image as ``data:image/png``.

    Args:
        pixels: (H, W) or (H, W, 3), uint8.
    """
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def image_grid(images: Sequence[np.ndarray], columns: int = 8) -> str:
    """Images in rows, shrunk to a width at which many fit on a screen.

    Args:
        images: (C, H, W) in [0, 1], C 1 or 3; sizes may differ.
        columns: images in a row.
    """
    cells = [_cell(image) for image in images]
    width, height = max(cell.width for cell in cells), max(cell.height for cell in cells)
    rows = -(-len(cells) // columns)
    columns = min(columns, len(cells))
    mode = "RGB" if any(cell.mode == "RGB" for cell in cells) else "L"
    white = (255, 255, 255) if mode == "RGB" else 255
    grid = Image.new(mode, (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP), white)
    for number, cell in enumerate(cells):
        row, column = divmod(number, columns)
        grid.paste(cell.convert(mode), (column * (width + GAP), row * (height + GAP)))
    return png_uri(np.asarray(grid))


def _cell(image: np.ndarray) -> Image.Image:
    pixels = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    picture = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    scale = min(1.0, CELL / max(picture.size))
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS) if scale < 1 else picture


def intensity_histograms(histograms: dict[str, np.ndarray]) -> str:
    """How often each grey level occurs, one line per set.

    Args:
        histograms: name of a set -> (256,) counts of the grey levels 0 to 255; the first is drawn as the samples.
    """
    figure, axes = _figure(6.4, 2.6)
    for (name, counts), colour in zip(histograms.items(), (SAMPLES_COLOUR, REFERENCE_COLOUR), strict=False):
        share = counts / max(counts.sum(), 1)
        axes.plot(np.arange(len(share)), share, color=colour, linewidth=1.2, label=name)
    axes.set_yscale("log")  # a radiograph's background takes most of its pixels
    axes.set_xlabel("grey level")
    axes.set_ylabel("share of pixels")
    axes.set_xlim(0, 255)
    axes.legend(frameon=False, fontsize=8)
    return _svg_uri(figure)


def feature_bars(names: Sequence[str], differences: Sequence[float]) -> str:
    """Standardised differences of the features that differ most, the largest on top.

    Args:
        names: feature names.
        differences: mean of the samples minus mean of the reference, in standard deviations of the reference.
    """
    figure, axes = _figure(6.4, 0.8 + 0.26 * len(names))
    places = np.arange(len(names))[::-1]
    axes.barh(places, differences, color=[SAMPLES_COLOUR if d > 0 else REFERENCE_COLOUR for d in differences])
    axes.axvline(0, color=LIMIT_COLOUR, linewidth=0.8)
    axes.set_yticks(places, names, fontsize=8)
    # centred under the figure, not under the axes, which the names push aside
    figure.supxlabel("samples − reference, in standard deviations of the reference", fontsize=10)
    return _svg_uri(figure)


def similarity_histogram(samples: np.ndarray, held_out: np.ndarray, threshold: float, held_out_name: str) -> str:
    """Similarity to the nearest training image: samples, independent images and the limit between.

    Args:
        samples: (N,) similarities.
        held_out: (M,) the same of images that are no copies.
        threshold: similarity from which on a sample is flagged.
        held_out_name: what the second set is called.
    """
    figure, axes = _figure(6.4, 2.6)
    edges = np.linspace(
        min(samples.min(), held_out.min(), threshold), max(samples.max(), held_out.max(), threshold), 41
    )
    for values, colour, name in (
        (held_out, REFERENCE_COLOUR, f"{held_out_name} (n = {len(held_out)})"),
        (samples, SAMPLES_COLOUR, f"samples (n = {len(samples)})"),
    ):
        weights = np.full(len(values), 1 / len(values))
        axes.hist(values, edges, weights=weights, color=colour, alpha=0.55, label=name)
    axes.axvline(threshold, color=LIMIT_COLOUR, linewidth=1, linestyle="--", label="limit")
    axes.set_xlabel("similarity to the nearest training image")
    axes.set_ylabel("share of images")
    axes.legend(frameon=False, fontsize=8)
    return _svg_uri(figure)


def figure_png_uri(figure: Figure) -> str:
    """A figure with images in it, for which SVG would be several times larger."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    # Figure, not pyplot: no global state, no window system, safe in a thread
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return figure, axes


def _svg_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    # no date and a fixed salt: two reports of the same numbers are the same bytes
    with matplotlib.rc_context({"svg.hashsalt": "medgen"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
