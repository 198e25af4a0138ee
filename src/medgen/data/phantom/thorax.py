"""Analytic frontal chest radiographs: simple shapes projected to path lengths, then Beer-Lambert and a film curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image
from scipy.interpolate import CubicSpline, PchipInterpolator
from scipy.ndimage import gaussian_filter, label
from scipy.special import expit

from medgen.errors import UserError

__all__ = [
    "FIELD_OF_VIEW_CM",
    "FINDINGS",
    "MAX_SIZE",
    "MIN_SIZE",
    "Acquisition",
    "Anatomy",
    "Finding",
    "ThoraxImage",
    "ThoraxPhantom",
    "make_thorax",
]

# Frames. Detector: centimetres, x to the image's right, y down, origin at the centre. Body: the same after roll, shift,
# scoliosis and the patient's breadth and stature are undone; u is the distance from the midline. The image's right is
# the patient's left, as radiographs are read.
RIGHT, LEFT = -1, 1  # the patient's, as signs of u

MIN_SIZE, MAX_SIZE = 32, 2048
FIELD_OF_VIEW_CM = 37.0
RENDER_SIZE = 256  # smaller images are averaged down from this: ribs and vessels would alias
PSF_SIGMA_CM = 0.03  # focal spot and detector

# Effective attenuation per cm at about 120 kVp, scatter included
MU_SOFT, MU_LUNG, MU_BONE, MU_METAL = 0.20, 0.045, 0.48, 3.0
SCATTER = 0.006  # fraction of the beam that reaches the detector whatever stands in its way

# The reference thorax in body coordinates
APEX_Y, BASE_Y = -15.0, 12.0
CAVITY_HALF_WIDTH, CAVITY_HALF_DEPTH = 13.3, 8.6
DOME_Y = {RIGHT: 7.6, LEFT: 9.2}  # the liver holds the right dome up
DOME_U = 5.8
SULCUS_DEPTH = 3.6  # from the top of the dome to the costophrenic angle
HILUM = {RIGHT: (3.4, -2.0), LEFT: (3.6, -3.0)}
# axes of the heart's ellipsoids: centre u, centre y, half length, half width, tilt in degrees, half thickness
HEART = ((3.3, 5.4, 7.1, 4.6, 43.0, 7.0), (-0.9, 5.0, 3.2, 4.2, 0.0, 6.4))
PULMONARY_TRUNK = (1.9, -2.2, 3.6, 2.1, 72.0, 3.2)

_Point = tuple[float, float]


@dataclass(frozen=True)
class Anatomy:
    """What stays with a patient from one radiograph to the next. Lengths in cm, factors relative to the reference."""

    sex: Literal["F", "M"]
    age: int
    breadth: float
    stature: float
    wall: float  # soft tissue outside the rib cage, at the side
    depth: float  # half the thickness of the chest
    heart: float
    heart_tilt: float  # degrees
    aorta: float  # radius of the knob
    scoliosis: float
    dome_difference: float  # left below right
    bone: float
    rib_drop: float
    breast: float
    gas: float  # radius of the stomach bubble
    seed: int  # of the vessel trees

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Anatomy:
        """Draw an adult.

        Args:
            rng: source of randomness; the same state gives the same patient.

        Returns:
            the patient.
        """
        sex: Literal["F", "M"] = "F" if rng.random() < 0.5 else "M"
        age = int(np.clip(rng.normal(52, 18), 18, 92))
        aged = (age - 50) / 40
        habitus = float(np.clip(rng.normal(), -1.6, 2.2))
        return cls(
            sex=sex,
            age=age,
            breadth=float(np.clip(rng.normal(1.02 if sex == "M" else 0.93, 0.05), 0.82, 1.14)),
            stature=float(np.clip(rng.normal(1.02 if sex == "M" else 0.95, 0.05), 0.84, 1.12)),
            wall=2.9 + 0.9 * habitus,
            depth=10.6 + 0.9 * habitus + 0.3 * aged,
            heart=float(np.clip(rng.normal(0.92 + 0.05 * aged, 0.05), 0.78, 1.05)),
            heart_tilt=float(rng.normal(4 * habitus, 6)),
            aorta=float(np.clip(rng.normal(1.75 + 0.3 * aged, 0.15), 1.3, 2.4)),
            scoliosis=float(rng.normal(0, 0.35)),
            dome_difference=float(rng.uniform(-0.5, 0.7)),
            bone=float(np.clip(rng.normal(1 - 0.15 * aged, 0.1), 0.7, 1.3)),
            rib_drop=float(rng.uniform(0.85, 1.15)),
            breast=float(rng.uniform(0.8, 2.8)) if sex == "F" else 0.0,
            gas=float(rng.uniform(0.8, 2.2)) if rng.random() < 0.7 else 0.0,
            seed=int(rng.integers(2**32)),
        )


@dataclass(frozen=True)
class Acquisition:
    """What changes from one radiograph to the next. Lengths in cm."""

    view: Literal["PA", "AP"]
    yaw: float  # how far the front of the chest is displaced against the back
    roll: float  # degrees
    shift: _Point
    inspiration: float  # how far the diaphragm is lower than the reference
    exposure: float  # in units of the line integral
    latitude: float  # of the film curve
    gradient: _Point  # of the exposure, edge to edge
    grain: float
    marker: bool  # a lead L beside the patient's left shoulder
    seed: int  # of grain and texture

    @classmethod
    def draw(cls, rng: np.random.Generator, view: Literal["PA", "AP"] | None = None) -> Acquisition:
        """Draw an exposure.

        Args:
            rng: source of randomness.
            view: PA (erect) or AP (bedside: shallow breath, larger heart); drawn, mostly PA, when None.

        Returns:
            the exposure.

        Raises:
            UserError: when ``view`` is neither.
        """
        if view not in (None, "PA", "AP"):
            raise UserError(f"view must be 'PA' or 'AP', got {view!r}")
        bedside = rng.random() < 0.3
        view = view or ("AP" if bedside else "PA")
        return cls(
            view=view,
            yaw=float(rng.normal(0, 0.45)),
            roll=float(rng.normal(0, 1.4)),
            shift=(float(rng.normal(0, 0.6)), float(rng.normal(0, 0.6))),
            inspiration=float(rng.normal(0.2, 0.7)) if view == "PA" else float(rng.normal(-1.6, 0.7)),
            exposure=float(rng.normal(0, 0.25)),
            latitude=float(rng.uniform(0.7, 1.1)),
            gradient=(float(rng.normal(0, 0.1)), float(rng.normal(0, 0.1))),
            grain=float(rng.uniform(0.6, 1.2)),
            marker=bool(rng.random() < 0.7),
            seed=int(rng.integers(2**32)),
        )


@dataclass(frozen=True)
class Finding:
    """An anomaly to insert.

    Args:
        label: one of :data:`FINDINGS`.
        seed: of its place, size and shape.
    """

    label: str
    seed: int

    def __post_init__(self) -> None:
        if self.label not in FINDINGS:
            raise UserError(f"finding must be one of {', '.join(FINDINGS)}, got {self.label!r}")


@dataclass(frozen=True)
class ThoraxImage:
    """A radiograph and what is true of it.

    Args:
        image: (H, W) float32 in [0, 1], bone white.
        lung_mask: (H, W) bool, the lung fields as they are seen: without heart, mediastinum and what lies behind the
            diaphragm; with whatever opacity lies in them.
        anomaly_mask: (H, W) bool, the projection of all findings, every pixel they touch; empty when there are none.
            For Cardiomegaly the silhouette of the heart.
        labels: the findings' names, each once; empty when there are none.
    """

    image: np.ndarray
    lung_mask: np.ndarray
    anomaly_mask: np.ndarray
    labels: tuple[str, ...]


class _Grid:
    """Pixel centres in body coordinates, and tubes drawn between points of them."""

    def __init__(self, size: int, anatomy: Anatomy, acquisition: Acquisition) -> None:
        self.size = size
        self.cm = FIELD_OF_VIEW_CM / size
        self.anatomy, self.acquisition = anatomy, acquisition
        roll = np.deg2rad(acquisition.roll)
        self._rotation = np.array([[np.cos(roll), -np.sin(roll)], [np.sin(roll), np.cos(roll)]])  # body to detector
        self._shift = np.array(acquisition.shift)
        axis = ((np.arange(size) + 0.5) * self.cm - FIELD_OF_VIEW_CM / 2).astype(np.float32)
        self.detector_x, self.detector_y = axis[None, :], axis[:, None]
        x, y = self.detector_x - np.float32(self._shift[0]), self.detector_y - np.float32(self._shift[1])
        cos, sin = np.float32(np.cos(roll)), np.float32(np.sin(roll))
        self.y = (cos * y - sin * x) / np.float32(anatomy.stature)
        self.u = ((cos * x + sin * y) - self._midline(self.y)) / np.float32(anatomy.breadth)
        self.abs_u = np.abs(self.u)
        self.is_left = self.u > 0

    def _midline(self, y: np.ndarray) -> np.ndarray:
        return (self.anatomy.scoliosis * np.cos(y * np.float32(np.pi / 16))).astype(np.float32)

    def empty(self) -> np.ndarray:
        return np.zeros((self.size, self.size), np.float32)

    def by_side(self, values: dict[int, float]) -> np.ndarray:
        """A map (H, W) that holds ``values[LEFT]`` left of the midline and ``values[RIGHT]`` right of it."""
        return np.where(self.is_left, np.float32(values[LEFT]), np.float32(values[RIGHT]))

    def profile(self, knots: Sequence[float], values: Sequence[float]) -> np.ndarray:
        """A smooth function of y given at some heights, as a map (H, W)."""
        fine = np.linspace(knots[0], knots[-1], 400)
        return np.interp(self.y, fine, PchipInterpolator(knots, values)(fine)).astype(np.float32)

    def to_pixels(self, points: np.ndarray) -> np.ndarray:
        """Body coordinates (N, 2) to column and row, in pixels."""
        x = points[:, 0] * self.anatomy.breadth + self._midline(points[:, 1])
        detector = np.stack([x, points[:, 1] * self.anatomy.stature], axis=1) @ self._rotation.T + self._shift
        return self.detector_to_pixels(detector)

    def detector_to_pixels(self, points: np.ndarray) -> np.ndarray:
        return (points + FIELD_OF_VIEW_CM / 2) / self.cm - 0.5

    def tube(self, out: np.ndarray, points: np.ndarray, radii: np.ndarray | float) -> None:
        """Raise ``out`` (H, W) to the thickness in cm of a round tube along ``points`` (N, 2), body coordinates."""
        self.tube_in_pixels(out, self.to_pixels(np.asarray(points, float)), radii)

    def tube_in_pixels(self, out: np.ndarray, points: np.ndarray, radii: np.ndarray | float) -> None:
        true = np.broadcast_to(np.asarray(radii, float) / self.cm, len(points))
        # a tube thinner than a pixel is drawn a pixel wide and as much fainter: it would break into dots otherwise
        drawn = np.hypot(true, 0.6)
        gain = 2 * self.cm * (true / drawn) ** 2
        for (x0, y0), (x1, y1), r0, r1, g in zip(points, points[1:], drawn, drawn[1:], gain, strict=False):
            reach = max(r0, r1)
            left, right = max(int(min(x0, x1) - reach), 0), min(int(max(x0, x1) + reach) + 2, self.size)
            top, bottom = max(int(min(y0, y1) - reach), 0), min(int(max(y0, y1) + reach) + 2, self.size)
            if left >= right or top >= bottom:
                continue
            dx, dy = x1 - x0, y1 - y0
            px = np.arange(left, right, dtype=np.float32)[None, :] - np.float32(x0)
            py = np.arange(top, bottom, dtype=np.float32)[:, None] - np.float32(y0)
            along = np.clip((px * dx + py * dy) / max(dx * dx + dy * dy, 1e-9), 0, 1)
            radius = r0 + (r1 - r0) * along
            squared = radius**2 - (px - along * dx) ** 2 - (py - along * dy) ** 2
            box = out[top:bottom, left:right]
            np.maximum(box, g * np.sqrt(np.maximum(squared, 0)), out=box)

    def ellipsoid(self, u: float, y: float, half_length: float, half_width: float, tilt: float) -> np.ndarray:
        """Fraction (H, W) in [0, 1] of its greatest thickness that a ray meets in an ellipsoid; 0 outside."""
        cos, sin = np.cos(np.deg2rad(tilt)), np.sin(np.deg2rad(tilt))
        du, dy = self.u - np.float32(u), self.y - np.float32(y)
        along, across = (du * cos + dy * sin) / half_length, (dy * cos - du * sin) / half_width
        return np.sqrt(np.maximum(1 - along * along - across * across, 0)).astype(np.float32)


@dataclass
class _Scene:
    """Maps (H, W) of one exposure, before the film curve."""

    grid: _Grid
    line_integral: np.ndarray
    aerated: np.ndarray  # thickness of lung, cm
    vessels: np.ndarray  # what they add to the line integral
    lung: np.ndarray  # bool
    heart: np.ndarray  # bool


class ThoraxPhantom:
    """A patient in front of a detector.

    Args:
        anatomy: the patient.
        acquisition: the exposure.
    """

    def __init__(self, anatomy: Anatomy, acquisition: Acquisition) -> None:
        self.anatomy = anatomy
        self.acquisition = acquisition
        self.dome_y = {
            RIGHT: DOME_Y[RIGHT] + acquisition.inspiration,
            LEFT: DOME_Y[LEFT] + acquisition.inspiration + anatomy.dome_difference,
        }

    def render(self, size: int, findings: Sequence[Finding] = ()) -> ThoraxImage:
        """Project, expose and develop.

        The same phantom gives the same geometry at every size, and the same pixels outside the anomaly with and
        without findings (at most the width of the point spread around it).

        Args:
            size: height and width in pixels, from 32 to 2048.
            findings: what to insert.

        Returns:
            the radiograph, (size, size), with its masks.

        Raises:
            UserError: when ``size`` is out of range.
        """
        if not MIN_SIZE <= size <= MAX_SIZE:
            raise UserError(f"size must be from {MIN_SIZE} to {MAX_SIZE} pixels, got {size}")
        oversampling = -(-RENDER_SIZE // size)
        grid = _Grid(size * oversampling, self.anatomy, self.acquisition)

        anomaly = np.zeros((grid.size, grid.size), bool)
        enlarged = next((f for f in findings if f.label == "Cardiomegaly"), None)
        gain = 1.0 if enlarged is None else float(np.random.default_rng(enlarged.seed).uniform(1.2, 1.34))
        scene = self._project(grid, heart_gain=gain)
        if enlarged is not None:
            anomaly |= scene.heart
        for finding in findings:
            if finding.label in _INSERT:
                change = _INSERT[finding.label](np.random.default_rng(finding.seed), self, scene)
                anomaly |= change != 0
                scene.line_integral += change

        image = _box_mean(self._develop(scene), oversampling)
        return ThoraxImage(
            image=image,
            lung_mask=_box_mean(scene.lung, oversampling) >= 0.5,
            # whatever was touched: a catheter never fills half a pixel of a small image
            anomaly_mask=_box_mean(anomaly, oversampling) > 0,
            labels=tuple(dict.fromkeys(f.label for f in findings)),
        )

    # Outlines. They take numbers and maps alike: places for findings are chosen without a pixel grid.

    def cavity_half_width(self, y: np.ndarray | float) -> np.ndarray:
        """Half the inner width of the rib cage at height ``y``; 0 above the apices."""
        s = np.clip((np.asarray(y, np.float32) - APEX_Y) / (BASE_Y - APEX_Y), 0, 1)
        return CAVITY_HALF_WIDTH * (1 - (1 - s) ** 2.5) ** np.float32(0.5)

    def mediastinum_half_width(self, y: np.ndarray | float, side: np.ndarray | int) -> np.ndarray:
        """From the midline to the inner border of the lung on ``side`` at height ``y``, heart and aorta apart."""
        y = np.asarray(y, np.float32)
        s = np.clip((y - APEX_Y) / (BASE_Y - APEX_Y), 0, 1)
        towards_apex = 2.6 * np.clip(1 - s / 0.13, 0, 1) ** 1.5
        below_carina = 0.5 * expit((y + 3) / 1.5)
        return 2.35 + 0.1 * np.asarray(side, np.float32) + towards_apex - below_carina

    def apex(self, abs_u: np.ndarray | float) -> np.ndarray:
        """Height of the top of a lung, ``abs_u`` from the midline."""
        return APEX_Y + 1.4 + 0.25 * (np.asarray(abs_u, np.float32) - 4.6) ** 2

    def diaphragm(self, abs_u: np.ndarray | float, y_top: np.ndarray | float) -> np.ndarray:
        """Height of a dome with its top at ``y_top``, ``abs_u`` from the midline."""
        lateral = np.maximum(np.asarray(abs_u, np.float32) - DOME_U, 0) / (CAVITY_HALF_WIDTH - DOME_U)
        medial = np.maximum(DOME_U - np.asarray(abs_u, np.float32), 0) / DOME_U
        return y_top + SULCUS_DEPTH * (0.55 * lateral**2 + 0.45 * lateral**5) + 1.6 * medial**2

    def heart_ellipsoids(self, gain: float = 1.0) -> list[tuple[float, ...]]:
        """Heart as (u, y, half length, half width, tilt in degrees, half thickness), resting on the diaphragm."""
        scale = self.anatomy.heart * gain * (1.1 if self.acquisition.view == "AP" else 1.0)
        shift = 0.6 * self.acquisition.yaw
        ellipsoids = []
        for u, y, length, width, tilt, thickness in HEART:
            tilt = tilt + self.anatomy.heart_tilt * -0.6 if tilt else 0.0
            base = y + 0.9 * self.acquisition.inspiration + 2.0 * (scale - 1)
            ellipsoids.append((u * scale + shift, base, length * scale, width * scale, tilt, thickness * scale))
        return ellipsoids

    def in_lung(self, u: float, y: float) -> bool:
        """Whether a point in body coordinates lies in the visible field of a healthy lung."""
        side = LEFT if u > 0 else RIGHT
        if not self.mediastinum_half_width(y, side) < abs(u) < self.cavity_half_width(y):
            return False
        if not self.apex(abs(u)) < y < self.diaphragm(abs(u), self.dome_y[side]):
            return False
        for cu, cy, length, width, tilt, _ in self.heart_ellipsoids():
            cos, sin = np.cos(np.deg2rad(tilt)), np.sin(np.deg2rad(tilt))
            along, across = ((u - cu) * cos + (y - cy) * sin) / length, ((y - cy) * cos - (u - cu) * sin) / width
            if along**2 + across**2 < 1:
                return False
        return True

    def place_in_lung(self, rng: np.random.Generator, radius: float) -> _Point:
        """A point whose surroundings up to ``radius`` (cm) lie in the lung; in a small lung, up to what fits."""
        around = np.stack([np.cos(np.linspace(0, 2 * np.pi, 12)), np.sin(np.linspace(0, 2 * np.pi, 12))], axis=1)
        while True:
            for _ in range(200):
                u = float(rng.choice((LEFT, RIGHT)) * rng.uniform(2, CAVITY_HALF_WIDTH))
                y = float(rng.uniform(APEX_Y, BASE_Y))
                if all(self.in_lung(u + radius * a, y + radius * b) for a, b in around):
                    return u, y
            radius *= 0.8

    def _project(self, grid: _Grid, heart_gain: float) -> _Scene:
        """Line integral of the attenuation along each ray, by tissue."""
        anatomy, acquisition = self.anatomy, self.acquisition
        y, abs_u = grid.y, grid.abs_u
        front, back = 0.5 * acquisition.yaw, -0.3 * acquisition.yaw

        half_width = self.cavity_half_width(y)
        body = self._body(grid)
        cavity = self._cavity(grid, half_width)

        # what displaces lung: mediastinum, heart, great vessels, diaphragm
        side = np.where(grid.is_left, np.float32(LEFT), np.float32(RIGHT))
        border = self.mediastinum_half_width(y, side) + front * side * 0.5
        heart_cm = grid.empty()
        for cu, cy, length, width, tilt, thickness in self.heart_ellipsoids(heart_gain):
            np.maximum(heart_cm, 2 * thickness * grid.ellipsoid(cu, cy, length, width, tilt), out=heart_cm)
        heart = heart_cm > 0
        great = grid.empty()
        tu, ty, length, width, tilt, thickness = PULMONARY_TRUNK
        np.maximum(great, 2 * thickness * grid.ellipsoid(tu + front, ty, length, width, tilt), out=great)
        knob = anatomy.aorta
        np.maximum(great, 2.4 * knob * grid.ellipsoid(1.7 + front, -7.0, knob * 1.25, knob * 1.4, 90), out=great)
        aorta = np.array([(2.2 + back, -7.0), (1.9 + back, -2.0), (1.5 + back, 4.0), (0.9 + back, 12.0)])
        grid.tube(great, aorta, 1.2)
        lung = (abs_u > border) & (abs_u < half_width) & ~heart & (great == 0)

        dome = self.diaphragm(abs_u, grid.by_side(self.dome_y))
        apex = self.apex(abs_u)
        lung &= (y > apex) & (y < dome)
        lung = _largest_part(lung & grid.is_left) | _largest_part(lung & ~grid.is_left)
        below = np.maximum(y - dome, 0)
        # rays that graze the dome meet little of it: a sharp edge, then lung that thins out behind the liver
        recess = np.clip(1 - np.sqrt(below / 3.2), 0, 1) * np.where(below > 0, np.float32(0.8), np.float32(1))
        # the lung wraps around the mediastinum: a sharp border above, hidden behind the heart below
        heart &= recess > 0  # its silhouette ends where there is no lung left to be displaced
        opened = np.sqrt(np.clip((abs_u - border) / grid.profile((-26, -6, 2, 26), (0.8, 1.0, 3.0, 3.0)), 0, 1))
        opened *= np.sqrt(np.clip((y - apex) / 1.2, 0, 1))
        aerated = np.maximum(cavity - heart_cm - great, 0) * opened * recess

        bone = self._bones(grid, front, back) * np.float32(anatomy.bone)
        vessels = self._vessels(grid) * np.clip(aerated / 3, 0, 1) * np.float32(2.4 * (MU_SOFT - MU_LUNG))
        gas = self._airways_and_stomach(grid, front)
        rng = np.random.default_rng([acquisition.seed, 1])
        texture = 0.6 * _noise(rng, grid.size, 24) + _noise(rng, grid.size, 90)

        total = MU_SOFT * body - (MU_SOFT - MU_LUNG) * aerated * (1 + 0.022 * texture)
        total += (MU_BONE - MU_SOFT) * bone + vessels
        total -= MU_SOFT * np.minimum(gas, 0.8 * body)
        return _Scene(grid, total.astype(np.float32), aerated, vessels, lung, heart)

    def _body(self, grid: _Grid) -> np.ndarray:
        """Thickness of neck, trunk, arms and breasts."""
        anatomy = self.anatomy
        trunk = CAVITY_HALF_WIDTH + anatomy.wall
        deep = anatomy.depth
        heights = (-26, -19.0, -17.4, -15.6, -13.8, -9, -4, 3, 10, 26)
        widths = (6.0, 6.2, 7.8, 14.0, 18.8, 20.0, trunk + 0.6, trunk, trunk - 0.2, trunk + 0.8)
        depths = (5.6, 6.0, 6.6, 7.4, 8.2, deep - 0.8, deep, deep, deep + 0.4, deep + 1)
        half_width = grid.profile(heights, widths)
        section = np.clip(1 - (grid.abs_u / half_width) ** 2.6, 0, None) ** np.float32(0.5)
        body = 2 * grid.profile(heights, depths) * section
        for side in (RIGHT, LEFT):
            arm = np.array([(side * 18.8, -10.5), (side * (21.0 + 0.5 * anatomy.wall), 2.0), (side * 26.0, 20.0)])
            limb = grid.empty()
            grid.tube(limb, arm, np.array([5.2, 4.6, 4.0]) + 0.35 * anatomy.wall)
            np.maximum(body, limb, out=body)
            if anatomy.breast:
                shape = grid.ellipsoid(side * 8.2, 4.6, 5.6, 4.6 + 0.3 * anatomy.breast, 0)
                body += anatomy.breast * shape * np.clip((grid.y - 0.5) / 6, 0, 1)
        return body

    def _cavity(self, grid: _Grid, half_width: np.ndarray) -> np.ndarray:
        """Thickness of the pleural cavity."""
        across = np.clip(grid.abs_u / np.maximum(half_width, 1e-3), 0, 1)
        depth = grid.profile((-26, APEX_Y, -10, -4, 4, 26), (2.2, 2.6, 5.6, 7.9, CAVITY_HALF_DEPTH, CAVITY_HALF_DEPTH))
        return 2 * depth * np.sqrt(1 - across**2.4)

    def _bones(self, grid: _Grid, front: float, back: float) -> np.ndarray:
        """Thickness of bone: spine, ribs, clavicles, scapulae, humeri."""
        y, drop = grid.y, self.anatomy.rib_drop
        centred = grid.u - np.float32(back)
        # vertebral bodies of 2.2 cm, brighter at the end plates
        phase = np.cos((y + 14.3) * np.float32(2 * np.pi / 2.25))
        column = np.clip((1.75 - np.abs(centred)) / 0.35, 0, 1)
        bone = column * (0.5 + 0.3 * phase**3)
        spots = grid.empty()
        for level in -16.55 + 2.25 * np.arange(16):
            for x in (-1.05, 1.05):  # pedicles
                grid.tube(spots, np.array([(back + x, level - 0.35), (back + x, level + 0.2)]), 0.33)
            grid.tube(spots, np.array([(back, level + 0.6), (back, level + 1.1)]), 0.3)  # spinous process
        bone += 0.45 * spots
        for rib in range(11):
            self._add_rib(bone, grid, rib, drop)
        for side in (RIGHT, LEFT):
            bone += self._shoulder(grid, side, front)
        return bone

    def _add_rib(self, bone: np.ndarray, grid: _Grid, rib: int, drop: float) -> None:
        """Add both ribs of a pair: half ellipses seen from the front, the lower arm of each being the anterior part."""
        head = -14.2 + 2.25 * rib
        height = drop * (3.0, 5.4, 7.2, 8.6, 9.6, 10.4, 11.0, 11.2, 11.0, 10.0, 8.0)[rib]
        shear = 0.04 + 0.012 * rib
        half = float(self.cavity_half_width(head + 0.4 * height + shear * 8)) + 0.25
        radius = (0.5, 0.62, 0.66, 0.68, 0.7, 0.7, 0.7, 0.68, 0.64, 0.6, 0.5)[rib]
        rows = np.flatnonzero(
            (grid.y.max(axis=1) > head - 2) & (grid.y.min(axis=1) < head + height + shear * CAVITY_HALF_WIDTH + 2)
        )
        if not rows.size:
            return
        band = slice(rows[0], rows[-1] + 1)
        abs_u = grid.abs_u[band]
        semi = height / 2
        down = (grid.y[band] - np.float32(head + semi) - shear * abs_u) / semi
        along = abs_u / half
        norm = np.sqrt(along * along + down * down) + 1e-4
        # first-order distance to the ellipse: |f| / |grad f|
        gradient = np.hypot(along / half - shear * down / semi, down / semi) / norm
        distance = np.abs(norm - 1) / np.maximum(gradient, 1e-4)
        distance = np.minimum(distance, 3)
        anterior = down > 0
        # bone ends at the costal cartilage, ever further out from the sternum
        end = 3.0 + 0.75 * rib
        present = np.where(
            anterior, np.clip((abs_u - end) / 0.8, 0, 1) * (0.8 if rib < 9 else 0.0), np.clip((abs_u - 1.6) / 0.4, 0, 1)
        )
        wide = radius * np.where(anterior, np.float32(1.15), np.float32(1))
        outer = np.sqrt(np.maximum(wide**2 - distance**2, 0))
        marrow = np.sqrt(np.maximum((0.74 * wide) ** 2 - distance**2, 0))
        bone[band] += present * (2.0 * outer - 1.6 * marrow)

    def _shoulder(self, grid: _Grid, side: int, front: float) -> np.ndarray:
        """Clavicle, scapula and humerus on one side."""
        lifted = -1.2 if self.acquisition.view == "AP" else 0.0
        clavicle = CubicSpline(
            (0, 0.35, 0.7, 1),
            [
                (side * 2.0 + front, -11.2 + 0.5 * lifted),
                (side * 7.0 + 0.6 * front, -12.6 + lifted),
                (side * 12.0, -13.6 + lifted),
                (side * 15.8, -13.0 + 0.5 * lifted),
            ],
        )(np.linspace(0, 1, 14))
        shell, marrow = grid.empty(), grid.empty()
        grid.tube(shell, clavicle, np.linspace(0.85, 0.6, 14))
        grid.tube(marrow, clavicle, np.linspace(0.62, 0.42, 14))
        bone = 1.1 * (shell - 0.8 * marrow)

        humerus = np.array([(side * 18.0, -11.6), (side * 20.0, -4.0), (side * 26.0, 21.0)])
        limb, hollow = grid.empty(), grid.empty()
        grid.tube(limb, humerus[:1].repeat(2, axis=0), 2.2)
        grid.tube(limb, humerus, np.array([1.5, 1.15, 1.1]))
        grid.tube(hollow, humerus, np.array([1.1, 0.7, 0.65]))
        bone += 0.4 * (limb - 0.7 * hollow)

        inward = 1.6 if self.acquisition.view == "AP" else 0.0  # arms hang at the bedside: blades over the lungs
        corners = np.array([(12.2, -11.6), (15.6, -10.2), (12.6 - 0.8 * inward, 0.4)])
        corners[0, 0] -= inward
        corners[:, 0] *= side
        border = grid.empty()
        grid.tube(border, corners[[0, 2, 1]], np.array([0.18, 0.42, 0.42]))
        grid.tube(border, np.array([corners[0], (side * 16.6, -12.4)]), np.array([0.25, 0.5]))  # spine and acromion
        bone += 0.6 * border
        blade = np.full_like(grid.y, 1)
        centre = corners.mean(axis=0)
        for a, b in ((0, 1), (1, 2), (2, 0)):
            (au, ay), (bu, by) = corners[a], corners[b]
            length = np.hypot(bu - au, by - ay)
            inside = np.sign((bu - au) * (centre[1] - ay) - (by - ay) * (centre[0] - au))
            distance = inside * ((bu - au) * (grid.y - np.float32(ay)) - (by - ay) * (grid.u - np.float32(au))) / length
            np.minimum(blade, np.clip(distance / 0.5, 0, 1), out=blade)
        return bone + 0.16 * blade

    def _vessels(self, grid: _Grid) -> np.ndarray:
        """Thickness of the pulmonary arteries and veins, which branch from the hila and taper."""
        rng = np.random.default_rng(self.anatomy.seed)
        out = grid.empty()

        def branch(start: _Point, angle: float, radius: float, length: float, generation: int) -> None:
            steps = 3
            turns = angle + np.cumsum(rng.normal(0, 0.10, steps))
            path = np.cumsum(np.stack([np.cos(turns), np.sin(turns)], axis=1) * length / steps, axis=0)
            points = np.concatenate([[start], np.asarray(start) + path])
            grid.tube(out, points, np.linspace(radius, 0.72 * radius, steps + 1))
            if generation < 3:
                split = rng.uniform(0.25, 0.6)
                for sign, share in ((1, rng.uniform(0.62, 0.85)), (-1, rng.uniform(0.55, 0.8))):
                    branch(
                        tuple(points[-1]),
                        turns[-1] + sign * split * rng.uniform(0.5, 1.1),
                        radius * share,
                        length * rng.uniform(0.6, 0.85),
                        generation + 1,
                    )

        for side in (RIGHT, LEFT):
            abs_u, y = HILUM[side]
            # Downwards more and wider than upwards: an erect lung is perfused at its base
            for angle in np.deg2rad((-78, -50, -22, 4, 26, 46, 64, 84)):
                angle = angle + rng.normal(0, 0.09)
                radius = 0.46 + 0.14 * np.sin(angle) + rng.normal(0, 0.04)
                start = (side * (abs_u - 0.4), y + 1.3 * np.sin(angle))
                branch(start, angle if side == LEFT else np.pi - angle, radius, rng.uniform(3.4, 4.6), 0)
            trunk = np.array(
                [(side * (abs_u - 0.8), y - 0.6), (side * (abs_u + 0.6), y + 1.2), (side * (abs_u + 0.5), y + 4)]
            )
            grid.tube(out, trunk, np.array([0.85, 0.75, 0.5]))
        return out

    def _airways_and_stomach(self, grid: _Grid, front: float) -> np.ndarray:
        """Thickness of gas outside the alveoli."""
        gas = grid.empty()
        carina = (0.4 * front - 0.2, -4.8)
        grid.tube(gas, np.array([(0.2 * front, -20.0), (0.3 * front - 0.1, -9.0), carina]), 0.8)
        grid.tube(gas, np.array([carina, (carina[0] - 3.0, -2.2)]), np.array([0.65, 0.5]))
        grid.tube(gas, np.array([carina, (carina[0] + 4.0, -2.6)]), np.array([0.6, 0.45]))
        gas *= 0.75
        if self.anatomy.gas:
            size = self.anatomy.gas
            bubble = grid.ellipsoid(5.6, self.dome_y[LEFT] + 0.9 + size, 1.6 * size, size, 12)
            np.maximum(gas, 3.0 * size * bubble, out=gas)
        return gas

    def _develop(self, scene: _Scene) -> np.ndarray:
        """Transmission with scatter and grain, then the film's curve; the lungs are exposed alike in all patients."""
        grid, acquisition = scene.grid, self.acquisition
        transmission = np.exp(-scene.line_integral) + np.float32(SCATTER)
        if PSF_SIGMA_CM / grid.cm > 0.3:
            transmission = gaussian_filter(transmission, PSF_SIGMA_CM / grid.cm)
        through_lung = 2 * (MU_SOFT * self.anatomy.depth - (MU_SOFT - MU_LUNG) * 0.92 * CAVITY_HALF_DEPTH)
        # photon noise: its deviation falls with the root of the photons that reach a pixel
        deviation = acquisition.grain * 0.010 * np.sqrt(grid.size / 512) * np.exp(-through_lung / 2)
        rng = np.random.default_rng([acquisition.seed, 2])
        noise = rng.standard_normal((grid.size, grid.size), dtype=np.float32)
        log_signal = np.float32(deviation) * noise / np.sqrt(transmission) - np.log(transmission)

        slope = acquisition.gradient[0] * grid.detector_x + acquisition.gradient[1] * grid.detector_y
        middle = through_lung + 0.75 + acquisition.exposure + slope / FIELD_OF_VIEW_CM
        if acquisition.marker:
            letter = grid.empty()
            strokes = np.array([(15.6, -17.0), (15.6, -15.2), (16.7, -15.2)])
            grid.tube_in_pixels(letter, grid.detector_to_pixels(strokes), 0.14)
            log_signal += 8 * letter
        base = expit(np.float32(-2.6 / acquisition.latitude))
        developed = (expit((log_signal - middle) / acquisition.latitude) - base) / (1 - base)
        return np.clip(developed, 0, 1).astype(np.float32)


