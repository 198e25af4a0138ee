"""Latents as compressed images, against JPEG and JPEG 2000 at equal bytes."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medgen.apps.derived import check_space, render
from medgen.data.workers import map_each
from medgen.errors import UserError
from medgen.output import atomic_file, atomic_write_text, git_revision, plain_json

if TYPE_CHECKING:
    import torch

    from medgen.data.embedding import Embedding
    from medgen.metrics.paired import PairedQuality
    from medgen.networks import LatentGenerator

__all__ = [
    "JPEG",
    "JPEG2000",
    "Fitted",
    "ImageCodec",
    "check_bits",
    "check_further",
    "compress",
    "decode_latents",
    "encode_latents",
    "fit_bytes",
    "select_split",
]

logger = logging.getLogger(__name__)

# Nothing here imports torch or MONAI before it must: JPEG 2000 files are sought in a process per core, and MONAI's
# import costs each of them ten seconds.

FLOAT16, MOST_BITS = 16, 12  # bits of a number; MOST_BITS of a quantised one
RANGES = 2.0 ** ((np.arange(256) - 64) / 16)  # half-ranges of a quantiser that a byte can name, in standard deviations
OCTAVES = 3  # how far below the largest number a half-range is sought
JPEG_QUALITIES = (1, 100)
FULL_COLOUR = 128  # added to the quality of a JPEG whose colours have as many pixels as its brightness
LOSSLESS, LOSSLESS_MARK = 0, b"\1"  # quality of JPEG 2000, and first byte of its bare code
JPEG2000_LEVELS = 6  # resolutions, OpenJPEG's default
SHOWN_IMAGES, TILE, FONT, GAP = 4, 192, 15, 6  # of the picture; pixels
# fmt: off
CURVES = {  # codec -> title, colour, line
    "latent":        ("latent",           "#c2410c", "o-"),
    "jpeg":          ("JPEG",             "#1d4ed8", "s-"),
    "jpeg_bare":     ("JPEG, bare",       "#60a5fa", "s--"),
    "jpeg2000":      ("JPEG 2000",        "#047857", "^-"),
    "jpeg2000_bare": ("JPEG 2000, bare",  "#34d399", "^--"),
}
# fmt: on


# ------------------------------------------------------------------ latents


def encode_latents(
    latents: np.ndarray, bits: int, mean: np.ndarray, std: float, spherical: bool = False
) -> list[bytes]:
    """Latents as bytes, all that a decoder needs of each image.

    What all images share counts as the codec: the generator, the latents' shape, mean and spread, and the number of
    bits. 16 bits are float16 of ``(latent - mean) / std``. Fewer are the packed indices of a uniform quantiser with
    2^bits levels from -r to r. The half-range r is each image's own, the one of least error: a wide one is coarse
    everywhere, a narrow one clips the few large numbers (Max 1960, "Quantizing for minimum distortion", weighs the two
    for a Gaussian source; optimised latents are none). One byte names it, in steps of a sixteenth of an octave.

    On a sphere the length says nothing: the decoder sets it, r cancels, and the byte is saved.

    Indices are not entropy-coded: deflate makes 8-bit codes of 128 or of 512 Gaussian numbers 5 bytes longer or more,
    and saves a tenth of 9,216 numbers.

    Args:
        latents: (N, L, D).
        bits: of a number, from 1 to 12, or 16.
        mean: (L, D) of random latents.
        std: of a number of random latents.
        spherical: whether latents are points of the sphere ``mean(z²) = 1``; ``mean`` is 0 there.

    Returns:
        N codes, each of ``L · D · bits / 8`` bytes rounded up, and one more where there is no sphere and bits are
        fewer than 16.

    Raises:
        UserError: another number of bits, or latents of another shape than the mean's.
    """
    _check_bits(bits)
    if latents.shape[1:] != mean.shape:
        raise UserError(f"latents must be (N, {', '.join(map(str, mean.shape))}), got {latents.shape}")
    x = ((latents.astype(np.float64) - mean) / std).reshape(len(latents), mean.size)
    if bits == FLOAT16:
        return [row.tobytes() for row in x.astype("<f2")]
    x = _on_sphere(x) if spherical else x
    top = np.searchsorted(RANGES, np.abs(x).max(1)).clip(max=len(RANGES) - 1)  # clips nothing
    least = np.full(len(x), np.inf)
    best, chosen = np.zeros(x.shape, dtype=np.uint16), top.astype(np.uint8)
    for below in range(16 * OCTAVES):
        place = (top - below).clip(min=0)
        half_range = RANGES[place][:, None]
        index = np.floor((x / half_range + 1) * 2 ** (bits - 1)).clip(0, 2**bits - 1).astype(np.uint16)
        decoded = _on_sphere(_levels(index, bits)) if spherical else _levels(index, bits) * half_range
        error = np.square(decoded - x).sum(1)
        better = error < least
        least[better], best[better], chosen[better] = error[better], index[better], place[better]
    planes = (best[:, :, None] >> np.arange(bits - 1, -1, -1, dtype=np.uint16)) & 1
    packed = np.packbits(planes.reshape(len(x), -1).astype(np.uint8), axis=1)
    head = [b""] * len(x) if spherical else [bytes([place]) for place in chosen]
    return [first + row.tobytes() for first, row in zip(head, packed, strict=True)]


def decode_latents(
    codes: Sequence[bytes], bits: int, mean: np.ndarray, std: float, spherical: bool = False
) -> np.ndarray:
    """Latents from bytes: what :func:`encode_latents` made, and its arguments.

    Args:
        codes: N codes.
        bits: of a number.
        mean: (L, D).
        std: of a number.
        spherical: whether latents are points of a sphere.

    Returns:
        (N, L, D) float32.

    Raises:
        UserError: another number of bits, or a code of another length.
    """
    _check_bits(bits)
    head = 0 if spherical or bits == FLOAT16 else 1
    length = head + -(-mean.size * bits // 8)
    for code in codes:
        if len(code) != length:
            raise UserError(
                f"a code of latents {mean.shape} with {bits} bits must have {length} bytes, got {len(code)}; decode "
                "with the settings that it was made with"
            )
    raw = np.frombuffer(b"".join(codes), dtype=np.uint8).reshape(len(codes), length)
    if bits == FLOAT16:
        x = raw.view("<f2").astype(np.float64)
    else:
        planes = np.unpackbits(raw[:, head:], axis=1, count=mean.size * bits).reshape(len(codes), mean.size, bits)
        x = _levels(planes @ (1 << np.arange(bits - 1, -1, -1)), bits)
        x = x if spherical else x * RANGES[raw[:, :1]]
    x = _on_sphere(x) if spherical else x
    return (x.reshape(len(codes), *mean.shape) * std + mean).astype(np.float32)


def _check_bits(bits: int) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not (1 <= bits <= MOST_BITS or bits == FLOAT16):
        raise UserError(f"bits must be from 1 to {MOST_BITS}, or {FLOAT16} for float16, got {bits!r}; set --bits")


def _levels(index: np.ndarray, bits: int) -> np.ndarray:
    """Middles of a quantiser's 2^bits intervals between -1 and 1."""
    return (index.astype(np.float64) + 0.5) / 2 ** (bits - 1) - 1


