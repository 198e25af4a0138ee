"""Sliced Wasserstein distance against a restatement by scipy; what it does and does not depend on; refusals."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.handlers import from_engine
from scipy.ndimage import convolve, gaussian_filter
from scipy.stats import chisquare, wasserstein_distance

from medgen.errors import UserError
from medgen.metrics.distribution import SlicedWassersteinDistance, SlicedWassersteinDistanceMetric
from medgen.metrics.sliced_wasserstein import (
    PATCHES,
    REAL,
    SAMPLES,
    laplacian_pyramid,
    patch_descriptors,
    pyramid_sides,
    set_descriptors,
    sliced_wasserstein,
    sliced_wasserstein_distance,
)

BINOMIAL = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256


def textures(n, side=32, channels=1, sigma=1.0, seed=0):
    """Blobs in [0, 1] with details of every size, (n, channels, side, side) float32."""
    noise = np.random.default_rng(seed).standard_normal((n, channels, side, side))
    blobs = sum(gaussian_filter(noise, (0, 0, s, s), mode="wrap") * s for s in (sigma, 3 * sigma, 8 * sigma))
    return np.clip(0.5 + 0.15 * blobs / blobs.std(), 0, 1).astype(np.float32)


def restated_pyramid(image):
    """Levels of one channel (S, S): the whole 5 × 5 kernel, zeros and all, in double precision."""
    levels = []
    while image.shape[0] > 16:
        smaller = convolve(image, BINOMIAL, mode="mirror")[::2, ::2]
        doubled = np.zeros_like(image)
        doubled[::2, ::2] = smaller
        levels.append(image - convolve(doubled, 4 * BINOMIAL, mode="mirror"))
        image = smaller
    return [*levels, image]


def restated_distance(real, fake, seed=0, directions=512):
    """Of the patches of one level, (N, P, C, K) each, direction by direction."""

    def table(patches):
        channels = np.moveaxis(patches.astype(np.float64), 2, 0)
        normal = [(channel - channel.mean()) / channel.std() for channel in channels]
        return np.stack(normal, axis=2).reshape(-1, patches.shape[2] * patches.shape[3])

    x, y = table(real), table(fake)
    towards = np.random.default_rng([seed, 0]).standard_normal((directions, x.shape[1]))
    towards /= np.linalg.norm(towards, axis=1, keepdims=True)
    return 1000 * np.mean([wasserstein_distance(x @ one, y @ one) for one in towards])


# -- pyramid and patches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [16, 32, 128])
def test_pyramid_equals_plain_convolution_with_the_whole_kernel(side):
    images = np.random.default_rng(side).random((2, 3, side, side))
    levels = laplacian_pyramid(images)
    assert tuple(level.shape[-1] for level in levels) == pyramid_sides(side)
    for image in range(2):
        for channel in range(3):
            for level, expected in zip(levels, restated_pyramid(images[image, channel]), strict=True):
                np.testing.assert_allclose(level[image, channel], expected, atol=1e-6)


def test_sides_go_down_to_16_and_small_images_are_their_own_level():
    assert pyramid_sides(512) == (512, 256, 128, 64, 32, 16)
    assert [pyramid_sides(side) for side in (16, 8, 4)] == [(16,), (8,), (4,)]


@pytest.mark.parametrize("channels", [1, 3])
def test_descriptors_are_patches_of_their_level(channels):
    images = textures(2, 64, channels)
    found = patch_descriptors(images, [5, 9])
    assert found.shape == (2, 3, 128, channels, 49)
    for image in range(2):
        for level, pixels in enumerate(laplacian_pyramid(images)):
            windows = np.lib.stride_tricks.sliding_window_view(pixels[image], (channels, 7, 7))
            there = {window.tobytes() for window in windows.reshape(-1, channels * 49)}
            assert all(patch.tobytes() in there for patch in found[image, level])


def positions(side, places, seed=0, role=REAL):
    """Row and column of every patch: images of 16 pixels and less are their only level."""
    coordinates = np.arange(side * side, dtype=np.float32).reshape(1, 1, side, side)
    first = patch_descriptors(np.repeat(coordinates, len(places), axis=0), places, seed, role)[:, 0, :, 0, 0]
    return np.stack([first // side, first % side], axis=-1).astype(int)


@pytest.mark.parametrize(("side", "room"), [(16, 10), (8, 2), (4, 1)])
def test_every_position_is_drawn_equally_often(side, room):
    counts = np.zeros((room, room))
    np.add.at(counts, tuple(positions(side, range(200)).reshape(-1, 2).T), 1)
    assert counts.sum() == 200 * PATCHES
    assert room == 1 or chisquare(counts.ravel()).pvalue > 1e-3


def test_positions_follow_from_the_seed_the_role_and_the_place_alone():
    at = positions(16, [3, 7])
    np.testing.assert_array_equal(positions(16, [7])[0], at[1])
    assert not np.array_equal(at[0], at[1])
    assert not np.array_equal(positions(16, [3], seed=1)[0], at[0])
    assert not np.array_equal(positions(16, [3], role=SAMPLES)[0], at[0])


def test_batches_change_no_descriptor():
    images = textures(40, 64, 3)  # more than one chunk
    together = patch_descriptors(images, range(40))
    np.testing.assert_array_equal(
        np.concatenate([patch_descriptors(images[i : i + 7], range(i, min(i + 7, 40))) for i in range(0, 40, 7)]),
        together,
    )
    np.testing.assert_array_equal(set_descriptors(images), together)


# -- the distance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m", "channels"), [(6, 6, 1), (6, 6, 3), (7, 4, 1), (3, 5, 3)])
def test_distance_is_scipys_along_each_direction_for_sets_of_any_size(n, m, channels):
    real, fake = textures(n, 32, channels), textures(m, 32, channels, sigma=1.5, seed=1)
    descriptors = set_descriptors(real, 3, REAL), set_descriptors(fake, 3, SAMPLES)
    found = sliced_wasserstein_distance(real, fake, seed=3)
    assert list(found) == [32, 16]
    for level, value in enumerate(found.values()):
        expected = restated_distance(*(of[:, level] for of in descriptors), seed=3)
        assert value == pytest.approx(expected, rel=1e-5)


def test_fewer_directions_are_the_first_ones():
    real, fake = set_descriptors(textures(4)), set_descriptors(textures(4, seed=1))
    found = sliced_wasserstein(real, fake, directions=10)
    assert found[0] == pytest.approx(restated_distance(real[:, 0], fake[:, 0], directions=10), rel=1e-5)


def test_blocks_of_directions_change_nothing(monkeypatch):
    real, fake = set_descriptors(textures(5)), set_descriptors(textures(4, seed=1))
    whole = sliced_wasserstein(real, fake)
    monkeypatch.setattr("medgen.metrics.sliced_wasserstein.BLOCK", 3 * 5 * PATCHES)  # three directions
    np.testing.assert_allclose(sliced_wasserstein(real, fake), whole, rtol=1e-6)


def test_patches_have_no_distance_to_themselves_and_the_distance_is_symmetric():
    a, b = set_descriptors(textures(6)), set_descriptors(textures(6, sigma=1.5, seed=1))
    assert sliced_wasserstein(a, a).tolist() == [0, 0]
    forth, back = sliced_wasserstein(a, b), sliced_wasserstein(b, a)
    np.testing.assert_allclose(forth, back, rtol=1e-6)
    assert forth.min() > 0


def anatomy(n, seed):
    """Images that are much the same at each pixel, as radiographs are."""
    return 0.5 + 0.5 * textures(1, seed=0) * (0.9 + 0.1 * textures(n, seed=seed))


def test_each_set_is_looked_at_in_positions_of_its_own():
    real, fake = anatomy(30, 1), anatomy(30, 2)
    # places that the other set does not have are positions that it does not have
    apart = [
        sliced_wasserstein(set_descriptors(real), patch_descriptors(fake, range(start, start + 30)))
        for start in range(100, 220, 30)
    ]

    found = [list(sliced_wasserstein_distance(real, fake, seed=seed).values()) for seed in range(4)]

    # common positions would give a quarter of it
    np.testing.assert_allclose(np.mean(found, axis=0), np.mean(apart, axis=0), rtol=0.4)


def test_distance_of_a_set_to_itself_falls_with_the_number_of_images():
    few, many = (sliced_wasserstein_distance(of, of) for of in (textures(10), textures(160)))
    assert 0 < min(many.values())
    assert max(many.values()) < 0.5 * min(few.values())


def test_brightness_and_contrast_of_a_whole_set_do_not_count():
    a = textures(6)
    assert sliced_wasserstein(set_descriptors(a), set_descriptors(0.5 * a + 0.3)).max() < 0.01  # of a thousand


def test_order_of_the_descriptors_changes_nothing_and_that_of_the_images_their_positions_alone():
    a, b = textures(60), textures(60, sigma=1.5, seed=1)
    real, fake = set_descriptors(a), set_descriptors(b, role=SAMPLES)
    value = sliced_wasserstein(real, fake)
    np.testing.assert_allclose(sliced_wasserstein(real[::-1], fake), value, rtol=1e-5)
    assert sliced_wasserstein(set_descriptors(a[::-1]), fake) == pytest.approx(value, rel=0.2)


def test_blur_shows_at_the_finest_level_only():
    real, others = textures(60, 64, seed=0), textures(60, 64, seed=1)
    blurred = [gaussian_filter(others, (0, 0, sigma, sigma)) for sigma in (0.0, 0.5, 0.7, 1.0)]
    found = [sliced_wasserstein_distance(real, images) for images in blurred]
    finest = [of[64] for of in found]
    assert finest == sorted(finest)
    assert finest[-1] > 2 * finest[0]
    assert max(of[16] for of in found) < 1.2 * found[0][16]


def test_flat_images_have_a_finite_distance_and_none_to_each_other():
    flat = np.full((5, 1, 32, 32), 0.3, dtype=np.float32)
    assert sliced_wasserstein_distance(flat, flat + 0.4) == {32: 0.0, 16: 0.0}
    to_textures = sliced_wasserstein_distance(textures(5), flat)
    assert all(100 < value < 2000 for value in to_textures.values())


@pytest.mark.parametrize("side", [4, 8])
def test_first_images_of_a_growing_generator_have_a_distance(side):
    a, b = textures(20, side, sigma=0.5), textures(20, side, sigma=0.5, seed=1)
    assert sliced_wasserstein_distance(a, b)[side] < sliced_wasserstein_distance(a, b**4)[side]


# -- in an evaluation -------------------------------------------------------------------------------------------------


def in_an_engine(predictions, images, batch_size=4, **options):
    engine = Engine(lambda _, batch: [{"pred": pred, "image": image} for pred, image in zip(*batch, strict=True)])
    handler = SlicedWassersteinDistance(from_engine(["pred", "image"]), **options)
    handler.attach(engine, "swd")
    pairs = zip(*(torch.from_numpy(of).split(batch_size) for of in (predictions, images)), strict=True)
    return engine, engine.run(list(pairs)).metrics


@pytest.mark.parametrize("batch_size", [3, 10])
def test_handler_writes_the_mean_and_the_levels_for_any_batch_size(batch_size):
    predictions, images = textures(10, 64, 3, sigma=1.5, seed=1), textures(10, 64, 3)
    metrics = in_an_engine(predictions, images, batch_size, seed=2)[1]
    expected = sliced_wasserstein_distance(images, predictions, seed=2)
    levels = {f"swd_{side}": value for side, value in expected.items()}
    assert metrics == pytest.approx({"swd": np.mean(list(expected.values())), **levels}, rel=1e-6)
    assert all(isinstance(value, float) for value in metrics.values())


def test_handler_starts_anew_and_may_then_see_larger_images():
    engine, first = in_an_engine(textures(6, 16, seed=1), textures(6, 16))
    assert set(first) == {"swd", "swd_16"}
    larger = textures(6, seed=1), textures(6)
    metrics = engine.run([tuple(map(torch.from_numpy, larger))]).metrics
    assert metrics["swd_32"] == pytest.approx(sliced_wasserstein_distance(larger[1], larger[0])[32], rel=1e-6)


RANK_CODE = """
import sys
import numpy as np, torch
import torch.distributed as dist
from medgen.metrics.distribution import SlicedWassersteinDistanceMetric
rank, rendezvous, images, output = int(sys.argv[1]), *sys.argv[2:]
dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
fake, real = torch.from_numpy(np.load(images))
metric = SlicedWassersteinDistanceMetric()
for batch in zip(fake[rank::2].split(2), real[rank::2].split(2)):
    metric(*batch)
