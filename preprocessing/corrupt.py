"""Corrupted copies of images, to test a detector of anomalies: ``python -m preprocessing.corrupt --source DIR``.

The source is a preprocessed dataset (a folder with datalist.json, or the datalist; the items of --split are taken) or
any folder of pictures. Each image gets one copy per --kind under TARGET/images/<kind>, or one in all with --one-each:

python -m preprocessing.corrupt --source data/cxr --target data/cxr_lines --kind line --kind disc --keep-originals

python -m preprocessing.corrupt --source data/cxr --target data/cxr_noise --kind noise --variance 0.01

======= ==================================================================================== =====================
kind    what                                                                                 severity
======= ==================================================================================== =====================
noise   Gaussian, mean 0, added to values in [0, 1] and clipped                              --variance
blur    Gaussian, as OpenCV's GaussianBlur of that kernel with sigma 0                       --kernel
line    a bright line, 15 to 40 % of the side long and 0.6 to 1.2 % (one pixel or more) wide --contrast
disc    a bright disc, 3 to 8 % of the side in radius                                        --contrast
device  a pacemaker with its lead, or a port with its catheter (chest radiographs)           --contrast
needle  a metal needle from the skin inwards, dark streaks along it (CT slices)              --contrast
ascites fluid along the inner abdominal wall, grey as --fluid (CT slices)                    --contrast
======= ==================================================================================== =====================

The last five have a mask, TARGET/masks/<kind>: 255 for every pixel they touch, the needle's streaks left out. Their
edges are antialiased, metal is saturated: --contrast 1 is white, less lets the image shine through. Place and shape
are drawn from the seed, the kind and the image's name alone: what is bright away from where the image is white already,
fluid beside bone and never on it. An image is rejected for a kind that would not be seen in it, or change no pixel.

Values are rounded to the nearest grey level; gan_anom_detect, whose noise and blur the defaults are, cut them off,
which makes copies half a level darker on average.

Items of the datalist have anomaly: 1, corruption (the kind), severity, anomaly_mask, source (the image in its own
dataset), the patient and all other fields of the source. With --keep-originals the images themselves come along, with
anomaly: 0, so that the datalist is ready for a test. Whatever --split says, copies stand in test, and with them all
else of their patients: nothing may learn from what is anomalous.

--dataset_dir is where the paths of the source's datalist start from, if not from its folder; preprocessing.split prints
it.

With --shard 0/8 to --shard 7/8, on any machines at once, each of eight processes converts its part of the files; the
same command without --shard then does what is missing and writes the tables, the same bytes as one process alone.

Exit codes: 0 all went well; 3 the datalist was written, but files were rejected; 1 nothing could be written; 2 wrong
usage; 75 some files could not be read, but may be the next time; 130 interrupted.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import typer
from PIL import Image
from scipy.interpolate import PchipInterpolator
from scipy.ndimage import binary_closing, binary_erosion, correlate1d, distance_transform_edt, gaussian_filter
from skimage.util import random_noise

from medgen.data.datalist import file_stem, list_files, natural_key, validate_datalist
from medgen.data.reader import UnreadableImageError, read_frames
from medgen.errors import UserError
from medgen.metrics.anomaly import body_region
from preprocessing import _convert as c
from preprocessing.split import assign_splits

__all__ = ["GLOBAL", "LOCAL", "Corruption", "Kind", "app", "corrupt", "corrupt_dataset", "gaussian_blur"]

VARIANCE = 0.01  # gan_anom_detect, of values in [0, 1]
KERNEL = 5  # pixels; gan_anom_detect, whose script has 11
FLUID = 0.39  # 10 HU in the window of preprocessing.liver_ct, level 50 and width 350
BODY_THRESHOLD = 0.04  # JPEG and noise leave the air around a patient not quite of one grey
BONE = 0.8  # bone is brighter, in the window that ascites is seen in
TRIES = 12  # places that are drawn for an insert before the darkest of them is taken
VISIBLE = 0.35  # an insert that brightens the image by so much on average is seen
FAINTEST = 0.05  # one that changes what it covers by less, at --contrast 1, is not there for any eye
PATHS = ("image", "mask", "anomaly_mask")  # of the source's items; they do not hold for the copies
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")


class Kind(StrEnum):
    """Ways to corrupt an image."""

    noise = "noise"
    blur = "blur"
    line = "line"
    disc = "disc"
    device = "device"
    needle = "needle"
    ascites = "ascites"


GLOBAL = (Kind.noise, Kind.blur)  # the whole image is corrupted, so there is no mask
NAMES = {
    Kind.line: "a line",
    Kind.disc: "a disc",
    Kind.device: "a device",
    Kind.needle: "a needle",
    Kind.ascites: "ascites",
}


@dataclass(frozen=True)
class Corruption:
    """How much of it.

    Args:
        variance: of the noise, of values in [0, 1].
        kernel: of the blur, pixels, odd.
        contrast: of an insert's brightness against what it covers, in (0, 1].
        fluid: grey of ascites, in [0, 1].
    """

    variance: float = VARIANCE
    kernel: int = KERNEL
    contrast: float = 1.0
    fluid: float = FLUID

    def __post_init__(self) -> None:
        if not self.variance > 0:
            raise UserError(f"variance must be above 0, got {self.variance:g}; {VARIANCE} is usual")
        if self.kernel < 3 or self.kernel % 2 == 0:
            raise UserError(f"kernel must be odd and 3 or more, got {self.kernel}; 5 and 11 are usual")
        if not 0 < self.contrast <= 1:
            raise UserError(f"contrast must be above 0 and at most 1, got {self.contrast:g}; 1 is saturated")
        if not 0 <= self.fluid <= 1:
            raise UserError(f"fluid must be a grey from 0 to 1, got {self.fluid:g}; {FLUID} is usual")

    def severity(self, kind: Kind) -> float:
        """The one number of a kind that says how severe it is."""
        return {Kind.noise: self.variance, Kind.blur: self.kernel}.get(kind, self.contrast)


def corrupt(
    pixels: np.ndarray, kind: Kind | str, rng: np.random.Generator, settings: Corruption | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Corrupt one image.

    Args:
        pixels: (H, W) grey or (H, W, 3) colour, in [0, 1].
        kind: one of :class:`Kind`.
        rng: source of randomness; the same state gives the same image.
        settings: how much; default :class:`Corruption`.

    Returns:
        The image, of the same shape, float32 in [0, 1]; and (H, W) bool, every pixel that an insert touches, or None
        for ``noise`` and ``blur``.

    Raises:
        UnreadableImageError: a needle or ascites in an image that shows no body, or an insert that would not be seen
            wherever it was tried.
    """
    kind, settings = Kind(kind), settings or Corruption()
    pixels = np.asarray(pixels, dtype=np.float32)
    if kind == Kind.noise:
        noisy = random_noise(pixels, mode="gaussian", rng=rng, mean=0, var=settings.variance, clip=True)
        return noisy.astype(np.float32), None
    if kind == Kind.blur:
        return gaussian_blur(pixels, settings.kernel), None
    # inserts are drawn in grey: what is metal or water looks the same in all channels
    grey = pixels if pixels.ndim == 2 else pixels @ c.LUMA
    change, mask = LOCAL[kind](grey, rng, settings)
    return np.clip(change(pixels), 0, 1).astype(np.float32), mask


