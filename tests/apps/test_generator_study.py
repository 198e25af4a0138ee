"""What a study of presets runs, and the table that it makes of the figures."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medgen.apps import GeneratorStudy, generator_study
from medgen.data import write_datalist
from medgen.errors import UserError, find_user_error
from medgen.networks import DCGANGenerator

BUNDLE = Path(__file__).parents[2] / "bundles" / "skin_sngan"


@pytest.fixture
def make_study(tmp_path: Path) -> Callable[..., GeneratorStudy]:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    splits: dict[str, list[dict]] = {"training": [], "validation": [], "test": []}
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
        split = "training" if number < 12 else "validation" if number < 16 else "test"
        splits[split].append({"image": f"{number}.png", "patient": f"p{number}", "label": number % 2})
    write_datalist(tmp_path / "datalist.json", "noise", "dermoscopy", splits)

    def make(
        *presets: str,
        epoch_share: float = 1.0,
        published: dict | None = None,
        evaluation: dict | None = None,
        **training: Any,
    ) -> GeneratorStudy:
        common = {"datalist": str(tmp_path / "datalist.json"), "dataset_dir": str(tmp_path), "num_workers": 0}
        return GeneratorStudy(
            BUNDLE,
            tmp_path / "out",
            presets,
            common | training,
            common | {"source_metrics": True} | (evaluation or {}),
            epoch_share,
            published,
        )

    return make


def test_each_preset_is_trained_sampled_and_measured_with_one_network(make_study, tmp_path):
    runs = make_study("batch_16", "sngan_128", g_channels=8, image_size="null", seed=3, flip=True).runs()

    assert [run.name for run in runs] == ["untrained", "batch_16", "sngan_128"]
    assert [step.config_file for step in runs[0].steps] == ["inference.json", "evaluate.json"]
    train, inference, evaluate = (step.overrides for step in runs[2].steps)
    folder = tmp_path / "out" / "sngan_128"
    for step in (train, inference, evaluate):
        expected = {"preset": "sngan_128", "g_channels": 8, "model_path": str(folder / "model.pt"), "num_workers": 0}
        assert expected.items() <= step.items()
        assert "image_size" not in step  # null keeps the preset's
    assert {"resume": True, "flip": True, "seed": 3}.items() <= train.items()
    assert not {"flip", "resume"} & evaluate.keys()
    assert runs[2].done == folder / "metrics.json"


def test_share_of_the_epochs_keeps_the_presets_apart(make_study):
    study = make_study("batch_16", "d_lr_100_long", "sngan_128", epoch_share=0.02)

    assert [study.settings[name]["epochs"] for name in study.presets] == [4, 6, 10]  # of 200, 300 and 500
    assert make_study("batch_16", epoch_share=1e-6).settings["batch_16"]["epochs"] == 1
    assert make_study("batch_16", epoch_share=0.5, epochs=7).settings["batch_16"]["epochs"] == 7


@pytest.mark.parametrize(
    ("presets", "settings", "message"),
    [
        ((), {}, "presets must be different names, got none"),
        (("batch_16", "batch_16"), {}, "presets must be different names, got batch_16, batch_16"),
        (("batch_17",), {}, "preset must be one of dcgan, .*, got 'batch_17'"),
        (("batch_16",), {"epoch_share": 0}, "epoch_share must be a number above 0, got 0"),
        (("batch_16",), {"epoch_share": "abc"}, "epoch_share must be a number above 0, got 'abc'"),
        (("batch_16",), {"epoch_share": float("inf")}, "epoch_share must be a number above 0, got inf"),
        (("batch_16",), {"difaugment": "color"}, "no setting difaugment in .*train.json; did you mean --diff_augment?"),
        (
            ("batch_16",),
            {"evaluation": {"splits": "test"}},
            "no setting splits in .*evaluate.json; did you mean --split",
        ),
        (("batch_16",), {"preset": "sngan"}, "training must not have preset, which the study sets for each preset"),
    ],
)
def test_settings_that_cannot_be_are_told_before_anything_runs(make_study, presets, settings, message):
    with pytest.raises((UserError, RuntimeError)) as caught:
        make_study(*presets, **settings)

    assert re.search(message, find_user_error(caught.value))


def write_metrics(folder: Path, **figures: float | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps({"resolution": 64, "n_test": 4, "split": "test", **figures}))
    (folder / "best.json").write_text(json.dumps({"images_seen": 4800, "value": 1.0}))


def test_table_holds_the_figures_beside_baselines_and_published_ones(make_study, tmp_path):
    study = make_study("batch_16", "label_smoothing", "d_lr_100", published={"batch_16": {"psnr": 12.76, "mdsi": 0.49}})
    # in brackets stands what half of the real images have against the other: not beside a figure of all of them
    figures = {"kid": 7.0, "kid_equal_n": 0.25, "kid_real": -0.01, "ms_ssim_samples": None}
    figures |= {"frd_equal_n": 5.0, "frd_real": 4.0}
    unpaired = {"unpaired_psnr": 11.0, "unpaired_psnr_real": 10.5, "unpaired_mdsi": 0.5}
    write_metrics(tmp_path / "out" / "batch_16", **figures, **unpaired, ms_ssim_test=0.3)
    write_metrics(tmp_path / "out" / "d_lr_100", kid_equal_n=0.125, kid_real=-0.01)
    # a figure of real images that one run could not take
    write_metrics(tmp_path / "out" / "untrained_64_100_64", kid_equal_n=9.0, kid_real=None, unpaired_psnr_real=10.5)

    study.write({"label_smoothing": "it diverged | twice"})

    lines = (tmp_path / "out" / "study.md").read_text().splitlines()
    assert (
        "Dataset noise: 12 training images. Measured: 4 samples against as many images of the test split; seed 0. So "
        "few images scatter widely: the distances below, of halves of them, tell large differences alone."
    ) in lines
    for line in (
        "| preset | latent size | label of real | spectral norm | rate of D | images shown |",
        "| batch_16 | 100 | 1 | no | 0.0002 | 4,800 |",
        "| d_lr_100 | 256 | 0.9 | yes | 0.02 | 4,800 |",
        "| batch_16 | 0.25 (-0.01) | 5 (4) | – | – (0.3) |",
        "| untrained | 9 | – | – | – |",
        "| real images, 64 px | -0.01 | 4 | – | 0.3 |",
        "| batch_16 | 11 (12.8) | – | – | 0.5 (0.49) | – |",
        "| real images, 64 px | 10.5 | – | – | – | – |",
        "- label_smoothing: it diverged | twice",
    ):
        assert line in lines, line
    with open(tmp_path / "out" / "study.csv", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert rows["label_smoothing"]["failed"] == "it diverged | twice"
    assert rows["batch_16"]["unpaired_psnr"] == "11.0"
    record = json.loads((tmp_path / "out" / "study.json").read_text())
    assert [row["name"] for row in record["rows"]] == list(rows)
    assert record["about"]["n_training"] == 12


def test_settings_told_are_those_that_were_used(make_study, tmp_path):
    given = {"max_images": 64, "diff_augment": "color", "flip": True, "epochs": None, "seed": 3}
    study = make_study("batch_16", "latent_128", **given)
    for name in ("batch_16", "latent_128", "untrained_64_100_64"):
        write_metrics(tmp_path / "out" / name)

    study.write({})

    text = (tmp_path / "out" / "study.md").read_text()
    assert "EMA 0, max_images 64, diff_augment color, flip yes.\n" in text
    assert "epochs" not in text  # which max_images takes the place of
    assert text.count("seed 3") == 1
    with open(tmp_path / "out" / "study.csv", newline="") as file:
        assert {(row["flip"], row["latent_dim"]) for row in csv.DictReader(file)} >= {("True", "100"), ("True", "128")}


def test_untrained_generator_is_shared_by_the_presets_of_its_size(make_study):
    of_one, of_many, larger, narrow = (
        make_study(*presets, **settings).runs()[0]
        for presets, settings in (
            (("batch_16",), {}),
            (("batch_128", "batch_16"), {}),
            (("latent_256", "batch_16"), {}),
            (("batch_16",), {"g_channels": 8}),
        )
    )

    assert of_one == of_many
    assert of_one.settings(BUNDLE) == of_many.settings(BUNDLE)
    assert len({run.done for run in (of_one, larger, narrow)}) == 3
    expected = {"image_size": 64, "latent_dim": 256, "g_channels": 64}
    assert all(expected.items() <= step.overrides.items() for step in larger.steps)


def test_label_that_no_image_has_is_told_before_anything_is_written(make_study, tmp_path):
    study = make_study("batch_16", g_channels=4, label="melanoma")
    with pytest.raises(Exception) as caught:  # noqa: PT011
        study.check_images()
    assert "label must be one that the datalist's items have" in str(find_user_error(caught.value))
    assert not (tmp_path / "out").exists()


def test_study_fails_when_every_preset_does(make_study, monkeypatch):
    study = make_study("batch_16", "batch_64", g_channels=4)
    monkeypatch.setattr(study, "write", lambda failed: None)
    for failed, expected in (({"batch_16": "a", "batch_64": "b"}, UserError), ({"batch_16": "a"}, SystemExit)):
        monkeypatch.setattr(generator_study, "run_all", lambda *_, failed=failed: failed)
        with pytest.raises(expected):
            study.run()


def test_untrained_weights_are_those_of_the_seed_and_draw_as_in_training(make_study, tmp_path, monkeypatch):
    monkeypatch.setattr(generator_study, "run_all", lambda *_: {})
    path = tmp_path / "out" / "untrained_64_100_4" / "model.pt"
    found = []
    for seed in (1, 1, 2):
        study = make_study("batch_16", g_channels=4, seed=seed)
        monkeypatch.setattr(study, "write", lambda failed: None)
        study.run()
        found.append(path.read_bytes())
    assert found[0] == found[1] != found[2]
    network = DCGANGenerator(64, 100, 3, 4)
    network.load_state_dict(torch.load(path, weights_only=True))
    z = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        of_statistics, of_batch = network.eval()(z).std().item(), network.train()(z).std().item()
    assert of_statistics == pytest.approx(of_batch, rel=0.1)  # normalised by mean 0 and variance 1, it draws grey