def _lobulated(rng: np.random.Generator, scene: _Scene, centre: _Point, radius: float, lobes: float) -> np.ndarray:
    """Like :meth:`_Grid.ellipsoid` about ``centre``, its radius modulated by a few harmonics of the angle."""
    du, dy = scene.grid.u - np.float32(centre[0]), scene.grid.y - np.float32(centre[1])
    angle = np.arctan2(dy, du)
    edge = np.ones_like(angle)
    for harmonic in (2, 3, 5):
        edge += rng.uniform(0.3, 1) * lobes / harmonic * np.cos(harmonic * angle + rng.uniform(0, 2 * np.pi))
    return np.sqrt(np.maximum(1 - (du * du + dy * dy) / (radius * edge) ** 2, 0)).astype(np.float32)


def _insert_nodule(rng: np.random.Generator, phantom: ThoraxPhantom, scene: _Scene) -> np.ndarray:
    radius = float(rng.uniform(0.7, 1.4))
    centre = phantom.place_in_lung(rng, radius * 1.2)
    return 1.6 * (MU_SOFT - MU_LUNG) * 2 * radius * _lobulated(rng, scene, centre, radius, 0.1)


def _insert_mass(rng: np.random.Generator, phantom: ThoraxPhantom, scene: _Scene) -> np.ndarray:
    radius = float(rng.uniform(1.7, 2.8))
    centre = phantom.place_in_lung(rng, radius * 1.2)
    return 1.2 * (MU_SOFT - MU_LUNG) * 2 * radius * _lobulated(rng, scene, centre, radius, 0.25)