def gaussian_blur(pixels: np.ndarray, kernel: int = KERNEL) -> np.ndarray:
    """What OpenCV's ``GaussianBlur(image, (kernel, kernel), 0)`` gives, but for its rounding.

    Up to 9 pixels OpenCV has fixed kernels that are sums of binomials, for which sigma does not matter. Beyond, sigma
    is 0.3 ((kernel - 1) / 2 - 1) + 0.8. The border is mirrored about the outermost pixel (reflect-101).

    Args:
        pixels: (H, W) or (H, W, 3), of any range.
        kernel: width in pixels, odd.

    Returns:
        float32 of the same shape.
    """
    fixed = {3: (1, 2, 1), 5: (1, 4, 6, 4, 1), 7: (1, 3.5, 7, 9, 7, 3.5, 1), 9: (4, 13, 30, 51, 60, 51, 30, 13, 4)}
    if kernel in fixed:
        weights = np.array(fixed[kernel], dtype=np.float64)
    else:
        sigma = 0.3 * ((kernel - 1) / 2 - 1) + 0.8
        weights = np.exp(-((np.arange(kernel) - (kernel - 1) / 2) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    blurred = correlate1d(np.asarray(pixels, dtype=np.float64), weights, axis=0, mode="mirror")
    return correlate1d(blurred, weights, axis=1, mode="mirror").astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# inserts: (grey image, rng, settings) -> what to do to the image, and the mask

_Insert = tuple[Callable[[np.ndarray], np.ndarray], np.ndarray]


def _laid_over(cover: np.ndarray, level: float | np.ndarray = 1.0) -> Callable[[np.ndarray], np.ndarray]:
    """Blend an image towards a grey: ``cover`` (H, W) in [0, 1] is how much of each pixel is covered."""

    def apply(pixels: np.ndarray) -> np.ndarray:
        shape = cover.shape + (1,) * (pixels.ndim - 2)
        grey = level if np.isscalar(level) else np.reshape(level, shape)
        share = cover.reshape(shape)
        return pixels * (1 - share) + share * grey

    return apply


_Drawn = TypeVar("_Drawn", bound=tuple)


def _check_seen(kind: Kind, cover: np.ndarray, change: np.ndarray) -> None:
    """Refuse an insert that changes what it covers, by ``change`` at full contrast, too little to be seen."""
    if (cover * np.abs(change)).sum() <= FAINTEST * cover.sum():
        raise UnreadableImageError(
            f"no place where {NAMES[kind]} would be visible: what lies there is as bright, or leaves no room"
        )


def _brightest(kind: Kind, grey: np.ndarray, draw: Callable[[], _Drawn]) -> _Drawn:
    """The first cover drawn that brightens the image visibly, else the one that does most; with what is drawn beside.

    Args:
        kind: what is drawn.
        grey: (H, W) in [0, 1].
        draw: gives a cover (H, W) in [0, 1] and whatever else belongs to it.

    Returns:
        What ``draw`` gave.

    Raises:
        UnreadableImageError: if none can be seen: white on white.
    """
    best, most = None, -1.0
    for _ in range(TRIES):
        drawn = draw()
        cover = drawn[0]
        gain = float((cover * (1 - grey)).sum() / max(cover.sum(), 1e-6))
        if gain > most:
            best, most = drawn, gain
        if most >= VISIBLE:
            break
    _check_seen(kind, best[0], 1 - grey)
    return best


def _tube(shape: tuple[int, int], points: np.ndarray, radius: float) -> np.ndarray:
    """Cover (H, W) in [0, 1] of a round-ended band about a path (N, 2) of x, y in pixels, edges one pixel soft.

    A band thinner than a pixel is drawn a pixel wide and as much fainter.
    """
    cover = np.zeros(shape, np.float32)
    drawn = max(radius, 0.5)
    reach = drawn + 1
    for (x0, y0), (x1, y1) in pairwise(points):
        left, right = max(int(min(x0, x1) - reach), 0), min(int(max(x0, x1) + reach) + 2, shape[1])
        top, bottom = max(int(min(y0, y1) - reach), 0), min(int(max(y0, y1) + reach) + 2, shape[0])
        if left >= right or top >= bottom:
            continue
        px, py = np.arange(left, right)[None, :] - x0, np.arange(top, bottom)[:, None] - y0
        dx, dy = x1 - x0, y1 - y0
        along = np.clip((px * dx + py * dy) / max(dx * dx + dy * dy, 1e-9), 0, 1)
        distance = np.hypot(px - along * dx, py - along * dy)
        box = cover[top:bottom, left:right]
        np.maximum(box, np.clip(drawn + 0.5 - distance, 0, 1), out=box)
    return cover * min(radius / drawn, 1)


def _place(shape: tuple[int, int], rng: np.random.Generator, margin: float = 0.2) -> np.ndarray:
    """A point x, y in the image, away from its borders."""
    return np.array([rng.uniform(margin, 1 - margin) * shape[1], rng.uniform(margin, 1 - margin) * shape[0]])


def _line(grey: np.ndarray, rng: np.random.Generator, settings: Corruption) -> _Insert:
    side = min(grey.shape)

    def draw() -> tuple[np.ndarray]:
        angle, middle = rng.uniform(0, np.pi), _place(grey.shape, rng, 0.25)
        half = rng.uniform(0.075, 0.2) * side * np.array([np.cos(angle), np.sin(angle)])
        ends = np.stack([middle - half, middle + half])
        return (_tube(grey.shape, ends, max(rng.uniform(0.003, 0.006) * side, 0.5)),)

    (cover,) = _brightest(Kind.line, grey, draw)
    return _laid_over(settings.contrast * cover), cover > 0


def _disc(grey: np.ndarray, rng: np.random.Generator, settings: Corruption) -> _Insert:
    side = min(grey.shape)

    def draw() -> tuple[np.ndarray]:
        centre = _place(grey.shape, rng)
        return (_tube(grey.shape, np.stack([centre, centre]), rng.uniform(0.03, 0.08) * side),)

    (cover,) = _brightest(Kind.disc, grey, draw)
    return _laid_over(settings.contrast * cover), cover > 0


def _device(grey: np.ndarray, rng: np.random.Generator, settings: Corruption) -> _Insert:
    """A pacemaker or a port at one shoulder of a frontal chest radiograph, its lead or catheter down to the heart."""
    height, width = grey.shape
    side = min(grey.shape)

    def path(points: Sequence[tuple[float, float]]) -> np.ndarray:
        knots = np.asarray(points, float) * (width, height)
        length = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(knots, axis=0).T))])
        return PchipInterpolator(length, knots)(np.linspace(0, length[-1], 48))

    def draw() -> tuple[np.ndarray]:
        # devices lie mostly at the left shoulder, which is on the right of the image
        left = rng.random() < 0.75
        x, y = rng.uniform(0.72, 0.82), rng.uniform(0.18, 0.30)
        tip = rng.uniform(0.56, 0.66), rng.uniform(0.62, 0.74)
        if rng.random() < 0.5:
            half = rng.uniform(0.035, 0.05) * side
            can = np.array([(x * width - half / 2, y * height), (x * width + half / 2, y * height)])
            cover = 0.8 * _tube(grey.shape, can, half)
            rim = _tube(grey.shape, can, half) - _tube(grey.shape, can, 0.82 * half)
            circuit = _tube(grey.shape, can + np.array([0, 0.35 * half]), 0.3 * half)
            cover = np.maximum(cover, np.maximum(rim, circuit))
            lead = path([(x, y - 0.05), (x - 0.12, y - 0.09), (0.52, y + 0.02), (0.46, 0.45), (0.48, 0.58), tip])
            cover = np.maximum(cover, _tube(grey.shape, lead, 0.003 * side + 0.2))
            end = np.array([tip, tip]) * (width, height)
            cover = np.maximum(cover, _tube(grey.shape, end, 0.006 * side + 0.2))
        else:
            radius = rng.uniform(0.022, 0.032) * side
            centre = np.array([(x, y + 0.05)] * 2) * (width, height)
            ring = _tube(grey.shape, centre, radius) - _tube(grey.shape, centre, 0.65 * radius)
            cover = np.maximum(ring, 0.35 * _tube(grey.shape, centre, radius))
            catheter = path(
                [(x - 0.02, y + 0.03), (x - 0.06, y - 0.08), (0.56, y - 0.08), (0.47, y + 0.1), (0.46, 0.5)]
            )
            cover = np.maximum(cover, 0.8 * _tube(grey.shape, catheter, 0.003 * side + 0.2))
        return (cover if left else cover[:, ::-1],)

    (cover,) = _brightest(Kind.device, grey, draw)
    return _laid_over(settings.contrast * cover), cover > 0