def _on_sphere(x: np.ndarray) -> np.ndarray:
    """Rows of mean square 1."""
    return x / np.sqrt(np.square(x).mean(1, keepdims=True))


# ------------------------------------------------------------------ JPEG and JPEG 2000


class ImageCodec(ABC):
    """An image codec whose files can be made smaller or larger.

    ``bare`` leaves out of each code what is the same for all images of one size, as the generator is for all latents,
    and puts it back before decoding: at the size of a latent the headers would be most of the file.

    Args:
        shape: (H, W) or (H, W, 3) of the images.
        bare: whether headers count as the codec, and not as part of the code.
    """

    def __init__(self, shape: tuple[int, ...], bare: bool = False) -> None:
        self.shape, self.bare = tuple(shape), bare

    @abstractmethod
    def qualities(self, budget: int) -> list[tuple[int, int]]:
        """Lowest and highest quality worth trying for so many bytes, of each way to encode."""

    @abstractmethod
    def encode(self, pixels: np.ndarray, quality: int) -> bytes:
        """Code of uint8 pixels."""

    @abstractmethod
    def whole(self, code: bytes) -> bytes:
        """The file that a code stands for."""

    def decode(self, code: bytes) -> np.ndarray:
        """Pixels (H, W) or (H, W, 3) uint8 of a code."""
        return np.array(Image.open(io.BytesIO(self.whole(code))))