def _insert_consolidation(rng: np.random.Generator, phantom: ThoraxPhantom, scene: _Scene) -> np.ndarray:
    radius = float(rng.uniform(3.0, 5.0))
    centre = phantom.place_in_lung(rng, 0.7 * radius)
    extent = _lobulated(rng, scene, centre, radius, 0.4) ** 1.5
    patchy = np.clip(0.8 + 0.2 * _noise(rng, scene.grid.size, 32), 0.25, 1.2)
    same_side = scene.grid.is_left == (centre[0] > 0)
    filled = 0.6 * extent * patchy * scene.aerated * (scene.lung & same_side)
    return (MU_SOFT - MU_LUNG) * filled


def _insert_effusion(rng: np.random.Generator, phantom: ThoraxPhantom, scene: _Scene) -> np.ndarray:
    """Fluid whose surface rises towards the chest wall and hides the costophrenic angle."""
    side = int(rng.choice((LEFT, RIGHT)))
    grid = scene.grid
    level = phantom.dome_y[side] + float(rng.uniform(-2.5, 2.0))
    outward = np.clip((grid.abs_u - 4) / (CAVITY_HALF_WIDTH - 4), 0, 1)
    depth = grid.y - (level + 1.0 - 3.5 * outward**2.5)
    fluid = scene.aerated * np.sqrt(np.clip(depth / 3.0, 0, 1)) * (grid.is_left == (side == LEFT))
    return (MU_SOFT - MU_LUNG) * 0.95 * fluid


