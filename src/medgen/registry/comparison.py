"""Versions of one model side by side: a table, and one self-contained HTML page."""

from __future__ import annotations

import base64
import io
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import mlflow
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from PIL import Image, UnidentifiedImageError

from medgen import __version__
from medgen.errors import UserError
from medgen.output import atomic_write_text
from medgen.registry._connection import connection
from medgen.registry.figures import BOUNDS, direction_of
from medgen.registry.names import find_version
from medgen.registry.versions import VersionDetails, describe

__all__ = ["Comparison", "MetricRow", "compare", "write_comparison"]

# figures of two versions that differ in one of these were not measured alike
CONDITIONS = ("n", "n_samples", "n_test", "split", "seed", "image_size", "resolution", "label", "ms_ssim_kernel")
SHOWN_SIDE = 1024  # pixels of a picture's longer side on the page


@dataclass(frozen=True)
class MetricRow:
    """One metric of all versions compared.

    Args:
        name: of the metric.
        values: of each version; None where it has none.
        intervals: lower and upper end for each version; None where its figures hold none.
        direction: "higher" or "lower", whichever is better; None where that is not known.
        best: index of the version that is best; None where that is not known, two are equal, or its interval overlaps
            with another's.
        overlap: whether that is why there is no best.
    """

    name: str
    values: tuple[float | None, ...]
    intervals: tuple[tuple[float, float] | None, ...]
    direction: str | None
    best: int | None
    overlap: bool

    @property
    def differences(self) -> tuple[float | None, ...]:
        """From the first version."""
        first = self.values[0]
        return tuple(None if value is None or first is None else value - first for value in self.values)


@dataclass(frozen=True)
class Comparison:
    """Versions of one registered model, side by side.

    Args:
        versions: in the order that was asked for.
        metrics: of any of them.
        conditions: how the figures were measured where that differs: setting -> each version's, None for none.
        params: of their trainings' runs where they differ.
        pictures: name -> of each version a PNG as a data URL, None where it has none of that name.
    """

    versions: tuple[VersionDetails, ...]
    metrics: tuple[MetricRow, ...]
    conditions: Mapping[str, tuple[str | None, ...]]
    params: Mapping[str, tuple[str | None, ...]]
    pictures: Mapping[str, tuple[str | None, ...]]


def compare(name: str, versions: Sequence[int], tracking_uri: str | None = None) -> Comparison:
    """Set versions of a registered model side by side.

    Args:
        name: of the registered model.
        versions: two or more.
        tracking_uri: ``sqlite:////path/mlflow.db`` or the address of a server; default: MLFLOW_TRACKING_URI.

    Raises:
        UserError: fewer than two versions, or one that is not there.
    """
    if len(set(versions)) < 2 or len(set(versions)) < len(versions):
        raise UserError(
            f"two or more different versions can be compared, got {', '.join(map(str, versions)) or 'none'}; see "
            "`medgen registry list`"
        )
    with connection(tracking_uri) as client:
        found = tuple(describe(client, find_version(client, f"models:/{name}/{version}")) for version in versions)
        pictures = [_pictures(version) for version in found]
    return Comparison(
        versions=found,
        metrics=_metric_rows([version.metrics for version in found]),
        conditions=_differing([_measured(version) for version in found]),
        params=_differing([version.training.params if version.training else {} for version in found]),
        pictures={
            key: tuple(of.get(key) for of in pictures) for key in dict.fromkeys(k for of in pictures for k in of)
        },
    )


def write_comparison(found: Comparison, path: str | Path) -> Path:
    """Write the page: no script, no network, no file beside it.

    Args:
        found: what was compared.
        path: of the HTML file; one that is there is replaced.

    Raises:
        UserError: it cannot be written.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("medgen.registry", "."), PackageLoader("medgen.report", ".")]),
        autoescape=True,  # names and figures come from a registry that others write to
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": figure, "signed": signed}
    page = environment.get_template("compare.html.jinja").render(
        found=found,
        versions=found.versions,
        created=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        medgen=__version__,
        lineage=_rows([version.lineage for version in found.versions]),
    )
    try:
        atomic_write_text(path, page)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another --output") from error
    return Path(path)


def figure(value: float | None) -> str:
    """Four digits of a number; a dash for none."""
    return "–" if value is None else f"{value:.4g}"


def signed(value: float | None) -> str:
    """A difference; "" for none."""
    return "" if value is None else "±0" if value == 0 else f"{value:+.3g}".replace("-", "−")


def _metric_rows(metrics: Sequence[Mapping[str, float]]) -> tuple[MetricRow, ...]:
    names = list(dict.fromkeys(name for of in metrics for name in of))
    bounds = {f"{name}_{end}" for name in names for end in BOUNDS}
    return tuple(_metric_row(name, metrics) for name in names if name not in bounds and name not in CONDITIONS)


def _metric_row(name: str, metrics: Sequence[Mapping[str, float]]) -> MetricRow:
    values = tuple(of.get(name) for of in metrics)
    ends = [tuple(of.get(f"{name}_{end}") for end in BOUNDS) for of in metrics]
    intervals = tuple(None if None in pair else pair for pair in ends)
    direction = direction_of(name)
    known = {index: value for index, value in enumerate(values) if value is not None and math.isfinite(value)}
    best, overlap = None, False
    if direction and len(known) > 1:
        best = (max if direction == "higher" else min)(known, key=known.__getitem__)
        others = [index for index in known if index != best]
        overlap = any(_overlap(intervals[best], intervals[index]) for index in others)
        if overlap or any(known[index] == known[best] for index in others):
            best = None
    return MetricRow(name, values, intervals, direction, best, overlap)


def _overlap(one: tuple[float, float] | None, other: tuple[float, float] | None) -> bool:
    return one is not None and other is not None and one[0] <= other[1] and other[0] <= one[1]


def _measured(version: VersionDetails) -> dict[str, str]:
    """What the figures of a version were measured on, as far as they say."""
    said = {**version.notes, **{key: f"{value:g}" for key, value in version.metrics.items()}}
    return {key: said[key] for key in CONDITIONS if key in said} if version.metrics else {}


def _rows(columns: Sequence[Mapping[str, str]]) -> dict[str, tuple[str | None, ...]]:
    return {key: tuple(of.get(key) for of in columns) for key in dict.fromkeys(key for of in columns for key in of)}


def _differing(columns: Sequence[Mapping[str, str]]) -> dict[str, tuple[str | None, ...]]:
    """Rows in which those that say anything do not say the same."""
    return {key: row for key, row in _rows(columns).items() if len({value for value in row if value is not None}) > 1}


def _pictures(version: VersionDetails) -> dict[str, str]:
    """The pictures that are kept with a version, as data URLs."""
    if not version.pictures:
        return {}
    found = {}
    with tempfile.TemporaryDirectory(prefix="medgen-pictures-") as folder:
        source = f"models:/{version.name}/{version.version}/pictures"
        kept = Path(mlflow.artifacts.download_artifacts(artifact_uri=source, dst_path=folder))
        for path in sorted(kept.glob("*.png")):
            try:
                with Image.open(path, formats=("PNG",)) as image:
                    image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
                    buffer = io.BytesIO()
                    image.save(buffer, "PNG")
            except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
                continue  # not what was registered: there is nothing to show
            found[path.stem] = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return found