class JPEG(ImageCodec):
    """Baseline JPEG (ITU-T T.81) by libjpeg, with Huffman tables made for each image.

    Bare: the standard's own Huffman tables (annex K), which need not be sent, one byte for the quality, which stands
    for the quantisation table, and the entropy-coded segment: an abbreviated stream (section B.4) without its markers.

    Colours are tried at half the resolution (4:2:0), and at the full one (4:4:4).
    """

    def qualities(self, budget: int) -> list[tuple[int, int]]:
        """Of libjpeg's scale; 128 above it with the colours' full resolution."""
        low, high = JPEG_QUALITIES
        return [(low, high)] + [(FULL_COLOUR + low, FULL_COLOUR + high)] * (len(self.shape) == 3)

    def encode(self, pixels: np.ndarray, quality: int) -> bytes:
        """Code of uint8 pixels; see :class:`ImageCodec`."""
        file = self._file(pixels, quality)
        return bytes([quality]) + file[_jpeg_header(file) : -2] if self.bare else file

    def whole(self, code: bytes) -> bytes:
        """The file that a code stands for."""
        if not self.bare:
            return code
        black = self._file(np.zeros(self.shape, dtype=np.uint8), code[0])
        return black[: _jpeg_header(black)] + code[1:] + b"\xff\xd9"  # EOI

    def _file(self, pixels: np.ndarray, quality: int) -> bytes:
        colour = {"subsampling": 0 if quality & FULL_COLOUR else 2} if pixels.ndim == 3 else {}
        return _pillow(pixels, "JPEG", quality=quality % FULL_COLOUR, optimize=not self.bare, **colour)


class JPEG2000(ImageCodec):
    """JPEG 2000 (ITU-T T.800) by OpenJPEG: raw codestream, one layer, one tile, no comment.

    The wavelet is the irreversible one, whose rate control takes a size in bytes, which serves as the quality; 0 stands
    for the reversible one, lossless. Bare: the packets alone, without the main and the tile's header, which depend on
    the images' size and the wavelet only, but for the tile's length, which follows from the code's.
    """

    def qualities(self, budget: int) -> list[tuple[int, int]]:
        """Sizes in bytes, and lossless."""
        # the rate control misses a size by some tens of bytes; one that binds at none of these never does
        return [(1, min(2 * budget + 512, int(np.prod(self.shape)) - 1)), (LOSSLESS, LOSSLESS)]

    def encode(self, pixels: np.ndarray, quality: int) -> bytes:
        """Code of uint8 pixels; see :class:`ImageCodec`."""
        main, tile = self._parts(pixels, quality)
        if not self.bare:
            return self._file(main, tile)
        # packets begin with a byte of 0, for an empty one, or of 128 at least
        return LOSSLESS_MARK + tile if quality == LOSSLESS else tile

    def whole(self, code: bytes) -> bytes:
        """The file that a code stands for."""
        if not self.bare:
            return code
        is_lossless = code.startswith(LOSSLESS_MARK)
        return self._file(self._headers[is_lossless], code[len(LOSSLESS_MARK) * is_lossless :])

    @cached_property
    def _headers(self) -> tuple[bytes, bytes]:
        """Main headers of the irreversible and of the reversible wavelet."""
        black = np.zeros(self.shape, dtype=np.uint8)
        return self._parts(black, 64)[0], self._parts(black, LOSSLESS)[0]

    def _parts(self, pixels: np.ndarray, size: int) -> tuple[bytes, bytes]:
        """Main header without its comment, and packets."""
        levels = min(JPEG2000_LEVELS, min(self.shape[:2]).bit_length())
        rate = {"irreversible": True, "quality_mode": "rates", "quality_layers": [pixels.size / max(size, 1)]}
        rate = {"irreversible": False} if size == LOSSLESS else rate
        file = _pillow(pixels, "JPEG2000", no_jp2=True, num_resolutions=levels, **rate)
        main, position = file[:2], 2
        while (marker := file[position : position + 2]) != b"\xff\x90":  # SOT
            end = position + 2 + int.from_bytes(file[position + 2 : position + 4], "big")
            main += b"" if marker == b"\xff\x64" else file[position:end]  # COM: OpenJPEG's name and version
            position = end
        # SOT is 12 bytes and SOD two in the only tile-part, EOC ends the file
        return main, file[position + 14 : -2]

    @staticmethod
    def _file(main: bytes, packets: bytes) -> bytes:
        length = (14 + len(packets)).to_bytes(4, "big")
        return main + b"\xff\x90\x00\x0a\x00\x00" + length + b"\x00\x01\xff\x93" + packets + b"\xff\xd9"


