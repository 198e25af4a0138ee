"""What a report has to tell, as plain values."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from medgen.data.image_set import ImageSet
from medgen.metrics.intervals import Baseline, Estimate
from medgen.output import git_revision, plain_json

__all__ = ["Distance", "Measurements", "PatchDistance"]

# name in metrics.json, where it is not the protocol's
SHORT = {"frd_v1": "frd", "radiomics": "frd_full", "xrv": "fd_xrv", "xrv_ldm_source": "fd_xrv_ldm_source"}


@dataclass(frozen=True)
class Distance:
    """The distances of one protocol.

    Args:
        protocol: its name.
        title: for people.
        frechet: Fréchet distance of all images, or for radiomics the FRD made of it.
        frechet_equal: the same between random halves of the reference and as many samples as the other half holds.
        frechet_baseline: the same between the two halves of the reference: of equal n, so these two may be compared.
            Both None without single images' features.
        kernel: kernel distance; None without the features of both sets.
        kernel_equal: as ``frechet_equal``.
        kernel_baseline: as ``frechet_baseline``.
        prdc: precision, recall, density, coverage; empty without the features of both sets.
        n_features: that entered the distances.
        by_patient: whether patients were drawn for the intervals, of the reference and of the samples; else images.
        invalid: why the protocol's figures mean nothing; empty if they do.
        differences: per-feature table, for radiomics.
        settings: everything that decided the features.
    """

    protocol: str
    title: str
    frechet: Estimate
    frechet_equal: Baseline | None
    frechet_baseline: Baseline | None
    kernel: Estimate | None
    kernel_equal: Baseline | None
    kernel_baseline: Baseline | None
    prdc: dict[str, Estimate]
    n_features: int
    by_patient: tuple[bool, bool] = (False, False)
    invalid: str = ""
    differences: Sequence[Any] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """In how many of the divisions the samples are farther from real images than real images are; one sentence."""
        if self.frechet_equal is None or self.frechet_baseline is None:
            return ""
        pairs = list(zip(self.frechet_equal.values, self.frechet_baseline.values, strict=True))
        farther = sum(judged > real for judged, real in pairs)
        sizes = f"{self.frechet_equal.n_second} samples or {self.frechet_baseline.n_second} real images"
        return (
            f"{self.title}: against {self.frechet_equal.n_first} real images, {sizes}: the samples were farther away "
            f"in {farther} of {len(pairs)} divisions (other real images: half on average; divisions share images, so "
            "this is no test of significance)."
        )

    @property
    def remarks(self) -> list[str]:
        """How each interval was made and what limits it."""
        estimates = {"Fréchet": self.frechet, "kernel": self.kernel, **self.prdc}
        return [f"{name}: {of.note}" for name, of in estimates.items() if of is not None and of.note]


@dataclass(frozen=True)
class PatchDistance:
    """The sliced Wasserstein distance of one level, or the mean over the levels.

    Args:
        name: in metrics.json: ``swd``, or ``swd_64`` for the level of 64 pixels.
        title: for people.
        distance: of all images, × 1000.
        equal: the same between random halves of the reference and as many samples.
        baseline: the same between the two halves of the reference; both None where it cannot be halved.
    """

    name: str
    title: str
    distance: Estimate
    equal: Baseline | None
    baseline: Baseline | None


@dataclass
class Measurements:
    """What :func:`medgen.report.measure.measure` found; None and empty stand for what was not asked for.

    Args:
        samples: images that were judged; None where features were given instead.
        reference: likewise.
        training: images that were searched for copies.
        feature_files: role -> (file, images, patients or None), where features were given instead of images.
        distances: one for each protocol.
        patches: the sliced Wasserstein distance, mean and levels; empty where there are no images that it takes.
        diversity: role of a set -> its :class:`~medgen.metrics.diversity.PairwiseSimilarity`.
        paired: the :class:`~medgen.metrics.paired.PairedQuality`.
        memorisation: the :class:`~medgen.metrics.memorisation.MemorisationAudit`.
        unmeasured: (role, file, reason) of images that could be read but have no features.
        notes: what a reader must know, a sentence each.
        seed: of every draw.
    """

    samples: ImageSet | None
    reference: ImageSet | None
    training: ImageSet | None
    feature_files: dict[str, tuple[str, int, int | None]]
    distances: list[Distance]
    patches: list[PatchDistance]
    diversity: dict[str, Any]
    paired: Any
    memorisation: Any
    unmeasured: list[tuple[str, str, str]]
    notes: list[str]
    seed: int

    def image_sets(self) -> dict[str, ImageSet]:
        """The sets that are images, by role."""
        named = {"samples": self.samples, "reference": self.reference, "training": self.training}
        return {role: images for role, images in named.items() if images is not None}

    def left_out(self) -> list[tuple[str, str, str]]:
        """(role, file, reason) of everything that was not measured, or not by all protocols."""
        unread = [
            (role, file, reason)
            for role, images in self.image_sets().items()
            for file, reason in images.rejected.items()
        ]
        return unread + self.unmeasured

    def verdicts(self) -> list[str]:
        """One sentence for each valid distance with a baseline."""
        return [distance.verdict for distance in self.distances if distance.verdict and not distance.invalid]

    def figures(self) -> dict[str, float | int | str | None]:
        """The headline numbers under flat names, as they stand in ``metrics.json``."""
        flat: dict[str, Any] = {}
        for distance in self.distances:
            name = SHORT.get(distance.protocol) or _plain_name(distance.protocol)
            flat |= _flat(name, distance.frechet, distance.frechet_equal, distance.frechet_baseline)
            if distance.kernel:
                flat |= _flat(f"kid_{name}", distance.kernel, distance.kernel_equal, distance.kernel_baseline)
            for key, estimate in distance.prdc.items():
                flat |= _flat(f"{key}_{name}", estimate)
        for of in self.patches:
            flat |= _flat(of.name, of.distance, of.equal, of.baseline)
        for role, similarity in self.diversity.items():
            flat |= _flat(f"ms_ssim_{role}", similarity)
        if self.paired is not None:
            for name, summary in self.paired.summary.items():
                flat |= _flat(name, summary)
        if self.memorisation is not None:
            flat |= _flat("memorised_share", _share(self.memorisation))
            flat["memorised"] = len(self.memorisation.flagged)
        flat |= {f"n_{role}": len(images) for role, images in self.image_sets().items()}
        if self.distances:
            flat["n"] = self.distances[0].frechet.n_samples
        elif self.samples is not None:
            flat["n"] = len(self.samples)
        return plain_json({**flat, "seed": self.seed, "git": git_revision()})

    def lines(self) -> list[str]:
        """The headline numbers for a terminal: each with its interval, its baseline and n."""
        rows = [("", "value", "95% interval", "at equal n", "real against real", "n samples, reference")]
        for distance in self.distances:
            title = distance.title + (" (not valid)" if distance.invalid else "")
            rows.append(_row(title, distance.frechet, distance.frechet_equal, distance.frechet_baseline))
            if distance.kernel is not None:
                rows.append(_row("  kernel distance", distance.kernel, distance.kernel_equal, distance.kernel_baseline))
            rows += [_row(f"  {name}", estimate) for name, estimate in distance.prdc.items()]
        rows += [_row(of.title, of.distance, of.equal, of.baseline) for of in self.patches]
        for role, similarity in self.diversity.items():
            rows.append(_row(f"MS-SSIM between {role}", similarity, n=f"{similarity.n_images} images"))
        if self.paired is not None:
            rows += [_row(f"paired {name}", of, n=f"{of.n} pairs") for name, of in self.paired.summary.items()]
        if self.memorisation is not None:
            n = f"{len(self.memorisation.matches)}, training {self.memorisation.n_training}"
            rows.append(_row("share of copies", _share(self.memorisation), n=n))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _plain_name(protocol: str) -> str:
    """``module:/some/where/net.ts`` and ``module:package.nets:Net`` as ``net`` and ``Net``; others as they are."""
    return re.sub(r"\W+", "_", PurePath(protocol.split(":")[-1]).stem)


def _share(audit: Any) -> Estimate:
    share, low, high = (
        math.nan if value is None else value for value in (audit.share, audit.share_low, audit.share_high)
    )
    return Estimate(share, low, high, audit.n_training, len(audit.matches), audit.level)


def _value(estimate: Any) -> float | None:
    return getattr(estimate, "value", getattr(estimate, "mean", None))


def _flat(name: str, estimate: Any, equal: Baseline | None = None, baseline: Baseline | None = None) -> dict[str, Any]:
    flat = {name: _value(estimate), f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    if equal is not None:
        flat[f"{name}_equal_n"] = equal.mean
    if baseline is not None:
        flat[f"{name}_equal_n_real"] = baseline.mean
    return flat


def _row(
    title: str, estimate: Any, equal: Baseline | None = None, baseline: Baseline | None = None, n: str | None = None
) -> tuple[str, ...]:
    value, ends = _value(estimate), (estimate.low, estimate.high)
    known = all(end is not None and math.isfinite(end) for end in ends)
    ranges = [f"{of.mean:.4g} ({of.low:.4g} to {of.high:.4g})" if of else "" for of in (equal, baseline)]
    return (
        title,
        "none" if value is None or math.isnan(value) else f"{value:.4g}",
        "{:.4g} to {:.4g}".format(*ends) if known else "",
        *ranges,
        f"{estimate.n_samples}, {estimate.n_reference}" if n is None else n,
    )
