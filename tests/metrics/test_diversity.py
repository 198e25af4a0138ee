"""Pairwise MS-SSIM against plain loops over MONAI's metric, piq and torchmetrics; its draws, interval and limits."""

from __future__ import annotations

import itertools

import numpy as np
import piq
import pytest
import torch
from ignite.engine import Engine
from monai.handlers import from_engine
from monai.metrics import MultiScaleSSIMMetric
from scipy import stats
from torch.nn import functional as F
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from medgen.errors import UserError
from medgen.metrics import diversity
from medgen.metrics.diversity import PairwiseMultiScaleSSIM, ms_ssim, pairwise_ms_ssim
from medgen.metrics.reconstruction import ms_ssim_kernel_size


def pictures(n: int, channels: int = 1, height: int = 64, width: int = 64, noise: float = 0.03) -> torch.Tensor:
    """Blurred structure that a set shares in part, and noise: pairs that are neither equal nor unrelated."""
    rng = torch.Generator().manual_seed(n + height)
    coarse = torch.rand(1, channels, 8, 8, generator=rng) + 0.7 * torch.rand(n, channels, 8, 8, generator=rng)
    smooth = F.interpolate(coarse / 1.7, size=(height, width), mode="bicubic")
    return (smooth + noise * torch.randn(smooth.shape, generator=rng)).clamp(0, 1)


def plain_double_loop(images: torch.Tensor) -> list[float]:
    """MONAI's metric, pair by pair."""
    metric = MultiScaleSSIMMetric(spatial_dims=2, kernel_size=ms_ssim_kernel_size(min(images.shape[2:])))
    values = []
    for i in range(len(images)):
        for j in range(i + 1, len(images)):
            values.append(float(metric(images[i : i + 1], images[j : j + 1])))
    return values


@pytest.mark.parametrize(
    ("channels", "height", "width"),
    [(1, 64, 64), (3, 64, 80), (1, 99, 77), (1, 176, 176), (1, 48, 48)],
)
def test_all_pairs_equal_a_plain_double_loop_over_monais_metric(channels, height, width):
    images = pictures(6, channels, height, width)
    expected = plain_double_loop(images)
    result = pairwise_ms_ssim(images, device="cpu")
    assert result.mean == pytest.approx(np.mean(expected), abs=5e-6)
    assert result.std == pytest.approx(np.std(expected), abs=5e-6)
    assert (result.n_pairs, result.n_images, result.window) == (15, 6, ms_ssim_kernel_size(min(height, width)))


def test_ms_ssim_equals_piq_on_grey_images_of_even_sides():
    x, y = (
        pictures(5, height=192, width=176).double(),
        pictures(5, height=192, width=176, noise=0.2).roll(1, 0).double(),
    )
    torch.testing.assert_close(ms_ssim(x, y), piq.multi_scale_ssim(x, y, reduction="none"), rtol=0, atol=1e-12)


def test_piq_differs_on_odd_sides_and_colour_as_documented():
    odd = pictures(2, height=191, width=181).double()
    colour = pictures(2, channels=3, height=176, width=176).double()
    for x, y in (odd[:, None], colour[:, None]):
        assert abs(float(ms_ssim(x, y)) - float(piq.multi_scale_ssim(x, y))) > 1e-6


def test_torchmetrics_differs_by_the_border_of_the_coarsest_scale_alone():
    # torchmetrics is told to leave the coarsest scale out, and so are we: its weight is the last
    x, y = pictures(1, height=192, width=192).double(), pictures(1, height=192, width=192, noise=0.1).double()
    both = ms_ssim(x, y), multiscale_structural_similarity_index_measure(x, y, data_range=1.0)
    assert 1e-7 < abs(float(both[0] - both[1])) < 5e-3
    weights = (*diversity.SCALE_WEIGHTS[:4], 0.0)
    without = multiscale_structural_similarity_index_measure(x, y, data_range=1.0, betas=weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diversity, "SCALE_WEIGHTS", weights)
        torch.testing.assert_close(float(ms_ssim(x, y)), float(without), rtol=0, atol=1e-7)