def _pillow(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def _jpeg_header(file: bytes) -> int:
    """Bytes before the entropy-coded segment of a JPEG with one scan."""
    position = 2
    while file[position + 1] != 0xDA:  # SOS
        position += 2 + int.from_bytes(file[position + 2 : position + 4], "big")
    return position + 2 + int.from_bytes(file[position + 2 : position + 4], "big")


@dataclass(frozen=True)
class Fitted:
    """A code found for a budget.

    Args:
        code: the bytes.
        quality: that they were made with.
        fits: whether they are within the budget; if not, the codec has no smaller ones.
    """

    code: bytes
    quality: int
    fits: bool


def fit_bytes(codec: ImageCodec, pixels: np.ndarray, budget: int, made: dict[int, bytes] | None = None) -> Fitted:
    """The best code of at most ``budget`` bytes, by bisection of the quality; the smallest where none is so small.

    Of a codec with several ways to encode the one of the smallest square error is taken.

    Args:
        codec: JPEG or JPEG 2000.
        pixels: uint8, of the codec's shape.
        budget: bytes.
        made: quality -> code of the same image, from other budgets; what is made here is added.
    """
    made = {} if made is None else made

    def fits(quality: int) -> bool:
        if quality not in made:
            made[quality] = codec.encode(pixels, quality)
        return len(made[quality]) <= budget

    def error(quality: int) -> int:
        return int(np.square(codec.decode(made[quality]).astype(np.int64) - pixels).sum())

    found = []
    for low, high in codec.qualities(budget):
        if fits(high):
            found.append(high)
        elif fits(low):
            while high - low > 1:  # low fits, high does not: sizes need not grow evenly for that to stay true
                middle = (low + high) // 2
                low, high = (middle, high) if fits(middle) else (low, middle)
            found.append(low)
    if not found:
        found = [min(made, key=lambda quality: len(made[quality]))]
    best = found[0] if len(found) == 1 else min(found, key=error)
    return Fitted(made[best], best, fits(best))


def _fit_all(shared: tuple[Mapping[str, ImageCodec], Sequence[int]], pixels: np.ndarray) -> dict[str, list[Fitted]]:
    """Codes of one image: codec -> one for each budget."""
    codecs, budgets = shared
    found = {}
    for name, codec in codecs.items():
        made: dict[int, bytes] = {}
        found[name] = [fit_bytes(codec, pixels, budget, made) for budget in budgets]
    return found


# ------------------------------------------------------------------ comparison


class _Pictures(Sequence["torch.Tensor"]):
    """uint8 pixels (N, H, W[, 3]) as images (C, H, W) in [0, 1]."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> torch.Tensor:
        import torch

        return torch.from_numpy(np.atleast_3d(self.pixels[i]).transpose(2, 0, 1).astype(np.float32) / 255)


@dataclass(frozen=True)
class _Point:
    """All images by one codec at one setting: a point of the curves."""

    codec: str
    setting: str
    budget: int
    fitted: list[Fitted]
    measured: PairedQuality

    @property
    def name(self) -> str:
        """In the metrics."""
        return f"{self.codec}_{self.setting}" if self.codec == "latent" else f"{self.codec}_at_{self.setting}"

    @property
    def bytes(self) -> float:
        """Of an image, on average."""
        return float(np.mean([len(each.code) for each in self.fitted]))


def compress(
    embedding: Embedding,
    generator: LatentGenerator,
    dataset: Sequence[Mapping[str, torch.Tensor]],
    output_dir: str | os.PathLike[str],
    bits: Sequence[int] = (16, 8, 6, 4, 2),
    further: Sequence[int] = (2, 4, 8),
    picture_bits: int = 8,
    perceptual_weights: str | os.PathLike[str] | None = None,
    batch_size: int = 16,
    num_workers: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure how good latents are as compressed images, against JPEG and JPEG 2000 at equal bytes.

    All figures come from decoded bytes: latents are coded and decoded (:func:`encode_latents`), their images rounded to
    8 bits, and compared with the original in 8 bits, which is what the other codecs take. For each depth of the latents
    the other codecs get as many bytes, by bisection of their quality (:func:`fit_bytes`); where a codec cannot get that
    small, its smallest code stands, and the table says how many bytes it took. Budgets that the pixels themselves would
    fit are left out. Codecs that are ``bare`` do not count
    headers and tables that all images share, as the latents do not count the generator: see :class:`ImageCodec`.

    Writes ``compression.csv`` (a row for each image, codec and setting), ``metrics.json``,
    ``images/rate_distortion.png`` and ``images/compressed.png``.

    Args:
        embedding: latents of N images.
        generator: theirs.
        dataset: ``dataset[i]["image"]`` is the original (C, H, W) in [0, 1] of latent i.
        output_dir: where the files go.
        bits: depths of the latents' numbers, see :func:`encode_latents`.
        further: more budgets for the other codecs, in multiples of the largest latent's bytes.
        picture_bits: depth of the latents that are shown; one of ``bits``.
        perceptual_weights: state dict of torchvision's AlexNet, for LPIPS; None leaves it out.
        batch_size: latents rendered, and pairs measured, at once.
        num_workers: processes that look for files; 0 does it in this one.
        seed: of the bootstrap.

    Returns:
        What ``metrics.json`` holds: for each codec and setting the mean bytes, the share of images that fit the budget
        and of those without loss, which no mean of the PSNR holds, and each measure with its 95 % interval over
        patients.

    Raises:
        UserError: settings that are none, latents of another generator or space, or images of another size.
    """
    from medgen.losses import LocalLPIPS
    from medgen.metrics.paired import PAIRED_METRICS, paired_quality

    depths = check_bits(bits, picture_bits)
    check_further(further)
    check_space(embedding, generator)
    lpips = None if perceptual_weights is None else LocalLPIPS("alex", perceptual_weights, rescale=True)
    wanted = ["ms_ssim", "psnr"] + ["lpips"] * (lpips is not None)
    metrics = [name for name in wanted if PAIRED_METRICS[name].min_side <= min(generator.image_size)]
    originals = _originals(dataset, len(embedding), generator)
    shared = {"mean": embedding.mean, "std": embedding.std, "spherical": generator.is_spherical}
    points: list[_Point] = []
    shown: dict[str, np.ndarray] = {"original": originals[:SHOWN_IMAGES]}

    def add(codec: str, setting: str, budget: int, fitted: list[Fitted], pixels: np.ndarray) -> None:
        measured = paired_quality(
            _Pictures(originals),
            _Pictures(pixels),
            metrics,
            patients=[str(item.get("patient", item["image"])) for item in embedding.items],
            lpips=lpips,
            device=generator.mean.device,
            batch_size=batch_size,
            seed=seed,
        )
        points.append(_Point(codec, setting, budget, fitted, measured))
        if setting == f"{picture_bits}bit":
            shown[codec] = pixels[:SHOWN_IMAGES]

    budgets = {}
    for depth in depths:
        codes = encode_latents(embedding.latents, depth, **shared)
        budgets[f"{depth}bit"] = len(codes[0])
        images = render(generator, decode_latents(codes, depth, **shared), batch_size)
        pixels = np.stack([_pixels(image) for image in images])
        add("latent", f"{depth}bit", len(codes[0]), [Fitted(code, depth, True) for code in codes], pixels)
    largest = max(budgets.values())
    budgets |= {f"{factor}x": factor * largest for factor in further}
    shape = originals.shape[1:]
    pixels_bytes = int(np.prod(shape))
    too_large = [setting for setting, budget in budgets.items() if budget >= pixels_bytes]
    if too_large:
        logger.info(f"no JPEG at {', '.join(too_large)}: the {pixels_bytes} bytes of the pixels themselves fit")
    budgets = {setting: budget for setting, budget in budgets.items() if budget < pixels_bytes}
    codecs = {
        "jpeg": JPEG(shape),
        "jpeg_bare": JPEG(shape, bare=True),
        "jpeg2000": JPEG2000(shape),
        "jpeg2000_bare": JPEG2000(shape, bare=True),
    }
    logger.info(f"{len(originals)} images as JPEG and JPEG 2000 at {len(budgets)} sizes")
    fitted = list(map_each(_fit_all, (codecs, list(budgets.values())), list(originals), num_workers, None))
    if None in fitted:
        raise UserError(
            f"a process ended while it compressed {embedding.items[fitted.index(None)]['image']}; set --num_workers 0"
        )
    for name, codec in codecs.items():
        for place, (setting, budget) in enumerate(budgets.items()):
            of_codec = [of_image[name][place] for of_image in fitted]
            add(name, setting, budget, of_codec, np.stack([codec.decode(each.code) for each in of_codec]))

    output_dir = Path(output_dir)
    _write_table(output_dir / "compression.csv", embedding.items, points)
    splits = ", ".join(sorted({str(item.get("split", "unknown")) for item in embedding.items}))
    _draw_curves(output_dir / "images" / "rate_distortion.png", points, metrics, f"{len(originals)} images ({splits})")
    _draw_strip(output_dir / "images" / "compressed.png", shown, points, f"{picture_bits}bit")
    record = {
        **_figures(points),
        "pixels_bytes": pixels_bytes,
        "n": len(originals),
        "split": splits,
        "seed": seed,
        "space": embedding.space,
        "stage": embedding.stage,
        "generator_sha256": generator.sha256,
        "git": git_revision(),
    }
    atomic_write_text(output_dir / "metrics.json", json.dumps(plain_json(record), indent=4) + "\n")
    return record


def check_bits(bits: Sequence[int], picture_bits: int) -> list[int]:
    """Depths from the largest to the smallest.

    Raises:
        UserError: one of them is none, or the one that is shown is not among them.
    """
    if isinstance(bits, str) or not isinstance(bits, Sequence) or not bits:
        raise UserError(f'bits must be a list such as [16,8,4], got {bits!r}; set --bits "[16,8,4]"')
    for depth in bits:
        _check_bits(depth)
    if picture_bits not in bits:
        among = ", ".join(map(str, bits))
        raise UserError(f"picture_bits must be one of bits ({among}), got {picture_bits!r}; set --picture_bits")
    return sorted(set(bits), reverse=True)


def check_further(further: Sequence[int]) -> None:
    """See that multiples of a budget are such.

    Raises:
        UserError: it is no list, or one of them is no whole number of at least 1.
    """
    if isinstance(further, str) or not isinstance(further, Sequence):
        raise UserError(f'further must be a list such as [2,4,8], or [], got {further!r}; set --further "[2,4,8]"')
    from medgen.settings import check_whole

    for factor in further:
        check_whole(further=factor)


def select_split(embedding: Embedding, split: str) -> Embedding:
    """The images of one split of an embedding.

    Args:
        embedding: latents of images whose split is known.
        split: its name; "all" for all images, of whatever split.

    Raises:
        UserError: there are none.
    """
    if split == "all":
        return embedding
    names = [item["image"] for item in embedding.items if item.get("split") == split]
    if not names:
        there = ", ".join(sorted({str(item.get("split", "unknown")) for item in embedding.items}))
        raise UserError(
            f"no image of the split {split!r:.80} among the {len(embedding)} of the embedding, whose splits are: "
            f"{there}; embed that split with inference.json, or set --split all"
        )
    return embedding.of_images(names)


def _originals(dataset: Sequence[Mapping[str, torch.Tensor]], n: int, generator: LatentGenerator) -> np.ndarray:
    """(N, H, W[, 3]) uint8."""
    if len(dataset) != n:
        raise UserError(f"every latent needs its original, got {len(dataset)} images for {n} latents; set --datalist")
    pixels = []
    for i in range(n):
        image = dataset[i]["image"]
        if tuple(image.shape) != (generator.channels, *generator.image_size):
            raise UserError(
                f"originals must be {(generator.channels, *generator.image_size)} for this generator, got "
                f"{tuple(image.shape)}; load them with the preprocessing of compress.json"
            )
        pixels.append(_pixels(image))
    return np.stack(pixels)


def _pixels(image: np.ndarray | torch.Tensor) -> np.ndarray:
    """(H, W) or (H, W, 3) uint8 of an image (C, H, W) in [0, 1]; what lies outside is clipped."""
    levels = np.rint(np.clip(np.asarray(image), 0, 1) * 255).astype(np.uint8)
    return levels[0] if len(levels) == 1 else np.ascontiguousarray(levels.transpose(1, 2, 0))


def _figures(points: Sequence[_Point]) -> dict[str, float | None]:
    """Means of all points with their intervals, by flat names."""
    figures: dict[str, float | None] = {}
    for point in points:
        figures[f"{point.name}_bytes"] = point.bytes
        if point.codec != "latent":
            figures[f"{point.name}_fits"] = float(np.mean([each.fits for each in point.fitted]))
            # an infinite PSNR is in no mean: these images are counted instead
            figures[f"{point.name}_lossless"] = float(np.mean(np.isinf(point.measured.values["psnr"])))
        for metric, summary in point.measured.summary.items():
            figures[f"{point.name}_{metric}"] = summary.mean
            figures |= {f"{point.name}_{metric}_low": summary.low, f"{point.name}_{metric}_high": summary.high}
    return figures


def _write_table(path: Path, items: Sequence[Mapping[str, Any]], points: Sequence[_Point]) -> None:
    with atomic_file(path, "w") as file:
        table = csv.writer(file, lineterminator="\n")
        metrics = list(points[0].measured.values)
        columns = ["image", "patient", "split", "codec", "setting", "budget", "bytes", "fits", "quality"]
        table.writerow([*columns, *metrics])
        for point in points:
            values = zip(*point.measured.values.values(), strict=True)
            for item, each, of_image in zip(items, point.fitted, values, strict=True):
                row = [item["image"], item.get("patient", ""), item.get("split", ""), point.codec, point.setting]
                row += [point.budget, len(each.code), int(each.fits), each.quality]
                table.writerow([*row, *(f"{value:.6g}" for value in of_image)])


def _draw_curves(path: Path, points: Sequence[_Point], metrics: Sequence[str], images: str) -> None:
    """Each measure over the bytes of an image, a line a codec, with its interval."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from medgen.metrics.paired import PAIRED_METRICS

    figure = Figure(figsize=(6.2 * len(metrics), 4.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for place, metric in enumerate(metrics):
        axes = figure.add_subplot(1, len(metrics), place + 1)
        for codec, (title, colour, style) in CURVES.items():
            of_codec = [p for p in points if p.codec == codec and p.measured.summary[metric].mean is not None]
            of_codec = sorted(of_codec, key=lambda point: point.bytes)
            x = [point.bytes for point in of_codec]
            found = [point.measured.summary[metric] for point in of_codec]
            axes.plot(x, [s.mean for s in found], style, color=colour, label=title, markersize=5)
            low = [s.mean if s.low is None else s.low for s in found]
            high = [s.mean if s.high is None else s.high for s in found]
            axes.vlines(x, low, high, color=colour, linewidth=1)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("bytes an image")
        better = PAIRED_METRICS[metric].direction
        axes.set_ylabel(f"{PAIRED_METRICS[metric].title}{' (dB)' if metric == 'psnr' else ''}, {better} is better")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(frameon=False)
    figure.suptitle(f"means of {images}, bars: 95 % interval over patients", fontsize=11)
    with atomic_file(path) as file:
        figure.savefig(file, format="png")


def _draw_strip(path: Path, shown: Mapping[str, np.ndarray], points: Sequence[_Point], setting: str) -> None:
    """A row an image: the original and what each codec makes of it, with its bytes and figures below."""
    from medgen.metrics.paired import PAIRED_METRICS

    of_codec = {point.codec: point for point in points if point.setting == setting}
    H, W = shown["original"].shape[1:3]
    scale = max(1, -(-TILE // W))
    width, height, line = W * scale, H * scale, FONT + 4
    font = ImageFont.load_default(FONT)
    row_height = height + (1 + len(points[0].measured.values)) * line + GAP
    size = (len(shown) * (width + GAP) - GAP, line + GAP + len(shown["original"]) * row_height)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, (codec, pixels) in enumerate(shown.items()):
        left = column * (width + GAP)
        draw.text((left + 2, 1), "original" if codec == "original" else CURVES[codec][0], fill="black", font=font)
        for row, picture in enumerate(pixels):
            top = line + GAP + row * row_height
            tile = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile.convert("RGB"), (left, top))
            texts = [f"{picture.size} bytes of pixels"]
            if codec != "original":
                measured = {name: values[row] for name, values in of_codec[codec].measured.values.items()}
                texts = [f"{len(of_codec[codec].fitted[row].code)} bytes"]
                texts += [
                    f"{PAIRED_METRICS[name].title} {value:.{1 if name == 'psnr' else 3}f}"
                    for name, value in measured.items()
                ]
            for number, text in enumerate(texts):
                draw.text((left + 2, top + height + 1 + number * line), text, fill="black", font=font)
    with atomic_file(path) as file:
        sheet.save(file, format="PNG")
