"""Latents as codes of images, and JPEG and JPEG 2000 within a budget."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from medgen.apps import JPEG, JPEG2000, compress, decode_latents, encode_latents, fit_bytes
from medgen.apps.compression import RANGES, check_bits, check_further, select_split
from medgen.data import Embedding
from medgen.errors import UserError
from medgen.networks import LatentGenerator, PGGANGenerator

MEAN, STD = np.linspace(-1, 1, 2 * 35, dtype=np.float32).reshape(2, 35), 0.3  # of w: L 2, D 35


def latents_of_w(n: int = 6) -> np.ndarray:
    """As optimisation leaves them: most numbers small, some large."""
    x = np.random.default_rng(0).standard_t(3, (n, 2, 35))
    return (MEAN + STD * x).astype(np.float32)


def latents_on_sphere(n: int = 6, d: int = 128) -> np.ndarray:
    z = np.random.default_rng(1).standard_normal((n, 1, d))
    return (z / np.sqrt(np.square(z).mean(2, keepdims=True))).astype(np.float32)


def on_sphere(d: int = 128) -> dict:
    return {"mean": np.zeros((1, d), dtype=np.float32), "std": 1.0, "spherical": True}


def picture(side: int = 64) -> np.ndarray:
    row, column = np.mgrid[:side, :side] / side
    disc = (row - 0.5) ** 2 + (column - 0.4) ** 2 < 0.1
    noise = np.random.default_rng(0).normal(0, 4, disc.shape)
    return np.clip(60 + 60 * row + 90 * disc + noise, 0, 255).astype(np.uint8)


# ------------------------------------------------------------------ latents


@pytest.mark.parametrize(("bits", "length"), [(16, 140), (8, 71), (6, 54), (5, 45), (4, 36), (1, 10)])
def test_code_of_w_has_its_packed_numbers_and_one_byte_for_the_range(bits, length):
    codes = encode_latents(latents_of_w(), bits, MEAN, STD)

    assert {len(code) for code in codes} == {length}  # 70 numbers: 70 * bits / 8 rounded up, and 1 below 16 bits


@pytest.mark.parametrize(("bits", "length"), [(16, 256), (8, 128), (3, 48), (1, 16)])
def test_code_of_z_has_its_packed_numbers_alone(bits, length):
    assert {len(code) for code in encode_latents(latents_on_sphere(), bits, **on_sphere())} == {length}


@pytest.mark.parametrize("bits", [2, 4, 8, 12])
def test_error_is_at_most_that_of_a_range_that_clips_nothing(bits):
    latents = latents_of_w()
    decoded = decode_latents(encode_latents(latents, bits, MEAN, STD), bits, MEAN, STD)

    # half a step of the smallest range that holds all numbers bounds each error, hence the mean square
    largest = np.abs((latents - MEAN) / STD).max((1, 2))
    half_step = np.array([RANGES[RANGES >= each].min() for each in largest]) / 2**bits
    error = np.square((decoded - latents) / STD).mean((1, 2))
    assert (np.sqrt(error) <= half_step).all()


def test_uniform_quantiser_of_gaussian_numbers_reaches_the_published_optimum():
    latents = np.random.default_rng(0).standard_normal((4, 1, 20_000)).astype(np.float32)
    mean = np.zeros((1, 20_000), dtype=np.float32)
    # Max 1960, table II: mean square error of 2, 4, 8 and 16 levels
    for bits, optimum in {1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154}.items():
        decoded = decode_latents(encode_latents(latents, bits, mean, 1.0), bits, mean, 1.0)
        assert np.square(decoded - latents).mean() == pytest.approx(optimum, rel=0.03)


def test_float16_loses_no_more_than_its_rounding():
    latents = latents_of_w()
    decoded = decode_latents(encode_latents(latents, 16, MEAN, STD), 16, MEAN, STD)

    deviation = (latents - MEAN) / STD
    assert (np.abs(decoded - latents) / STD <= np.abs(deviation) * 2.0**-11 + 1e-6).all()


@pytest.mark.parametrize("bits", [1, 4, 16])
def test_decoded_z_is_on_the_sphere(bits):
    decoded = decode_latents(encode_latents(latents_on_sphere(), bits, **on_sphere()), bits, **on_sphere())

    assert decoded.dtype == np.float32
    np.testing.assert_allclose(np.square(decoded).mean(2), 1, rtol=1e-6)


def test_length_of_z_is_not_coded():
    z = latents_on_sphere()
    assert encode_latents(z, 4, **on_sphere()) == encode_latents(7 * z, 4, **on_sphere())


def test_code_of_an_image_does_not_depend_on_the_others():
    latents = latents_of_w()
    assert encode_latents(latents, 4, MEAN, STD)[2:3] == encode_latents(latents[2:3], 4, MEAN, STD)


def test_the_mean_latent_is_coded():
    latents = np.stack([MEAN, MEAN]).astype(np.float32)
    decoded = decode_latents(encode_latents(latents, 4, MEAN, STD), 4, MEAN, STD)
    assert np.abs(decoded - latents).max() <= STD * RANGES[0]


@pytest.mark.parametrize("bits", [0, 13, 32, 4.0, True, "4"])
def test_no_such_depth(bits):
    with pytest.raises(UserError, match=r"bits must be from 1 to 12, or 16 for float16, got .*; set --bits"):
        encode_latents(latents_of_w(), bits, MEAN, STD)


def test_code_of_another_depth_is_refused():
    codes = encode_latents(latents_of_w(), 4, MEAN, STD)
    with pytest.raises(UserError, match="must have 71 bytes, got 36"):
        decode_latents(codes, 8, MEAN, STD)


def test_latents_of_another_shape_are_refused():
    with pytest.raises(UserError, match=r"latents must be \(N, 2, 35\), got \(6, 1, 128\)"):
        encode_latents(latents_on_sphere(), 4, MEAN, STD)


def test_shown_depth_must_be_measured():
    with pytest.raises(UserError, match=r"picture_bits must be one of bits \(16, 4\), got 8; set --picture_bits"):
        check_bits([16, 4], 8)
    with pytest.raises(UserError, match="bits must be a list"):
        check_bits("8", 8)


# ------------------------------------------------------------------ JPEG and JPEG 2000


@pytest.mark.parametrize("kind", [JPEG, JPEG2000])
@pytest.mark.parametrize("shape", [(64, 64), (24, 40), (64, 64, 3)])
def test_bare_code_is_a_file_that_any_decoder_reads(kind, shape):
    pixels = np.resize(picture(), shape) if len(shape) == 2 else np.repeat(picture()[..., None], 3, axis=2)
    codec = kind(shape, bare=True)
    code = codec.encode(pixels, 60 if kind is JPEG else 900)

    decoded = np.array(Image.open(io.BytesIO(codec.whole(code))))

    assert decoded.shape == shape
    np.testing.assert_array_equal(decoded, codec.decode(code))
    whole = kind(shape)
    if kind is JPEG:  # the tables differ, the coefficients do not
        np.testing.assert_array_equal(decoded, whole.decode(whole.encode(pixels, 60)))
    else:
        assert codec.whole(code) == whole.encode(pixels, 900)
    assert len(codec.whole(code)) - len(code) > 100  # the headers are what is left out


def test_bare_jpeg_is_the_files_scan_and_a_byte():
    pixels = picture()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=35)

    code = JPEG((64, 64), bare=True).encode(pixels, 35)

    assert code[0] == 35
    assert buffer.getvalue().endswith(code[1:] + b"\xff\xd9")


def test_jpeg_2000_is_a_raw_codestream_without_a_comment():
    file = JPEG2000((64, 64)).encode(picture(), 500)

    assert file.startswith(b"\xff\x4f\xff\x51")  # SOC, SIZ: no boxes around it
    assert b"OpenJPEG" not in file
    with Image.open(io.BytesIO(file)) as image:
        image.load()
        assert image.size == (64, 64)


@pytest.mark.parametrize("kind", [JPEG, JPEG2000])
@pytest.mark.parametrize("bare", [False, True])
def test_budget_is_kept_and_used(kind, bare):
    codec, pixels = kind((64, 64), bare), picture()
    errors = []
    for budget in (400, 600, 1000, 1600):
        found = fit_bytes(codec, pixels, budget)
        assert found.fits
        assert len(found.code) <= budget
        if found.quality < codec.qualities(budget)[0][1]:
            assert len(codec.encode(pixels, found.quality + 1)) > budget
        errors.append(np.square(codec.decode(found.code).astype(float) - pixels).mean())
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("kind", [JPEG, JPEG2000])
def test_budget_below_a_codecs_floor_gives_its_smallest_code_and_says_so(kind):
    codec, pixels = kind((64, 64)), picture()
    found = fit_bytes(codec, pixels, 40)

    assert not found.fits
    smallest = min(len(codec.encode(pixels, quality)) for quality in range(1, 60))
    assert len(found.code) == smallest > 100


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("shape", [(64, 64), (64, 64, 3)])
def test_jpeg_2000_is_lossless_once_that_fits(bare, shape):
    codec = JPEG2000(shape, bare)
    pixels = picture() if len(shape) == 2 else np.stack([picture(), 255 - picture(), picture() // 2], 2)
    lossless = len(codec.encode(pixels, 0))

    np.testing.assert_array_equal(codec.decode(fit_bytes(codec, pixels, lossless).code), pixels)
    assert (codec.decode(fit_bytes(codec, pixels, lossless - 1).code) != pixels).any()


def test_packets_of_jpeg_2000_never_begin_with_the_mark_of_lossless_ones():
    codec = JPEG2000((64, 64), bare=True)
    pixels = [picture(), np.zeros((64, 64), np.uint8), np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)]
    codes = [codec.encode(each, size) for each in pixels for size in (1, 2, 5, 20, 100, 1000, 4000)]

    assert not any(code.startswith(b"\1") for code in codes)
    assert {len(each) for each in (codec.encode(pixels[0], 0), JPEG2000((64, 64)).encode(pixels[0], 0))} != {0}


def test_jpeg_goes_up_to_quality_100():
    codec, pixels = JPEG((64, 64)), picture()
    assert fit_bytes(codec, pixels, 64 * 64).quality == 100


@pytest.mark.parametrize("bare", [False, True])
def test_colours_of_a_jpeg_have_full_resolution_where_that_is_closer(bare):
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2, 0], stripes[:, 1::2, 2] = 255, 255  # red and blue columns: 4:2:0 makes them one violet
    codec = JPEG(stripes.shape, bare)
    found = fit_bytes(codec, stripes, 6000)

    assert found.quality > 128
    buffer = io.BytesIO()
    Image.fromarray(stripes).save(buffer, "JPEG", quality=found.quality - 128, subsampling=0)
    np.testing.assert_array_equal(codec.decode(found.code), np.array(Image.open(io.BytesIO(buffer.getvalue()))))
    smooth = np.repeat(picture()[..., None], 3, axis=2)
    assert fit_bytes(codec, smooth, 1500).fits


def test_codes_of_other_budgets_are_used_again():
    class Counting(JPEG):
        calls = 0

        def encode(self, pixels, quality):
            self.calls += 1
            return super().encode(pixels, quality)

    codec, made = Counting((64, 64)), {}
    first = fit_bytes(codec, picture(), 600, made)
    calls = codec.calls
    assert fit_bytes(codec, picture(), 600, made) == first
    assert codec.calls == calls


# ------------------------------------------------------------------ comparison


@pytest.fixture(scope="module")
def generator() -> LatentGenerator:
    torch.manual_seed(0)
    return LatentGenerator(PGGANGenerator([8, 8, 8, 4, 4], latent_dim=16), "z", "ab" * 32)


def embedding_of(generator: LatentGenerator, n: int = 4, **changes) -> Embedding:
    z = torch.randn(n, generator.z_dim, generator=torch.Generator().manual_seed(3))
    items = [{"image": f"images/{i}.png", "patient": f"p{i // 2}"} for i in range(n)]
    settings = {"space": "z", "generator_sha256": generator.sha256, "encoder_sha256": "", "stage": "encoder"}
    settings |= {"mean": generator.mean.numpy(), "std": float(generator.std), **changes}
    return Embedding(latents=generator.from_z(z).numpy(), items=items, **settings)


def originals_of(generator: LatentGenerator, embedding: Embedding) -> list[dict]:
    with torch.no_grad():
        images = generator(torch.from_numpy(embedding.latents)).clamp(0, 1)
    return [{"image": (image * 255).round() / 255} for image in images]


@pytest.fixture(scope="module")
def outcome(generator, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compression")
    embedding = embedding_of(generator)
    originals = originals_of(generator, embedding)
    return folder, compress(embedding, generator, originals, folder, bits=[16, 8, 4, 2], further=[4], seed=3)


def test_quality_of_latents_falls_with_their_bits(outcome):
    _, figures = outcome
    psnr = [figures[f"latent_{bits}bit_psnr"] for bits in (8, 4, 2)]
    assert psnr == sorted(psnr, reverse=True)
    assert figures["latent_8bit_ms_ssim"] > figures["latent_2bit_ms_ssim"]


def test_table_counts_the_bytes_of_each_image(outcome):
    folder, figures = outcome
    rows = list(csv.DictReader((folder / "compression.csv").open()))

    assert len(rows) == 4 * (4 + 4 * 5)  # images; latents of 4 depths, 4 codecs at these sizes and one more
    assert {row["bytes"] for row in rows if row["codec"] == "latent" and row["setting"] == "8bit"} == {"16"}
    assert {row["budget"] for row in rows if row["setting"] == "4x"} == {str(4 * 2 * 16)}
    for row in rows:
        assert (int(row["bytes"]) <= int(row["budget"])) == bool(int(row["fits"]))
    jpeg = [row for row in rows if row["codec"] == "jpeg" and row["setting"] == "8bit"]
    assert {row["fits"] for row in jpeg} == {"0"}  # nothing that a JPEG file can be is so small
    assert figures["jpeg_at_8bit_fits"] == 0
    assert figures["jpeg_at_8bit_bytes"] == np.mean([int(row["bytes"]) for row in jpeg]) > 150
    of_latent = [float(row["psnr"]) for row in rows if row["codec"] == "latent" and row["setting"] == "4bit"]
    assert figures["latent_4bit_psnr"] == pytest.approx(np.mean(of_latent), rel=1e-5)


def test_figures_are_written_with_their_intervals_and_origin(outcome, generator):
    folder, figures = outcome
    written = json.loads((folder / "metrics.json").read_text())

    assert written == json.loads(json.dumps(figures))
    assert written["jpeg2000_at_4x_psnr_low"] <= written["jpeg2000_at_4x_psnr"] <= written["jpeg2000_at_4x_psnr_high"]
    assert (written["n"], written["seed"], written["generator_sha256"]) == (4, 3, generator.sha256)
    for name in ("rate_distortion.png", "compressed.png"):
        with Image.open(folder / "images" / name) as image:
            assert min(image.size) > 400


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ([0.5], "further must be a whole number of at least 1, got 0.5; set --further"),
        ([2, 0], "further must be a whole number of at least 1, got 0"),
        (["2"], "further must be a whole number of at least 1, got '2'"),
        (4, "further must be a list such as .*, got 4"),
        ("2,4", "further must be a list"),
    ],
)
def test_multiples_that_are_none_are_refused_before_anything_is_made(generator, tmp_path, further, message):
    embedding = embedding_of(generator)
    with pytest.raises(UserError, match=message):
        compress(embedding, generator, originals_of(generator, embedding), tmp_path, further=further)
    assert not any(tmp_path.iterdir())
    check_further([])


def test_budgets_of_the_pixels_themselves_are_left_out(generator, tmp_path):
    embedding = embedding_of(generator, n=2)
    originals = originals_of(generator, embedding)
    figures = compress(embedding, generator, originals, tmp_path, bits=[8], further=[255, 256, 1000])

    rows = list(csv.DictReader((tmp_path / "compression.csv").open()))
    assert {row["setting"] for row in rows} == {"8bit", "255x"}  # of 64 x 64 bytes; the latent has 16
    assert (figures["jpeg2000_at_255x_lossless"], figures["jpeg2000_at_255x_psnr"]) == (1, None)


def test_images_of_one_split_are_chosen(generator):
    embedding = embedding_of(generator)
    splits = ["training", "test", "training", "test"]
    items = [{**item, "split": split} for item, split in zip(embedding.items, splits, strict=True)]
    known = replace(embedding, items=items)

    chosen = select_split(known, "test")
    assert [item["image"] for item in chosen.items] == ["images/1.png", "images/3.png"]
    np.testing.assert_array_equal(chosen.latents, embedding.latents[[1, 3]])
    assert select_split(known, "all") is known
    for wrong, there in ((known, "test, training"), (embedding, "unknown")):
        with pytest.raises(UserError, match=f"no image of the split 'val' .* splits are: {there}; .* --split all"):
            select_split(wrong, "val")


def test_split_of_each_image_is_in_the_table(generator, tmp_path):
    embedding = embedding_of(generator, n=2)
    known = replace(embedding, items=[{**item, "split": "test"} for item in embedding.items])
    figures = compress(known, generator, originals_of(generator, embedding), tmp_path, bits=[8], further=[])

    assert (figures["split"], figures["n"]) == ("test", 2)
    assert {row["split"] for row in csv.DictReader((tmp_path / "compression.csv").open())} == {"test"}


def test_bad_input_is_told_in_one_line(generator, tmp_path):
    embedding = embedding_of(generator)
    originals = originals_of(generator, embedding)
    small = [{"image": item["image"][:, :32]} for item in originals]
    for wrong, given, message in (
        (embedding_of(generator, generator_sha256="cd" * 32), originals, "belong to the generator cdcdcdcdcdcd, this"),
        (embedding_of(generator, space="w"), originals, "space w, the generator was loaded for z; set --space w"),
        (embedding_of(generator, n=0), [], "at least one latent, got none"),
        (
            replace(embedding, latents=embedding.latents[:, :, :8], mean=embedding.mean[:, :8]),
            originals,
            r"shape \(1, 16\), those of the embedding \(1, 8\); make the embedding anew",
        ),
        (embedding, originals[:3], "got 3 images for 4 latents"),
        (embedding, small, r"originals must be \(1, 64, 64\) for this generator, got \(1, 32, 64\)"),
    ):
        with pytest.raises(UserError, match=message) as error:
            compress(wrong, generator, given, tmp_path)
        assert "\n" not in str(error.value)


def test_processes_that_compress_import_neither_torch_nor_monai():
    code = "import sys, medgen.apps.compression; print([name for name in ('torch', 'monai') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
