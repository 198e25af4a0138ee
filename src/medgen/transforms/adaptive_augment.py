"""Adaptive discriminator augmentation: random transformations of a batch of images, and what sets their probability.

Karras et al. 2020, "Training generative adversarial networks with limited data" (ADA), arXiv 2006.06676: appendix B
(the transformations, their order and distributions) and section 3 (the control loop). Written from the paper. Every
operation is linear in the images and can be differentiated any number of times, as R1 through the augmentation needs.

Legend of the shape suffixes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from medgen.errors import UserError

__all__ = ["AUGMENT_PRESETS", "RISE_IMAGES", "RISE_IMAGES_TRANSFER", "AdaptiveAugment", "AugmentController"]

TARGET = 0.6  # of r_t; ADA, section 3
ADJUST_EVERY = 4  # batches; ADA, section 3
RISE_IMAGES = 500_000  # images in which p can rise from 0 to 1; ADA, section 3
RISE_IMAGES_TRANSFER = 100_000  # the same when a trained model is taken further: it overfits sooner

# Low-pass filter of the orthogonal wavelet sym6 (Daubechies 1992, table 6.3), its sum √2.
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
TAPS = len(SYM6)
# Where the filter's weight lies. sym6 is not quite symmetric: taking the middle of its taps, 5.5, for it would move
# what is mirrored or turned by up to 0.4 pixels along each axis; with the centroid, linear ramps come out exactly.
CENTROID = sum(n * tap for n, tap in enumerate(SYM6)) / math.fsum(SYM6)

# One row a preset, one column an argument: probability relative to p, and strength where there is one.
_COLUMNS = (
    "x_flip", "rotate_90", "integer_shift", "integer_shift_max", "scale", "scale_std", "rotation", "rotation_max",
    "anisotropy", "anisotropy_std", "fractional_shift", "fractional_shift_std",
    "brightness", "brightness_std", "contrast", "contrast_std", "luma_flip", "hue", "hue_max", "saturation",
    "saturation_std",
)  # fmt: skip
_ROWS: dict[str, tuple[float, ...]] = {
    # name       flip 90° int. shift  scale   rotation anisotr. frac. shift  bright.  contrast  luma  hue   saturation
    "none":       (0, 0,  0, 0.125,   0, 0.2, 0, 180,  0, 0.2,  0, 0.125,    0, 0.2,  0, 0.5,   0,  0, 180,  0, 1.0),
    "bgc":        (1, 1,  1, 0.125,   1, 0.2, 1, 180,  1, 0.2,  1, 0.125,    1, 0.2,  1, 0.5,   1,  1, 180,  1, 1.0),
    "radiograph": (0, 0,  1, 0.0625,  1, 0.1, 1,  10,  0, 0.2,  1, 0.0625,   1, 0.1,  1, 0.25,  0,  0, 180,  0, 1.0),
}  # fmt: skip
AUGMENT_PRESETS: dict[str, dict[str, float]] = {
    name: dict(zip(_COLUMNS, row, strict=True)) for name, row in _ROWS.items()
}

# What draw returns, with the value that changes nothing.
_NEUTRAL = {
    "x_flip": 0.0, "rotate_90": 0.0, "integer_shift_x": 0.0, "integer_shift_y": 0.0,
    "scale": 1.0, "pre_rotation": 0.0, "anisotropy": 1.0, "post_rotation": 0.0,
    "fractional_shift_x": 0.0, "fractional_shift_y": 0.0,
    "brightness": 0.0, "contrast": 1.0, "luma_flip": 0.0, "hue": 0.0, "saturation": 1.0,
}  # fmt: skip
_RESAMPLED = ("scale", "pre_rotation", "anisotropy", "post_rotation", "fractional_shift_x", "fractional_shift_y")
_COLOUR = ("brightness", "contrast", "luma_flip", "hue", "saturation")


class AdaptiveAugment(nn.Module):
    """Augment what the discriminator sees, real and generated, each transformation with its own probability.

    The transformations are ADA's "bgc" (appendix B) in its order; image-space filtering, noise and cutout, which the
    paper lists beside them and leaves out of its default, are not here:

    - pixel blitting: mirroring in x, turns by 90°, integer shifts. Pixels are copied as they are;
    - geometric: isotropic scaling, rotation before and after anisotropic scaling, fractional shift. All of them and the
      blitting become one affine matrix, executed once: reflection padding, 2× upsampling with the wavelet filter sym6,
      bilinear look-up, downsampling with the same filter. Images for which none of these was drawn are only blitted;
    - colour: brightness, contrast, luma flip, hue, saturation, as one 4×4 matrix. An image of one channel is taken as
      (y, y, y) and gets the mean of what comes out: brightness and contrast act as on colours, luma flip negates it,
      and hue and saturation, which leave the grey axis in place, do nothing.

    Parameters are drawn apart from being applied: :meth:`draw` makes them, ``forward`` takes them, so that they can be
    saved and replayed. They are drawn on the CPU whatever device the images are on.

    Presets (:data:`AUGMENT_PRESETS`, :meth:`from_preset`): ``bgc`` is the paper's. ``radiograph`` keeps what a
    radiograph may look like, at half of the paper's strength: patients stand differently (shift, size, a tilt of
    at most 10°) and exposures differ (brightness, contrast). It never mirrors (the heart would change sides), never
    turns by 90°, never scales anisotropically (the cardiothoracic ratio is a finding), and never inverts the grey scale
    (an inverted image is an error to be found, not a variant). ``none`` changes nothing.

    The first twelve arguments after ``p`` are probabilities relative to p, from 0 (never) to 1; the rest are strengths.

    Args:
        p: probability of augmentation, from 0 to 1. :class:`AugmentController` sets it during training.
        x_flip: mirror in x, each second time.
        rotate_90: turn by 0, 90, 180 or 270°.
        integer_shift: shift by whole pixels.
        scale: scale both axes alike.
        rotation: rotate, about the centre of the image.
        anisotropy: scale the axes by a factor and by its inverse.
        fractional_shift: shift by any distance.
        brightness: add to all channels.
        contrast: multiply all channels.
        luma_flip: reflect colours in the plane through 0 across the grey axis, each second time.
        hue: rotate colours about the grey axis.
        saturation: scale the distance of colours from the grey axis.
        integer_shift_max: largest shift as a fraction of width and height; uniform.
        scale_std: standard deviation of log2 of the factor; normal.
        rotation_max: largest angle in degrees; uniform. With anisotropy in use there is a rotation before it and one
            after it, together with probability p.
        anisotropy_std: standard deviation of log2 of the factor; normal.
        fractional_shift_std: standard deviation of the shift as a fraction of width and height; normal.
        brightness_std: standard deviation of what is added, where images span [-1, 1]; normal.
        contrast_std: standard deviation of log2 of the factor; normal.
        hue_max: largest angle in degrees; uniform.
        saturation_std: standard deviation of log2 of the factor; normal.

    Raises:
        UserError: a probability outside [0, 1], or a negative strength.
    """

    def __init__(
        self,
        p: float = 0.0,
        x_flip: float = 0.0,
        rotate_90: float = 0.0,
        integer_shift: float = 0.0,
        scale: float = 0.0,
        rotation: float = 0.0,
        anisotropy: float = 0.0,
        fractional_shift: float = 0.0,
        brightness: float = 0.0,
        contrast: float = 0.0,
        luma_flip: float = 0.0,
        hue: float = 0.0,
        saturation: float = 0.0,
        integer_shift_max: float = 0.125,
        scale_std: float = 0.2,
        rotation_max: float = 180.0,
        anisotropy_std: float = 0.2,
        fractional_shift_std: float = 0.125,
        brightness_std: float = 0.2,
        contrast_std: float = 0.5,
        hue_max: float = 180.0,
        saturation_std: float = 1.0,
    ) -> None:
        super().__init__()
        self.probabilities = {
            "x_flip": x_flip,
            "rotate_90": rotate_90,
            "integer_shift": integer_shift,
            "scale": scale,
            "rotation": rotation,
            "anisotropy": anisotropy,
            "fractional_shift": fractional_shift,
            "brightness": brightness,
            "contrast": contrast,
            "luma_flip": luma_flip,
            "hue": hue,
            "saturation": saturation,
        }
        self.strengths = {
            "integer_shift_max": integer_shift_max,
            "scale_std": scale_std,
            "rotation_max": rotation_max,
            "anisotropy_std": anisotropy_std,
            "fractional_shift_std": fractional_shift_std,
            "brightness_std": brightness_std,
            "contrast_std": contrast_std,
            "hue_max": hue_max,
            "saturation_std": saturation_std,
        }
        for name, value in {"p": p, **self.probabilities}.items():
            if not 0 <= value <= 1:
                raise UserError(f"{name} must be a probability from 0 to 1, got {value}; set {name} to 0 to switch off")
        for name, value in self.strengths.items():
            if not 0 <= value < math.inf:
                raise UserError(f"{name} must be 0 or more, got {value}; set {name} to 0 or more")
        self.p = float(p)

    @classmethod
    def from_preset(cls, preset: str, p: float = 0.0, **changes: Any) -> AdaptiveAugment:
        """A row of :data:`AUGMENT_PRESETS`, with other arguments beside it or instead of it.

        Raises:
            UserError: no such preset.
        """
        if preset not in AUGMENT_PRESETS:
            raise UserError(
                f"augmentation preset must be one of {', '.join(AUGMENT_PRESETS)}, got {preset!r}; set it to one of "
                "them, or to none and name what you want"
            )
        return cls(p, **{**AUGMENT_PRESETS[preset], **changes})

    def draw(self, batch_size: int, generator: torch.Generator | None = None) -> dict[str, torch.Tensor]:
        """Random parameters for a batch, under the present ``p``.

        The amount of random numbers does not depend on ``p`` nor on the settings: with the same generator, a higher
        ``p`` transforms the same images in the same way and others beside them. For runs that repeat themselves seed
        the generator from (seed, rank, images seen), :func:`medgen.data.stream.derive_seed`.

        Args:
            batch_size: B.
            generator: on the CPU; torch's own by default.

        Returns:
            name -> (B,) float64 on the CPU: shifts as fractions of width and height (to the right and down), angles in
            radians (counter-clockwise), ``rotate_90`` in quarter turns (counter-clockwise), ``x_flip`` and
            ``luma_flip`` 0 or 1, brightness as what is added, the rest as factors.
        """
        gates = torch.rand(13, batch_size, dtype=torch.float64, generator=generator)
        uniform = torch.rand(8, batch_size, dtype=torch.float64, generator=generator)
        normal = torch.randn(7, batch_size, dtype=torch.float64, generator=generator)
        strengths = self.strengths
        chance = {name: self.p * share for name, share in self.probabilities.items()}
        if self.probabilities["anisotropy"]:
            # before or after or both: p in all
            before = after = 1 - math.sqrt(1 - chance["rotation"])
        else:  # two rotations in a row are one, and could go beyond the largest angle
            before, after = 0.0, chance["rotation"]
        symmetric = 2 * uniform - 1
        shift = strengths["integer_shift_max"] * symmetric[2:4]
        rotation = math.radians(strengths["rotation_max"]) * symmetric[4:6]
        fraction = strengths["fractional_shift_std"] * normal[2:4]
        drawn = {  # name: (chance, gate, value)
            "x_flip": (chance["x_flip"], 0, (uniform[0] * 2).floor()),
            "rotate_90": (chance["rotate_90"], 1, (uniform[1] * 4).floor()),
            "integer_shift_x": (chance["integer_shift"], 2, shift[0]),
            "integer_shift_y": (chance["integer_shift"], 2, shift[1]),
            "scale": (chance["scale"], 3, torch.exp2(strengths["scale_std"] * normal[0])),
            "pre_rotation": (before, 4, rotation[0]),
            "anisotropy": (chance["anisotropy"], 5, torch.exp2(strengths["anisotropy_std"] * normal[1])),
            "post_rotation": (after, 6, rotation[1]),
            "fractional_shift_x": (chance["fractional_shift"], 7, fraction[0]),
            "fractional_shift_y": (chance["fractional_shift"], 7, fraction[1]),
            "brightness": (chance["brightness"], 8, strengths["brightness_std"] * normal[4]),
            "contrast": (chance["contrast"], 9, torch.exp2(strengths["contrast_std"] * normal[5])),
            "luma_flip": (chance["luma_flip"], 10, (uniform[6] * 2).floor()),
            "hue": (chance["hue"], 11, math.radians(strengths["hue_max"]) * symmetric[7]),
            "saturation": (chance["saturation"], 12, torch.exp2(strengths["saturation_std"] * normal[6])),
        }
        return {
            name: torch.where(gates[gate] < probability, value, _NEUTRAL[name])
            for name, (probability, gate, value) in drawn.items()
        }

    def forward(self, images: torch.Tensor, parameters: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Augmented images.

        Args:
            images: (B, C, H, W) with C 1 or 3, nominally in [-1, 1]; not clipped afterwards.
            parameters: of :meth:`draw`; without, they are drawn from torch's own generator.

        Returns:
            images of the same shape and type; with ``p`` 0, or where no transformation was drawn, the very numbers.

        Raises:
            UserError: the images or the parameters have other shapes.
        """
        if images.ndim != 4 or images.shape[1] not in {1, 3} or min(images.shape[2:]) < 2:
            raise UserError(
                "images to augment must have shape (B, C, H, W) with 1 or 3 channels and sides of 2 pixels or more, "
                f"got {tuple(images.shape)}; train without augmentation on other images"
            )
        if parameters is None:
            if self.p == 0:
                return images
            parameters = self.draw(images.shape[0])
        wrong = [name for name in _NEUTRAL if name not in parameters or parameters[name].shape != images.shape[:1]]
        if wrong:
            raise UserError(
                f"augmentation parameters must hold {', '.join(_NEUTRAL)}, each of shape ({images.shape[0]},); "
                f"{', '.join(wrong)} do not; make them with draw({images.shape[0]})"
            )
        # a MetaTensor of the loader would carry its bookkeeping through every operation
        x = images.as_subclass(torch.Tensor) if type(images) is not torch.Tensor else images
        # under autocast the filters would compute in bfloat16, which has 8 bits: fewer than the pixels
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            x = self._transform_geometry(x, parameters)
            x = _transform_colour(x, parameters)
            return x.to(images.dtype)

    def _transform_geometry(self, x: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        height, width = x.shape[2:]
        moved = _changes(parameters, ("x_flip", "rotate_90", "integer_shift_x", "integer_shift_y"))
        resampled = _changes(parameters, _RESAMPLED)
        if (width - height) % 2:  # a quarter turn about the centre falls between the pixels
            resampled |= parameters["rotate_90"] % 2 == 1
        moved &= ~resampled
        if not (moved | resampled).any():
            return x
        source = _source_matrices(parameters, height, width)
        parts, order = [], []
        for chosen, transform in (
            (~(moved | resampled), None),
            (moved, _blit),
            (resampled, _resample),
        ):
            rows = chosen.nonzero()[:, 0]
            if not len(rows):
                continue
            part = x if len(rows) == len(x) else x.index_select(0, rows.to(x.device))
            parts.append(part if transform is None else transform(part, source[rows]))
            order.append(rows)
        return parts[0] if len(parts) == 1 else torch.cat(parts)[torch.cat(order).argsort().to(x.device)]


# ---------------------------------------------------------------------------------------------------------------------
# geometry. Matrices are built in float64 on the CPU, where the parameters are: nothing waits for a GPU.


def _changes(parameters: Mapping[str, torch.Tensor], names: tuple[str, ...]) -> torch.Tensor:
    """(B,) whether one of the parameters does something."""
    return torch.stack([parameters[name] != _NEUTRAL[name] for name in names]).any(0)


def _matrices(rows: list[list[torch.Tensor | float]], like: torch.Tensor) -> torch.Tensor:
    """(B, n, n) of entries that are (B,) or numbers."""
    return torch.stack(
        [torch.stack([torch.as_tensor(entry).to(like).expand_as(like) for entry in row], -1) for row in rows], -2
    )


def _scale_2d(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return _matrices([[x, 0, 0], [0, y, 0], [0, 0, 1]], x)


def _translate_2d(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return _matrices([[1, 0, x], [0, 1, y], [0, 0, 1]], x)


def _rotate_2d(cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Counter-clockwise for who looks at the image: y points down."""
    return _matrices([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]], cos)


def _source_matrices(parameters: Mapping[str, torch.Tensor], height: int, width: int) -> torch.Tensor:
    """(B, 3, 3): where each pixel (x, y, 1) of the result comes from; the inverse of ADA's matrix G.

    Inverses of the steps are multiplied from the right in the order of the steps, so that blitting stays exact.
    """
    given = {name: parameters[name].double() for name in _NEUTRAL}
    mirror = 1 - 2 * given["x_flip"]
    one = torch.ones_like(mirror)
    # cosine and sine of quarter turns without rounding
    cos, sin = torch.tensor([[1, 0, -1, 0], [0, 1, 0, -1]], dtype=torch.float64)[:, given["rotate_90"].long()]
    pre, post = given["pre_rotation"], given["post_rotation"]
    steps = (
        _scale_2d(mirror, one),
        _rotate_2d(cos, -sin),
        _translate_2d(
            -(given["integer_shift_x"] * width).round(),
            -(given["integer_shift_y"] * height).round(),
        ),
        _scale_2d(1 / given["scale"], 1 / given["scale"]),
        _rotate_2d(pre.cos(), -pre.sin()),
        _scale_2d(1 / given["anisotropy"], given["anisotropy"]),
        _rotate_2d(post.cos(), -post.sin()),
        _translate_2d(-given["fractional_shift_x"] * width, -given["fractional_shift_y"] * height),
    )
    centre_x, centre_y = one * (width - 1) / 2, one * (height - 1) / 2
    matrix = _translate_2d(centre_x, centre_y)
    for step in (*steps, _translate_2d(-centre_x, -centre_y)):
        matrix = matrix @ step
    return matrix


def _margins(low: float, high: float, size: int) -> tuple[int, int]:
    """Pixels to add before and after so that every look-up in [low, high] of the upsampled image has its taps."""
    first = math.ceil((math.floor(low) - (TAPS - 1)) / 2)
    last = (math.floor(high) + 1) // 2
    return max(-first, 0), max(last - (size - 1), 0)


def _pad(x: torch.Tensor, margins: list[int]) -> torch.Tensor:
    """Reflect at the borders, again where a margin is wider than the image: left, right, top, bottom."""
    while any(margins):
        height, width = x.shape[2:]
        step = [min(margin, side - 1) for margin, side in zip(margins, (width, width, height, height), strict=True)]
        x = F.pad(x, step, mode="reflect")
        margins = [margin - done for margin, done in zip(margins, step, strict=True)]
    return x


def _blit(x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Copy pixels; source positions are integers, reflected at the borders without repeating them."""
    height, width = x.shape[2:]
    source = source.round().long().to(x.device)[:, :2, :, None, None]
    columns = torch.arange(width, device=x.device)
    rows = torch.arange(height, device=x.device)[:, None]
    from_x, from_y = (
        _reflect(source[:, axis, 0] * columns + source[:, axis, 1] * rows + source[:, axis, 2], size)
        for axis, size in enumerate((width, height))
    )
    index_B1P = (from_y * width + from_x).flatten(1)[:, None]
    return x.flatten(2).gather(2, index_B1P.expand(-1, x.shape[1], -1)).unflatten(2, (height, width))


def _reflect(position: torch.Tensor, size: int) -> torch.Tensor:
    last = size - 1
    return last - (last - position % (2 * last)).abs()


# ---------------------------------------------------------------------------------------------------------------------
# resampling


def _resample(x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Look pixels up between pixels. ADA, appendix B, execution of the geometric transformations.

    A pixel at k lies at 2k + CENTROID of the upsampled image, whose first row is where the filter first touches.
    """
    (height, width), dtype = x.shape[2:], x.dtype
    out_height, out_width = 2 * height + TAPS - 2, 2 * width + TAPS - 2
    up = torch.tensor([[2, 0, CENTROID], [0, 2, CENTROID], [0, 0, 1]], dtype=torch.float64)
    source_B33 = up @ source @ torch.linalg.inv(up)

    last_x, last_y = out_width - 1.0, out_height - 1.0
    corners_24 = torch.tensor([[0, last_x, 0, last_x], [0, 0, last_y, last_y]], dtype=torch.float64)
    reach_B24 = source_B33[:, :2, :2] @ corners_24 + source_B33[:, :2, 2:]
    margins = [
        *_margins(float(reach_B24[:, 0].min()), float(reach_B24[:, 0].max()), width),
        *_margins(float(reach_B24[:, 1].min()), float(reach_B24[:, 1].max()), height),
    ]
    y = _Upsample.apply(_pad(x, margins))

    # to grid_sample's coordinates, -1 and 1 for the first and the last pixel, from pixels in the padded image
    to_grid = torch.eye(3, dtype=torch.float64)
    for axis, (margin, size) in enumerate(((margins[0], y.shape[3]), (margins[2], y.shape[2]))):
        to_grid[axis, axis] = 2 / (size - 1)
        to_grid[axis, 2] = 4 * margin / (size - 1) - 1
    affine_B23 = (to_grid @ source_B33)[:, :2].to(x.device, dtype)
    columns = torch.arange(out_width, device=x.device, dtype=dtype)[:, None]
    rows = torch.arange(out_height, device=x.device, dtype=dtype)[:, None, None]
    # by hand: F.affine_grid multiplies matrices, which TF32 would round to 10 bits, half a pixel of 512
    along_x_B1W2 = columns * affine_B23[:, None, None, :, 0]
    along_y_BH12 = rows * affine_B23[:, None, None, :, 1] + affine_B23[:, None, None, :, 2]
    return _Downsample.apply(_BilinearLookUp.apply(y, along_x_B1W2 + along_y_BH12))


def _interleave(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Zeros between the pixels along an axis, filtered: n to 2n + 10; scaled so that its adjoint undoes it."""
    margin = TAPS // 2 - 1
    padding = [0, 0, 0, 0]
    padding[2 * (3 - dim) : 2 * (4 - dim)] = margin, margin
    padded, size = F.pad(x, padding), x.shape[dim] + margin
    phases = []
    for phase in (0, 1):
        y = padded.narrow(dim, margin, size) * SYM6[phase]
        for shift in range(1, TAPS // 2):
            y.add_(padded.narrow(dim, margin - shift, size), alpha=SYM6[2 * shift + phase])
        phases.append(y)
    return torch.stack(phases, dim + 1).flatten(dim, dim + 1)


def _deinterleave(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The adjoint of :func:`_interleave`: filtered, every other pixel kept; 2n + 10 to n."""
    pairs = x.unflatten(dim, (-1, 2))
    size = pairs.shape[dim] - TAPS // 2 + 1
    y = x.new_zeros(*x.shape[:dim], size, *x.shape[dim + 1 :])
    for phase in (0, 1):
        half = pairs.select(dim + 1, phase).contiguous()
        for shift in range(TAPS // 2):
            y.add_(half.narrow(dim, shift, size), alpha=SYM6[2 * shift + phase])
    return y


class _Upsample(torch.autograd.Function):
    """(B, C, H, W) to (B, C, 2H + 10, 2W + 10), values halved; :class:`_Downsample` gives them back.

    Sums of shifted copies: on a CPU 3 to 6 times as fast, forward and backward, as strided convolutions
    (tests/benchmarks/bench_adaptive_augment.py), and in full float32 where a GPU would convolve in TF32. The wavelet is
    orthogonal: each of the two is the other's adjoint, and downsampling undoes upsampling.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return _interleave(_interleave(x, 3), 2)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _Downsample.apply(gradient)


class _Downsample(torch.autograd.Function):
    """(B, C, 2H + 10, 2W + 10) to (B, C, H, W); see :class:`_Upsample`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return _deinterleave(_deinterleave(x, 2), 3)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _Upsample.apply(gradient)


class _BilinearLookUp(torch.autograd.Function):
    """``F.grid_sample`` that can be differentiated any number of times with respect to the image.

    Not all releases of torch that the project supports differentiate grid_sample twice. It is linear in the image:
    its derivative is its adjoint, and the adjoint's is itself.
    """

    @staticmethod
    def forward(ctx: Any, image: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(grid)
        ctx.shape = image.shape
        return F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=True)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grid,) = ctx.saved_tensors
        return _BilinearLookUpAdjoint.apply(gradient, grid, ctx.shape), None


class _BilinearLookUpAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, grid: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        ctx.save_for_backward(grid)
        # the values of the image do not matter for the gradient with respect to it, its shape does
        image = gradient.new_zeros(()).expand(shape)
        bilinear, border, align_corners = 0, 1, True
        return torch.ops.aten.grid_sampler_2d_backward(
            gradient, image, grid, bilinear, border, align_corners, [True, False]
        )[0]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grid,) = ctx.saved_tensors
        return _BilinearLookUp.apply(gradient, grid), None, None


# ---------------------------------------------------------------------------------------------------------------------
# colour


def _transform_colour(x: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if not _changes(parameters, _COLOUR).any():
        return x
    matrix_B34 = _colour_matrices(parameters)[:, :3]
    if x.shape[1] == 1:
        gain = matrix_B34[:, :, :3].sum((1, 2)) / 3
        offset = matrix_B34[:, :, 3].mean(1)
        gain, offset = torch.stack([gain, offset])[:, :, None, None, None].to(x.device, x.dtype)
        return torch.addcmul(offset, x, gain)
    matrix_B34 = matrix_B34.to(x.device, x.dtype)[..., None, None]
    # by hand: as a product of matrices TF32 would round the pixels
    red, green, blue = (matrix_B34[:, :, channel] * x[:, channel, None] for channel in range(3))
    return red + green + blue + matrix_B34[:, :, 3]


def _colour_matrices(parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(B, 4, 4), for (r, g, b, 1). ADA, appendix B; written as identity plus what changes, so that neutral is exact."""
    b, c, flip, hue, s = (parameters[name].double() for name in _COLOUR)
    identity = torch.eye(4, dtype=torch.float64)
    luma = torch.zeros(4, 4, dtype=torch.float64)  # v vᵀ of the grey axis v = (1, 1, 1, 0) / √3
    luma[:3, :3] = 1 / 3
    rgb = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64))
    cross = torch.zeros(4, 4, dtype=torch.float64)  # w -> v × w
    cross[:3, :3] = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    flip, hue, s = (values[:, None, None] for values in (flip, hue, s))
    matrix = _matrices([[1, 0, 0, b], [0, 1, 0, b], [0, 0, 1, b], [0, 0, 0, 1]], b)
    matrix = _matrices([[c, 0, 0, 0], [0, c, 0, 0], [0, 0, c, 0], [0, 0, 0, 1]], c) @ matrix
    matrix = (identity - 2 * flip * luma) @ matrix  # Householder
    matrix = (identity + hue.sin() * cross + (1 - hue.cos()) * (cross @ cross)) @ matrix  # Rodrigues
    return (identity + (s - 1) * (rgb - luma)) @ matrix


# ---------------------------------------------------------------------------------------------------------------------
# control loop


class AugmentController:
    """Raise the probability of augmentation while the discriminator overfits, lower it otherwise.

    ADA, section 3, equation 1: ``r_t = E[sign(D(real))]`` over four batches is 0 without overfitting and 1 with nothing
    else; above the target, p rises by a fixed step for each image seen, below it p falls by as much, within [0, 1].

    Every process gives the sums over all processes, so that all of them hold the same ``p``: sums of signs are integers
    and exact in any order.

    Args:
        augment: whose ``p`` is controlled; where it stands is the start.
        target: of r_t, from 0 to 1.
        interval: batches from one adjustment to the next.
        rise_images: images in which p can rise from 0 to 1: 500,000, or 100,000 in a transfer from a trained model.

    Raises:
        UserError: a setting outside its range.
    """

    def __init__(
        self,
        augment: AdaptiveAugment,
        target: float = TARGET,
        interval: int = ADJUST_EVERY,
        rise_images: int = RISE_IMAGES,
    ) -> None:
        if not -1 < target < 1:
            raise UserError(f"augmentation target must be between -1 and 1, got {target}; set it to {TARGET}")
        if interval < 1:
            raise UserError(f"interval must be at least 1 batch, got {interval}; set it to {ADJUST_EVERY}")
        if rise_images < 1:
            raise UserError(
                f"rise_images must be at least 1, got {rise_images}; set it to {RISE_IMAGES} images, or to "
                f"{RISE_IMAGES_TRANSFER} in a transfer"
            )
        self.augment, self.target, self.interval, self.rise_images = augment, target, interval, rise_images
        self.overfitting = 0.0  # r_t of the last adjustment
        self._sign_sum: float | torch.Tensor = 0.0
        self._count = self._batches = 0

    def update(self, sign_sum: float | torch.Tensor, count: int) -> None:
        """Take a batch in; with every ``interval``-th, adjust ``p``.

        Args:
            sign_sum: sum of ``sign(D(real))`` over the batches of all processes. A tensor stays on its device until
                the adjustment: no other batch waits for a GPU.
            count: how many logits that were.
        """
        if isinstance(sign_sum, torch.Tensor):
            sign_sum = sign_sum.detach()
        self._sign_sum = self._sign_sum + sign_sum
        self._count += count
        self._batches += 1
        if self._batches < self.interval:
            return
        self.overfitting = float(self._sign_sum) / max(self._count, 1)
        step = self._count / self.rise_images
        if self.overfitting > self.target:
            self.augment.p = min(self.augment.p + step, 1.0)
        elif self.overfitting < self.target:
            self.augment.p = max(self.augment.p - step, 0.0)
        self._sign_sum, self._count, self._batches = 0.0, 0, 0

    def state_dict(self) -> dict[str, float]:
        """``p``, the last r_t, and what was taken in since."""
        return {
            "p": self.augment.p,
            "overfitting": self.overfitting,
            "sign_sum": float(self._sign_sum),
            "count": self._count,
            "batches": self._batches,
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from :meth:`state_dict`; sets the ``p`` of the augmentation."""
        self.augment.p = float(state["p"])
        self.overfitting = float(state["overfitting"])
        self._sign_sum = float(state["sign_sum"])
        self._count, self._batches = int(state["count"]), int(state["batches"])