@pytest.mark.parametrize("level", [0.02, 0.5, 0.98])
def test_float32_holds_up_beside_float64_on_flat_images_where_covariances_cancel(level):
    flat = (level + 0.004 * torch.randn(8, 1, 96, 96, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    single, double = (pairwise_ms_ssim(flat, device="cpu", dtype=dtype) for dtype in (torch.float32, torch.float64))
    assert single.mean == pytest.approx(double.mean, abs=1e-6)


def test_negative_contrast_counts_as_nothing():
    image = pictures(1, noise=0.3)
    assert float(ms_ssim(image, 1 - image)) == 0.0
    assert plain_double_loop(torch.cat([image, 1 - image])) == [0.0]


def test_equal_images_give_one_and_constant_images_a_number():
    assert pairwise_ms_ssim(pictures(1).expand(4, -1, -1, -1)).mean == pytest.approx(1, abs=1e-6)
    black_and_white = torch.stack([torch.zeros(1, 64, 64), torch.ones(1, 64, 64)])
    assert pairwise_ms_ssim(black_and_white).mean == pytest.approx((1e-4 / (1 + 1e-4)) ** 0.1333, abs=1e-6)


def test_more_noise_makes_a_set_more_diverse():
    means = [pairwise_ms_ssim(pictures(5, noise=noise)).mean for noise in (0.0, 0.02, 0.1, 0.3)]
    assert means == sorted(means, reverse=True)


def test_order_of_the_images_changes_nothing():
    images = pictures(7)
    assert pairwise_ms_ssim(images.flip(0)).mean == pytest.approx(pairwise_ms_ssim(images).mean, abs=1e-7)


class CountingSet:
    """A set that is not a tensor and tells how often it was read."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images, self.reads = images.numpy(), 0
        self.files = tuple(f"{i}.png" for i in range(len(images)))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> np.ndarray:
        self.reads += 1
        return self.images[index]


def memory_for(count: int, images: torch.Tensor) -> float:
    return count * diversity._bytes_per_image(images.shape[1:], torch.float32) / 2**30


@pytest.mark.parametrize(("held", "reads"), [(11, 11), (6, 3 + (3 + 3 + 2) + 3 + (3 + 2) + 3 + 2 + 2)])
@pytest.mark.parametrize("channels", [1, 3])
def test_blocks_that_do_not_hold_all_images_give_the_same_numbers(held, reads, channels):
    images = pictures(11, channels, 64, 48)
    counting = CountingSet(images)
    result = pairwise_ms_ssim(counting, max_memory=memory_for(held, images) * 1.0001)
    assert result.mean == pytest.approx(np.mean(plain_double_loop(images)), abs=5e-6)
    assert counting.reads == reads + 1  # the first image's shape says how many fit


def test_sampled_pairs_over_blocks_are_those_of_the_plain_loop():
    images = pictures(11)
    metric = MultiScaleSSIMMetric(spatial_dims=2, kernel_size=3)
    first, second = diversity._sample_pairs(11, 20, seed=3)
    expected = metric(images[first], images[second])
    for held in (4, 11):
        result = pairwise_ms_ssim(images, 20, seed=3, max_memory=memory_for(held, images) * 1.0001)
        assert result.mean == pytest.approx(float(expected.mean()), abs=5e-6)
        assert result.n_pairs == 20


@pytest.mark.parametrize(("count", "pairs"), [(2, 1), (7, 21), (7, 20), (40, 30), (5000, 2000)])
def test_drawn_pairs_are_distinct_ordered_and_of_the_seed(count, pairs):
    first, second = diversity._sample_pairs(count, pairs, seed=1)
    assert len(set(zip(first.tolist(), second.tolist(), strict=True))) == pairs
    assert (first >= 0).all()
    assert (first < second).all()
    assert (second < count).all()
    assert np.array_equal(first, diversity._sample_pairs(count, pairs, seed=1)[0])
    assert pairs < 3 or not np.array_equal(first, diversity._sample_pairs(count, pairs, seed=2)[0])


@pytest.mark.parametrize("pairs", [2, 8])  # drawn by rejection, and from a permutation
def test_every_pair_is_drawn_equally_often(pairs):
    drawn = [zip(*diversity._sample_pairs(5, pairs, seed), strict=True) for seed in range(3000)]
    counts = np.unique([5 * i + j for one in drawn for i, j in one], return_counts=True)[1]
    assert len(counts) == 10
    assert stats.chisquare(counts).pvalue > 1e-3


def test_as_many_pairs_as_there_are_means_all():
    images = pictures(4)
    assert pairwise_ms_ssim(images, 6) == pairwise_ms_ssim(images, 100) == pairwise_ms_ssim(images)


@pytest.mark.parametrize("patients", [None, ["a", "a", "b", "c", "c", "c", "d"]])
def test_interval_is_the_jackknife_over_images_or_patients(patients):
    images = pictures(7)
    groups = patients or [str(i) for i in range(7)]
    values = dict(zip(itertools.combinations(range(7), 2), plain_double_loop(images), strict=True))
    left = [
        np.mean([value for pair, value in values.items() if all(groups[i] != group for i in pair)])
        for group in sorted(set(groups))
    ]
    G = len(left)
    error = np.sqrt((G - 1) / G * np.sum((left - np.mean(left)) ** 2))
    half = stats.t.ppf(0.975, G - 1) * error
    result = pairwise_ms_ssim(images, patients=patients)
    assert result.high - result.mean == pytest.approx(half, rel=1e-3)
    assert result.mean - result.low == pytest.approx(half, rel=1e-3)
    assert (result.n_groups, result.note) == (G, "")


def test_interval_covers_the_mean_of_the_source_about_as_often_as_it_says():
    # values of pairs with an effect of each image, as real pairs have: pairs taken for independent would cover half
    rng = np.random.default_rng(0)
    first, second = np.triu_indices(20, 1)
    covered = 0
    for _ in range(400):
        effect = rng.normal(0, 0.03, 20)
        tally = diversity._Tally(20, np.arange(20))
        tally.add(first, second, 0.5 + effect[first] + effect[second] + rng.normal(0, 0.03, len(first)))
        result = tally.result(0.95, 11)
        covered += result.low <= 0.5 <= result.high
    assert 0.92 <= covered / 400 <= 0.99


@pytest.mark.parametrize(
    ("kwargs", "note"),
    [
        ({"patients": ["a", "a", "b", "b"]}, "fewer than 3 groups"),
        ({"pairs": 1}, "part of every pair"),
    ],
)
def test_where_no_interval_can_be_had_the_note_says_why(kwargs, note):
    result = pairwise_ms_ssim(pictures(4), **kwargs)
    assert (result.low, result.high) == (None, None)
    assert note in result.note


def with_value(value: float) -> torch.Tensor:
    images = pictures(3)
    images[2, 0, 5, 7] = value
    return images


@pytest.mark.parametrize(
    ("images", "kwargs", "message"),
    [
        (pictures(1), {}, "at least two images, got 1"),
        ([], {}, "at least two images, got 0"),
        ([*pictures(2), pictures(1, height=80)[0]], {}, r"one shape, got \(1, 64, 64\) and \(1, 80, 64\) \(image 2\)"),
        ([pictures(1)[0], pictures(1, channels=3)[0]], {}, r"one shape, got \(1, 64, 64\) and \(3, 64, 64\)"),
        (list(pictures(2)[:, 0]), {}, r"shape \(C, H, W\), got \(64, 64\) for image 0"),
        (with_value(float("nan")), {}, "image 2 holds values that are not finite"),
        (with_value(float("inf")), {}, "image 2 holds values that are not finite"),
        (with_value(255.0), {}, r"values in \[0, 1\], got .* to 255 in image 2"),
        (with_value(-0.5), {}, r"values in \[0, 1\], got -0.5 to"),
        (pictures(2, height=47), {}, "at least 48 pixels, got 47"),
        (pictures(2), {"pairs": 0}, "whole number from 1, got 0"),
        (pictures(2), {"pairs": 2.5}, "whole number from 1, got 2.5"),
        (pictures(2), {"pairs": "some"}, "got 'some'"),
        (pictures(2), {"patients": ["a"]}, "one patient per image, got 1 patients for 2 images"),
        (pictures(2), {"max_memory": 1e-6}, "max_memory must hold two images"),
        (pictures(2), {"level": 95}, "level must lie between 0 and 1, got 95"),
    ],
)
def test_unusable_input_is_refused_in_one_line(images, kwargs, message):
    with pytest.raises(UserError, match=message) as error:
        pairwise_ms_ssim(images, **kwargs)
    assert "\n" not in str(error.value)


def test_the_file_of_a_bad_image_is_named():
    with pytest.raises(UserError, match=r"2\.png"):
        pairwise_ms_ssim(CountingSet(with_value(float("nan"))))


def test_precision_settings_of_the_caller_neither_reach_the_numbers_nor_are_changed():
    images = pictures(4)
    expected = pairwise_ms_ssim(images, device="cpu").mean
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert pairwise_ms_ssim(images, device="cpu").mean == expected
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("transform", [from_engine("pred"), lambda output: torch.stack(from_engine("pred")(output))])
def test_handler_gives_the_diversity_of_all_images_of_an_evaluation(transform):
    images = pictures(6)
    engine = Engine(lambda _, batch: [{"pred": image} for image in batch])
    handler = PairwiseMultiScaleSSIM(output_transform=transform)
    handler.attach(engine, "diversity")
    for part in (images, images[:4]):  # the second run must have forgotten the first
        metrics = engine.run(part.split(2)).metrics
        assert metrics["diversity"] == pytest.approx(pairwise_ms_ssim(part).mean, abs=1e-7)
    assert "diversity" not in getattr(engine.state, "metric_details", {})  # no pixels among the saved figures


def test_handler_refuses_images_of_two_shapes_at_once():
    engine = Engine(lambda _, batch: batch)
    engine.logger.disabled = True
    PairwiseMultiScaleSSIM().attach(engine, "diversity")
    with pytest.raises(UserError, match=r"one shape, got \(1, 64, 64\) and \(1, 80, 64\)"):
        engine.run([[*pictures(1), *pictures(1, height=80)]])
