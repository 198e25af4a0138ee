"""``medgen report`` end to end, on small images made here."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image
from scipy.ndimage import gaussian_filter
from typer.testing import CliRunner

from medgen import cli
from medgen.data.image_set import ImageSet
from medgen.metrics.feature_set import FeatureSet
from medgen.metrics.frechet import frechet_distance
from medgen.metrics.intervals import draw_counts
from medgen.report.files import make_report
from medgen.report.measure import _halves, _patch_distances, measure

SIDE = 64
# brightness and contrast: as many features as make a Fréchet distance of a few images meaningful
TWO_FEATURES = """
import torch

class BrightnessContrast(torch.nn.Module):
    def forward(self, x):
        return torch.stack([x.mean((1, 2, 3)), x.std((1, 2, 3))], 1)
"""
PROTOCOL = "module:two_features:BrightnessContrast"


@pytest.fixture(autouse=True)
def _own_places(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "two_features.py").write_text(TWO_FEATURES)
    monkeypatch.syspath_prepend(tmp_path / "code")


def texture(seed: int, channels: int = 1) -> np.ndarray:
    """Blobs of random size and contrast, uint8 (H, W) or (H, W, 3)."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((SIDE, SIDE, channels))
    blobs = gaussian_filter(noise, (rng.uniform(1, 3), rng.uniform(1, 3), 0))
    blobs = 120 + rng.uniform(25, 45) * blobs / blobs.std()
    return np.clip(blobs, 0, 255).astype(np.uint8).squeeze()


def folder_of(path: Path, seeds, change=lambda pixels: pixels, **options) -> Path:
    path.mkdir()
    for seed in seeds:
        Image.fromarray(change(texture(seed, **options))).save(path / f"{seed:08d}_000.png")
    return path


def report(*arguments) -> object:
    return CliRunner().invoke(cli.app, ["report", "--num_workers", "0", *map(str, arguments)])