def _insert_pneumothorax(rng: np.random.Generator, phantom: ThoraxPhantom, scene: _Scene) -> np.ndarray:
    """Air between chest wall and lung, wide at the apex: darker, without vessels, bounded by the visceral pleura."""
    side = int(rng.choice((LEFT, RIGHT)))
    gap = float(rng.uniform(1.8, 3.8))
    grid = scene.grid
    height = np.clip((grid.y - APEX_Y) / (BASE_Y - APEX_Y), 0, 1)
    width = gap * np.clip(1 - height / 0.85, 0, 1) ** 0.7
    # the collapsed lung is the cavity moved down and inwards
    collapsed = phantom.cavity_half_width(grid.y - np.float32(0.6 * gap)) - width
    beyond = grid.abs_u - collapsed
    space = scene.lung & (grid.is_left == (side == LEFT)) & (beyond > 0) & (width > 0)
    pleura = np.maximum(1 - (beyond / 0.12 - 1) ** 2, 0)
    return space * (0.22 * pleura - MU_LUNG * scene.aerated - scene.vessels)


def _insert_device(rng: np.random.Generator, phantom: ThoraxPhantom, scene: _Scene) -> np.ndarray:
    """A pacemaker with its lead, a central venous line, or the electrodes of a monitor."""
    grid = scene.grid
    metal = grid.empty()
    kind = rng.integers(3)
    if kind == 0:
        x, y = float(rng.uniform(9.0, 10.5)), float(rng.uniform(-9.0, -7.5))
        box = grid.empty()
        for row in np.linspace(-1.2, 1.2, 5):
            grid.tube(box, np.array([(x - 1.1, y + row), (x + 1.1, y + row)]), 0.9)
        metal += 0.35 * np.minimum(box, 1.0)
        tip = (float(rng.uniform(3.5, 5.0)), float(rng.uniform(5.0, 6.5)))
        lead = [(x - 1.2, y - 1.6), (6.5, -10.8), (1.0, -9.6), (-2.1, -6.8), (-2.6, -1.0), (-0.8, 4.4), tip]
        grid.tube(metal, _smooth(lead), 0.10)
        grid.tube(metal, np.array([tip, (tip[0] + 0.5, tip[1] + 0.2)]), 0.16)
    elif kind == 1:
        end = float(rng.uniform(-4.5, -1.0))
        line = [(-5.4, -20.0), (-4.6, -15.5), (-3.6, -11.5), (-2.5, -8.0), (-2.3, end)]
        grid.tube(metal, _smooth(line), 0.13)
        metal *= 0.7
    else:
        for x, y in ((-11.0, -7.5), (10.8, -7.0), (9.5, 5.0)):
            x, y = x + float(rng.normal(0, 0.6)), y + float(rng.normal(0, 0.6))
            pad = grid.empty()
            grid.tube(pad, np.array([(x, y), (x, y)]), 0.75)
            metal += 0.15 * pad
            wire = [(x, y), (x * 0.75, y + 3 + float(rng.normal(0, 1))), (float(rng.normal(0, 3)), 13.0), (-4.0, 21.0)]
            grid.tube(metal, _smooth(wire), 0.07)
    return MU_METAL * metal


