"""Radiomic features of grey images, by presets whose settings are those of frd-score 0.x and 1.x."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from skimage.measure import label

from medgen.errors import UserError
from medgen.metrics.radiomics_filters import halve, halve_mask, laplacian_of_gaussian, normalise, wavelet_bands
from medgen.metrics.texture import FEATURE_CLASSES, region_features

__all__ = ["PRESETS", "RadiomicsExtractor", "RadiomicsPreset"]

# In the order of frd-score 1.x's own list, which leaves out MCC and SumAverage.
_V1_GLCM = (
    "Autocorrelation", "JointAverage", "ClusterProminence", "ClusterShade", "ClusterTendency", "Contrast",
    "Correlation", "DifferenceAverage", "DifferenceEntropy", "DifferenceVariance", "JointEnergy", "JointEntropy",
    "Imc1", "Imc2", "Idm", "Idmn", "Id", "Idn", "InverseVariance", "MaximumProbability", "SumEntropy", "SumSquares",
)  # fmt: skip
_V1_FEATURES = {
    "firstorder": FEATURE_CLASSES["firstorder"],
    "glcm": _V1_GLCM,
    "glrlm": FEATURE_CLASSES["glrlm"],
    "glszm": FEATURE_CLASSES["glszm"],
    "ngtdm": FEATURE_CLASSES["ngtdm"],
}
_WAVELET_BANDS = ("LH", "HL", "HH", "LL")
# Numbers that frd-score 1.x finds among the diagnostics of the reference implementation and takes for features.
_DIAGNOSTICS = (
    "Image-original_Mean", "Image-original_Minimum", "Image-original_Maximum",
    "Mask-original_VoxelNum", "Mask-original_VolumeNum",
    "Image-interpolated_Mean", "Image-interpolated_Minimum", "Image-interpolated_Maximum",
    "Mask-interpolated_VoxelNum", "Mask-interpolated_VolumeNum",
    "Mask-interpolated_Mean", "Mask-interpolated_Minimum", "Mask-interpolated_Maximum",
)  # fmt: skip

_LUMA = (19595, 38470, 7471)  # 65536 times 0.299, 0.587 and 0.114: Pillow's mode L

# The C library gives large blocks back to the kernel when they are freed, and the next image has to ask for every page
# again, which took up to a third of its time. A large block freed once raises its idea of what is large (glibc).
np.empty(1 << 24, np.uint8)


@dataclass(frozen=True)
class RadiomicsPreset:
    """What is done to an image, and which features are taken.

    Attributes:
        name: name of the row.
        bin_width: of the grey levels, in units of intensity after normalisation.
        scale: standard deviation that the image is normalised to; None leaves its 8-bit levels.
        halve: whether it is then resampled to pixels twice as wide.
        as_slice: whether that is done as for one slice of a volume; decides the last bit.
        margin: of these pixels, kept around a region for the filters.
        voxel_shift: added to intensities in the energy features and the root mean square.
        log_sigmas: of the Laplacian-of-Gaussian images, in original pixels.
        wavelets: whether the four bands of the wavelet transform are looked at.
        diagnostics: whether the 13 numbers that frd-score 1.x adds come first.
        features: names per feature class.
    """

    name: str
    bin_width: float
    scale: float | None
    halve: bool
    as_slice: bool
    margin: int
    voxel_shift: float
    log_sigmas: tuple[float, ...]
    wavelets: bool
    diagnostics: bool
    features: dict[str, tuple[str, ...]]


# fmt: off
_COLUMNS = "name bin_width scale halve as_slice margin voxel_shift log_sigmas wavelets diagnostics features".split()
_ROWS = [
    ("frd_v1", 5.0,  100.0, True,  True,  10, 300.0, (),                   True,  True,  _V1_FEATURES),
    ("frd_v0", 25.0, None,  False, False, 0,  0.0,   (),                   False, False, FEATURE_CLASSES),
    ("full",   5.0,  100.0, True,  False, 10, 300.0, (2.0, 3.0, 4.0, 5.0), True,  False, FEATURE_CLASSES),
]
# fmt: on
PRESETS: dict[str, RadiomicsPreset] = {
    row[0]: RadiomicsPreset(**dict(zip(_COLUMNS, row, strict=True))) for row in _ROWS
}


class RadiomicsExtractor:
    """Radiomic features by one of the :data:`PRESETS`, for :func:`medgen.metrics.feature_set.extract_features`.

    - ``frd_v1``: the 398 columns that frd-score 1.x makes of a 2-D image: 13 diagnostics, then 77 features of the image
      and of each of its four wavelet bands. (Its configuration asks for LoG images too, which pyradiomics skips, the
      image being a volume of one slice: hence not the 464 features of its documentation.)
    - ``frd_v0``: the 93 features of the image as it is, at pyradiomics' default settings. frd-score 0.x adds nine
      that describe the mask's shape; over whole images of one size they are constant and change no distance.
    - ``full``: the 93 features of the image, of its LoG images and of its wavelet bands, with the settings of
      ``frd_v1``.

    An image enters as the 8-bit levels 0 to 255 that it would have in a file; RGB becomes BT.601 luma as Pillow's mode
    L. Definitions are those of the IBSI with pyradiomics' conventions (names, bin edges at multiples of the width,
    angles averaged). The region, unless a mask says otherwise, is the whole image but for its first pixel, as in
    frd-score 1.x (pyradiomics refuses a mask without background); ``frd_v0`` takes the same, because frd-score's own
    v0 fails without masks.

    Light to send to processes, which is how images are worked on side by side. There is no GPU path: the ``frd_v1``
    features of a thousand radiographs of 512 pixels take 36 s on one core and 22 s on two, once, as they are cached.

    Attributes:
        name: of the preset.
        settings: everything that decides the numbers; can stand in JSON.
        feature_names: of the columns, as frd-score writes them: ``glcm_Contrast``, ``wavelet-LH_glcm_Contrast``,
            ``log-sigma-2_glcm_Contrast``.
    """

    def __init__(self, preset: str = "frd_v1") -> None:
        """Choose a preset.

        Args:
            preset: name of a row of :data:`PRESETS`.

        Raises:
            UserError: there is no such row.
        """
        if preset not in PRESETS:
            raise UserError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
        self.preset = PRESETS[preset]
        self.name = preset
        settings = asdict(self.preset)
        self.settings: dict[str, Any] = {
            "extractor": "radiomics",
            "preset": settings.pop("name"),
            **settings,
            "log_sigmas": list(self.preset.log_sigmas),
            "features": {family: list(names) for family, names in self.preset.features.items()},
        }
        self.feature_names: tuple[str, ...] = tuple(self._names())

    def _names(self) -> Iterator[str]:
        if self.preset.diagnostics:
            yield from (f"diagnostics_{name}" for name in _DIAGNOSTICS)
        images = ["", *(f"log-sigma-{sigma:g}_" for sigma in self.preset.log_sigmas)]
        if self.preset.wavelets:
            images += [f"wavelet-{band}_" for band in _WAVELET_BANDS]
        for image in images:
            for family, names in self.preset.features.items():
                yield from (f"{image}{family}_{name}" for name in names)

    def on_images(self, batch: Sequence[np.ndarray], masks: Sequence[np.ndarray] | None = None) -> np.ndarray:
        """Features of images.

        Args:
            batch: (C, H, W) each, values in [0, 1], C = 1 or 3; their sizes may differ.
            masks: (H, W) each, what is not 0 is the region; default: the whole images but for their first pixel.

        Returns:
            (B, D) float64. A feature that is undefined in a region is NaN.

        Raises:
            UserError: an image or mask has another shape, values out of range or not finite; is constant, where the
                preset normalises; or is too small for a filter.
        """
        if masks is not None and len(masks) != len(batch):
            raise UserError(f"masks must be {len(batch)}, one per image, got {len(masks)}")
        pairs = zip(batch, [None] * len(batch) if masks is None else masks, strict=True)
        rows = [self.on_image(image, mask) for image, mask in pairs]
        return np.stack(rows) if rows else np.empty((0, len(self.feature_names)))

    def on_image(self, image: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Features (D,) of one image; see :meth:`on_images`."""
        preset = self.preset
        pixels = _grey_levels(image)
        region = _region(pixels.shape, mask)
        found: list[np.ndarray] = []
        if preset.diagnostics:
            found += [_intensities(pixels), _pixels_and_parts(region)]
        if preset.scale is not None:
            pixels = normalise(pixels, preset.scale)
        if preset.halve:
            box = _bounding_box(region, least=2)
            pixels = halve(pixels, box, preset.margin, as_slice=preset.as_slice)
            region = halve_mask(region, box, preset.margin)
        top, left, height, width = _bounding_box(region, least=2 if preset.halve else 1)
        if preset.diagnostics:
            found += [_intensities(pixels), _pixels_and_parts(region), _intensities(pixels[region])]
        inside = slice(top, top + height), slice(left, left + width)
        cut = region[inside]
        for filtered in self._images(pixels):
            found.append(
                region_features(
                    np.ascontiguousarray(filtered[inside]),
                    None if cut.all() else cut,
                    bin_width=preset.bin_width,
                    voxel_shift=preset.voxel_shift,
                    pixel_area=4.0 if preset.halve else 1.0,
                    features=preset.features,
                )
            )
        return np.concatenate(found)

    def _images(self, pixels: np.ndarray) -> Iterator[np.ndarray]:
        """The image, and what the filters make of it."""
        yield pixels
        for sigma in self.preset.log_sigmas:
            yield laplacian_of_gaussian(pixels, sigma, 2.0 if self.preset.halve else 1.0)
        if self.preset.wavelets:
            bands = wavelet_bands(pixels)
            yield from (bands[name] for name in _WAVELET_BANDS)


