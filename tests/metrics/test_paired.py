"""Paired metrics against piq, MONAI, torchmetrics and scikit-image; pairing, intervals, handlers and failures."""

from __future__ import annotations

import numpy as np
import piq
import pytest
import torch
from ignite.engine import Engine
from monai.engines import SupervisedEvaluator
from monai.handlers import from_engine
from monai.metrics import PSNRMetric, SSIMMetric
from monai.transforms import Lambdad
from scipy.signal import convolve2d
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch.nn import functional as F
from torchmetrics.functional.image import peak_signal_noise_ratio as torchmetrics_psnr

from medgen.errors import UserError
from medgen.losses import LocalLPIPS
from medgen.metrics.paired import (
    MDSI,
    PAIRED_METRICS,
    HaarPSI,
    MultiScaleGMSD,
    match_pairs,
    paired_quality,
)

WITHOUT_WEIGHTS = [name for name in PAIRED_METRICS if name != "lpips"]


def pictures(n: int = 4, channels: int = 1, height: int = 64, width: int = 64) -> torch.Tensor:
    rng = torch.Generator().manual_seed(n)
    coarse = torch.rand(n, channels, 8, 8, generator=rng)
    return F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)


def noised(images: torch.Tensor, scale: float = 0.05) -> torch.Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(9))
    return (images + scale * noise).clamp(0, 1)


@pytest.fixture(params=[(1, 64, 80), (3, 64, 64), (1, 400, 390)], ids=str)
def pair(request) -> tuple[torch.Tensor, torch.Tensor]:
    reference = pictures(2, *request.param)
    return noised(reference), reference


ORACLES = {
    "psnr": lambda x, y: torch.tensor(
        [peak_signal_noise_ratio(b.numpy(), a.numpy(), data_range=1) for a, b in zip(x, y, strict=True)]
    ),
    "ssim": lambda x, y: piq.ssim(x, y, downsample=False, reduction="none"),
    "ms_gmsd": lambda x, y: piq.multi_scale_gmsd(x, y, reduction="none"),
    "mdsi": lambda x, y: piq.mdsi(x, y, reduction="none"),
    "haarpsi": lambda x, y: piq.haarpsi(x, y, reduction="none"),
}


@pytest.mark.filterwarnings("ignore:The original MDSI supports only RGB")
@pytest.mark.parametrize("name", ORACLES)
def test_each_value_equals_its_oracle(name, pair):
    image, reference = pair
    expected = ORACLES[name](image.double(), reference.double())
    found = paired_quality(reference, image, [name], batch_size=1).values[name]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-9, atol=1e-9)


def test_psnr_and_ssim_equal_monai_torchmetrics_and_scikit_image(pair):
    image, reference = pair
    found = paired_quality(reference, image, ["psnr", "ssim"]).values
    ssim = [
        structural_similarity(
            y.numpy(), x.numpy(), data_range=1, channel_axis=0, gaussian_weights=True, use_sample_covariance=False
        )
        for x, y in zip(image.double(), reference.double(), strict=True)
    ]
    np.testing.assert_allclose(found["ssim"], ssim, atol=1e-6)
    # MONAI subtracts squares in float32
    np.testing.assert_allclose(found["ssim"], SSIMMetric(2)(image, reference)[:, 0], atol=1e-4)
    np.testing.assert_allclose(found["psnr"], PSNRMetric(1.0)(image, reference)[:, 0], rtol=1e-5)
    each = torchmetrics_psnr(image, reference, data_range=1.0, reduction="none", dim=(1, 2, 3))
    np.testing.assert_allclose(found["psnr"], each, rtol=1e-5)


def test_ms_ssim_equals_piq():
    reference = pictures(2, 1, 192, 176)
    found = paired_quality(reference, noised(reference), ["ms_ssim"]).values["ms_ssim"]
    expected = piq.multi_scale_ssim(noised(reference).double(), reference.double(), reduction="none")
    np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("name", WITHOUT_WEIGHTS)
