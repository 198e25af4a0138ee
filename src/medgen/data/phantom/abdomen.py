"""Analytic CT of the upper abdomen in Hounsfield units: simple shapes, sampled finer than the voxels, and noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from scipy.ndimage import gaussian_filter

from medgen.data.phantom.thorax import MAX_SIZE, MIN_SIZE
from medgen.errors import UserError

__all__ = [
    "CT_FIELD_OF_VIEW_CM",
    "CT_FINDINGS",
    "SLICES",
    "SLICE_CM",
    "AbdomenAnatomy",
    "AbdomenFinding",
    "AbdomenPhantom",
    "AbdomenScan",
    "AbdomenVolume",
]

# Frame: centimetres, x to the patient's left, y to the back, z to the head; DICOM's axes, so that the first row and
# column of an axial slice are shown at the top left, the liver on the left of the image and the spine at its bottom.
RIGHT, LEFT = -1, 1

CT_FIELD_OF_VIEW_CM = 38.0
SLICES = 24
SLICE_CM = 0.8
OVERSAMPLING = 2  # in the plane

# Hounsfield units; portal venous phase
AIR, LUNG, FAT, FLUID, MUSCLE, METAL = -1000, -850, -100, 10, 58, 4500
SKIN, TABLE_SHELL, TABLE_CORE = 20, -20, -900
MARROW, CORTEX, DISC, CORD = 190, 650, 85, 35
BILE, CHYME, GUT_WALL = 6, 22, 60

OUTLINE_POWER = 2.5  # of the superellipse that a trunk's section is
RIB_PITCH = 2.9  # cm between the ribs' heads

_Point = tuple[float, float, float]


@dataclass(frozen=True)
class AbdomenAnatomy:
    """What stays with a patient from one scan to the next. Lengths in cm, attenuation in HU.

    Args:
        sex: F or M.
        age: years.
        half_width: of the body.
        half_depth: of the body, front to back.
        fat: thickness of the subcutaneous fat.
        wall: thickness of the muscle around the cavity.
        liver: attenuation of the liver.
        liver_size: relative to the reference.
        spleen_size: relative to the reference.
        kidney_drop: how far the kidneys lie below the reference.
        stomach_fill: how full the stomach is, 0 to 1.
        gas: share of the stomach that is air.
        seed: of vessels and bowel.
    """

    sex: Literal["F", "M"]
    age: int
    half_width: float
    half_depth: float
    fat: float
    wall: float
    liver: float
    liver_size: float
    spleen_size: float
    kidney_drop: float
    stomach_fill: float
    gas: float
    seed: int

    @classmethod
    def draw(cls, rng: np.random.Generator) -> AbdomenAnatomy:
        """Draw an adult.

        Args:
            rng: source of randomness; the same state gives the same patient.

        Returns:
            the patient.
        """
        sex: Literal["F", "M"] = "F" if rng.random() < 0.5 else "M"
        habitus = float(np.clip(rng.normal(), -1.5, 2.0))
        frame = 0.4 if sex == "M" else -0.4
        return cls(
            sex=sex,
            age=int(np.clip(rng.normal(58, 14), 20, 90)),
            half_width=15.4 + frame + 1.0 * habitus,
            half_depth=10.9 + frame + 0.8 * habitus,
            fat=1.7 + 0.65 * habitus,
            wall=float(rng.uniform(1.2, 1.6)),
            liver=float(np.clip(rng.normal(108, 10), 80, 130)),
            liver_size=float(np.clip(rng.normal(1.0, 0.05), 0.88, 1.12)),
            spleen_size=float(np.clip(rng.normal(1.0, 0.1), 0.8, 1.25)),
            kidney_drop=float(rng.normal(0, 0.6)),
            stomach_fill=float(rng.uniform(0.55, 1.0)),
            gas=float(rng.uniform(0.2, 0.5)),
            seed=int(rng.integers(2**32)),
        )


@dataclass(frozen=True)
class AbdomenScan:
    """What changes from one scan to the next.

    Args:
        shift: of the patient in the field of view, x and y, cm.
        roll: degrees.
        bed: offset of the scanned range along the body, cm.
        noise: standard deviation in HU.
        seed: of the noise.
    """

    shift: tuple[float, float]
    roll: float
    bed: float
    noise: float
    seed: int

    @classmethod
    def draw(cls, rng: np.random.Generator) -> AbdomenScan:
        """Draw a scan.

        Args:
            rng: source of randomness.

        Returns:
            the scan.
        """
        return cls(
            shift=(float(rng.normal(0, 0.5)), float(rng.normal(0, 0.4))),
            roll=float(rng.normal(0, 1.5)),
            bed=float(rng.normal(0, 0.7)),
            noise=float(rng.uniform(8, 14)),
            seed=int(rng.integers(2**32)),
        )


@dataclass(frozen=True)
class AbdomenFinding:
    """An anomaly to insert.

    Args:
        label: one of :data:`CT_FINDINGS`.
        seed: of its place and size.
    """

    label: str
    seed: int

    def __post_init__(self) -> None:
        if self.label not in CT_FINDINGS:
            raise UserError(f"finding must be one of {', '.join(CT_FINDINGS)}, got {self.label!r}")


@dataclass(frozen=True)
class AbdomenVolume:
    """A scan and what is true of it; axes are rows (to the back), columns (to the patient's left), slices (upwards).

    Args:
        image: (H, W, S) int16, Hounsfield units from -1024 to 3071.
        liver_mask: (H, W, S) bool.
        anomaly_mask: (H, W, S) bool: the metal of a needle without its streaks, the fluid of ascites; empty without.
        spacing: of rows, columns and slices in mm.
        labels: the findings' names, each once.
    """

    image: np.ndarray
    liver_mask: np.ndarray
    anomaly_mask: np.ndarray
    spacing: tuple[float, float, float]
    labels: tuple[str, ...]


@dataclass
class _Grid:
    """Sample points in the body's frame, and the shapes drawn so far.

    Args:
        x: (N, N) of a slice, body coordinates.
        y: (N, N) of a slice.
        z: (S,) of the slices.
        hu: (S, N, N) attenuation.
    """

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    hu: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.hu = np.full((len(self.z), *self.x.shape), AIR, np.float32)

    def blob(self, centre: _Point, radii: _Point, tilt: float = 0.0) -> np.ndarray:
        """(S, N, N) bool, the inside of an ellipsoid turned by ``tilt`` degrees in the axial plane."""
        cos, sin = np.cos(np.deg2rad(tilt)), np.sin(np.deg2rad(tilt))
        dx, dy = self.x - np.float32(centre[0]), self.y - np.float32(centre[1])
        flat = ((cos * dx + sin * dy) / radii[0]) ** 2 + ((cos * dy - sin * dx) / radii[1]) ** 2
        left = 1 - ((self.z - centre[2]) / radii[2]) ** 2
        return flat[None] < left[:, None, None]

    def tube(self, start: _Point, end: _Point, radius: float) -> np.ndarray:
        """(S, N, N) bool, the inside of a round-ended tube."""
        a, b = np.asarray(start, np.float32), np.asarray(end, np.float32)
        inside = np.zeros(self.hu.shape, bool)
        reach = np.flatnonzero((self.z > min(a[2], b[2]) - radius) & (self.z < max(a[2], b[2]) + radius))
        for number in reach:
            inside[number] = self._distance(a, b, number) < radius
        return inside

    def _distance(self, a: np.ndarray, b: np.ndarray, number: int) -> np.ndarray:
        point = (self.x - a[0], self.y - a[1], np.float32(self.z[number]) - a[2])
        way = b - a
        along = np.clip(sum(p * w for p, w in zip(point, way, strict=True)) / float(way @ way), 0, 1)
        return np.sqrt(sum((p - along * w) ** 2 for p, w in zip(point, way, strict=True)))


@dataclass
class _Scene:
    """What findings are put into."""

    grid: _Grid
    cavity: np.ndarray  # (S, N, N) bool, the peritoneal cavity below the diaphragm
    liver: np.ndarray  # (S, N, N) bool
    pixel: float  # cm


class AbdomenPhantom:
    """A patient on the table of a CT scanner.

    Args:
        anatomy: the patient.
        scan: the scan.
    """

    def __init__(self, anatomy: AbdomenAnatomy, scan: AbdomenScan) -> None:
        self.anatomy = anatomy
        self.scan = scan
        a = anatomy
        self.spine_y = 0.94 * a.half_depth - 0.8 * a.fat - 5.9  # centre of the vertebral bodies

    def render(self, size: int, findings: Sequence[AbdomenFinding] = ()) -> AbdomenVolume:
        """Scan the patient.

        Args:
            size: rows and columns, from 32 to 2048; there are always 24 slices, 8 mm apart.
            findings: what to insert.

        Returns:
            the volume with its masks. The same phantom gives the same anatomy at every size.

        Raises:
            UserError: when ``size`` is out of range.
        """
        if not MIN_SIZE <= size <= MAX_SIZE:
            raise UserError(f"size must be from {MIN_SIZE} to {MAX_SIZE} pixels, got {size}")
        fine = size * OVERSAMPLING
        scene = self._draw(fine)
        anomaly = np.zeros(scene.liver.shape, bool)
        for finding in findings:
            anomaly |= _INSERT[finding.label](np.random.default_rng(finding.seed), self, scene)
        hu = _box_mean(scene.grid.hu, OVERSAMPLING)
        rng = np.random.default_rng([self.scan.seed, 1])
        # a smooth reconstruction kernel: neighbouring pixels share their noise
        noise = gaussian_filter(rng.standard_normal(hu.shape, dtype=np.float32), (0, 0.6, 0.6))
        hu += noise * np.float32(self.scan.noise / noise.std())
        # slices last, as NIfTI and SimpleITK's users have them
        image = np.clip(np.rint(hu), -1024, 3071).astype(np.int16)
        mm = round(10 * CT_FIELD_OF_VIEW_CM / size, 6)  # what 16 characters of DICOM hold
        return AbdomenVolume(
            image=np.ascontiguousarray(image.transpose(1, 2, 0)),
            liver_mask=np.ascontiguousarray((_box_mean(scene.liver, OVERSAMPLING) > 0.5).transpose(1, 2, 0)),
            anomaly_mask=np.ascontiguousarray((_box_mean(anomaly, OVERSAMPLING) >= 0.5).transpose(1, 2, 0)),
            spacing=(mm, mm, 10 * SLICE_CM),
            labels=tuple(dict.fromkeys(finding.label for finding in findings)),
        )

    def _draw(self, fine: int) -> _Scene:
        """The patient without findings, ``fine`` samples wide."""
        a, scan = self.anatomy, self.scan
        pixel = CT_FIELD_OF_VIEW_CM / fine
        axis = ((np.arange(fine) + 0.5) * pixel - CT_FIELD_OF_VIEW_CM / 2).astype(np.float32)
        x, y = axis[None, :] - np.float32(scan.shift[0]), axis[:, None] - np.float32(scan.shift[1])
        roll = np.deg2rad(scan.roll)
        z = (np.arange(SLICES) - (SLICES - 1) / 2) * SLICE_CM + scan.bed
        grid = _Grid(
            (np.cos(roll) * x + np.sin(roll) * y).astype(np.float32),
            (np.cos(roll) * y - np.sin(roll) * x).astype(np.float32),
            z.astype(np.float32),
        )
        self._table(grid, axis)

        skin = self._outline(grid, 0.0)
        grid.hu[:, skin] = SKIN
        grid.hu[:, self._outline(grid, 0.25)] = FAT
        trunk = self._outline(grid, a.fat)
        grid.hu[:, trunk] = MUSCLE
        inner = self._outline(grid, a.fat + a.wall)
        self._back(grid, trunk)
        # the spine stands out into the cavity from behind
        spine = np.hypot(grid.x / 2.6, (grid.y - self.spine_y - 0.6) / 2.4) < 1
        inside = inner & ~spine & (grid.y < self.spine_y + 3.2)
        grid.hu[:, inside] = FAT
        self._ribs(grid)
        self._spine(grid)

        diaphragm = self._diaphragm(grid)
        above = grid.z[:, None, None] > diaphragm[None]
        grid.hu[above & inside[None]] = LUNG
        heart = grid.blob((2.3, -3.4, 11.2), (5.4, 4.8, 4.8), 25) & inside[None] & above
        grid.hu[heart] = 130
        cavity = inside[None] & ~(grid.z[:, None, None] > diaphragm[None] - 0.25)
        grid.hu[inside[None] & ~above & ~cavity] = MUSCLE
        liver = self._organs(grid, cavity)
        return _Scene(grid, cavity, liver, pixel)

    def _outline(self, grid: _Grid, depth: float) -> np.ndarray:
        """(N, N) bool, the trunk ``depth`` cm below the skin; flatter at the back, on which the patient lies."""
        a = self.anatomy
        width, front, back = a.half_width - depth, a.half_depth - depth, 0.94 * a.half_depth - 0.8 * depth
        down = np.where(grid.y > 0, grid.y / back, grid.y / front)
        power = OUTLINE_POWER + 0.6 * (grid.y > 0)
        return np.abs(grid.x / width) ** power + np.abs(down) ** power < 1

    def _table(self, grid: _Grid, axis: np.ndarray) -> None:
        """The couch, a shallow trough; it does not roll with the patient."""
        x, y = axis[None, :], axis[:, None] - np.float32(self.scan.shift[1])
        top = 0.94 * self.anatomy.half_depth + 1.1 - 0.011 * x**2
        shape = (np.abs(x) < 18.5) & (y > top) & (y < top + 1.3 + 0.004 * x**2)
        core = (np.abs(x) < 18.2) & (y > top + 0.3) & (y < top + 1.0 + 0.004 * x**2)
        grid.hu[:, shape] = TABLE_SHELL
        grid.hu[:, core] = TABLE_CORE

    def _back(self, grid: _Grid, trunk: np.ndarray) -> None:
        """The erector muscles with the fat between them, beside the spinous processes."""
        for side in (RIGHT, LEFT):
            ring = np.hypot((grid.x - side * 3.4) / 3.0, (grid.y - self.spine_y - 3.2) / 1.7)
            grid.hu[:, (ring < 1.12) & trunk] = FAT
            grid.hu[:, (ring < 1) & trunk] = MUSCLE

    def _ribs(self, grid: _Grid) -> None:
        """Ribs run around the cavity and fall towards the front: a slice cuts each of them once on either side."""
        a = self.anatomy
        width, front, back = (
            a.half_width - a.fat - 0.55 * a.wall,
            a.half_depth - a.fat - 0.55 * a.wall,
            0.94 * a.half_depth - 0.8 * (a.fat + 0.55 * a.wall),
        )
        down = np.where(grid.y > 0, grid.y / back, grid.y / front)
        power = OUTLINE_POWER + 0.6 * (grid.y > 0)
        ring = (np.abs(grid.x / width) ** power + np.abs(down) ** power) ** (1 / power)
        outward = (ring - 1) * np.hypot(grid.x, grid.y) / np.maximum(ring, 0.1)
        turn = np.abs(np.arctan2(grid.x / width, grid.y / back))  # 0 at the spine, pi at the breastbone
        drop = 7.0 * turn / np.pi + 5.0 * (turn / np.pi) ** 2
        for number, z in enumerate(grid.z):
            height = (z + drop) / RIB_PITCH
            rib = np.rint(height)
            off = (height - rib) * RIB_PITCH
            # 0 is the twelfth rib: the lowest end early, the others in cartilage
            end = np.select([rib < 0, rib == 0, rib == 1], [0, 1.3, 1.9], 2.5)
            shape = np.hypot(outward / 0.5, off / 0.62)
            bone = (shape < 1) & (turn < end) & (turn > 0.22)
            grid.hu[number, bone] = CORTEX
            grid.hu[number, bone & (shape < 0.62)] = MARROW

    def _spine(self, grid: _Grid) -> None:
        """Vertebral bodies and discs, arch, processes and cord."""
        y = grid.y - np.float32(self.spine_y)
        body = np.hypot(grid.x / 2.15, y / 1.65)
        arch = np.hypot(grid.x / 1.5, (y - 2.2) / 1.35)
        canal = np.hypot(grid.x / 0.95, (y - 2.3) / 0.8) < 1
        spinous = (np.abs(grid.x) < 0.28) & (y > 3.2) & (y < 5.0)
        transverse = (np.abs(y - 2.2 - 0.1 * np.abs(grid.x)) < 0.33) & (np.abs(grid.x) < 3.4) & (np.abs(grid.x) > 1.3)
        for number, z in enumerate(grid.z):
            level = (z / 3.1) % 1  # 3.1 cm from one vertebra to the next
            disc = level < 0.2
            plane = grid.hu[number]
            plane[body < 1] = DISC if disc else CORTEX
            if not disc:
                plane[body < 0.88] = MARROW
            if level > 0.3:
                plane[(arch < 1) | spinous | (transverse & (level > 0.55))] = CORTEX
                plane[((arch < 0.85) & (arch > 0.75)) | (spinous & (np.abs(grid.x) < 0.12))] = MARROW
            plane[canal] = CORD

    def _diaphragm(self, grid: _Grid) -> np.ndarray:
        """(N, N) height below which the abdomen lies: two domes, falling to the wall."""
        right = 8.8 - 0.075 * (grid.x + 5.5) ** 2 - 0.06 * (grid.y - 0.5) ** 2
        left = 7.6 - 0.085 * (grid.x - 6.0) ** 2 - 0.06 * (grid.y - 0.5) ** 2
        return np.maximum(right, left)

    def _organs(self, grid: _Grid, cavity: np.ndarray) -> np.ndarray:
        """Everything in the cavity; returns the liver."""
        a, rng = self.anatomy, np.random.default_rng(self.anatomy.seed)
        hu = grid.hu
        middle = self.spine_y - 1.65  # front of the vertebrae

        self._bowel(grid, cavity, rng)
        for side, low in ((RIGHT, -4.6), (LEFT, -3.6)):
            self._kidney(grid, cavity, side, low - a.kidney_drop)
        spleen = grid.blob((a.half_width - 5.6, 3.0, 3.2), (3.0, 4.9, 4.6 * a.spleen_size), -25) & cavity
        hu[spleen] = 122

        # the stomach's air gathers at its front
        fill = 0.75 + 0.35 * a.stomach_fill
        centre, radii = (5.0, -3.6, 3.4), (3.7 * fill, 3.9 * fill, 4.6 * fill)
        stomach = grid.blob(centre, radii, 20) & cavity
        lumen = grid.blob(centre, (radii[0] - 0.35, radii[1] - 0.35, radii[2] - 0.35), 20) & cavity
        hu[stomach] = GUT_WALL
        hu[lumen] = CHYME
        level = centre[1] - radii[1] * (1 - 2 * a.gas)
        hu[lumen & (grid.y < level)[None]] = AIR

        # aorta left and vena cava right of the midline, before the spine
        hu[:, np.hypot(grid.x - 1.1, grid.y - middle + 1.1) < 1.1] = 165
        hu[:, np.hypot((grid.x + 1.7) / 1.35, (grid.y - middle + 0.9) / 0.95) < 1] = 140
        for side in (RIGHT, LEFT):  # crura of the diaphragm, psoas further down
            crus = np.hypot((grid.x - side * 2.4) / 0.5, (grid.y - middle) / 1.6) < 1
            hu[:, crus] = MUSCLE
            psoas = np.hypot((grid.x - side * 3.4) / 1.3, (grid.y - self.spine_y) / 1.5) < 1
            low = grid.z < -4
            hu[low] = np.where(psoas, MUSCLE, hu[low])

        s = a.liver_size
        edge = a.half_width - a.fat - a.wall
        liver = grid.blob((0.55 - 0.47 * edge, -0.3, 2.2), (0.62 * edge * s, 7.6 * s, 8.6 * s), 12)
        liver |= grid.blob((0.6, -5.0, 3.8), (6.4 * s, 3.0 * s, 4.2 * s), -10)
        beside = np.hypot(grid.x / 3.3, (grid.y - middle - 0.4) / 3.0) > 1
        liver &= cavity & beside[None] & ~stomach
        liver &= ~grid.blob((-6.2, self.spine_y + 1.4, -4.6 - a.kidney_drop), (3.0, 3.3, 5.6), 30)
        hu[liver] = a.liver
        self._vessels(grid, liver, rng)
        gallbladder = grid.blob((-4.2, -4.0, -2.6), (1.3, 2.0, 2.4), 20) & cavity
        hu[gallbladder] = BILE
        return liver & ~gallbladder

    def _kidney(self, grid: _Grid, cavity: np.ndarray, side: int, low: float) -> None:
        centre, tilt = (side * 6.2, self.spine_y + 1.4, low), -side * 30
        kidney = grid.blob(centre, (2.5, 2.9, 5.2), tilt) & cavity
        grid.hu[kidney] = 185
        grid.hu[kidney & grid.blob(centre, (1.7, 2.0, 4.1), tilt)] = 135
        hilum = (side * 5.2, self.spine_y + 0.9, low)
        grid.hu[kidney & grid.blob(hilum, (1.3, 1.0, 2.6), tilt)] = FAT + 20

    def _bowel(self, grid: _Grid, cavity: np.ndarray, rng: np.random.Generator) -> None:
        """Loops in front of the kidneys, some with gas at their front."""
        for _ in range(40):
            centre = (float(rng.uniform(-8, 9)), float(rng.uniform(-7, 2.5)), float(rng.uniform(-11, 0.5)))
            radius = float(rng.uniform(1.1, 1.9))
            radii = (radius, radius * float(rng.uniform(0.8, 1.3)), float(rng.uniform(1.6, 3.2)))
            tilt = float(rng.uniform(0, 180))
            loop = grid.blob(centre, radii, tilt) & cavity
            lumen = grid.blob(centre, (radii[0] - 0.25, radii[1] - 0.25, radii[2] - 0.25), tilt) & cavity
            gas = rng.random() < 0.35
            grid.hu[loop] = GUT_WALL
            grid.hu[lumen] = CHYME + 10
            if gas:
                grid.hu[lumen & (grid.y < centre[1] - 0.1 * radius)[None]] = AIR

    def _vessels(self, grid: _Grid, liver: np.ndarray, rng: np.random.Generator) -> None:
        """Portal and hepatic veins, brighter than the liver in this phase."""
        bright = np.zeros(liver.shape, bool)
        for root, radius in (((-2.0, -0.6, 0.6), 0.55), ((-2.2, 1.6, 6.6), 0.5)):
            for _ in range(5):
                end = np.array([rng.uniform(-11, -3), rng.uniform(-5, 5), root[2] + rng.uniform(-4, 3)])
                middle = (np.asarray(root) + end) / 2 + rng.normal(0, 0.6, 3)
                bright |= grid.tube(root, tuple(middle), radius)
                bright |= grid.tube(tuple(middle), tuple(end), 0.6 * radius)
        grid.hu[bright & liver] = self.anatomy.liver + 45


def _insert_needle(rng: np.random.Generator, phantom: AbdomenPhantom, scene: _Scene) -> np.ndarray:
    """A needle from outside of the skin into the liver, all of it in one or two slices, with mild streaks."""
    grid = scene.grid
    area = scene.liver.sum(axis=(1, 2))
    number = int(rng.choice(np.flatnonzero(area > 0.6 * area.max())))
    rows, columns = np.nonzero(scene.liver[number])
    pick = int(rng.integers(len(rows)))
    tip = np.array([grid.x[rows[pick], columns[pick]], grid.y[rows[pick], columns[pick]], grid.z[number]], np.float32)
    # from the right side or the front, where no bowel lies in the way
    angle = np.deg2rad(rng.uniform(180, 265))
    towards = np.array([np.cos(angle), np.sin(angle), 0.0], np.float32)
    reach = np.arange(0, 30, 0.1, dtype=np.float32)
    path = tip[:2] + reach[:, None] * towards[:2]
    a = phantom.anatomy
    down = np.where(path[:, 1] > 0, path[:, 1] / (0.94 * a.half_depth), path[:, 1] / a.half_depth)
    in_body = np.hypot(path[:, 0] / a.half_width, down) < 1
    start = tip + (float(reach[in_body].max(initial=0)) + rng.uniform(2, 4)) * towards
    start[2] += rng.uniform(-0.3, 0.3)

    radius = max(0.11, 0.62 * OVERSAMPLING * scene.pixel)
    metal = np.zeros(scene.liver.shape, bool)
    way = start - tip
    for layer in range(len(grid.z)):
        point = (grid.x - tip[0], grid.y - tip[1])
        along = np.clip((point[0] * way[0] + point[1] * way[1]) / float(way[:2] @ way[:2]), 0, 1)
        height = tip[2] + along * way[2]
        across = np.hypot(point[0] - along * way[0], point[1] - along * way[1])
        near = np.abs(grid.z[layer] - height) < SLICE_CM / 2
        metal[layer] = near & (across < radius)
        if not near.any():
            continue
        # beam hardening along the shaft and beyond the tip, and faint bright and dark lines beside it
        ahead = -(point[0] * towards[0] + point[1] * towards[1])  # cm beyond the tip
        beside = np.abs(point[0] * towards[1] - point[1] * towards[0])
        fade = np.exp(-np.maximum(ahead, 0) / 4) * (np.abs(grid.z[layer] - tip[2]) < SLICE_CM)
        streak = -160 * np.exp(-((beside / 0.7) ** 2)) + 45 * np.cos(4 * beside) * np.exp(-((beside / 2.5) ** 2))
        body = grid.hu[layer] > -500
        grid.hu[layer] += np.where(body, streak * fade, 0).astype(np.float32)
    grid.hu[metal] = METAL
    return metal


def _insert_ascites(rng: np.random.Generator, phantom: AbdomenPhantom, scene: _Scene) -> np.ndarray:
    """Fluid between the wall and the organs, most of it around the liver, which it pushes inwards."""
    grid = scene.grid
    a = phantom.anatomy
    thickness = float(rng.uniform(1.0, 2.2))
    core = phantom._outline(grid, a.fat + a.wall + thickness)
    level = float(rng.uniform(1.0, 4.5))  # how far up the front the fluid reaches; it gathers at the back
    right = 0.25 * np.sin(1.3 * grid.y + rng.uniform(0, 6)) + grid.x < 2.5
    flank = (np.abs(grid.x) > 4) | (grid.y < -level)
    band = scene.cavity & (~core & (right | (grid.y > -level)) & flank)[None]
    fluid = band & ((grid.hu < 0) | scene.liver) & (grid.hu > -500)
    # under the dome as well, where the liver is pushed down
    top = scene.cavity & ~np.roll(scene.cavity, -1, axis=0) & scene.liver
    top[-1] = False
    fluid |= top
    grid.hu[fluid] = FLUID
    scene.liver &= ~fluid
    return fluid


_INSERT: dict[str, Callable[[np.random.Generator, AbdomenPhantom, _Scene], np.ndarray]] = {
    "Ascites": _insert_ascites,
    "Needle": _insert_needle,
}

# What gan_anom_detect's readers found in its liver CT
CT_FINDINGS: tuple[str, ...] = tuple(_INSERT)


def _box_mean(values: np.ndarray, factor: int) -> np.ndarray:
    """Mean over ``factor`` by ``factor`` samples of each slice (S, N, N)."""
    slices, height, width = values.shape
    return values.reshape(slices, height // factor, factor, width // factor, factor).mean((2, 4), dtype=np.float32)
