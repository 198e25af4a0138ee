"""Diversity of one image set: MS-SSIM over pairs of its images; the lower, the more its images differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from monai.handlers import IgniteMetricHandler
from monai.metrics import CumulativeIterationMetric
from scipy import stats
from torch.nn import functional as F
from tqdm import tqdm

from medgen.errors import UserError
from medgen.metrics.reconstruction import SCALES, ms_ssim_kernel_size

__all__ = [
    "PairwiseMultiScaleSSIM",
    "PairwiseMultiScaleSSIMMetric",
    "PairwiseSimilarity",
    "ms_ssim",
    "pairwise_ms_ssim",
]

# Shapes: H, W image or map at one scale, N images of a block, P pairs, C channels; k side of the window, so that
# valid convolution leaves h = H - k + 1 rows and w = W - k + 1 columns. Tensors lie as (H, N, C, W): the window's
# vertical pass over all of them is then one matrix product, and so is its horizontal pass.

SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, section 3.2
SIGMA, C1, C2 = 1.5, 0.01**2, 0.03**2  # Wang et al. 2004, section III.C, for images in [0, 1]
BAND = 32  # rows or columns that one matrix product filters: wider wastes work on zeros, narrower starves the product
# elements of one temporary map: on a CPU it must stay in a core's cache, on a GPU it must fill the device
CHUNK = {"cpu": 2**18, "cuda": 2**24}
GIB = 2**30


@dataclass(frozen=True)
class PairwiseSimilarity:
    """MS-SSIM of the pairs of one image set.

    Args:
        mean: over the pairs; 1 when all images are equal.
        std: standard deviation of the pairs' values, not of the mean.
        low: lower end of the mean's confidence interval; None when the note says why there is none.
        high: its upper end.
        n_pairs: pairs compared.
        n_images: images in the set.
        n_groups: what the jackknife left out one at a time: patients where they are known, else images.
        level: confidence level of the interval.
        window: side of the Gaussian window; figures with different windows do not compare.
        note: what a reader must know beside the numbers; empty when nothing.
    """

    mean: float
    std: float
    low: float | None
    high: float | None
    n_pairs: int
    n_images: int
    n_groups: int
    level: float
    window: int
    note: str = ""


@dataclass
class _Scale:
    """What one scale of N images contributes to any pair of them; (H, N, C, W) or, filtered, (h, N, C, w)."""

    pixels: torch.Tensor  # less each image's mean
    mean: torch.Tensor  # local mean of pixels
    spread: torch.Tensor  # local variance + C2 / 2
    level: torch.Tensor | None = None  # local mean of the image as it was; only the coarsest scale compares luminance

    def select(self, index: slice | torch.Tensor) -> _Scale:
        return _Scale(*(None if part is None else part[:, index] for part in vars(self).values()))


class _Pyramid:
    """Moments of one block of images at five scales, and the comparison of pairs from two such blocks.

    Args:
        shape: (C, H, W) of every image.
        count: images that the block holds.
        device: where.
        dtype: float32 or float64.
    """

    def __init__(self, shape: tuple[int, int, int], count: int, device: torch.device, dtype: torch.dtype) -> None:
        C, H, W = shape
        self.window = ms_ssim_kernel_size(min(H, W))
        self.count = count
        self.scales: list[_Scale] = []
        for scale, (maps, filtered) in enumerate(_map_shapes(shape)):
            sides = (maps, *[filtered] * (3 if scale == SCALES - 1 else 2))
            # each image lies in one piece, whatever the order of the axes: streams, not strides, from memory
            new = [torch.empty(count, C, *side, device=device, dtype=dtype).permute(2, 0, 1, 3) for side in sides]
            self.scales.append(_Scale(*new))
        self.chunk = max(CHUNK.get(device.type, CHUNK["cuda"]), C * H * W)
        self.space = [torch.empty(self.chunk, device=device, dtype=dtype) for _ in range(3)]
        offset = torch.arange(self.window, dtype=torch.float64) - (self.window - 1) / 2
        kernel = torch.exp(-(offset**2) / (2 * SIGMA**2))
        band = torch.zeros(BAND, BAND + self.window - 1, dtype=torch.float64)
        for row in range(BAND):
            band[row, row : row + self.window] = kernel / kernel.sum()
        self.band = band.to(device, dtype)
        self.columns_band = self.band.T.contiguous()

    def _take(self, number: int, *shape: int) -> torch.Tensor:
        return self.space[number][: int(np.prod(shape))].view(shape)

    def _smooth(self, x: torch.Tensor) -> torch.Tensor:
        """Gaussian-weighted local means of a chunk (H, P, C, W), valid convolution; a view of the third work buffer."""
        H, P, C, W = x.shape
        h, w = H - self.window + 1, W - self.window + 1
        rows, halfway, out = x.view(H, -1), self._take(1, h, P * C * W), self._take(2, h * P * C, w)
        # the band matrix in steps of BAND rows: a convolution that runs at the speed of a matrix product
        for start in range(0, h, BAND):
            n = min(BAND, h - start)
            reach = n + self.window - 1
            torch.mm(self.band[:n, :reach], rows[start : start + reach], out=halfway[start : start + n])
        columns = halfway.view(-1, W)
        for start in range(0, w, BAND):
            n = min(BAND, w - start)
            reach = n + self.window - 1
            torch.mm(columns[:, start : start + reach], self.columns_band[:reach, :n], out=out[:, start : start + n])
        return out.view(h, P, C, w)

    def _two_covariance(self, a: _Scale, b: _Scale) -> torch.Tensor:
        """2 σ_xy + C2 of a chunk of pairs, ``a`` holding one image or as many as ``b``; in the third work buffer."""
        product = self._take(0, *b.pixels.shape)
        torch.addcmul(self.band.new_tensor(C2), a.pixels, b.pixels, value=2, out=product)  # the window sums to 1
        return self._smooth(product).addcmul_(a.mean, b.mean, value=-2)

    def _term(self, a: _Scale, b: _Scale) -> torch.Tensor:
        """Mean over pixels and channels of contrast-structure (coarsest scale: of SSIM) of a chunk of pairs: (P,)."""
        similarity = self._two_covariance(a, b)
        similarity.div_(torch.add(a.spread, b.spread, out=self._take(0, *similarity.shape)))
        if b.level is not None:
            similarity.mul_((2 * a.level * b.level + C1) / (a.level**2 + b.level**2 + C1))
        return similarity.mean((0, 2, 3))

    def fill(self, batches: Iterable[torch.Tensor]) -> _Pyramid:
        """Compute the moments of ``count`` images that come in batches (B, C, H, W)."""
        done = 0
        for batch in batches:
            index = slice(done, done + len(batch))
            done += len(batch)
            level = batch.mean((2, 3), keepdim=True)
            # covariances do not see a shift, float32 does: E[xy] - E[x]E[y] of centred pixels cancels least
            x = batch - level
            for scale in self.scales:
                scale.pixels[:, index] = x.permute(2, 0, 1, 3)
                for part in _chunks(index, x[0].numel(), self.chunk):
                    one = scale.select(part)
                    one.mean.copy_(self._smooth(one.pixels.contiguous()))
                    one.spread.copy_(self._two_covariance(one, one)).div_(2)
                    if one.level is not None:
                        shift = level[part.start - index.start : part.stop - index.start]
                        one.level.copy_(one.mean + shift.permute(2, 0, 1, 3))
                x = F.avg_pool2d(x, kernel_size=2)
        return self

    def compare(self, mine: slice | torch.Tensor, other: _Pyramid, theirs: slice | torch.Tensor) -> torch.Tensor:
        """MS-SSIM of pairs of images of this block and of another.

        Args:
            mine: one image of this block as a slice (compared with each of ``theirs``), or P indices.
            other: the other block; may be this one.
            theirs: P images of it.

        Returns:
            (P,) float64.
        """
        P = theirs.stop - theirs.start if isinstance(theirs, slice) else len(theirs)
        terms = self.band.new_empty(SCALES, P)
        for number, (a, b) in enumerate(zip(self.scales, other.scales, strict=True)):
            one = a.select(mine) if isinstance(mine, slice) else None
            for part in _chunks(slice(0, P), b.pixels[:, 0].numel(), self.chunk):
                if isinstance(theirs, slice):
                    partner = b.select(slice(theirs.start + part.start, theirs.start + part.stop))
                else:
                    partner = b.select(theirs[part])
                terms[number, part] = self._term(a.select(mine[part]) if one is None else one, partner)
        weights = torch.tensor(SCALE_WEIGHTS, dtype=torch.float64, device=terms.device)
        # a negative mean has no real power: MONAI and piq call it 0 as well
        return (terms.double().clamp(min=0) ** weights[:, None]).prod(0)


def _map_shapes(shape: Sequence[int]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(H, W) and (h, w) at each scale."""
    H, W = shape[-2:]
    lost = ms_ssim_kernel_size(min(H, W)) - 1
    sides = [(H // 2**scale, W // 2**scale) for scale in range(SCALES)]
    return [((rows, cols), (rows - lost, cols - lost)) for rows, cols in sides]


def _bytes_per_image(shape: Sequence[int], dtype: torch.dtype) -> int:
    values = sum(rows * cols + 2 * h * w for (rows, cols), (h, w) in _map_shapes(shape))
    coarsest = int(np.prod(_map_shapes(shape)[-1][1]))
    return shape[0] * (values + coarsest) * dtype.itemsize


def _chunks(index: slice, elements_each: int, most: int) -> Iterator[slice]:
    step = max(1, most // elements_each)
    for start in range(index.start, index.stop, step):
        yield slice(start, min(start + step, index.stop))


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products in float32 proper: TF32's three digits would be lost in the covariances."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def image_name(images: Sequence, index: int) -> str:
    """File of an image where the set knows it, else its number."""
    files = getattr(images, "files", None)
    return str(files[index]) if files is not None else f"image {index}"


def checked_image(image: np.ndarray | torch.Tensor, name: str) -> torch.Tensor:
    """An image as a tensor (C, H, W), after a look at its axes and values.

    Raises:
        UserError: not three axes; empty; values outside [0, 1] or not finite.
    """
    image = torch.as_tensor(image)
    if image.ndim != 3 or not image.numel():
        raise UserError(f"expected images of shape (C, H, W), got {tuple(image.shape)} for {name}")
    check_range(image, name)
    return image


def check_range(images: torch.Tensor, name: str) -> None:
    """Refuse values outside [0, 1] and values that are not finite."""
    low, high = (float(value) for value in images.aminmax())
    if not np.isfinite([low, high]).all():  # aminmax passes NaN on
        raise UserError(f"{name} holds values that are not finite; leave it out or mend what wrote it")
    if low < -1e-6 or high > 1 + 1e-6:
        raise UserError(f"expected values in [0, 1], got {low:.4g} to {high:.4g} in {name}; scale or clip it first")


class _Loader:
    """Images of a set as checked tensors; remembers the one shape that all must have."""

    def __init__(self, images: Sequence, device: torch.device, dtype: torch.dtype) -> None:
        self.images, self.device, self.dtype = images, device, dtype
        self.shape: tuple[int, ...] | None = None

    def __call__(self, index: int) -> torch.Tensor:
        name = image_name(self.images, index)
        image = checked_image(self.images[index], name)
        if self.shape is None:
            ms_ssim_kernel_size(min(image.shape[1:]))
            self.shape = tuple(image.shape)
        if tuple(image.shape) != self.shape:
            raise UserError(
                f"MS-SSIM compares images of one shape, got {self.shape} and {tuple(image.shape)} ({name}); "
                "bring them to one size and mode first"
            )
        return image.to(self.dtype)

    def pyramid(self, indices: Sequence[int]) -> _Pyramid:
        def batches() -> Iterator[torch.Tensor]:
            step = max(1, 2**22 // int(np.prod(self.shape)))  # few pixels beside the block
            for start in range(0, len(indices), step):
                yield torch.stack([self(index) for index in indices[start : start + step]]).to(self.device)

        return _Pyramid(self.shape, len(indices), self.device, self.dtype).fill(batches())


class _Tally:
    """Running sums over pairs, in all and for each image: what mean, deviation and jackknife need."""

    def __init__(self, count: int, groups: np.ndarray) -> None:
        self.groups = groups
        self.n, self.total, self.squares = 0, 0.0, 0.0
        self.image_total, self.image_n = np.zeros(count), np.zeros(count, dtype=np.int64)
        # pairs within one group touch it twice but are left out once
        self.within_total, self.within_n = np.zeros(groups.max() + 1), np.zeros(groups.max() + 1, dtype=np.int64)

    def add(self, first: np.ndarray, second: np.ndarray, values: np.ndarray) -> None:
        self.n += len(values)
        self.total += values.sum()
        self.squares += np.square(values - 0.5).sum()
        for index in (first, second):
            np.add.at(self.image_total, index, values)
            np.add.at(self.image_n, index, 1)
        same = self.groups[first] == self.groups[second]
        np.add.at(self.within_total, self.groups[first][same], values[same])
        np.add.at(self.within_n, self.groups[first][same], 1)

    def result(self, level: float, window: int) -> PairwiseSimilarity:
        mean = float(self.total / self.n)
        std = float(np.sqrt(max(self.squares / self.n - (mean - 0.5) ** 2, 0.0)))
        n_groups = len(self.within_n)
        plain = PairwiseSimilarity(
            mean,
            std,
            None,
            None,
            self.n,
            len(self.image_n),
            n_groups,
            level,
            window,
            "no interval: fewer than 3 groups",
        )
        if n_groups < 3:
            return plain
        size = len(self.within_n)
        left_n = self.n - (np.bincount(self.groups, self.image_n, size) - self.within_n)
        left_total = self.total - (np.bincount(self.groups, self.image_total, size) - self.within_total)
        if (left_n == 0).any():
            return replace(plain, note="no interval: one image or patient is part of every pair; compare more pairs")
        # pairs share images, so they are not independent: leave out one image (patient) with all its pairs at a time
        means = left_total / left_n
        error = np.sqrt((n_groups - 1) / n_groups * np.square(means - means.mean()).sum())
        half = stats.t.ppf((1 + level) / 2, n_groups - 1) * error
        return replace(plain, low=max(float(mean - half), 0.0), high=min(float(mean + half), 1.0), note="")


def _sample_pairs(count: int, pairs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """``pairs`` distinct pairs i < j of ``count`` images, each set of pairs equally likely."""
    total = count * (count - 1) // 2
    rng = np.random.default_rng(seed)
    if total <= 4 * pairs:
        chosen = rng.permutation(total)[:pairs]
    else:  # a permutation of all pairs of 10,000 images would take 400 MB
        drawn = np.empty(0, dtype=np.int64)
        while len(drawn) < pairs:
            drawn = np.unique(np.append(drawn, rng.integers(total, size=2 * pairs)))
        chosen = rng.choice(drawn, pairs, replace=False)
    starts = np.cumsum(np.arange(count - 1, 0, -1))  # pairs whose first image is 0, 0 or 1, 0 to 2, ...
    first = np.searchsorted(starts, chosen, side="right")
    before = np.append(0, starts)[first]
    return first, first + 1 + chosen - before


def pairwise_ms_ssim(
    images: Sequence | torch.Tensor,
    pairs: str | int = "all",
    *,
    seed: int = 0,
    patients: Sequence[str] | None = None,
    device: str | torch.device | None = None,
    max_memory: float = 1.0,
    level: float = 0.95,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> PairwiseSimilarity:
    """Mean MS-SSIM over the pairs i < j of one image set: its diversity; the lower, the more its images differ.

    Odena et al. 2017, section 4.2, with the MS-SSIM of Wang et al. 2003: Gaussian window of sigma 1.5 and side
    :func:`~medgen.metrics.ms_ssim_kernel_size`, k 0.01 and 0.03, five scales by 2 × 2 averages, valid convolution. The
    definition is that of MONAI's ``MultiScaleSSIMMetric``: a scale's term is the mean over pixels and channels, and a
    negative one counts as 0. ``piq`` agrees on grey images whose sides are even at every scale; it pads odd sides where
    MONAI drops the last row, and takes the product of each channel's terms before the mean. ``torchmetrics`` does not
    agree: at the coarsest scale it averages over a reflected border too.

    Images are decoded, and their moments computed, once per block: what a pair adds is one filtered product per
    scale. At any time there are two blocks, ``max_memory`` GiB together, beside one batch of images and the running
    sums per image; the number of images changes nothing in that. More images than fit are decoded again, once for
    each block before theirs.

    The interval is a jackknife over images (patients). Over all pairs it covers about as often as it says. Over a
    sample of pairs it is conservative: each drawn pair is left out twice, once with either image, so that its own
    scatter counts double. Simulated with 400 pairs of 200 images, 98.5% of 95% intervals covered the mean where the
    pair itself made up 82% of the variance of its value, 97% where it made up a third.

    Args:
        images: ``len()`` and ``[i]`` -> (C, H, W) in [0, 1], all of one shape; or a tensor (N, C, H, W).
        pairs: ``"all"``, or how many distinct pairs to draw; all when there are no more than that.
        seed: of the draw.
        patients: one per image; the interval then leaves out one patient at a time.
        device: default: CUDA where there is one.
        max_memory: GiB for the moments of two blocks.
        level: confidence level of the jackknife interval.
        dtype: float32, or float64 to check it.
        progress: show a bar.

    Returns:
        Mean, deviation, interval and counts.

    Raises:
        UserError: fewer than two images; shapes that differ; values outside [0, 1] or not finite; sides below 48.
    """
    count = len(images)
    if count < 2:
        raise UserError(f"diversity takes at least two images, got {count}")
    if patients is not None and len(patients) != count:
        raise UserError(f"expected one patient per image, got {len(patients)} patients for {count} images")
    if pairs != "all" and (isinstance(pairs, (bool, str)) or pairs != int(pairs) or pairs < 1):
        raise UserError(f'pairs must be "all" or a whole number from 1, got {pairs!r}')
    if not 0 < level < 1:
        raise UserError(f"level must lie between 0 and 1, got {level}")
    groups = np.arange(count) if patients is None else np.unique(np.asarray(patients, str), return_inverse=True)[1]
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    load = _Loader(images, device, dtype)
    load(0)
    each = _bytes_per_image(load.shape, dtype)
    if 2 * each > max_memory * GIB:
        raise UserError(f"max_memory must hold two images, {2 * each / GIB:.2g} GiB, got {max_memory} GiB")
    # one block when all images fit; else two at a time
    block = count if count * each <= max_memory * GIB else int(max_memory * GIB / 2 / each)
    total = count * (count - 1) // 2
    tally = _Tally(count, groups)
    work = _all_pairs(load, count, block) if pairs == "all" or pairs >= total else None
    if work is None:
        work = _listed_pairs(load, *_sample_pairs(count, int(pairs), seed), count, block)
    with (
        _full_precision(device),
        tqdm(total=total if pairs == "all" else min(total, int(pairs)), desc="MS-SSIM", disable=not progress) as bar,
    ):
        for first, second, values in work:
            tally.add(first, second, values.cpu().numpy())
            bar.update(len(first))
    return tally.result(level, ms_ssim_kernel_size(min(load.shape[1:])))


_Compared = Iterator[tuple[np.ndarray, np.ndarray, torch.Tensor]]


def _all_pairs(load: _Loader, count: int, block: int) -> _Compared:
    blocks = [range(start, min(start + block, count)) for start in range(0, count, block)]
    for number, mine in enumerate(blocks):
        here = load.pyramid(mine)
        for theirs in blocks[number:]:
            there = here if theirs is mine else load.pyramid(theirs)
            for i in mine:
                second = np.arange(max(i + 1, theirs.start), theirs.stop)
                if len(second):
                    own = i - mine.start
                    partners = slice(int(second[0]) - theirs.start, len(theirs))
                    values = here.compare(slice(own, own + 1), there, partners)
                    yield np.full(len(second), i), second, values
            del there  # before the next block is loaded: two at a time is the promise


def _listed_pairs(load: _Loader, first: np.ndarray, second: np.ndarray, count: int, block: int) -> _Compared:
    n_blocks = -(-count // block)
    cell = first // block * n_blocks + second // block
    order = np.argsort(cell, kind="stable")
    for chosen in np.split(order, np.flatnonzero(np.diff(cell[order])) + 1):
        sides = []
        for index in (first[chosen], second[chosen]):
            needed, position = np.unique(index, return_inverse=True)
            sides.append((load.pyramid(needed.tolist()), torch.as_tensor(position, device=load.device)))
        (here, i), (there, j) = sides
        yield first[chosen], second[chosen], here.compare(i, there, j)
        del sides, here, there


def ms_ssim(prediction: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """MS-SSIM of images with their references, pair by pair, by the definition of :func:`pairwise_ms_ssim`.

    Args:
        prediction: (B, C, H, W) in [0, 1], sides of at least 48 pixels; float32 or float64.
        image: of the same shape.

    Returns:
        (B,) float64.
    """
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    index = torch.arange(len(image), device=image.device)
    with _full_precision(image.device):
        shape = tuple(image.shape[1:])
        a, b = (_Pyramid(shape, len(x), x.device, dtype).fill([x.to(dtype)]) for x in (prediction, image))
        return a.compare(index, b, index)


class PairwiseMultiScaleSSIMMetric(CumulativeIterationMetric):
    """:func:`pairwise_ms_ssim` of the images of one evaluation, in MONAI's form.

    The images of the whole evaluation wait in memory as float32; for more than some thousands call
    :func:`pairwise_ms_ssim` on the files that were written.

    Args:
        pairs: ``"all"``, or how many pairs to draw.
        seed: of the draw.
        max_memory: GiB for the moments.
    """

    def __init__(self, pairs: str | int = "all", seed: int = 0, max_memory: float = 1.0) -> None:
        super().__init__()
        self.pairs, self.seed, self.max_memory = pairs, seed, max_memory

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        images = y_pred.detach().float().cpu()
        shape = tuple(images.shape[1:])
        self._shape = self._shape or shape
        if shape != self._shape:  # MONAI finds out at the end, and prints every pixel of every image
            raise UserError(f"MS-SSIM compares images of one shape, got {self._shape} and {shape}")
        return images

    def reset(self) -> None:
        """Forget the images."""
        super().reset()
        self._shape: tuple[int, ...] | None = None

    def aggregate(self) -> torch.Tensor:
        """Mean MS-SSIM over the pairs, a scalar."""
        images = self.get_buffer()
        if images is None:
            raise UserError("diversity takes at least two images, got 0")
        result = pairwise_ms_ssim(images, self.pairs, seed=self.seed, max_memory=self.max_memory)
        return torch.tensor(result.mean, dtype=torch.float64)


class PairwiseMultiScaleSSIM(IgniteMetricHandler):
    """Diversity of the images of one evaluation as a handler: mean MS-SSIM over their pairs; lower is more diverse.

    Args:
        pairs: ``"all"``, or how many pairs to draw.
        seed: of the draw.
        max_memory: GiB for the moments.
        output_transform: engine output -> the images alone, a list of (C, H, W) or a batch, e.g.
            ``from_engine("pred")`` of decollated output.
    """

    # ignite would take a list of two images for a prediction and its reference
    _skip_unrolling = True

    def __init__(
        self,
        pairs: str | int = "all",
        seed: int = 0,
        max_memory: float = 1.0,
        output_transform: Callable = lambda x: x,
    ) -> None:
        metric = PairwiseMultiScaleSSIMMetric(pairs, seed, max_memory)
        # the details of this metric are the images themselves: they must not end in metric_details
        super().__init__(metric_fn=metric, output_transform=output_transform, save_details=False)

    def update(self, output: torch.Tensor | Sequence[torch.Tensor]) -> None:
        """Take the images of one iteration."""
        if isinstance(output, tuple) and len(output) == 1:  # from_engine of output that is not decollated
            output = output[0]
        self._is_reduced = False
        self.metric_fn(output)