@pytest.mark.parametrize("channels", [1, 3])
def test_more_noise_is_worse_in_the_stated_direction_and_range(name, channels):
    metric, reference = PAIRED_METRICS[name], pictures(3, channels)
    means = [
        paired_quality(reference, noised(reference, scale), [name]).summary[name].mean for scale in (0.01, 0.05, 0.2)
    ]
    assert means == sorted(means, reverse=metric.direction == "higher")
    assert all(min(metric.best, metric.worst) < mean < max(metric.best, metric.worst) for mean in means)


@pytest.mark.parametrize("name", WITHOUT_WEIGHTS)
@pytest.mark.parametrize("image", [pictures(1, 3), pictures(1), torch.zeros(1, 1, 64, 64), torch.ones(1, 1, 64, 64)])
def test_equal_images_have_the_best_value_black_ones_too(name, image):
    assert paired_quality(image, image, [name]).values[name] == pytest.approx(PAIRED_METRICS[name].best, abs=1e-9)


def test_all_but_mdsi_are_symmetric():
    x, y = pictures(3), noised(pictures(3), 0.2)
    forth, back = paired_quality(x, y).values, paired_quality(y, x).values
    for name in set(WITHOUT_WEIGHTS) - {"mdsi"}:
        np.testing.assert_allclose(forth[name], back[name], rtol=1e-9)
    assert np.abs(forth["mdsi"] - back["mdsi"]).max() > 1e-6


@pytest.mark.parametrize("name", WITHOUT_WEIGHTS)
def test_smallest_side_is_the_smallest(name):
    side = PAIRED_METRICS[name].min_side
    reference = torch.rand(2, 1, side, side + 1, generator=torch.Generator().manual_seed(0))
    assert np.isfinite(paired_quality(reference, noised(reference), [name]).values[name]).all()
    if side > 1:
        with pytest.raises(UserError, match=f"{name} takes images of at least {side} pixels, got"):
            paired_quality(reference[:, :, 1:], reference[:, :, 1:], [name])


def mdsi_of_grey_levels(a: np.ndarray, b: np.ndarray) -> float:
    """Nafchi et al. 2016, equations 1 to 9, written for three equal channels of 0 to 255."""
    prewitt = np.array([[1, 0, -1]] * 3) / 3

    def gradient(x):
        return np.hypot(*(convolve2d(x, kernel, mode="same") for kernel in (prewitt, prewitt.T)))

    def similarity(x, y, c):
        return (2 * x * y + c) / (x**2 + y**2 + c)

    luma = 0.2989 + 0.587 + 0.114
    ga, gb, gf = gradient(luma * a), gradient(luma * b), gradient(luma * (a + b) / 2)
    gradients = similarity(ga, gb, 140) + similarity(ga, gf, 55) - similarity(gb, gf, 55)
    grey = 0.01**2 + 0.09**2  # what the weights of H and of M leave of a grey level
    chroma = (2 * grey * a * b + 550) / (grey * (a**2 + b**2) + 550)
    root = (0.6 * gradients + 0.4 * chroma).astype(complex) ** 0.25
    return float(np.mean(np.abs(root - root.mean())) ** 0.25)


def test_mdsi_of_grey_images_is_that_of_three_equal_channels_and_what_is_documented():
    reference = pictures(3)
    image = noised(reference)
    found = paired_quality(reference, image, ["mdsi"]).values["mdsi"]
    colour = paired_quality(reference.expand(-1, 3, -1, -1), image.expand(-1, 3, -1, -1), ["mdsi"]).values["mdsi"]
    levels = zip(image[:, 0].double().numpy() * 255, reference[:, 0].double().numpy() * 255, strict=True)
    np.testing.assert_allclose(found, colour, rtol=1e-12)
    np.testing.assert_allclose(found, [mdsi_of_grey_levels(a, b) for a, b in levels], rtol=1e-6)


@pytest.fixture(scope="module")
def lpips(tmp_path_factory) -> LocalLPIPS:
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "squeezenet.pth"
    torch.save(squeezenet1_1(weights=None).state_dict(), path)
    return LocalLPIPS("squeeze", path, rescale=True)


