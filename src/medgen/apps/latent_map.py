"""Latents in the plane: a page that a browser opens without a network, and a picture."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgen.apps.probes import Factor
from medgen.errors import UserError
from medgen.output import atomic_file, atomic_write_text

__all__ = ["map_latents", "write_map_page", "write_map_picture"]

METHODS = ("pca", "umap")
ABSENT, PRESENT, UNKNOWN = "#9ca3af", "#c2410c", "#e5e7eb"
SCALE = "Viridis"
PANELS_IN_A_ROW = 4
PRIVATE = "This page holds identifiers, ages and sexes of patients: it is not for publication."

Array = NDArray[np.float64]


def map_latents(latents: Array, method: str = "pca", seed: int = 0) -> tuple[Array, tuple[str, str]]:
    """Two coordinates for each latent.

    Args:
        latents: (N, D), N at least 3.
        method: "pca", which keeps distances as well as a plane can; or "umap" (McInnes et al. 2018), which keeps
            neighbours and whose distances mean nothing; it takes umap-learn.
        seed: of UMAP.

    Returns:
        (N, 2), and the names of the axes.

    Raises:
        UserError: an unknown method, or umap-learn is not installed.
    """
    if method not in METHODS:
        raise UserError(f"map_method must be {' or '.join(METHODS)}, got {method!r}; set --map_method pca")
    if len(latents) < 3:
        raise UserError(f"a map takes at least 3 latents, got {len(latents)}; embed more images")
    if method == "pca":
        from sklearn.decomposition import PCA

        pca = PCA(2, random_state=seed)
        places = pca.fit_transform(latents)
        first, second = pca.explained_variance_ratio_
        return places, (f"component 1 ({first:.1%} of the variance)", f"component 2 ({second:.1%})")
    from monai.utils import optional_import

    umap, is_there = optional_import("umap")
    if not is_there:
        raise UserError("map_method umap takes umap-learn, which is not installed; pip install umap-learn, or take pca")
    return umap.UMAP(random_state=seed).fit_transform(latents).astype(np.float64), ("UMAP 1", "UMAP 2")


def write_map_page(
    path: str | Path,
    places: Array,
    axes: tuple[str, str],
    items: Sequence[Mapping[str, Any]],
    factors: Sequence[Factor],
) -> None:
    """An interactive plot in one HTML file with all that it needs.

    A menu chooses the factor that colours the points; hovering over one shows its file, patient, labels, age, sex and
    error. The page says that it is therefore not for publication.

    Args:
        path: the file.
        places: (N, 2).
        axes: their names.
        items: N, of the embedding.
        factors: at least one, with N values each.
    """
    import plotly.graph_objects as go

    figure = go.Figure(
        go.Scattergl(
            x=places[:, 0],
            y=places[:, 1],
            mode="markers",
            text=[_hover(item) for item in items],
            hovertemplate="%{text}<extra></extra>",
            marker={"size": 7, "opacity": 0.85, "line": {"width": 0}, **_colouring(factors[0])},
        )
    )
    buttons = [
        {
            "label": factor.name,
            "method": "restyle",
            # lists of one: a restyle takes a list for one value for each trace
            "args": [{f"marker.{key}": [value] for key, value in _flat(_colouring(factor)).items()}],
        }
        for factor in factors
    ]
    figure.update_layout(
        template="plotly_white",
        margin={"t": 90, "b": 60},
        title=f"{len(items)} images in the latent space<br><sup>{PRIVATE}</sup>",
        xaxis_title=axes[0],
        yaxis_title=axes[1],
        updatemenus=[{"buttons": buttons, "x": 1, "xanchor": "right", "y": 1.08, "yanchor": "bottom"}],
        hoverlabel={"align": "left"},
    )
    page = figure.to_html(include_plotlyjs=True, default_height="95vh", config={"displaylogo": False})
    atomic_write_text(path, page)


def _colouring(factor: Factor) -> dict[str, Any]:
    """How a factor colours the markers: two colours for a label, a scale for age; a pale grey where it is not known."""
    values, known = factor.values, np.isfinite(factor.values)
    bar: dict[str, Any] = {"title": {"text": factor.name}, "thickness": 14}
    if not factor.is_binary:
        low, high = float(values[known].min()), float(values[known].max())
        scale: Any = SCALE
        if not known.all():  # a step below the scale
            from plotly.colors import sample_colorscale

            low -= (high - low) / 10
            colours = sample_colorscale(SCALE, 11)
            first = 1 / 11  # where the lowest age that is known stands on the longer scale
            steps = np.linspace(first, 1, len(colours)).tolist()
            scale = [[0, UNKNOWN], [first * 0.9, UNKNOWN], *([at, c] for at, c in zip(steps, colours, strict=True))]
        ticks = np.linspace(values[known].min(), values[known].max(), 5).round().tolist()
        bar |= {"tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
        filled = np.where(known, values, low)
    else:
        colours, names = (ABSENT, PRESENT), factor.classes
        low, high = -0.5, 1.5
        if not known.all():
            colours, names, low = (UNKNOWN, *colours), ("unknown", *names), -1.5
        steps = len(colours)
        scale = [[(place + end) / steps, colour] for place, colour in enumerate(colours) for end in (0, 1)]
        bar |= {"tickvals": list(range(2 - steps, 2)), "ticktext": list(names)}
        filled = np.where(known, values, -1)
    return {
        "color": filled.tolist(), "colorscale": scale, "cmin": low, "cmax": high, "showscale": True, "colorbar": bar
    }  # fmt: skip


def _flat(nested: Mapping[str, Any]) -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": entry for inner, entry in _flat(value).items()}
        else:
            flat[key] = value
    return flat


def _hover(item: Mapping[str, Any]) -> str:
    labels = item.get("labels", item.get("label"))
    if isinstance(labels, list | tuple | set):
        labels = ", ".join(map(str, labels)) or "none"
    shown = {
        "file": item["image"],
        "patient": item.get("patient"),
        "labels": labels,
        "age": item.get("age"),
        "sex": item.get("sex"),
        "mean square error": item.get("mse"),
        "MS-SSIM": item.get("ms_ssim"),
    }
    # names come from the datalist: they are text and no markup
    lines = [f"{name} {html.escape(_short(value))}" for name, value in shown.items() if value is not None]
    return "<br>".join(lines)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_map_picture(path: str | Path, places: Array, axes: tuple[str, str], factors: Sequence[Factor]) -> None:
    """The same as a PNG, a panel for each factor.

    Args:
        path: the file.
        places: (N, 2).
        axes: their names.
        factors: at least one, with N values each.
    """
    from matplotlib.figure import Figure

    columns = min(PANELS_IN_A_ROW, len(factors))
    rows = math.ceil(len(factors) / columns)
    figure = Figure((3.3 * columns, 3.1 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).reshape(-1)
    for panel in panels[len(factors) :]:
        panel.set_axis_off()
    for panel, factor in zip(panels, factors, strict=False):
        known = np.isfinite(factor.values)
        panel.scatter(*places[~known].T, s=7, color=UNKNOWN, linewidths=0)
        if factor.is_binary:
            for value, colour in enumerate((ABSENT, PRESENT)):
                chosen = factor.values == value
                label = f"{factor.classes[value]} ({chosen.sum()})"
                panel.scatter(*places[chosen].T, s=9, color=colour, alpha=0.8, linewidths=0, label=label)
            panel.legend(frameon=False, fontsize=7, loc="best", handletextpad=0)
        else:
            points = panel.scatter(*places[known].T, s=9, c=factor.values[known], cmap=SCALE.lower(), linewidths=0)
            bar = figure.colorbar(points, cax=panel.inset_axes((0.03, 0.05, 0.04, 0.35)))
            bar.ax.tick_params(labelsize=7)
        panel.set_title(factor.name, fontsize=9)
        panel.set_xticks([])
        panel.set_yticks([])
    figure.supxlabel(axes[0], fontsize=9)
    figure.supylabel(axes[1], fontsize=9)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