def _body(grey: np.ndarray) -> np.ndarray:
    # air is what the border shows, which is not always black: windows may be wide, or their greys wrapped around
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    differs = np.abs(grey - np.median(border)) > BODY_THRESHOLD
    reach = max(round(0.04 * min(grey.shape)), 1)
    closed = binary_closing(np.pad(differs, reach), iterations=reach)[reach:-reach, reach:-reach]
    body, whole = body_region(differs.astype(np.float32)), body_region(closed.astype(np.float32))
    # where the skin is as grey as the air its line has gaps, and the body falls apart unless they are closed; where it
    # is whole, closing would only join the couch to it
    if body.sum() < 0.6 * whole.sum():
        body = whole
    if not 0.05 < body.mean() < 0.95:
        raise UnreadableImageError("shows no body with air around it, for a needle or ascites to lie in")
    return body


def _needle(grey: np.ndarray, rng: np.random.Generator, settings: Corruption) -> _Insert:
    """A biopsy or ablation needle: from outside of the skin to a third or more of the way to the middle."""
    body = _body(grey)
    side = min(grey.shape)
    middle = np.argwhere(body).mean(axis=0)[::-1]

    def draw() -> tuple[np.ndarray, np.ndarray, float]:
        # from the front or the sides: the patient lies on his back
        angle = rng.uniform(-np.pi - 0.3, 0.3)
        outward = np.array([np.cos(angle), np.sin(angle)])
        aim = middle + rng.uniform(-0.12, 0.12, 2) * side
        steps = aim + np.arange(0, 1.5 * side, 0.5)[:, None] * outward
        rows, columns = np.rint(steps[:, ::-1]).astype(int).T
        seen = (rows >= 0) & (columns >= 0) & (rows < grey.shape[0]) & (columns < grey.shape[1])
        inside = np.zeros(len(steps), bool)
        inside[seen] = body[rows[seen], columns[seen]]
        skin = steps[np.flatnonzero(inside).max(initial=0)]
        tip = aim + rng.uniform(0.0, 0.45) * (skin - aim)
        start = skin + 0.06 * side * outward
        radius = max(rng.uniform(0.004, 0.007) * side, 0.5)
        # the streaks are dark beside the shaft and beyond the tip
        path = np.stack([start, tip - 0.15 * side * outward])
        return _tube(grey.shape, np.stack([start, tip]), radius), path, radius

    metal, path, radius = _brightest(Kind.needle, grey, draw)
    # beam hardening and photon starvation, fading with the distance
    shaft = _tube(grey.shape, path, 2.2 * radius)
    streaks = gaussian_filter(shaft, max(1.2 * radius, 0.7)) * body
    dark = settings.contrast * 0.35 * streaks

    def apply(pixels: np.ndarray) -> np.ndarray:
        shaded = _laid_over(dark, 0.0)(pixels)
        return _laid_over(settings.contrast * metal)(shaded)

    return apply, metal > 0


