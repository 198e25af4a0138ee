"""Fréchet distance against torchmetrics, torch-fidelity and SciPy's matrix root; streamed moments; refusals."""

from __future__ import annotations

import subprocess
import sys
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance

from medgen.errors import UserError
from medgen.metrics.frechet import FeatureMoments, frechet_distance, small_sample_note, trace_sqrt_product

CASES = {
    "more images than features": (400, 300, 20, 1.0),
    "fewer images than features": (30, 25, 60, 1.0),
    "fewer in one set": (25, 200, 60, 1.0),
    "as many as features": (60, 60, 60, 1.0),
    "features in units from 1e-4 to 1e4": (400, 300, 20, 10.0 ** np.linspace(-4, 4, 20)),
    "fewer images and mixed units": (30, 25, 60, 10.0 ** np.linspace(-4, 4, 60)),
}


def two_sets(n: int, m: int, d: int, unit=1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(d, d)) / np.sqrt(d) + np.eye(d)
    return (rng.normal(size=(n, d)) @ mixing + 1) * unit, (rng.normal(size=(m, d)) * 1.3 + 0.7) * unit


def by_torchmetrics(a: np.ndarray, b: np.ndarray) -> float:
    features = torch.nn.Identity()
    features.num_features = a.shape[1]  # torchmetrics would else try it on an image
    metric = FrechetInceptionDistance(feature=features)
    metric.update(torch.from_numpy(a), real=True)
    metric.update(torch.from_numpy(b), real=False)
    return float(metric.compute())


def by_torch_fidelity(a: np.ndarray, b: np.ndarray) -> float:
    statistics = [fid_features_to_statistics(torch.from_numpy(features)) for features in (a, b)]
    return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


def by_matrix_root(a: np.ndarray, b: np.ndarray) -> float:
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SciPy says so where the matrix is singular
        root = sqrtm(s1)
        middle = sqrtm(root @ s2 @ root)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1 + s2) - 2 * np.trace(middle).real)


@pytest.mark.parametrize("oracle", [by_torchmetrics, by_torch_fidelity, by_matrix_root])
@pytest.mark.parametrize("case", CASES)
def test_distance_equals_independent_implementations(case, oracle):
    a, b = two_sets(*CASES[case])
    expected = pytest.approx(oracle(a, b), rel=1e-6)
    assert frechet_distance(a, b) == expected
    assert frechet_distance(FeatureMoments.from_features(a), FeatureMoments.from_features(b)) == expected
    assert frechet_distance(FeatureMoments.from_features(a), b) == expected