def test_lpips_is_measured_per_image_when_its_network_is_given(lpips):
    reference = pictures(3)
    image = noised(reference)
    result = paired_quality(reference, image, lpips=lpips)
    expected = [float(lpips(x[None], y[None])) for x, y in zip(image, reference, strict=True)]
    np.testing.assert_allclose(result.values["lpips"], expected, rtol=1e-5)
    assert set(result.summary) == set(PAIRED_METRICS)


def test_infinite_psnr_is_counted_and_kept_out_of_the_mean():
    reference = pictures(5)
    image = noised(reference)
    image[1] = reference[1]
    result = paired_quality(reference, image, ["psnr", "ssim"])
    finite = np.delete(result.values["psnr"], 1)
    summary = result.summary["psnr"]
    assert np.isinf(result.values["psnr"][1])
    assert (summary.n, summary.n_infinite) == (5, 1)
    assert summary.mean == pytest.approx(finite.mean())
    assert summary.low <= summary.mean <= summary.high
    assert "1 of 5 pairs are equal" in summary.note
    assert (result.summary["ssim"].n_infinite, result.summary["ssim"].mean) == (0, result.values["ssim"].mean())


def test_equal_sets_have_no_mean_psnr_and_say_so():
    summary = paired_quality(pictures(3), pictures(3), ["psnr"]).summary["psnr"]
    assert (summary.mean, summary.std, summary.low, summary.high, summary.n_infinite) == (None, None, None, None, 3)
    assert "every pair is equal" in summary.note


def test_interval_draws_whole_patients():
    # ten copies of one patient's image are one observation, not ten
    reference = pictures(4).repeat_interleave(10, 0)
    image = (reference + torch.tensor([0.02, 0.04, 0.06, 0.08]).repeat_interleave(10)[:, None, None, None]).clamp(0, 1)
    patients = [f"P{i // 10}" for i in range(40)]
    free = paired_quality(reference, image, ["psnr"]).summary["psnr"]
    bound = paired_quality(reference, image, ["psnr"], patients=patients).summary["psnr"]
    assert bound.mean == free.mean
    assert bound.high - bound.low > 2 * (free.high - free.low)
    assert paired_quality(reference, image, ["psnr"], patients=patients).summary["psnr"] == bound


def test_one_pair_has_no_interval_and_the_note_says_why():
    summary = paired_quality(pictures(1), noised(pictures(1)), ["ssim"]).summary["ssim"]
    assert (summary.low, summary.high) == (None, None)
    assert "fewer than two" in summary.note


def test_values_depend_neither_on_batches_nor_on_neighbours_of_another_shape():
    references = [*pictures(3), *pictures(2, 3, 80, 64), *pictures(2)]
    images = [noised(image[None])[0] for image in references]
    together = paired_quality(references, images, batch_size=4).values
    for i, (reference, image) in enumerate(zip(references, images, strict=True)):
        alone = paired_quality([reference], [image]).values
        for name in WITHOUT_WEIGHTS:
            assert together[name][i] == pytest.approx(alone[name][0], rel=1e-6, abs=1e-9)


class Files(list):
    """Images that know their files."""

    def __init__(self, images: torch.Tensor, files: list[str]) -> None:
        super().__init__(image.numpy() for image in images)
        self.files = tuple(files)


def test_pairs_by_name_find_their_references_whatever_the_order():
    images = pictures(3)
    reference = Files(images, ["a.png", "b.png", "c.dcm"])
    moved = Files(noised(images).roll(1, 0), ["out/c.png", "out/a.png", "out/b.jpg"])
    result = paired_quality(reference, moved, ["psnr"], pair_by="name")
    assert result.files == ("out/c.png", "out/a.png", "out/b.jpg")
    assert result.references == ("c.dcm", "a.png", "b.png")
    straight = paired_quality(images, noised(images), ["psnr"]).values["psnr"]
    np.testing.assert_allclose(result.values["psnr"], np.roll(straight, 1))