def _ascites(grey: np.ndarray, rng: np.random.Generator, settings: Corruption) -> _Insert:
    """Fluid between the abdominal wall and the organs, of one grey but for the noise of the image."""
    body = _body(grey)
    side = np.sqrt(body.sum())
    depth = distance_transform_edt(np.pad(body, 1))[1:-1, 1:-1]
    rows, columns = np.indices(grey.shape)
    middle = np.argwhere(body).mean(axis=0)
    angle = np.arctan2(rows - middle[0], columns - middle[1])
    # the patient's right flank, around the liver, is on the left of the image; sometimes the left flank
    towards = np.pi if rng.random() < 0.75 else 0.0
    off = np.abs((angle - towards - rng.uniform(-0.3, 0.3) + np.pi) % (2 * np.pi) - np.pi)
    extent = rng.uniform(0.7, 1.2)
    # the cavity begins behind the ribs, as far as they are seen
    bone = (grey > BONE) & body
    ribs = depth[bone & (depth < 0.2 * side)]
    wall = max(float(np.percentile(ribs, 90)) + 1 if ribs.size else 0.0, 0.1 * side)
    thickness = rng.uniform(0.06, 0.12) * side * np.sqrt(np.clip(1 - (off / extent) ** 2, 0, 1))
    # waves of the surface, as organs press into it
    thickness *= 1 + 0.15 * np.sin(rng.uniform(4, 7) * angle + rng.uniform(0, 2 * np.pi))
    edge = np.clip(depth - wall + 0.5, 0, 1) * np.clip(wall + thickness - depth + 0.5, 0, 1)
    cover = (settings.contrast * edge * (thickness > 0.5) * (binary_erosion(body) & ~bone)).astype(np.float32)
    # the noise of the image: 1.4826 times the median absolute difference from a smoothed copy
    soft = body & (grey > 0.1) & ~bone
    noise = 1.4826 * float(np.median(np.abs(grey - gaussian_filter(grey, 1))[soft])) if soft.any() else 0.0
    _check_seen(Kind.ascites, cover, settings.fluid - grey)
    level = settings.fluid + noise * rng.standard_normal(grey.shape)
    return _laid_over(cover, level), cover > 0


