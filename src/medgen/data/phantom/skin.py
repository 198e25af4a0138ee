"""Drawn dermoscopic images: skin and lesion as layers of pigment and blood, then hairs, a ruler, and the lens's rim."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.special import expit

__all__ = ["BENIGN", "MALIGNANT", "SITES", "Lesion", "Photograph", "Skin", "SkinImage", "SkinPhantom"]

# Frames. Image: x right, y down, the origin in the middle, 1 is half of the height; the width is 4/3 of that. Lesion:
# the same after the photograph's turn, shift and zoom are undone, so that two photographs show the same lesion.
ASPECT = 4 / 3
RENDER_SIZE = 192  # pixels; smaller images are averaged down from this: hairs and network would alias
GRID = 160  # pixels of the lesion's own noise, over 2 * GRID_HALF units
GRID_HALF = 1.6

NEVUS, KERATOSIS, MELANOMA, CARCINOMA = "nevus", "seborrheic keratosis", "melanoma", "basal cell carcinoma"
BENIGN = (NEVUS, NEVUS, KERATOSIS)  # drawn in turn
MALIGNANT = (MELANOMA, MELANOMA, CARCINOMA)
SITES = ("anterior torso", "posterior torso", "head/neck", "lower extremity", "upper extremity")

# What a unit of each chromophore takes away from red, green and blue, as the exponent of Beer and Lambert. Melanin is
# brown where it is shallow and blue-grey where it is deep, since the skin above it scatters blue light back.
PALE = np.array([0.98, 0.88, 0.82], np.float32)
MELANIN = np.array([0.55, 1.05, 1.60], np.float32)
DEEP_MELANIN = np.array([1.15, 0.95, 0.75], np.float32)
BLOOD = np.array([0.12, 0.95, 0.85], np.float32)
HAIR_COLOUR = np.array([0.16, 0.11, 0.09], np.float32)
RIM_COLOUR = np.array([0.16, 0.14, 0.15], np.float32)
RULER_COLOUR = np.array([0.12, 0.12, 0.14], np.float32)


@dataclass(frozen=True)
class Skin:
    """What stays with a patient."""

    sex: str
    age: int
    melanin: float  # of the skin around the lesion
    blood: float
    hairs: int  # most that a photograph shows

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Skin:
        """Draw an adult.

        Args:
            rng: source of randomness; the same state gives the same patient.

        Returns:
            the patient.
        """
        return cls(
            sex="female" if rng.random() < 0.5 else "male",
            age=int(np.clip(rng.normal(52, 17), 18, 88)),
            melanin=float(rng.uniform(0.02, 0.22)),
            blood=float(rng.uniform(0.0, 0.22)),
            hairs=int(rng.choice([0, 4, 10, 30], p=[0.4, 0.3, 0.2, 0.1])),
        )


@dataclass(frozen=True)
class Lesion:
    """What stays with a lesion from one photograph to the next. Lengths in units of the lesion's frame."""

    diagnosis: str
    site: str
    radius: float
    stretch: float  # of one axis against the other
    edge: float  # width of the border's fading
    bumps: tuple[tuple[float, float], ...]  # amplitude and phase of the border's waves, from two to a turn upwards
    pigment: float
    network: float  # contrast of the pigment network
    mesh: float  # holes of the network to a unit
    seed: int  # of spots and noise

    @classmethod
    def draw(cls, rng: np.random.Generator, diagnosis: str) -> Lesion:
        """Draw a lesion.

        Args:
            rng: source of randomness; the same state gives the same lesion.
            diagnosis: of :data:`BENIGN` or :data:`MALIGNANT`.

        Returns:
            the lesion: of melanomas the border is irregular, the two halves differ and there are several colours.
        """
        # radius, roughness of the border, width of its fading, pigment, contrast of the network
        ranges = {
            NEVUS: ((0.30, 0.52), 0.035, (0.04, 0.11), (0.55, 1.15), (0.10, 0.40)),
            KERATOSIS: ((0.35, 0.62), 0.05, (0.012, 0.03), (0.40, 0.85), (0.0, 0.05)),
            MELANOMA: ((0.45, 0.75), 0.09, (0.02, 0.06), (0.55, 1.00), (0.20, 0.55)),
            CARCINOMA: ((0.28, 0.50), 0.08, (0.04, 0.10), (0.10, 0.25), (0.0, 0.0)),
        }
        radius, rough, edge, pigment, network = ranges[diagnosis]
        bumps = tuple(
            (float(rng.normal(0, rough / (1 + 0.35 * wave))), float(rng.uniform(0, 2 * np.pi))) for wave in range(8)
        )
        return cls(
            diagnosis=diagnosis,
            site=str(rng.choice(SITES)),
            radius=float(rng.uniform(*radius)),
            stretch=float(rng.uniform(0.75, 1.0)),
            edge=float(rng.uniform(*edge)),
            bumps=bumps,
            pigment=float(rng.uniform(*pigment)),
            network=float(rng.uniform(*network)),
            mesh=float(rng.uniform(7, 11)),
            seed=int(rng.integers(2**32)),
        )

    def depth(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Distance to the border along the ray from the centre, above 0 inside.

        Args:
            x, y: points in the lesion's frame.

        Returns:
            the distances, of the points' shape.
        """
        u, v = x, y / self.stretch
        turn = np.arctan2(v, u)
        border = 1 + sum(size * np.cos((wave + 2) * turn + phase) for wave, (size, phase) in enumerate(self.bumps))
        return self.radius * np.maximum(border, 0.3) - np.hypot(u, v)


@dataclass(frozen=True)
class Photograph:
    """What changes from one photograph to the next."""

    turn: float  # radians
    shift: tuple[float, float]
    zoom: float
    rim: float  # radius at which the image darkens
    rim_width: float
    light: tuple[float, float, float]  # of red, green and blue
    ruler: bool
    seed: int  # of hairs, texture and noise

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Photograph:
        """Draw a photograph.

        Args:
            rng: source of randomness; the same state gives the same photograph.

        Returns:
            the photograph; one in five has a ruler, two in three a dark rim.
        """
        light = rng.normal(1, 0.02, 3) * rng.uniform(0.9, 1.03)
        return cls(
            turn=float(rng.uniform(0, 2 * np.pi)),
            shift=(float(rng.normal(0, 0.12)), float(rng.normal(0, 0.08))),
            zoom=float(rng.uniform(0.85, 1.2)),
            rim=float(rng.uniform(1.15, 1.45)) if rng.random() < 0.65 else 9.0,
            rim_width=float(rng.uniform(0.02, 0.08)),
            light=(float(light[0]), float(light[1]), float(light[2])),
            ruler=bool(rng.random() < 0.2),
            seed=int(rng.integers(2**32)),
        )


@dataclass(frozen=True)
class SkinImage:
    """A rendered photograph.

    Args:
        image: (H, W, 3) float32 in [0, 1].
        lesion_mask: (H, W) bool.
    """

    image: np.ndarray
    lesion_mask: np.ndarray


@dataclass(frozen=True)
class SkinPhantom:
    """A lesion on a patient's skin, as one photograph shows it."""

    skin: Skin
    lesion: Lesion
    photograph: Photograph

    def render(self, size: int) -> SkinImage:
        """Draw the photograph.

        Args:
            size: height in pixels; the width is 4/3 of it.

        Returns:
            the image and the mask of the lesion.
        """
        height = max(size, RENDER_SIZE)
        width = round(height * ASPECT)
        photo = self.photograph
        rng = np.random.default_rng(photo.seed)
        y, x = np.mgrid[:height, :width].astype(np.float32)
        y, x = ((2 * y + 1) - height) / height, ((2 * x + 1) - width) / height
        u, v = (x - photo.shift[0]) / photo.zoom, (y - photo.shift[1]) / photo.zoom
        u, v = u * np.cos(photo.turn) + v * np.sin(photo.turn), v * np.cos(photo.turn) - u * np.sin(photo.turn)

        depth = self.lesion.depth(u, v)
        layers = self._skin(rng, height, width) + self._lesion(u, v, depth)
        image = PALE * np.exp(-layers)
        image = self._white_spots(image, u, v)
        for cover, colour in (
            (self._hairs(rng, height, width), HAIR_COLOUR),
            (self._ruler(height, width), RULER_COLOUR),
        ):
            image = image * (1 - cover[..., None]) + colour * cover[..., None]
        rim = expit((np.hypot(x, y) - photo.rim) / photo.rim_width)[..., None]
        image = (image * (1 - 0.08 * np.hypot(x, y)[..., None] ** 2) * photo.light) * (1 - rim) + RIM_COLOUR * rim
        image = np.clip(image + 0.008 * rng.standard_normal(image.shape, np.float32), 0, 1).astype(np.float32)

        mask = depth > 0
        if size < height:
            shape = (round(size * ASPECT), size)
            planes = [_shrunk(image[..., n], shape) for n in range(3)]
            return SkinImage(np.stack(planes, axis=-1), _shrunk(mask.astype(np.float32), shape) > 0.5)
        return SkinImage(image, mask)

    def _skin(self, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
        """Exponents of the skin around the lesion: blotches, furrows, freckles."""
        blotches = _noise(rng, (height, width), height / 6)
        furrows = np.minimum(*(_noise(rng, (height, width), sigma) for sigma in ((1.0, 6.0), (6.0, 1.0))))
        furrows = np.clip(-furrows * 0.5, 0, 1)
        melanin = self.skin.melanin * (1 + 0.2 * blotches) + 0.03 * furrows
        freckles = np.clip(_noise(rng, (height, width), height / 90) - 2.4, 0, 1)
        blood = self.skin.blood * (1 + 0.15 * _noise(rng, (height, width), height / 8)) + 0.02 * furrows
        return np.maximum(melanin + 0.25 * freckles, 0)[..., None] * MELANIN + np.maximum(blood, 0)[..., None] * BLOOD

    def _lesion(self, u: np.ndarray, v: np.ndarray, depth: np.ndarray) -> np.ndarray:
        """Exponents of the lesion at points of its own frame, so deep inside it."""
        lesion = self.lesion
        rng = np.random.default_rng(lesion.seed)
        fields = [_noise(rng, (GRID, GRID), sigma) for sigma in (GRID / 10, GRID / 10, GRID / 14, GRID / 40)]
        warp_u, warp_v, patches, grain = (_sampled(values, u, v) for values in fields)
        inside = expit((depth + 0.02 * grain) / lesion.edge)
        mesh = _mesh(u + 0.03 * warp_u, v + 0.03 * warp_v, lesion.mesh)
        zero = np.zeros_like(u)
        if lesion.diagnosis == NEVUS:
            # darker towards the middle, the same all around it
            core = np.clip(depth / lesion.radius, 0, 1)
            spots = _spots(rng, u, v, 14, 0.85 * lesion.radius, (0.012, 0.03))
            brown = lesion.pigment * (0.65 + 0.45 * core + lesion.network * mesh + 0.08 * patches + 0.16 * grain)
            deep, red = zero, 0.05 + zero
            brown = brown + 0.30 * spots
        elif lesion.diagnosis == KERATOSIS:
            # ridges and plugs of horn on a dull, sharply bordered plaque
            ridges = np.abs(_sampled(_noise(rng, (GRID, GRID), GRID / 34), u, v))
            plugs = _spots(rng, u, v, 10, 0.8 * lesion.radius, (0.02, 0.04))
            brown = lesion.pigment * (0.75 + 0.35 * np.exp(-4 * ridges) + 0.15 * patches + 0.08 * grain) + 0.9 * plugs
            deep, red = 0.12 + zero, 0.05 + zero
        elif lesion.diagnosis == MELANOMA:
            # one side differs from the other; blue-grey and red parts, dark blots
            side = expit(3 * (u * np.cos(patches) + 0.4 * warp_u))
            blots = _spots(rng, u, v, 9, 0.95 * lesion.radius, (0.03, 0.09))
            brown = lesion.pigment * (0.35 + 0.8 * side + lesion.network * mesh + 0.30 * patches + 0.25 * grain)
            brown = brown + 0.5 * blots
            deep = 0.7 * np.clip(warp_u - 0.3, 0, 1.2) + 0.4 * blots
            red = 0.35 * np.clip(warp_v - 0.3, 0, 1.5)
        else:
            # pink, with tree-like vessels and blue-grey nests
            vessels = np.exp(-((_sampled(_noise(rng, (GRID, GRID), GRID / 16), u, v) / 0.05) ** 2))
            nests = _spots(rng, u, v, 6, 0.7 * lesion.radius, (0.04, 0.10))
            brown = lesion.pigment * (0.8 + 0.3 * patches)
            deep, red = 0.7 * nests, 0.30 + 0.55 * vessels
        layers = (np.maximum(brown, 0), np.maximum(deep, 0), np.maximum(red, 0))
        colours = (MELANIN, DEEP_MELANIN, BLOOD)
        return sum((inside * layer)[..., None] * colour for layer, colour in zip(layers, colours, strict=True))

    def _white_spots(self, image: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Milia-like cysts of a keratosis; nothing in other lesions."""
        if self.lesion.diagnosis != KERATOSIS:
            return image
        rng = np.random.default_rng([self.lesion.seed, 1])
        cysts = 0.7 * _spots(rng, u, v, 12, 0.8 * self.lesion.radius, (0.015, 0.03))[..., None]
        return image * (1 - cysts) + 0.92 * PALE * cysts

    def _hairs(self, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
        """How much of each pixel hairs cover: arcs that grow the same way."""
        canvas = Image.new("L", (width, height))
        pen = ImageDraw.Draw(canvas)
        way = rng.uniform(0, 2 * np.pi)
        for _ in range(int(rng.integers(0, self.skin.hairs + 1))):
            start = rng.uniform((0, 0), (width, height))
            angle = way + rng.normal(0, 0.5)
            bend = rng.normal(0, 0.9)
            turns = angle + bend * np.linspace(0, 1, 24)
            steps = rng.uniform(0.3, 0.9) * height / 24 * np.stack([np.cos(turns), np.sin(turns)], axis=-1)
            points = np.vstack([start, start + np.cumsum(steps, axis=0)])
            thick = max(1, round(height / RENDER_SIZE * rng.uniform(0.6, 1.7)))
            pen.line([(float(px), float(py)) for px, py in points], fill=int(rng.integers(140, 255)), width=thick)
        return gaussian_filter(np.asarray(canvas, np.float32) / 255, 0.4 * height / RENDER_SIZE)

    def _ruler(self, height: int, width: int) -> np.ndarray:
        """How much of each pixel the marks of a ruler along the lower edge cover."""
        canvas = Image.new("L", (width, height))
        if self.photograph.ruler:
            pen = ImageDraw.Draw(canvas)
            step = 0.09 * self.photograph.zoom * height / 2
            for mark in range(int(width / step) + 1):
                long = 0.14 if mark % 5 == 0 else 0.07
                x = 0.4 * step + mark * step
                pen.line([(x, height), (x, height * (1 - long))], fill=220, width=max(1, height // 200))
        return np.asarray(canvas, np.float32) / 255


def _noise(rng: np.random.Generator, shape: tuple[int, int], sigma: float | tuple[float, float]) -> np.ndarray:
    """Smooth noise of mean 0 and standard deviation 1."""
    # coarse noise is drawn on a coarse grid: wide kernels take most of the time
    step = max(1, int(np.min(sigma) / 3))
    grid = rng.standard_normal([-(-side // step) for side in shape], dtype=np.float32)
    values = gaussian_filter(grid, np.asarray(sigma) / step, mode="wrap")
    if step > 1:
        values = np.asarray(Image.fromarray(values).resize(shape[::-1], Image.Resampling.BICUBIC))
    return (values - values.mean()) / values.std()


def _sampled(values: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A grid of the lesion's frame at points of it."""
    scale = values.shape[0] / (2 * GRID_HALF)
    return map_coordinates(values, [(v + GRID_HALF) * scale, (u + GRID_HALF) * scale], order=1, mode="wrap")


def _mesh(u: np.ndarray, v: np.ndarray, holes: float) -> np.ndarray:
    """A honeycomb: 0 in the middle of its holes, up to 1 on the lines between them."""
    waves = sum(
        np.cos(2 * np.pi * holes * (u * np.cos(way) + v * np.sin(way))) for way in (0, np.pi / 3, 2 * np.pi / 3)
    )
    return 1 - (waves + 1.5) / 4.5


def _spots(
    rng: np.random.Generator, u: np.ndarray, v: np.ndarray, most: int, radius: float, sizes: tuple[float, float]
) -> np.ndarray:
    """Round spots within a radius, from 0 to 1."""
    cover = np.zeros_like(u)
    for _ in range(int(rng.integers(most // 2, most + 1))):
        distance, angle, size = radius * np.sqrt(rng.random()), rng.uniform(0, 2 * np.pi), rng.uniform(*sizes)
        squared = (u - distance * np.cos(angle)) ** 2 + (v - distance * np.sin(angle)) ** 2
        cover = np.maximum(cover, np.exp(-0.5 * squared / size**2))
    return cover


def _shrunk(plane: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) float32 averaged down to ``shape`` (width, height)."""
    return np.asarray(Image.fromarray(plane).resize(shape, Image.Resampling.BOX))