_INSERT: dict[str, Callable[[np.random.Generator, ThoraxPhantom, _Scene], np.ndarray]] = {
    "Nodule": _insert_nodule,
    "Mass": _insert_mass,
    "Consolidation": _insert_consolidation,
    "Effusion": _insert_effusion,
    "Pneumothorax": _insert_pneumothorax,
    "Support Devices": _insert_device,
}

# The vocabulary of ChestX-ray14, but for Support Devices, which is CheXpert's
FINDINGS: tuple[str, ...] = ("Cardiomegaly", *_INSERT)


def make_thorax(
    rng: np.random.Generator,
    size: int = 256,
    *,
    findings: Sequence[str] = (),
    view: Literal["PA", "AP"] | None = None,
) -> ThoraxImage:
    """Draw a patient, an exposure and findings, and render them.

    Args:
        rng: source of randomness; the same state gives the same image, bit for bit.
        size: height and width in pixels, from 32 to 2048.
        findings: labels of what to insert, from :data:`FINDINGS`.
        view: PA or AP; drawn when None.

    Returns:
        the radiograph, (size, size), float32 in [0, 1], with its masks.

    Raises:
        UserError: when ``size``, ``view`` or a label is none of the above.
    """
    phantom = ThoraxPhantom(Anatomy.draw(rng), Acquisition.draw(rng, view))
    return phantom.render(size, [Finding(label, int(rng.integers(2**32))) for label in findings])


def _smooth(points: Sequence[_Point]) -> np.ndarray:
    """A smooth path through a few points, (48, 2)."""
    knots = np.asarray(points, float)
    length = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(knots, axis=0).T))])
    return PchipInterpolator(length, knots)(np.linspace(0, length[-1], 48))


def _noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Smooth noise (size, size) of unit deviation at its ``cells`` by ``cells`` nodes, the same at every size."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def _largest_part(mask: np.ndarray) -> np.ndarray:
    """The largest connected part of a mask: slivers between heart, vessels and diaphragm are no lung field."""
    parts, _ = label(mask)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return mask & (parts == sizes.argmax())


def _box_mean(image: np.ndarray, factor: int) -> np.ndarray:
    """Mean over ``factor`` by ``factor`` pixels."""
    if factor == 1:
        return image
    size = image.shape[0] // factor
    return image.reshape(size, factor, size, factor).mean(axis=(1, 3), dtype=np.float32)