def _grey_levels(image: np.ndarray) -> np.ndarray:
    """(H, W) float32 whole numbers from 0 to 255, as an 8-bit file of the image holds them."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[0] not in (1, 3) or not image.size:
        raise UserError(f"an image must be (1, H, W) or (3, H, W), got {image.shape}")
    levels = np.floor(image * np.float32(255) + np.float32(0.5))
    if not (levels.min() >= 0 and levels.max() <= 255):  # NaN is neither
        raise UserError(f"pixels must lie in 0..1, got {image.min():g} to {image.max():g}; scale the image")
    if len(levels) == 1:
        return levels[0].astype(np.float32)
    red, green, blue = levels.astype(np.int32)
    return ((red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2] + 0x8000) >> 16).astype(np.float32)


def _region(shape: tuple[int, int], mask: np.ndarray | None) -> np.ndarray:
    if mask is None:
        region = np.ones(shape, bool)
        region[0, 0] = False
    else:
        region = np.asarray(mask) != 0
        if region.shape != shape:
            raise UserError(f"a mask must have the image's size, {shape}, got {region.shape}")
    if np.count_nonzero(region) < 2:
        raise UserError(f"a region must hold at least 2 pixels, got {np.count_nonzero(region)} of {shape}")
    return region


def _bounding_box(region: np.ndarray, least: int) -> tuple[int, int, int, int]:
    """Row, column, height and width of a region, which must be ``least`` pixels high and wide."""
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    height, width = (int(span[-1] - span[0]) + 1 if span.size else 0 for span in (rows, columns))
    if min(height, width) < least or height * width < 2:
        raise UserError(
            f"a region must be at least {least} pixels high and wide where features are computed, got {height} x "
            f"{width}; use larger images or masks"
        )
    return int(rows[0]), int(columns[0]), height, width


def _intensities(values: np.ndarray) -> np.ndarray:
    return np.array([values.mean(dtype=np.float64), values.min(), values.max()], np.float64)


def _pixels_and_parts(region: np.ndarray) -> np.ndarray:
    """Number of pixels, and of parts that do not touch, not even at corners."""
    pixels = np.count_nonzero(region)
    # labelling takes longer than everything else here, and nearly all regions are whole images
    parts = 1 if pixels >= region.size - 1 else label(region, connectivity=2).max()
    return np.array([pixels, parts], np.float64)