np.save(f"{output}{rank}.npy", list(metric.aggregate().values()))
dist.destroy_process_group()
"""


@pytest.mark.slow(reason="two processes import MONAI")
def test_number_of_processes_changes_nothing(tmp_path):
    fake, real = textures(9, sigma=1.5, seed=1), textures(9)
    np.save(tmp_path / "images.npy", np.stack([fake, real]))
    places = [(tmp_path / "rendezvous").as_uri(), str(tmp_path / "images.npy"), str(tmp_path / "rank")]
    ranks = [subprocess.Popen([sys.executable, "-c", RANK_CODE, str(rank), *places]) for rank in range(2)]
    assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    expected = list(sliced_wasserstein_distance(real, fake).values())
    for rank in range(2):
        np.testing.assert_allclose(np.load(tmp_path / f"rank{rank}.npy"), expected, rtol=1e-6)


def test_import_of_the_functions_imports_no_torch():
    code = "import sys; from medgen.metrics import sliced_wasserstein_distance; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


# -- what is refused --------------------------------------------------------------------------------------------------


def spoilt(value):
    images = textures(4)
    images[2, 0, 5, 7] = value
    return images


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (textures(1), "at least 2 images in each, got 1"),
        (np.empty((0, 1, 32, 32)), "at least 2 images in each, got 0"),
        ([], "at least 2 images in each, got 0"),
        (textures(3, 24), "a power of two from 4, got 24 pixels"),
        (textures(3, 2), "a power of two from 4, got 2 pixels"),
        (textures(3)[:, :, :16], r"square images \(B, C, S, S\), got \(3, 1, 16, 32\)"),
        ([*textures(2), textures(1, 16)[0]], r"got \(1, 32, 32\) and, for image 2, \(1, 16, 16\)"),
        ([*textures(2), textures(1, channels=3)[0]], r"got \(1, 32, 32\) and, for image 2, \(3, 32, 32\)"),
        (textures(3, channels=2), r"\(1, S, S\) or \(3, S, S\)"),
        (textures(3)[:, 0], r"\(1, S, S\) or \(3, S, S\)"),
        (spoilt(np.nan), "got nan to nan for image 2"),
        (spoilt(np.inf), r"to inf for image 2"),
        (255 * textures(2), r"must lie in 0\.\.1"),
        (2 * textures(2) - 1, r"must lie in 0\.\.1, got -"),
        (textures(4, 64), r"one size and mode, .* \(2, 128, 1, 49\) and \(3, 128, 1, 49\)"),
        (textures(4, channels=3), r"one size and mode, .* \(2, 128, 1, 49\) and \(2, 128, 3, 49\)"),
    ],
)
def test_unusable_images_are_refused_in_one_line(images, message):
    with pytest.raises(UserError, match=message) as error:
        sliced_wasserstein_distance(textures(4), images)
    assert "\n" not in str(error.value)


def test_descriptors_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="patches must be finite"):
        sliced_wasserstein(patch_descriptors(spoilt(np.nan), range(4)), set_descriptors(textures(4)))


def test_handler_refuses_single_images_other_ranges_and_two_sizes_at_once():
    one = textures(1)
    with pytest.raises(UserError, match="at least 2 images in each, got 1"):
        in_an_engine(one, one)
    with pytest.raises(UserError, match="takes images, got none"):
        SlicedWassersteinDistanceMetric().aggregate()
    with pytest.raises(UserError, match=r"predictions must lie in 0\.\.1"):
        in_an_engine(2 * textures(3) - 1, textures(3))
    with pytest.raises(UserError, match=r"one size and mode, got \(1, 16, 16\) and \(1, 32, 32\)"):
        in_an_engine(textures(3, 16), textures(3))
    with pytest.raises(UserError, match="a power of two from 4, got 24"):
        in_an_engine(textures(3, 24), textures(3, 24))