LOCAL: dict[Kind, Callable[[np.ndarray, np.random.Generator, Corruption], _Insert]] = {
    Kind.line: _line,
    Kind.disc: _disc,
    Kind.device: _device,
    Kind.needle: _needle,
    Kind.ascites: _ascites,
}


# ---------------------------------------------------------------------------------------------------------------------
# the command


@dataclass(frozen=True)
class _Task:
    dataset: str
    kinds: tuple[str, ...]
    one_each: bool
    keep_originals: bool
    corruption: Corruption
    seed: int

    def convert(self, job: c.Job, target: Path) -> c.Outcome:
        """Write the copies of one image and their masks."""
        frames = read_frames(job.path)
        if len(frames) > 1 or frames[0].meta.get("format") in ("DICOM", "NIfTI"):
            raise UnreadableImageError("expected a picture; convert it with preprocessing.images or liver_ct first")
        pixels = frames[0].pixels
        wide = pixels.ndim == 2 and str(frames[0].meta.get("photometric", "")).startswith("I;16")
        kinds = [Kind(kind) for kind in self.kinds]
        if self.one_each:
            kinds = [kinds[int(self._rng(job, "").integers(len(kinds)))]]
        images: list[str] = []
        sizes: list[int] = []
        items: list[dict[str, Any]] = []

        def write(picture: np.ndarray, name: str) -> str:
            sizes.append(c.write_png(Image.fromarray(picture), target, name))
            images.append(name)
            return name

        if self.keep_originals:
            name = write(c.quantise(pixels, wide), f"images/original/{job.stem}.png")
            items.append({"image": name, "anomaly": 0})
        reasons = []
        for kind in kinds:
            try:
                changed, mask = corrupt(pixels, kind, self._rng(job, kind), self.corruption)
            except UnreadableImageError as error:
                reasons.append(f"{kind}: {error}")
                continue
            picture = c.quantise(changed, wide)
            if np.array_equal(picture, c.quantise(pixels, wide)):
                reasons.append(f"{kind}: changes no pixel of this image by a grey level at this severity")
                continue
            item = {"image": write(picture, f"images/{kind}/{job.stem}.png"), "anomaly": 1}
            if mask is not None:
                item["anomaly_mask"] = write(mask.astype(np.uint8) * 255, f"masks/{kind}/{job.stem}.png")
            items.append({**item, "corruption": str(kind), "severity": self.corruption.severity(kind)})
        return c.Outcome(job.file, tuple(images), "; ".join(reasons), bytes=tuple(sizes), items=tuple(items))

    def _rng(self, job: c.Job, kind: str) -> np.random.Generator:
        digest = hashlib.sha256(f"{self.seed}\0{kind}\0{job.file}".encode()).digest()
        return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))