@pytest.mark.parametrize(
    ("references", "files", "message"),
    [
        (["a.png", "b.png"], ["x/a.png"], r"no partner for b\.png \(reference\)$"),
        (["a.png"], ["a.png", "z.png"], r"no partner for z\.png \(image\)$"),
        ([f"{i}.png" for i in range(9)], ["0.png"], r"no partner for 1\.png .* 5\.png \(reference\) and 3 more"),
        (["p/a.png", "q/a.png"], ["a.png"], r"reference names must differ to be paired, got p/a\.png and q/a\.png"),
        (["a.png"], ["a.png", "a.jpg"], r"image names must differ"),
    ],
)
def test_names_that_do_not_pair_are_listed(references, files, message):
    with pytest.raises(UserError, match=message):
        match_pairs(references, files)


def broken(value: float) -> torch.Tensor:
    images = pictures(2)
    images[1, 0, 3, 3] = value
    return images


@pytest.mark.parametrize(
    ("reference", "images", "kwargs", "message"),
    [
        (pictures(3), pictures(2), {}, "3 references and 2 images; pair by name, or compare the sets by a distance"),
        ([], [], {}, "nothing to compare"),
        (pictures(2), pictures(2, 1, 64, 80), {}, r"one shape, got \(1, 64, 80\) and \(1, 64, 64\) for image 0"),
        (pictures(2), pictures(2, 3), {}, "one shape"),
        (pictures(2, 2), pictures(2, 2), {}, "expected 1 or 3 channels, got 2 in image 0"),
        (pictures(2), broken(float("nan")), {}, "image 1 holds values that are not finite"),
        (broken(float("nan")), pictures(2), {}, "image 1 holds values that are not finite"),
        (pictures(2), broken(255.0), {}, r"values in \[0, 1\], got .* to 255 in image 1"),
        (pictures(2), pictures(2), {"metrics": ["fid"]}, "metrics must be of psnr, .*, got fid"),
        (pictures(2), pictures(2), {"metrics": []}, "metrics must be of .*, got none"),
        (pictures(2), pictures(2), {"metrics": ["lpips"]}, "lpips needs a network with weights"),
        (pictures(2), pictures(2), {"pair_by": "name"}, "sets that know their files"),
        (pictures(2), pictures(2), {"pair_by": "chance"}, "got 'chance'"),
        (pictures(2), pictures(2), {"patients": ["a"]}, "one patient per reference, got 1 for 2"),
        (pictures(2), pictures(2), {"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_unusable_input_is_refused_in_one_line(reference, images, kwargs, message):
    with pytest.raises(UserError, match=message) as error:
        paired_quality(reference, images, **kwargs)
    assert "\n" not in str(error.value)


HANDLERS = {"ms_gmsd": MultiScaleGMSD, "mdsi": MDSI, "haarpsi": HaarPSI}


def test_handlers_give_the_means_and_details_in_an_evaluator():
    reference = pictures(5)
    image = noised(reference)
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=[{"image": x, "label": y} for x, y in zip(image.split(2), reference.split(2), strict=True)],
        network=torch.nn.Identity(),
        postprocessing=Lambdad("pred", lambda x: x.clamp(0, 1)),
        key_val_metric={"ms_gmsd": MultiScaleGMSD(from_engine(["pred", "label"]))},
        additional_metrics={
            "mdsi": MDSI(output_transform=from_engine(["pred", "label"])),
            "haarpsi": HaarPSI(output_transform=from_engine(["pred", "label"])),
        },
    )
    evaluator.run()
    expected = paired_quality(reference, image, list(HANDLERS)).values
    for name in HANDLERS:
        assert evaluator.state.metrics[name] == pytest.approx(expected[name].mean(), rel=1e-6)
        details = evaluator.state.metric_details[name][:, 0]
        np.testing.assert_allclose(details, expected[name], rtol=1e-6)


@pytest.mark.parametrize("name", HANDLERS)
@pytest.mark.parametrize(
    ("prediction", "message"),
    [(pictures(2) * 2, "got .* in the prediction; scale or clip"), (broken(np.nan), "finite")],
)
def test_handlers_refuse_predictions_that_were_not_clipped(name, prediction, message):
    engine = Engine(lambda _, batch: batch)
    engine.logger.disabled = True
    HANDLERS[name]().attach(engine, name)
    with pytest.raises(UserError, match=message):
        engine.run([(prediction, pictures(2))])
