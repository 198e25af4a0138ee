"""Generated images against real ones: which figures there are, and that they are those of the metrics themselves."""

from __future__ import annotations

import functools
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from medgen.errors import UserError
from medgen.handlers import GeneratorMetrics
from medgen.handlers.generator_metrics import _radiomic_kernel_distance
from medgen.metrics import frd_score, kernel_distance, paired_quality, pairwise_ms_ssim
from medgen.metrics.intervals import matched_distance, real_baseline
from medgen.metrics.radiomics import RadiomicsExtractor
from medgen.metrics.sliced_wasserstein import sliced_wasserstein_distance


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDGEN_CACHE", str(tmp_path / "cache"))


def textures(count: int, side: int, seed: int) -> torch.Tensor:
    """8-bit images (N, 1, S, S) with structure at several scales."""
    rng = np.random.default_rng(seed)
    found = np.full((count, 1, side, side), 0.5)
    for scale in (1, 4, side // 4):
        noise = rng.normal(0, 0.08, (count, 1, side // scale, side // scale))
        found += noise.repeat(scale, axis=2).repeat(scale, axis=3)
    return torch.from_numpy(np.round(np.clip(found, 0, 1) * 255) / 255).float()


def blurred(images: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(images, 5, stride=1, padding=2, count_include_pad=False)


def measure(handler, pred, image, patients=None, labels=None, batch_size=3):
    """Figures of an evaluation of these images."""
    engine = SimpleNamespace(state=SimpleNamespace(metrics={}, output=[], batch=[]))
    handler.start(engine)
    for start in range(0, len(pred), batch_size):
        places = range(start, min(start + batch_size, len(pred)))
        engine.state.output = [{"pred": pred[i], "image": image[i]} for i in places]
        engine.state.batch = [
            {"patient": str(i) if patients is None else patients[i], "label": None if labels is None else labels[i]}
            for i in places
        ]
        handler.collect(engine)
    handler.measure(engine)
    return engine.state.metrics


def radiomics_of(*sets):
    """Features of each set of images, and their names."""
    extractor = RadiomicsExtractor("frd_v1")
    tables = [np.stack([extractor.on_image(image.numpy()) for image in images]) for images in sets]
    return *tables, extractor.feature_names


def frd(real, samples):
    *tables, names = radiomics_of(real, samples)
    return frd_score(*tables, "frd_v1", names)


def kid(real, samples, **patients):
    *tables, names = radiomics_of(real, samples)
    return scaled_kernel_distance(*tables, names, **patients)


def scaled_kernel_distance(x, y, names, **patients):
    """By mean and deviation of both sets, in double precision."""
    both = np.concatenate([x, y])
    kept = np.ptp(both.astype(np.float32), 0) > 0
    scaled = np.arcsinh((both - both.mean(0)) / np.where(kept, both.std(0), 1))[:, kept]
    return kernel_distance(scaled[: len(x)], scaled[len(x) :], **patients)


def test_figures_are_those_of_the_metrics_themselves(tmp_path):
    pred, image = textures(8, 64, 0) ** 1.3, textures(8, 64, 1)
    pred = (pred * 255).round() / 255

    found = measure(GeneratorMetrics(tmp_path / "picture.png"), pred, image)

    assert found["n_samples"] == found["n_test"] == 8
    assert found["resolution"] == 64
    assert found["ms_ssim_samples"] == pytest.approx(pairwise_ms_ssim(pred).mean, abs=1e-6)
    assert found["ms_ssim_test"] == pytest.approx(pairwise_ms_ssim(image).mean, abs=1e-6)
    assert found["frd"] == pytest.approx(frd(image, pred), rel=1e-6)
    assert found["kid"] == pytest.approx(kid(image, pred), rel=1e-4)
    swd = sliced_wasserstein_distance(image.numpy(), pred.numpy())
    assert {side: found[f"swd_{side}"] for side in (64, 32, 16)} == pytest.approx(swd, rel=1e-4)
    assert found["swd"] == pytest.approx(np.mean(list(swd.values())), rel=1e-4)
    for name in ("frd", "kid", "swd", "swd_64", "swd_32", "swd_16"):
        assert {f"{name}_equal_n", f"{name}_real"} <= set(found)
    assert not any(name.startswith("unpaired") for name in found)
    assert np.asarray(Image.open(tmp_path / "picture.png")).shape == (2 * 64 + 2, 8 * 64 + 7 * 2)


def test_images_like_the_real_ones_are_as_near_as_those_are_to_each_other(tmp_path):
    real, alike, other = textures(24, 16, 0), textures(24, 16, 1), blurred(textures(24, 16, 2))

    near = measure(GeneratorMetrics(tmp_path / "near.png"), alike, real)
    far = measure(GeneratorMetrics(tmp_path / "far.png"), other, real)

    for name in ("frd", "swd"):
        assert near[f"{name}_real"] == far[f"{name}_real"]
        assert near[f"{name}_equal_n"] == pytest.approx(near[f"{name}_real"], rel=0.3)
        assert far[f"{name}_equal_n"] > 1.2 * near[f"{name}_equal_n"]
    # this one has no bias to share: all images may be compared, and alike ones are at 0
    assert abs(near["kid"]) < 0.1 * far["kid"]
    assert abs(near["kid_real"]) < 0.1 * far["kid"]


def test_real_images_are_averaged_to_the_size_of_the_generated_ones(tmp_path):
    # each pixel of the small image becomes 4×4 of which half are one level brighter, and half one darker
    pred, averaged = textures(4, 16, 0), textures(4, 16, 1).clamp(1 / 255, 254 / 255)
    checkers = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(32, 32) / 255
    image = averaged.repeat_interleave(4, 2).repeat_interleave(4, 3) + checkers

    found = measure(GeneratorMetrics(tmp_path / "a.png"), pred, image)
    expected = measure(GeneratorMetrics(tmp_path / "b.png"), pred, averaged)

    assert found == expected
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_each_class_is_measured_alone_too(tmp_path, caplog):
    pred, image = textures(13, 16, 0), textures(13, 16, 1)
    labels = [0, 1] * 6 + [2]

    with caplog.at_level(logging.WARNING):
        found = measure(GeneratorMetrics(tmp_path / "picture.png", num_classes=3), pred, image, labels=labels)
    alone = measure(GeneratorMetrics(tmp_path / "alone.png"), pred[1:12:2], image[1:12:2])

    assert found["n_test_class1"] == 6
    assert found["frd_class1"] == pytest.approx(alone["frd"])
    # patches are where an image's place in the whole set has them, so not those of the class alone
    assert found["swd_class1"] == pytest.approx(alone["swd"], rel=0.3)
    assert {name.removesuffix("_class0") for name in found if name.endswith("_class0")} == set(alone) - {"resolution"}
    assert "class 2 is not measured alone: it has 1 images" in caplog.text
    assert not any(name.endswith("_class2") for name in found)


def test_pixels_are_held_once(tmp_path):
    seen = []

    class Watching(GeneratorMetrics):
        def show(self, sets, places):
            seen.append((sets, dict(self._pixels)))

        def diversity(self, sets):
            seen.append((sets, dict(self._pixels)))
            return {}

    measure(Watching(tmp_path / "picture.png"), textures(6, 64, 0), textures(6, 64, 1))

    (shown, _), (compared, _) = seen
    assert all(compared[role].pixels is of.pixels for role, of in shown.items())
    assert [left for _, left in seen] == [{}, {}]  # of the single images none is left beside them


def test_kernel_distance_compares_no_images_of_one_patient(tmp_path, caplog):
    pred, image = textures(8, 16, 0), textures(4, 16, 1).repeat_interleave(2, 0)
    patients = list("aabbccdd")

    found = measure(GeneratorMetrics(tmp_path / "p.png"), pred, image, patients=patients)

    assert found["kid"] == pytest.approx(kid(image, pred, x_patients=patients), rel=1e-4)
    assert found["kid"] < kid(image, pred)
    *tables, names = radiomics_of(image, pred)
    statistic = functools.partial(scaled_kernel_distance, names=names)
    expected = {
        by_patient: {
            "kid_real": real_baseline(tables[0], patients, statistic, by_patient=by_patient).mean,
            "kid_equal_n": matched_distance(
                *tables, statistic, reference_patients=patients, by_patient=by_patient
            ).mean,
        }
        for by_patient in (True, False)
    }
    for name, value in expected[True].items():
        assert found[name] == pytest.approx(value, rel=1e-4)
        assert value < expected[False][name] - 0.1
    with caplog.at_level(logging.WARNING):
        found = measure(GeneratorMetrics(tmp_path / "p.png"), pred, textures(8, 16, 2), patients=list("aaaaaaaa"))
    assert "kid is left out: expected images of at least 2 patients, got 1 patient" in caplog.text
    assert "frd" in found


@pytest.mark.parametrize("n", [4, 20])
def test_kernel_distance_of_sets_that_could_change_places_is_0_on_average(n):
    rng = np.random.default_rng(n)
    mixing = rng.normal(size=(4, 12))
    names = [f"feature {i}" for i in range(12)]
    sets = [[np.exp(rng.normal(size=(n, 4)) @ mixing) for _ in range(2)] for _ in range(150)]

    values = [_radiomic_kernel_distance(*pair, names) for pair in sets]

    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))


def test_real_images_are_paired_with_those_of_other_patients(tmp_path, caplog):
    image, patients = textures(6, 16, 1), list("aabbca")
    handler = GeneratorMetrics(tmp_path / "p.png", num_classes=2, source_metrics=True)

    with caplog.at_level(logging.WARNING):
        found = measure(handler, textures(6, 16, 0), image, patients, labels=[0, 0, 1, 1, 1, 0])

    def stretched(images):
        low, high = (end(images, dim=(1, 2, 3), keepdim=True) for end in (torch.amin, torch.amax))
        return (images - low) / (high - low)

    image = stretched(image)
    expected = paired_quality(image, image[[2, 2, 4, 4, 5, 2]], ["psnr", "ssim"]).summary
    assert found["unpaired_psnr_real"] == pytest.approx(expected["psnr"].mean, rel=1e-4)
    assert found["unpaired_ssim_real"] == pytest.approx(expected["ssim"].mean, rel=1e-4)
    expected = paired_quality(image[2:5], image[[4, 4, 2]], ["psnr"]).summary
    assert found["unpaired_psnr_real_class1"] == pytest.approx(expected["psnr"].mean, rel=1e-4)
    assert "unpaired_psnr_class0" in found
    assert "unpaired_psnr_real_class0" not in found
    assert "unpaired figures of real images are left out: all images are of one patient" in caplog.text


def test_figures_of_the_source_are_of_images_that_have_nothing_to_do_with_each_other(tmp_path, caplog):
    pred, image = textures(5, 32, 0) * 0.5, textures(5, 32, 1)
    image = torch.cat([image, 1 - image, image**2], 1)  # colour
    pred = torch.cat([pred, pred, 1 - pred], 1)
    pred[4] = 0.5  # collapsed: it has no range to be stretched to

    found = measure(GeneratorMetrics(tmp_path / "p.png", source_metrics=True), pred, image)

    def stretched(images):
        levels = (images * 255).round()
        low, high = (end(levels, dim=(1, 2, 3), keepdim=True) for end in (torch.amin, torch.amax))
        return (levels - low) / (high - low).clamp(min=1)

    names = ["psnr", "ssim", "ms_gmsd", "mdsi", "haarpsi"]
    for suffix, other in (("", stretched(pred)), ("_real", stretched(image.roll(-1, 0)))):
        expected = paired_quality(stretched(image), other, names).summary
        for name in names:
            assert found[f"unpaired_{name}{suffix}"] == pytest.approx(expected[name].mean, rel=1e-4), name
    psnr = -10 * (stretched(pred) - stretched(image)).double().square().mean((1, 2, 3)).log10().mean()
    assert found["unpaired_psnr"] == pytest.approx(float(psnr), rel=1e-5)
    with caplog.at_level(logging.WARNING):
        small = measure(
            GeneratorMetrics(tmp_path / "p.png", source_metrics=True), pred[..., :16, :16], image[..., :16, :16]
        )
    assert "unpaired MS-GMSD left out: images of 16 pixels are too small" in caplog.text
    assert {name for name in small if "unpaired" in name and "real" not in name} == {
        f"unpaired_{name}" for name in names if name != "ms_gmsd"
    }


def test_halves_share_no_patient(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        found = measure(GeneratorMetrics(tmp_path / "p.png"), textures(6, 16, 0), textures(6, 16, 1), list("aabbcc"))

    assert "swd_real" not in found
    assert "swd at equal n is left out: halves take at least 4 patients" in caplog.text


def test_small_images_are_measured_as_far_as_they_can_be(tmp_path, caplog):
    pred, image = textures(6, 4, 0), textures(6, 4, 1)

    with caplog.at_level(logging.WARNING):
        found = measure(GeneratorMetrics(tmp_path / "picture.png"), pred, image)

    assert "MS-SSIM is left out: MS-SSIM takes images of at least 48 pixels, got 4" in caplog.text
    assert found["swd"] == found["swd_4"]
    assert not any(name.startswith("ms_ssim") for name in found)


def test_a_collapsed_generator_has_no_radiomics(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        found = measure(GeneratorMetrics(tmp_path / "p.png"), torch.full((6, 1, 16, 16), 0.5), textures(6, 16, 1))

    assert "frd and kid are left out: none of the 6 images gives frd_v1 features" in caplog.text
    assert "frd" not in found
    assert found["swd"] > 0


def test_one_image_is_no_set(tmp_path):
    with pytest.raises(UserError, match="at least 2 real images, got 1; name a --split with more"):
        measure(GeneratorMetrics(tmp_path / "picture.png"), textures(1, 32, 0), textures(1, 32, 1))


def test_picture_shows_images_from_the_whole_set(tmp_path):
    # of a list in the order of its classes each is seen
    pred = torch.arange(15.0)[:, None, None, None].expand(15, 1, 4, 4) / 255

    measure(GeneratorMetrics(tmp_path / "picture.png"), pred, textures(15, 4, 1))

    picture = np.asarray(Image.open(tmp_path / "picture.png"))
    assert picture[0, ::6].tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