def figures_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def rows_of(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


class Page(HTMLParser):
    """Tags, and everything that could make a browser fetch something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.addresses, self.images, self.text = [], [], 0, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]

    def handle_data(self, data):
        self.text.append(data)


# ---------------------------------------------------------------------------------------------------------------------
# what it finds


def test_worse_images_are_farther_away_and_the_baseline_stands_beside_each_number(tmp_path):
    reference = folder_of(tmp_path / "reference", range(40))
    good = folder_of(tmp_path / "good", range(40, 80))
    bad = folder_of(tmp_path / "bad", range(40, 80), lambda p: gaussian_filter(p, 2) // 2 + 100)

    results = [report(samples, reference, "--output_dir", tmp_path / f"of_{samples.name}") for samples in (good, bad)]

    assert [result.exit_code for result in results] == [0, 0], results[-1].output
    near, far = figures_of(tmp_path / "of_good"), figures_of(tmp_path / "of_bad")
    for name in ("frd", "kid_frd", "frd_full", "kid_frd_full"):
        assert near[name] < far[name], name
        assert far[f"{name}_low"] <= far[name] <= far[f"{name}_high"]
    for name in ("frd", "frd_full"):
        # of equal n: real images as samples have the baseline's distance, the others do not
        assert near[f"{name}_equal_n"] == pytest.approx(near[f"{name}_equal_n_real"], abs=0.4)
        assert far[f"{name}_equal_n"] > far[f"{name}_equal_n_real"] + 1
    assert far["precision_frd"] < near["precision_frd"]
    assert near["n"] == near["n_samples"] == near["n_reference"] == 40
    assert "real against real" in results[0].output
    assert "mostly bias" in results[0].output  # 40 images, hundreds of features


def test_every_number_of_the_page_and_of_both_json_files_is_finite(tmp_path):
    """PSNR of equal images is infinite, a reference without spread has no scale: JSON knows neither."""
    reference, samples = folder_of(tmp_path / "a", range(12)), folder_of(tmp_path / "b", range(12))

    result = report(samples, reference, "--output_dir", tmp_path / "out", "--paired", "--pairs", "all")

    assert result.exit_code == 0, result.output
    for name in ("metrics.json", "report.json"):
        text = (tmp_path / "out" / name).read_text()
        assert "NaN" not in text
        assert "Infinity" not in text
    page = "".join(Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8")).text)
    assert not re.search(r"\b(nan|inf)\b", page)
    assert "the logarithm of their distance is infinite" in page
    assert "the logarithm of their distance is infinite" in result.output


def test_paired_quality_compares_images_of_one_name(tmp_path):
    reference = folder_of(tmp_path / "reference", range(6))
    samples = folder_of(tmp_path / "samples", range(6), lambda p: np.clip(p.astype(int) + 10, 0, 255).astype(np.uint8))

    result = report(samples, reference, "--output_dir", tmp_path / "out", "--paired", "--protocol", PROTOCOL)

    assert result.exit_code == 0, result.output
    rows = rows_of(tmp_path / "out" / "paired.csv")
    assert [row["sample"] for row in rows] == [f"{seed:08d}_000.png" for seed in range(6)]
    for seed, row in enumerate(rows):
        real = texture(seed).astype(int)
        error = np.mean((np.clip(real + 10, 0, 255) - real) ** 2) / 255**2
        assert float(row["psnr"]) == pytest.approx(-10 * np.log10(error), abs=1e-4)
    assert figures_of(tmp_path / "out")["psnr"] == pytest.approx(np.mean([float(row["psnr"]) for row in rows]))


def test_a_copy_of_a_training_image_of_the_datalist_is_found(tmp_path):
    data = folder_of(tmp_path / "data", range(60))
    items = [{"image": f"{seed:08d}_000.png", "patient": f"p{seed}"} for seed in range(60)]
    datalist = data / "datalist.json"
    datalist.write_text(json.dumps({"name": "made here", "training": items[:30], "test": items[30:]}))
    samples = folder_of(tmp_path / "samples", range(100, 110))
    Image.fromarray(texture(7)).save(samples / "copy.png")

    result = report(samples, datalist, "--output_dir", tmp_path / "out", "--protocol", PROTOCOL)

    assert result.exit_code == 0, result.output
    (flagged,) = [row for row in rows_of(tmp_path / "out" / "copies.csv") if row["flagged"] == "True"]
    assert flagged["sample"] == "copy.png"
    assert flagged["training"] == "00000007_000.png"
    figures = figures_of(tmp_path / "out")
    assert figures["memorised"] == 1
    assert figures["memorised_share"] == pytest.approx(1 / 11)
    assert figures["n_reference"] == figures["n_training"] == 30


def test_a_reference_that_was_trained_on_does_not_set_the_limit_of_copies(tmp_path):
    training, samples = folder_of(tmp_path / "training", range(40)), folder_of(tmp_path / "samples", range(100, 110))
    Image.fromarray(texture(7)).save(samples / "copy.png")

    found = measure(
        samples, training, training=training, protocols=[PROTOCOL], num_workers=0, progress=False
    )  # fmt: skip

    assert [found.samples.files[i] for i in found.memorisation.flagged] == ["copy.png"]
    assert any("40 held-out images share their patient or their pixels" in note for note in found.memorisation.notes)


def test_noise_is_told_by_the_patches_of_the_finest_level(tmp_path):
    rng = np.random.default_rng(0)
    reference = folder_of(tmp_path / "reference", range(30))
    good = folder_of(tmp_path / "good", range(40, 70))
    bad = folder_of(
        tmp_path / "bad", range(40, 70), lambda p: np.clip(p + rng.normal(0, 25, p.shape), 0, 255).astype(np.uint8)
    )

    options = {"protocols": [PROTOCOL], "num_workers": 0, "progress": False}
    near, far = (measure(samples, reference, **options) for samples in (good, bad))

    assert [of.name for of in far.patches] == ["swd", "swd_64", "swd_32", "swd_16"]
    for found in (near, far):
        mean, *levels = found.patches
        assert mean.distance.value == pytest.approx(np.mean([of.distance.value for of in levels]))
        assert mean.baseline.mean == pytest.approx(np.mean([of.baseline.mean for of in levels]))
        assert all(of.distance.low <= of.distance.value <= of.distance.high for of in found.patches)
    finest, others = far.patches[1], near.patches[1]
    assert finest.distance.low > others.distance.high
    assert finest.equal.low > finest.baseline.high
    assert others.equal.mean < 1.5 * others.baseline.mean
    assert far.patches[3].distance.value < 1.5 * near.patches[3].distance.value
    assert far.figures()["swd_64_equal_n_real"] == finest.baseline.mean


@pytest.mark.parametrize(("asked", "drawn"), [(None, 50), (20, 20), (1000, 50)])
def test_patches_are_resampled_fifty_times_at_most(tmp_path, monkeypatch, asked, drawn):
    sets = [ImageSet.from_source(folder_of(tmp_path / name, seeds)) for name, seeds in (("a", range(2)), ("b", (2, 3)))]
    found = []
    monkeypatch.setattr("medgen.report.measure.draw_counts", lambda *of: found.append(draw_counts(*of)) or found[-1])
    monkeypatch.setattr("medgen.report.measure.sliced_wasserstein", lambda *_, **__: [0.0])  # seconds for each resample

    _patch_distances(*sets, asked, 0, [])

    assert [len(counts) for counts in found] == [drawn, drawn]


def test_images_without_a_pyramid_have_no_distance_of_patches_and_that_is_said(tmp_path):
    reference, samples = folder_of(tmp_path / "a", range(12)), folder_of(tmp_path / "b", range(20, 32))

    found = measure(samples, reference, protocols=[PROTOCOL], image_size=48, num_workers=0, progress=False)

    assert found.patches == []
    (note,) = [note for note in found.notes if "sliced Wasserstein" in note]
    assert "power of two from 4, got 48" in note


def test_patients_are_resampled_as_a_whole(tmp_path):
    """Eight images of each of five patients: fewer independent ones, so a wider interval than of forty patients."""
    reference = tmp_path / "reference"
    reference.mkdir()
    for patient in range(5):
        for image in range(8):
            pixels = texture(patient * 8 + image) // 2 + 20 * patient
            Image.fromarray(pixels).save(reference / f"{patient:08d}_{image:03d}.png")
    samples = folder_of(tmp_path / "samples", range(100, 140))

    options = {"protocols": [PROTOCOL], "num_workers": 0, "progress": False}
    unknown = measure(samples, reference, **options).distances[0].frechet
    known = measure(samples, reference, patient_pattern=r"^(\d{8})_", **options).distances[0].frechet

    assert known.value == unknown.value
    assert known.high - known.low > 1.5 * (unknown.high - unknown.low)


def test_a_feature_file_gives_what_its_images_give(tmp_path):
    reference, samples = folder_of(tmp_path / "a", range(12)), folder_of(tmp_path / "b", range(20, 32))
    runner = CliRunner()
    for name, options in (("rows", []), ("moments", ["--moments"])):
        command = ["features", str(reference), "--protocol", PROTOCOL, "--output", str(tmp_path / f"{name}.npz")]
        assert runner.invoke(cli.app, command + options).exit_code == 0

    values = [
        measure(samples, source, protocols=[PROTOCOL], num_workers=0, progress=False).distances[0]
        for source in (reference, tmp_path / "rows.npz", tmp_path / "moments.npz")
    ]

    assert values[1].frechet.value == pytest.approx(values[0].frechet.value, rel=1e-9)
    assert values[2].frechet.value == pytest.approx(values[0].frechet.value, rel=1e-6)
    assert values[1].kernel.value == pytest.approx(values[0].kernel.value, rel=1e-9)
    assert values[2].kernel is None  # moments hold no images to compare


def test_the_same_command_gives_the_same_figures(tmp_path):
    reference, samples = folder_of(tmp_path / "a", range(12)), folder_of(tmp_path / "b", range(20, 32))

    for name in ("one", "two"):
        report(samples, reference, "--output_dir", tmp_path / name)

    assert figures_of(tmp_path / "one") == figures_of(tmp_path / "two")


def test_the_features_that_differ_most_head_the_table(tmp_path):
    reference = folder_of(tmp_path / "reference", range(12))
    brighter = folder_of(tmp_path / "brighter", range(20, 32), lambda p: p // 4 + 180)

    report(brighter, reference, "--output_dir", tmp_path / "out", "--protocol", "frd_v0")

    rows = rows_of(tmp_path / "out" / "features_frd_v0.csv")
    differences = [abs(float(row["difference"])) for row in rows]
    assert differences == sorted(differences, reverse=True)
    mean = next(row for row in rows if row["name"].endswith("firstorder_Mean"))
    assert float(mean["reference_mean"]) == pytest.approx(np.mean([texture(s).mean() for s in range(12)]), rel=1e-3)
    assert float(mean["samples_mean"]) > float(mean["reference_mean"])


def test_copies_are_searched_for_with_the_networks_own_weights(tmp_path, monkeypatch):
    """One network for all three sets: the weights, the device and the batch that were asked for."""
    training, samples = folder_of(tmp_path / "training", range(40)), folder_of(tmp_path / "samples", range(100, 110))
    reference = folder_of(tmp_path / "reference", range(40, 70))
    made = []

    class Stub:
        settings = {"extractor": "stub"}  # noqa: RUF012
        feature_names = None

        def on_images(self, batch):
            return np.stack([[image.mean(), image.std()] for image in batch])

    def make(row, *, weights, device):
        made.append((row.name, weights, device))
        return Stub()

    monkeypatch.setattr("medgen.report.measure.make_extractor", make)

    found = measure(
        samples, reference, training=training, protocols=["fid"], weights=["fid=w.pth"], num_workers=0, progress=False
    )

    assert made == [("fid", "w.pth", "cpu")]
    assert found.memorisation.features.n_features == 2


def test_pairs_of_which_one_cannot_be_read_are_left_out(tmp_path):
    reference, samples = folder_of(tmp_path / "a", range(12)), folder_of(tmp_path / "b", range(12), lambda p: p // 2)
    (samples / "00000003_000.png").write_bytes(b"broken")

    result = report(samples, reference, "--output_dir", tmp_path / "out", "--protocol", PROTOCOL, "--paired")

    assert result.exit_code == 3, result.output
    assert len(rows_of(tmp_path / "out" / "paired.csv")) == 11
    assert "1 of the 12 reference images that can be read have no partner" in result.output


def test_code_runs_only_if_the_command_names_it(tmp_path, monkeypatch):
    """A feature file is data, also where its protocol is somebody's module."""
    reference = folder_of(tmp_path / "reference", range(12))
    (tmp_path / "code" / "evil.py").write_text("raise SystemExit('code was run')")
    names = tuple(f"{i}.png" for i in range(12))
    features = np.random.default_rng(0).random((12, 2))
    FeatureSet(features, (), names, None, "module:evil:net", {}, {}).save(tmp_path / "evil.npz")

    result = report(tmp_path / "evil.npz", reference, "--output_dir", tmp_path / "out")

    assert result.exit_code == 1
    assert "give --protocol module:evil:net if you trust that network" in result.output


def test_moments_keep_the_warnings_of_their_images(tmp_path):
    """Invalid protocols stay invalid, and few images stay few."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        files = tuple(f"{i}.png" for i in range(30))
        settings = {"role": name, "range": [0, 1]}
        rows = FeatureSet(rng.random((30, 40)), (), files, None, "xrv_ldm_source", settings, {})
        rows.save(tmp_path / f"{name}.npz")
        rows.moments().save(tmp_path / f"{name}_moments.npz")

    both = measure(tmp_path / "a_moments.npz", tmp_path / "b_moments.npz", protocols=["xrv_ldm_source"])
    assert "network expects" in both.distances[0].invalid
    assert any("30 images are too few for 40 features" in note for note in both.notes)
    assert "not valid" in both.lines()[1]


def test_files_of_an_earlier_report_go_and_others_stay(tmp_path):
    reference, samples = folder_of(tmp_path / "a", range(12)), folder_of(tmp_path / "b", range(20, 32))
    out = tmp_path / "out"
    report(samples, reference, "--output_dir", out, "--protocol", "frd_v0", "--training", reference)
    (out / "features_mine.csv").write_text("not the report's")
    assert {"copies.csv", "features_frd_v0.csv"} <= {file.name for file in out.iterdir()}

    report(samples, reference, "--output_dir", out, "--protocol", PROTOCOL)

    expected = {"report.html", "report.json", "metrics.json", "rejected.csv", "features_mine.csv"}
    assert {file.name for file in out.iterdir()} == expected


def test_only_files_that_a_report_wrote_are_removed(tmp_path):
    reference, samples = folder_of(tmp_path / "a", range(12)), folder_of(tmp_path / "b", range(20, 32))
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    (out / "model.pt").write_text("somebody's")
    (out / "report.json").write_text(json.dumps({"files": ["model.pt", "sub", "..", "copies.csv"]}))
    (out / "copies.csv").write_text("somebody's")

    result = report(samples, reference, "--output_dir", out, "--protocol", PROTOCOL)

    assert result.exit_code == 0, result.output
    assert (out / "model.pt").read_text() == (out / "copies.csv").read_text() == "somebody's"
    assert (out / "sub").is_dir()


def test_the_page_does_not_pass_on_a_password(tmp_path):
    reference, samples = folder_of(tmp_path / "a", range(12)), folder_of(tmp_path / "b", range(20, 32))
    command = "medgen report a b --tracking_uri https://bob:s3cret@host:5000/"

    files, _ = make_report(
        samples, reference, tmp_path / "out", command=command, protocols=[PROTOCOL], num_workers=0, progress=False
    )

    texts = [file.read_text(encoding="utf-8") for file in files]
    assert not any("s3cret" in text for text in texts)
    assert "//***@host:5000/" in texts[0]


def test_images_of_one_patient_do_not_make_a_perfect_generator_look_better_than_real(tmp_path):
    """40 patients with 4 alike images each against independent samples of the same distribution."""
    rng = np.random.default_rng(0)
    farther = []
    for _ in range(12):
        patients = np.repeat(np.arange(40), 4)
        x = 0.8 * rng.standard_normal((40, 8))[patients] + 0.6 * rng.standard_normal((160, 8))
        y = rng.standard_normal((160, 8))
        known = {"reference_patients": [str(p) for p in patients], "sample_patients": None}
        equal, real, _ = _halves(x, y, frechet_distance, known, seed=0)
        assert (equal.n_first, equal.n_second) == (real.n_first, real.n_second) == (20, 20)
        farther += [a > b for a, b in zip(equal.values, real.values, strict=True)]

    assert 0.35 < np.mean(farther) < 0.65


def test_training_images_are_for_samples_that_are_images(tmp_path):
    reference = folder_of(tmp_path / "reference", range(12))
    features = np.random.default_rng(0).random((12, 2))
    files = tuple(f"{i}.png" for i in range(12))
    FeatureSet(features, (), files, None, PROTOCOL, {}, {}).save(tmp_path / "f.npz")

    result = report(
        tmp_path / "f.npz", reference, "--output_dir", tmp_path / "out", "--protocol", PROTOCOL, "--training", reference
    )

    assert result.exit_code == 1
    assert "the samples are features" in result.output


def test_every_figure_has_its_interval(tmp_path):
    reference, samples = folder_of(tmp_path / "a", range(12)), folder_of(tmp_path / "b", range(12), lambda p: p // 2)

    report(
        samples,
        reference,
        "--output_dir",
        tmp_path / "out",
        "--protocol",
        PROTOCOL,
        "--paired",
        "--training",
        reference,
    )

    figures = figures_of(tmp_path / "out")
    alone = {"n", "seed", "git", "memorised"}
    for name in figures:
        if name not in alone and not re.search(r"^n_|_low$|_high$|_equal_n$|_equal_n_real$", name):
            assert figures[f"{name}_low"] <= figures[name] <= figures[f"{name}_high"], name


# ---------------------------------------------------------------------------------------------------------------------
# the page


def test_the_page_needs_nothing_but_itself(tmp_path):
    reference, samples = folder_of(tmp_path / "a", range(12)), folder_of(tmp_path / "b", range(20, 32))
    report(samples, reference, "--training", reference, "--output_dir", tmp_path / "out", "--title", "Two textures")

    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))

    assert page.tags.count("img") >= 6
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert "Two textures" in "".join(page.text)


def test_names_from_outside_do_not_become_markup(tmp_path):
    reference, samples = folder_of(tmp_path / "a", range(12)), folder_of(tmp_path / "b", range(20, 32))
    (samples / "<script>alert(1)<x>.png").write_bytes(b"no picture")

    result = report(samples, reference, "--output_dir", tmp_path / "out", "--protocol", PROTOCOL, "--title", "<b>bold")

    assert result.exit_code == 3
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags
    text = "".join(page.text)
    assert "<b>bold" in text
    assert "<script>alert(1)<x>.png" in text


def test_mlflow_holds_the_figures_and_the_page(tmp_path):
    reference, samples = folder_of(tmp_path / "a", range(12)), folder_of(tmp_path / "b", range(20, 32))
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "patients.csv").write_text("nobody's business")

    result = report(
        samples, reference, "--output_dir", tmp_path / "out", "--protocol", PROTOCOL, "--tracking_uri", uri,
        "--experiment", "textures",
    )  # fmt: skip

    assert result.exit_code == 0, result.output
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("textures").experiment_id])
    assert run.data.metrics["n_samples"] == 12
    assert run.data.metrics["ms_ssim_samples"] == pytest.approx(figures_of(tmp_path / "out")["ms_ssim_samples"])
    assert {"report.html", "report.json", "metrics.json"} <= {
        file.path for file in client.list_artifacts(run.info.run_id)
    }


def test_a_tracker_that_is_away_does_not_cost_the_measurements(tmp_path, monkeypatch):
    reference, samples = folder_of(tmp_path / "a", range(12)), folder_of(tmp_path / "b", range(20, 32))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    result = report(
        samples, reference, "--output_dir", tmp_path / "out", "--protocol", PROTOCOL,
        "--tracking_uri", "http://127.0.0.1:9",
    )  # fmt: skip

    assert result.exit_code == 1
    assert "127.0.0.1:9" in result.output
    assert (tmp_path / "out" / "report.html").is_file()


def test_help_imports_no_framework():
    code = (
        "import sys; from medgen.cli import app\n"
        "try: app(['report', '--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'monai', 'mlflow', 'matplotlib', 'jinja2', 'SimpleITK'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)

    assert result.returncode == 0, result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# bad input


def test_what_three_images_do_not_allow_is_left_out_and_said(tmp_path):
    reference, samples = folder_of(tmp_path / "a", range(3)), folder_of(tmp_path / "b", range(20, 32))

    result = report(samples, reference, "--output_dir", tmp_path / "out", "--protocol", PROTOCOL)

    assert result.exit_code == 0, result.output
    assert "at least 4 patients to be halved" in result.output
    assert "no precision and recall" in result.output
    assert not {name for name in figures_of(tmp_path / "out") if "equal_n" in name or "precision" in name}


def test_what_cannot_be_read_is_listed_left_out_and_counted(tmp_path):
    reference, samples = folder_of(tmp_path / "a", range(12)), folder_of(tmp_path / "b", range(20, 32))
    whole = (samples / "00000021_000.png").read_bytes()
    (samples / "00000021_000.png").write_bytes(whole[: len(whole) // 2])

    result = report(samples, reference, "--output_dir", tmp_path / "out", "--protocol", PROTOCOL)

    assert result.exit_code == 3
    assert "left out 1 file" in result.output
    (row,) = rows_of(tmp_path / "out" / "rejected.csv")
    assert (row["set"], row["file"]) == ("samples", "00000021_000.png")
    assert row["reason"]
    assert figures_of(tmp_path / "out")["n_samples"] == 11


def test_a_constant_image_is_named_and_gives_no_nan(tmp_path):
    reference, samples = folder_of(tmp_path / "a", range(12)), folder_of(tmp_path / "b", range(20, 32))
    Image.fromarray(np.full((SIDE, SIDE), 90, np.uint8)).save(samples / "flat.png")

    result = report(samples, reference, "--output_dir", tmp_path / "out")

    assert "flat.png" in result.output
    reasons = {row["file"]: row["reason"] for row in rows_of(tmp_path / "out" / "rejected.csv")}
    assert "constant" in reasons["flat.png"]
    figures = figures_of(tmp_path / "out")
    assert figures["n_samples"] == 13
    assert figures["n"] == 12  # in the distances
    assert figures["frd"] is not None


@pytest.mark.parametrize(
    ("samples", "options", "expected"),
    [
        ("missing", [], "does not exist"),
        ("empty", [], "empty folder"),
        ("larger", [], "--image_size"),
        ("colour", [], "--mode"),
        ("text", [], "expected images below"),
        ("one", [], "at least 2 images"),
        ("good", ["--protocol", "fib"], "fib"),
        ("good", ["--protocol", PROTOCOL, "--protocol", PROTOCOL], "each --protocol once"),
        ("good", ["--weights", "fid"], "PROTOCOL=PATH"),
        ("good", ["--weights", "fib=x"], "PROTOCOL=PATH"),
        ("good", ["--protocol", "fid"], "pt_inception-2015-12-05-6726825d.pth"),
        ("good", ["--pairs", "0"], "--pairs"),
        ("good", ["--pairs", "some"], "--pairs"),
        ("good", ["--samples_split", "test"], "datalist"),
        ("good", ["--training", "features.npz"], "features.npz"),
        ("good", ["--paired"], "compares images of one file name"),
        ("good", ["--patient_pattern", "("], "patient_pattern"),
        ("good", ["--resamples", "1"], "resamples"),
        ("good", ["--device", "tpu", "--protocol", "frd_v1"], "device"),
        ("good", ["--seed", "-1"], "seed"),
        ("good", ["--weights", "fid=x.pth"], "which nothing here uses"),
        ("good", ["--weights", "lpips=x.pth"], "add --paired"),
        ("good", ["--num_workers", "-1"], "num_workers"),
        ("good", ["--batch_size", "0"], "batch_size"),
        ("good", ["--max_images", "0"], "max_images"),
        ("good", ["--feature_size", "8", "--protocol", "frd_v1"], "module:PATH"),
        ("same_names", ["--paired", "--weights", "lpips=missing.pth"], "squeezenet1_1-b8a52dc0.pth"),
    ],
)
def test_bad_input_is_told_in_one_line(tmp_path, samples, options, expected):
    reference = folder_of(tmp_path / "reference", range(12))
    folder_of(tmp_path / "good", range(20, 32))
    folder_of(tmp_path / "one", [20])
    folder_of(tmp_path / "larger", range(20, 32), lambda p: np.kron(p, np.ones((2, 2), np.uint8)))
    folder_of(tmp_path / "colour", range(20, 32), channels=3)
    folder_of(tmp_path / "same_names", range(12))
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").write_text("no images")

    result = report(
        tmp_path / samples, reference, "--output_dir", tmp_path / "out",
        *(options if "--protocol" in options else ["--protocol", PROTOCOL, *options]),
    )  # fmt: skip

    assert result.exit_code == 1, result.output
    errors = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.output
    assert expected in errors[0]
    if samples in ("good", "same_names"):
        assert "reading" not in result.output  # before hours of work


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04nonsense", "an empty zip", "damaged", "NaN"])
def test_what_is_no_feature_file_is_refused(tmp_path, content):
    reference = folder_of(tmp_path / "reference", range(12))
    path = tmp_path / "features.npz"
    if content == "NaN":
        features = np.full((12, 2), np.nan)
        np.savez(path, features=features, meta=np.frombuffer(b'{"format": 1}', np.uint8))
    elif content == "an empty zip":
        np.savez(path)
    elif content == "damaged":
        np.savez(path, features=np.ones((3, 2)))
        damaged = bytearray(path.read_bytes())
        damaged[damaged.rindex(b"PK\x01\x02")] ^= 1  # the central directory
        path.write_bytes(damaged)
    else:
        path.write_bytes(content)

    result = report(path, reference, "--output_dir", tmp_path / "out")

    assert result.exit_code == 1
    assert [line[:7] for line in result.output.splitlines()] == ["error: "]
    assert "features.npz" in result.output