def _read_source(
    source: Path, split: str, dataset_dir: Path | None
) -> tuple[Path, dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """Root of the images, items per split, and the datalist's other keys; items that are anomalous are left out."""
    datalist = source / "datalist.json" if source.is_dir() else source
    if source.is_dir() and not datalist.is_file():
        files = [file for file in list_files(source) if file.lower().endswith(SUFFIXES)]
        if not files:
            raise UserError(f"expected a datalist.json or pictures below --source {source}, got none")
        if dataset_dir is not None:
            raise UserError(f"--dataset_dir needs a datalist, got a folder of pictures, {source}; leave it out")
        items = [{"image": file, "patient": file_stem(file)} for file in files]
        return source, {"test": items}, {"name": source.resolve().name}
    content = validate_datalist(datalist)
    there = [name for name, items in content.items() if items and isinstance(items, list) and "image" in items[0]]
    if split != "all" and split not in there:
        raise UserError(f"--split must be all or one of {', '.join(there) or 'none'} of {datalist}, got {split}")
    splits = {name: content[name] for name in (there if split == "all" else [split])}
    healthy = {name: [item for item in items if item.get("anomaly", 0) == 0] for name, items in splits.items()}
    left = sum(map(len, splits.values())) - sum(map(len, healthy.values()))
    if left:
        print(f"note: {left} images that are anomalous already are left out", file=sys.stderr)
    root = datalist.parent if dataset_dir is None else dataset_dir
    images = [item["image"] for items in healthy.values() for item in items]
    if images and not any((root / image).is_file() for image in images):
        raise UserError(
            f"{root / images[0]} and all other images of {datalist} are not found; set --dataset_dir to the folder "
            "that its paths start from"
        )
    head = {key: value for key, value in content.items() if key not in there}
    return root, healthy, {"name": datalist.resolve().parent.name, **head}


def _kept(item: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key not in PATHS}


def corrupt_dataset(
    source: Annotated[
        Path, typer.Option(help="Preprocessed dataset, its datalist, or a folder of pictures.", show_default=False)
    ],
    target: c.Target,
    kind: Annotated[list[Kind], typer.Option(help="How to corrupt; may be repeated; see above.", show_default=False)],
    split: Annotated[str, typer.Option(help="Split of the source's datalist that is taken, or all.")] = "test",
    dataset_dir: Annotated[
        Path | None, typer.Option(help="Where the datalist's paths start from; default: its folder.")
    ] = None,
    one_each: Annotated[
        bool, typer.Option("--one-each", help="One copy of each image, of a kind drawn, instead of one per kind.")
    ] = False,
    keep_originals: Annotated[
        bool, typer.Option("--keep-originals", help="Write the images themselves, too, with anomaly: 0.")
    ] = False,
    variance: Annotated[float, typer.Option(help="Of the noise, of values in 0 to 1.")] = VARIANCE,
    kernel: Annotated[int, typer.Option(help="Of the blur in pixels, odd.")] = KERNEL,
    contrast: Annotated[float, typer.Option(help="Of inserts, above 0 to 1.")] = 1.0,
    fluid: Annotated[float, typer.Option(help="Grey of ascites, 0 to 1.")] = FLUID,
    workers: c.Workers = c.DEFAULT_WORKERS,
    shard: c.ShardOption = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    name: Annotated[str, typer.Option(help="Dataset's name in the datalist; default: the target folder's.")] = "",
) -> int:
    """Corrupt a dataset and write its datalist; see the head of this module.

    Returns:
        The exit code.

    Raises:
        UserError: if the source or the target cannot be used, a setting is out of range, or no image could be written.
    """
    corruption = Corruption(variance, kernel, contrast, fluid)
    kinds = tuple(str(k) for k in Kind if k in kind)
    task = _Task("corrupt", kinds, one_each, keep_originals, corruption, seed)
    root, splits, head = _read_source(source, split, dataset_dir)
    rows = {item["image"]: item for items in splits.values() for item in items}
    files = sorted(rows, key=natural_key)
    jobs = c.make_jobs(root, files, [file.removeprefix("images/") for file in files])
    c.prepare_target(root, target, task, inside=dataset_dir is not None)
    outcomes = c.convert(jobs, task, target, workers, shard)
    if shard:
        return c.finish_shard(outcomes, shard)

    # job.file is the printable form of the path
    by_image = {file: outcomes[job.file] for file, job in zip(files, jobs, strict=True)}
    copies = [
        {"image": copy["image"], **_kept(item), "source": item["image"], **copy, "split": part}
        for part, items in splits.items()
        for item in items
        for copy in by_image[item["image"]].items
    ]
    moved = sum(bool(copy["anomaly"]) and copy["split"] != "test" for copy in copies)
    if moved:
        print(
            f"note: {moved} copies of images of other splits stand in test, with all else of their patients; do not "
            "test a detector with them that has learnt from these patients",
            file=sys.stderr,
        )
    assigned, _ = assign_splits(copies)
    written = {part: items for part, items in assigned.items() if items or part == "test"}
    rejected = {file: outcome.reason for file, outcome in by_image.items() if outcome.reason}
    labels = {"label_names": head["label_names"]} if "label_names" in head else {}
    return c.finish(
        target,
        name or target.resolve().name,
        head.get("modality", "unknown"),
        written,
        rejected,
        outcomes,
        corruptions={k: corruption.severity(Kind(k)) for k in kinds},
        source_name=head["name"],
        **labels,
    )


app = c.new_app(corrupt_dataset, __doc__)

if __name__ == "__main__":
    sys.exit(c.main(app))