@pytest.mark.parametrize("case", CASES)
def test_order_of_the_sets_does_not_matter(case):
    a, b = two_sets(*CASES[case])
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    moments = [FeatureMoments.from_features(features) for features in (a, b)]
    assert frechet_distance(*moments) == pytest.approx(frechet_distance(*moments[::-1]), rel=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_equal_sets_are_no_distance_apart_and_never_less(case):
    a, _ = two_sets(*CASES[case])
    variance = a.var(axis=0).sum()
    shuffled = a[np.random.default_rng(1).permutation(len(a))]
    for other in (a, shuffled, FeatureMoments.from_features(a)):
        assert 0 <= frechet_distance(a, other) < 1e-12 * variance


@pytest.mark.parametrize("case", CASES)
def test_shifting_one_set_adds_the_squared_shift(case):
    a, _ = two_sets(*CASES[case])
    shift = np.linspace(1, 2, a.shape[1]) * a.std(axis=0)
    assert frechet_distance(a, a + shift) == pytest.approx((shift**2).sum(), rel=1e-9)


def test_independent_features_have_the_closed_form():
    s1, s2 = np.geomspace(1e-3, 1e3, 30), np.geomspace(1e2, 1e-2, 30)
    exact = np.sqrt(s1 * s2).sum()
    assert trace_sqrt_product(np.diag(s1), np.diag(s2)) == pytest.approx(exact, rel=1e-9)
    s1[::3], s2[1::5] = 0, 0  # singular, each in its own directions
    assert trace_sqrt_product(np.diag(s1), np.diag(s2)) == pytest.approx(np.sqrt(s1 * s2).sum(), rel=1e-9)
    assert trace_sqrt_product(np.diag(s1), np.zeros((30, 30))) == 0


@pytest.mark.parametrize(("n", "m"), [(25, 200), (200, 25), (30, 25), (59, 300), (60, 60)])
def test_trace_of_singular_covariances_is_as_exact_as_from_the_images_themselves(n, m):
    a, b = two_sets(n, m, 60)
    roots = [np.linalg.qr(x - x.mean(axis=0))[1] / np.sqrt(len(x) - 1) for x in (a, b)]  # no covariance is formed
    expected = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    found = trace_sqrt_product(np.cov(a, rowvar=False), np.cov(b, rowvar=False))
    assert found == pytest.approx(expected, rel=1e-12)


def test_constant_and_repeated_features_are_no_obstacle():
    a, b = two_sets(200, 150, 10)
    wide = [np.hstack([x, x[:, :4], np.full((len(x), 2), 3.0)]) for x in (a, b)]
    assert frechet_distance(*wide) == pytest.approx(by_torch_fidelity(*wide), rel=1e-6)


def test_copies_of_an_image_in_both_sets_are_no_distance_apart():
    same = np.full((5, 3), 2.5)
    assert frechet_distance(same, same) == 0
    assert frechet_distance(same, same + 1) == pytest.approx(3)


def test_counts_equal_repeated_rows():
    rng = np.random.default_rng(2)
    for n, m, d in ((50, 40, 8), (12, 14, 40)):
        a, b = two_sets(n, m, d)
        a_counts, b_counts = rng.integers(0, 4, n), rng.integers(0, 4, m)
        expected = frechet_distance(a.repeat(a_counts, axis=0), b.repeat(b_counts, axis=0))
        assert frechet_distance(a, b, a_counts=a_counts, b_counts=b_counts) == pytest.approx(expected, rel=1e-9)


# -- moments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_streamed_moments_equal_those_of_all_at_once(offset):
    x = two_sets(3000, 2, 7)[0] + offset  # more than one chunk
    streamed, start = FeatureMoments(7), 0
    for size in (1, 1, 0, 2, 500, 3, 2493):
        streamed.update(x[start : start + size])
        start += size
    for moments in (streamed, FeatureMoments.from_features(x)):
        assert moments.n == 3000
        np.testing.assert_allclose(moments.mean, x.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(moments.covariance, np.cov(x - offset, rowvar=False), rtol=1e-8, atol=1e-9)
        assert np.array_equal(moments.covariance, moments.covariance.T)


def test_moments_merge_in_any_order_and_leave_the_other_alone():
    x = two_sets(100, 2, 5)[0] + 50
    parts = [x[:10], x[10:11], x[11:]]
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        merged = FeatureMoments(5)
        for number in order:
            part = FeatureMoments.from_features(parts[number])
            merged.merge(part)
            assert part.n == len(parts[number])
        merged.merge(FeatureMoments(5))
        assert merged.n == 100
        np.testing.assert_allclose(merged.mean, x.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(merged.covariance, np.cov(x, rowvar=False), rtol=1e-10)


def test_float32_and_whole_numbers_are_summed_in_double():
    x = two_sets(500, 2, 4)[0].astype(np.float32)
    np.testing.assert_allclose(
        FeatureMoments.from_features(x).covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-12
    )
    counts = np.arange(12, dtype=np.uint8).reshape(4, 3) * 20
    np.testing.assert_allclose(FeatureMoments.from_features(counts).covariance, np.cov(counts, rowvar=False))


def test_saved_moments_come_back_and_can_be_added_to(tmp_path):
    x, more = two_sets(40, 30, 6)
    moments = FeatureMoments.from_features(x, protocol="inception", settings={"size": 299, "antialias": True})
    moments.save(tmp_path / "deeper" / "real.npz")
    loaded = FeatureMoments.load(tmp_path / "deeper" / "real.npz")
    assert (loaded.n, loaded.protocol, loaded.settings) == (40, "inception", '{"antialias": true, "size": 299}')
    loaded.update(more)
    np.testing.assert_allclose(loaded.covariance, np.cov(np.vstack([x, more]), rowvar=False), rtol=1e-10)
    assert [path.name for path in (tmp_path / "deeper").iterdir()] == ["real.npz"]


def test_moments_that_threads_save_at_once_are_whole(tmp_path, monkeypatch):
    together, savez = Barrier(3), np.savez
    monkeypatch.setattr(np, "savez", lambda *args, **arrays: (together.wait(timeout=60), savez(*args, **arrays)))
    moments = FeatureMoments.from_features(two_sets(40, 30, 6)[0])

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(moments.save, [tmp_path / "real.npz"] * 3))

    assert FeatureMoments.load(tmp_path / "real.npz").n == 40
    assert [path.name for path in tmp_path.iterdir()] == ["real.npz"]


# -- refusals and notes -----------------------------------------------------------------------------------------------


def test_files_that_are_no_moments_are_refused(tmp_path):
    path = tmp_path / "moments.npz"
    with pytest.raises(UserError, match=r"must be an \.npz file of feature moments"):
        FeatureMoments.load(path)
    path.write_bytes(b"PK not a zip")
    with pytest.raises(UserError, match=r"must be an \.npz file of feature moments"):
        FeatureMoments.load(path)
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(UserError, match=r"must be an \.npz file of feature moments"):
        FeatureMoments.load(path)
    np.savez(path, n=3, mean=np.zeros(3), scatter=np.full((3, 3), np.nan), protocol="", settings="")
    with pytest.raises(UserError, match="do not belong together"):
        FeatureMoments.load(path)
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(UserError, match=r"must be an \.npz file of feature moments"):
        FeatureMoments.load(tmp_path / "array.npy")


def test_pickled_objects_are_not_loaded(tmp_path):
    evil = np.empty((), dtype=object)
    evil[()] = {"a": 1}
    np.savez(tmp_path / "evil.npz", n=1, mean=evil, scatter=evil, protocol="", settings="")
    with pytest.raises(UserError, match="allow_pickle=False"):
        FeatureMoments.load(tmp_path / "evil.npz")


def test_small_files_do_not_become_large_in_memory(tmp_path):
    arrays = {"n": 3, "mean": np.zeros(500), "scatter": np.zeros((500, 500)), "protocol": "", "settings": ""}
    np.savez_compressed(tmp_path / "bomb.npz", **arrays)
    with pytest.raises(UserError, match=r"bomb\.npz must hold its arrays uncompressed, got n compressed"):
        FeatureMoments.load(tmp_path / "bomb.npz")
    FeatureMoments.from_features(np.eye(500)).save(tmp_path / "saved.npz")
    with zipfile.ZipFile(tmp_path / "saved.npz") as saved, zipfile.ZipFile(tmp_path / "lies.npz", "w") as lies:
        assert {entry.compress_type for entry in saved.infolist()} == {zipfile.ZIP_STORED}
        for name in saved.namelist():
            lies.writestr(name, saved.read(name).replace(b"(500, 500)", b"(500, 999)"))
    with pytest.raises(UserError, match=r"must hold the 3,996,128 bytes that scatter has by its header, got 2,000,128"):
        FeatureMoments.load(tmp_path / "lies.npz")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("d", [3, 3000])
def test_features_that_are_not_finite_are_named_by_row(value, d):
    bad = np.ones((1500, d), dtype=np.float32)
    bad[[1027, 1300], 1] = value
    with pytest.raises(UserError, match=r"NaN or infinity in row 1027, 1300 \(counted from 0\)"):
        frechet_distance(np.ones((4, d)), bad)


def test_sets_that_do_not_compare_are_refused():
    with pytest.raises(UserError, match="same number of features, got 3 and 4"):
        frechet_distance(np.ones((5, 3)), np.ones((5, 4)))
    with pytest.raises(UserError, match="at least 2 images in each, got 1"):
        frechet_distance(np.ones((5, 3)), np.ones((1, 3)))
    with pytest.raises(UserError, match="at least 2 images in each, got 0"):
        frechet_distance(FeatureMoments(3), np.ones((5, 3)))
    with pytest.raises(UserError, match="table of numbers"):
        frechet_distance(np.ones(5), np.ones((5, 3)))
    with pytest.raises(UserError, match="must have 3 columns, got 4"):
        FeatureMoments(3).update(np.ones((2, 4)))
    with pytest.raises(UserError, match="5 whole numbers"):
        frechet_distance(np.ones((5, 3)), np.ones((5, 3)), a_counts=[1, 2])


def test_moments_of_different_protocols_are_refused():
    x = two_sets(10, 2, 3)[0]
    inception = FeatureMoments.from_features(x, protocol="inception", settings={"size": 299})
    with pytest.raises(UserError, match="'inception' and 'swav'"):
        frechet_distance(inception, FeatureMoments.from_features(x, protocol="swav"))
    with pytest.raises(UserError, match="size 299 and 256"):
        inception.merge(FeatureMoments.from_features(x, protocol="inception", settings={"size": 256}))
    assert frechet_distance(inception, FeatureMoments.from_features(x)) < 1e-12  # nothing said, nothing refused


def test_note_on_small_samples():
    assert "500 images are too few for 2048 features" in small_sample_note(500, 2048)
    assert "biased upwards by about 10%" in small_sample_note(2000, 400)
    assert small_sample_note(50_000, 2048) == ""


def test_note_states_the_bias_that_equal_sets_show():
    rng = np.random.default_rng(3)
    d, n = 40, 400
    values = [frechet_distance(rng.normal(size=(n, d)), rng.normal(size=(n, d))) for _ in range(20)]
    assert np.mean(values) / d == pytest.approx((d / 2 + 2) / n, rel=0.1)


def test_distances_import_neither_torch_nor_monai():
    code = (
        "import sys, medgen.metrics.frechet, medgen.metrics.kernel, medgen.metrics.prdc, medgen.metrics.intervals;"
        "sys.exit(bool({'torch', 'monai'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
