"""``project.json`` as its users run it: on a folder, killed, resumed, and with their mistakes."""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from PIL import Image
from running import (
    Forked,
    assert_one_line,
    assert_same_files,
    command,
    files_in,
    finish,
    run,
    search_killed_twice,
    start,
)

from medgen.data.image_set import file_sha256
from medgen.losses import PixelMSSSIMLoss
from medgen.networks import ConvNeXtEncoder, StyleGAN2Generator
from medgen.sources import load_encoder
from medgen.transforms import ProjectionRecord

BUNDLE = Path(__file__).parents[2] / "bundles" / "stylegan2_anomaly"
TINY = {"image_size": 16, "channel_base": 128, "channel_max": 8, "latent_dim": 8, "w_dim": 8, "num_mapping_layers": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights and an overlay of a tiny generator, and one of a tiny generator with classes."""
    folder = tmp_path_factory.mktemp("tiny")
    for name, classes in (("tiny", 0), ("classes", 2)):
        torch.manual_seed(0)
        generator = StyleGAN2Generator(**TINY, num_classes=classes)
        with torch.no_grad():
            for block in generator.synthesis.blocks:
                for layer in block.convolutions():
                    layer.noise_strength.fill_(0.1)
        torch.save(generator.state_dict(), folder / f"{name}.pt")
        definition = {"_target_": "medgen.networks.StyleGAN2Generator", **TINY, "num_classes": classes}
        (folder / f"{name}.json").write_text(json.dumps({"network_def": definition}))
    return folder


def make(
    folder: Path, output_dir: Path, datalist: Path, overlay: str = "tiny", config: str = "project", **overrides
) -> ConfigWorkflow:
    settings = {"bundle_root": str(BUNDLE), "datalist": str(datalist), "output_dir": str(output_dir), "num_workers": 0}
    settings |= {"model_path": str(folder / f"{overlay}.pt"), "steps": 4, "batch_size": 2, "split": "training"}
    files = [str(BUNDLE / "configs" / f"{config}.json"), str(folder / f"{overlay}.json")]
    return ConfigWorkflow(files, logging_file=False, workflow_type="infer", **{**settings, **overrides})


@pytest.mark.slow(
    reason="starts four projections as processes of their own; importing MONAI alone takes seconds in each"
)
def test_projection_killed_with_sigkill_and_resumed_leaves_the_same_files(folder, datalist, tmp_path):
    # the folder's images and masks: 16 pictures in groups of 3
    settings = {"input_dir": datalist.parent, "model_path": folder / "tiny.pt", "batch_size": 3, "steps": 120}
    config = ["configs/project.json", str(folder / "tiny.json")]
    expected, found, done, output = search_killed_twice(BUNDLE, config, tmp_path, 16, **settings)
    assert f"projecting {16 - done // 3 * 3} of 16 images" in output  # groups that were finished are not done again
    assert len([name for name in expected if name.startswith("projections/")]) == 16
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.mark.slow(reason="starts six inferences as processes of their own")
def test_shards_at_once_one_of_them_killed_leave_the_files_of_one_process(folder, datalist, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(datalist.parent, tmp_path / "in")
    (tmp_path / "in" / "a.png").write_bytes(b"broken")  # counts where the list is cut into shards and groups
    settings = {"input_dir": tmp_path / "in", "model_path": folder / "tiny.pt", "batch_size": 2, "steps": 60}
    config = ["configs/inference.json", str(folder / "tiny.json")]

    def begin(**shard: str) -> Forked:
        return start(BUNDLE, command(config, out, patch=4, **settings, **shard))

    finish(begin())
    out.rename(tmp_path / "whole")
    killed, other = begin(shard="1/3"), begin(shard="0/3")
    while killed.poll() is None and not list(out.glob("projections/*.npz")):
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    again = begin(shard="1/3")
    finish(other)
    assert "shard 1/3: 6 of 17 items are done" in finish(again)
    finish(begin(shard="2/3"))
    assert [name for name in ("scores.csv", "rejected.csv") if (out / name).exists()] == []
    assert "projecting" not in finish(begin(resume="true"))
    assert_same_files(out, tmp_path / "whole")


def test_each_image_has_a_reconstruction_and_a_record(folder, datalist, tmp_path):
    run(make(folder, tmp_path / "out", datalist))
    items = json.loads(datalist.read_text())["training"]
    names = {Path(item["image"]).stem for item in items}
    assert {path.stem for path in (tmp_path / "out/projections").iterdir()} == names
    assert {path.stem for path in (tmp_path / "out/reconstructions").iterdir()} == names
    generator = StyleGAN2Generator(**TINY)
    generator.load_state_dict(torch.load(folder / "tiny.pt", weights_only=True))
    for name in names:
        record = ProjectionRecord(tmp_path / "out/projections" / f"{name}.npz")
        noise = [torch.from_numpy(noise)[None, None] for noise in record.noise]
        with torch.no_grad():
            image = generator.synthesis(torch.from_numpy(record.w)[None], noise)[0, 0]
        saved = np.asarray(Image.open(tmp_path / "out/reconstructions" / f"{name}.png"))
        np.testing.assert_array_equal(saved, ((image + 1) / 2).clamp(0, 1).mul(255).round().byte().numpy())
        assert record.loss_curve.shape == (4,)
        assert record.settings["model_sha256"]
    assert (tmp_path / "out/images/loss_curves.png").is_file()


def test_finished_projection_is_resumed_without_work_and_not_overwritten_unasked(folder, datalist, tmp_path):
    run(make(folder, tmp_path / "out", datalist))
    before = files_in(tmp_path / "out")
    run(make(folder, tmp_path / "out", datalist, resume="true"))
    assert files_in(tmp_path / "out") == before
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(make(folder, tmp_path / "out", datalist))
    assert_one_line(caught.value, r"4 of 4 results are in the output folder already; .*--resume true")


def test_lost_record_is_made_again_with_its_group(folder, datalist, tmp_path):
    run(make(folder, tmp_path / "out", datalist))
    before = files_in(tmp_path / "out")
    (tmp_path / "out/projections/image1.npz").unlink()
    (tmp_path / "out/reconstructions/image1.png").unlink()
    run(make(folder, tmp_path / "out", datalist, resume=True))
    assert files_in(tmp_path / "out") == before


def test_lost_reconstruction_is_made_again_with_its_group(folder, datalist, tmp_path):
    run(make(folder, tmp_path / "out", datalist))
    before = files_in(tmp_path / "out")
    (tmp_path / "out/reconstructions/image1.png").unlink()
    run(make(folder, tmp_path / "out", datalist, resume=True))
    assert files_in(tmp_path / "out") == before


def test_image_that_cannot_be_read_is_refused_before_the_projection(folder, datalist, tmp_path):
    shutil.copytree(datalist.parent, tmp_path / "data")
    (tmp_path / "data/image3.png").write_bytes(b"")
    with pytest.raises(Exception) as caught:  # noqa: PT011
        make(folder, tmp_path / "out", tmp_path / "data/datalist.json").initialize()
    assert_one_line(caught.value, r"image3\.png: empty file \(0 bytes\) \(1 of 4 items cannot be used\)")


def test_classes_come_from_the_datalist(folder, datalist, tmp_path):
    run(make(folder, tmp_path / "out", datalist, overlay="classes", steps=1))  # one step leaves w where it starts
    items = json.loads(datalist.read_text())["training"]
    starts = {
        label: {
            ProjectionRecord(tmp_path / "out/projections" / f"{Path(item['image']).stem}.npz").w.tobytes()
            for item in items
            if item["label"] == label
        }
        for label in (0, 1)
    }
    assert [len(found) for found in starts.values()] == [1, 1]
    assert starts[0] != starts[1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model_path": "absent.pt"}, r"no weights at absent\.pt; .*--model_path"),
        ({"space": "z"}, "space must be w or w\\+, got 'z'"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"batch_size": 1.5}, "batch_size must be a whole number of at least 1, got 1.5"),
        ({"perceptual_weights": "absent.pth"}, r"no file at absent\.pth; .*leave --perceptual_weights out"),
        ({"resume": "perhaps"}, "a switch must be true or false, got 'perhaps'"),
        ({"shard": "4/4"}, "shard must be i/n with i from 0 to n - 1, such as 0/4 to 3/4, got '4/4'"),
        ({"input_dir": "absent"}, "expected a folder, got absent"),
        ({"patience": 2.5}, "patience must be a whole number of at least 0, got 2.5"),
        ({"initial_lr": "x"}, "initial_lr must be a number from 0 to"),
        ({"noise_regularisation": "x"}, "noise_regularisation must be a number from 0 to"),
        ({"min_improvement": "x"}, "min_improvement must be a number from 0 to 1, got 'x'"),
    ],
)
def test_mistakes_in_the_settings_are_one_line(overrides, message, folder, datalist, tmp_path):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(make(folder, tmp_path / "out", datalist, **overrides))
    assert_one_line(caught.value, message)


def test_other_settings_are_not_mixed_into_an_earlier_projection(folder, datalist, tmp_path):
    run(make(folder, tmp_path / "out", datalist))
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(make(folder, tmp_path / "out", datalist, resume=True, steps=5))
    assert_one_line(caught.value, "made with steps 4, this run has 5")


def copied(datalist: Path, folder: Path) -> Path:
    """Three images as a folder of their own."""
    folder.mkdir()
    for number in range(3):
        shutil.copy(datalist.parent / f"image{number}.png", folder)
    return folder


def test_another_batch_size_is_not_mixed_into_an_earlier_projection(folder, datalist, tmp_path):
    # sums are rounded by the batch, and the steps amplify it
    run(make(folder, tmp_path / "out", datalist))
    (tmp_path / "out/projections/image1.npz").unlink()
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(make(folder, tmp_path / "out", datalist, resume=True, batch_size=3))
    assert_one_line(caught.value, "made with batch_size 2, this run has 3")


def test_changed_image_is_not_resumed(folder, datalist, tmp_path):
    images = copied(datalist, tmp_path / "in")
    run(make(folder, tmp_path / "out", datalist, input_dir=str(images)))
    Image.fromarray(np.full((20, 20), 200, np.uint8)).save(images / "image0.png")
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(make(folder, tmp_path / "out", datalist, input_dir=str(images), resume=True))
    assert_one_line(caught.value, r"image0\.npz was made with image_sha256 \w+, this run has \w+")


def test_changed_label_is_not_resumed(folder, datalist, tmp_path):
    run(make(folder, tmp_path / "out", datalist, overlay="classes", steps=1))
    content = json.loads(datalist.read_text())
    content["training"][1]["label"] = 1 - content["training"][1]["label"]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    settings = {"dataset_dir": str(datalist.parent), "overlay": "classes", "steps": 1, "resume": True}
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(make(folder, tmp_path / "out", other, **settings))
    assert_one_line(caught.value, "image1.npz was made with label 1, this run has 0")


def test_output_below_the_input_is_refused(folder, datalist, tmp_path):
    images = copied(datalist, tmp_path / "in")
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(make(folder, images / "out", datalist, input_dir=str(images)))
    assert_one_line(caught.value, "output_dir must lie outside input_dir, got .*in/out in .*in: ")
    assert not (images / "out").exists()


@pytest.mark.parametrize("config", ["inference", "score"])
def test_other_configs_refuse_an_output_below_the_input_as_well(config):
    for bundle in (BUNDLE, BUNDLE.parent / "cxr_autoencoder_kl"):
        path = bundle / "configs" / f"{config}.json"
        if path.is_file():
            assert "$medgen.output.check_apart(@input_dir, @output_dir)" in json.loads(path.read_text())["initialize"]


def test_image_that_diverges_is_listed_and_the_others_are_projected(folder, datalist, tmp_path, monkeypatch):
    diverging = np.asarray(Image.open(datalist.parent / "image1.png")).mean()
    real = PixelMSSSIMLoss.forward

    def infinite_for_one(self, images, features):
        bad = (features[1].flatten() * 255 - diverging).abs() < 0.5
        return real(self, images, features) / (~bad)

    monkeypatch.setattr(PixelMSSSIMLoss, "forward", infinite_for_one)
    for resume in (False, True):
        run(make(folder, tmp_path / "out", datalist, resume=resume))
        assert {path.stem for path in (tmp_path / "out/projections").iterdir()} == {"image0", "image2", "image3"}
        assert {path.stem for path in (tmp_path / "out/reconstructions").iterdir()} == {"image0", "image2", "image3"}
        table = (tmp_path / "out/rejected.csv").read_text()
        assert table == "file,reason\nimage1.png,its projection ended in values that are not finite\n"


@pytest.mark.parametrize("config", ["inference", "evaluate"])
def test_image_that_diverges_is_not_scored(config, folder, datalist, tmp_path, monkeypatch, caplog):
    real, calls = PixelMSSSIMLoss.prepare, []

    def spoil_the_first(self, target):  # its features are asked for once before the steps and once after
        features = real(self, target)
        calls.append(None)
        if len(calls) <= 2:
            features[0][0] = torch.nan
        return features

    monkeypatch.setattr(PixelMSSSIMLoss, "prepare", spoil_the_first)
    with caplog.at_level(logging.WARNING):
        run(make(folder, tmp_path / "out", datalist, config=config))
    with (tmp_path / "out/scores.csv").open(newline="") as file:
        assert [row["image"] for row in csv.DictReader(file)] == ["image1.png", "image2.png", "image3.png"]
    assert "1 of 4 images could not be projected and have no reconstruction; rejected.csv says which" in caplog.text
    assert "image0.png,its projection ended" in (tmp_path / "out/rejected.csv").read_text()


def test_published_settings_are_the_defaults_of_the_config():
    parser = ConfigParser()
    parser.read_config(BUNDLE / "configs" / "project.json")
    published = {"space": "w", "steps": 1000, "initial_lr": 0.1, "noise_regularisation": 1e5, "seed": 303}
    assert {name: parser[name] for name in published} == published


@pytest.fixture(scope="module")
def encoder(folder):
    """Bundle of an encoder for the tiny generator, whose estimates are far from the mean of w and from each other."""
    definition = {
        "image_size": 16,
        "latent_shape": [1, 8],
        "space": "w",
        "size": "atto",
        "patch": 2,
        "layer_scale": 0.1,
    }
    torch.manual_seed(1)
    network = ConvNeXtEncoder(**definition)
    network.latent_std.fill_(5.0)
    (folder / "encoder/configs").mkdir(parents=True)
    (folder / "encoder/models").mkdir()
    torch.save(network.state_dict(), folder / "encoder/models/model.pt")
    record = {"generator_sha256": file_sha256(folder / "tiny.pt"), "space": "w"}
    (folder / "encoder/models/trained_as.json").write_text(json.dumps(record))
    config = {"side": 32, "network_def": {"_target_": "medgen.networks.ConvNeXtEncoder", **definition}}
    config["network_def"]["image_size"] = "@side"
    (folder / "encoder/configs/inference.json").write_text(json.dumps(config))
    (folder / "encoder/configs/small.json").write_text(json.dumps({"side": 16}))
    return {"encoder": str(folder / "encoder"), "encoder_overlay": "small.json"}


@pytest.mark.parametrize("config", ["project", "inference", "evaluate"])
def test_projection_starts_where_the_encoder_says(config, folder, encoder, datalist, tmp_path):
    names = [item["image"] for item in json.loads(datalist.read_text())["training"]]
    shutil.copytree(datalist.parent, tmp_path / "in")
    for name in names:  # of the generator's size, so that nothing resizes them
        Image.open(datalist.parent / name).resize((16, 16)).save(tmp_path / "in" / name)
    settings = {"config": config, "steps": 1, **encoder}  # a single step leaves w where it starts
    run(make(folder, tmp_path / "out", tmp_path / "in/datalist.json", **settings))
    network = load_encoder(encoder["encoder"], encoder["encoder_overlay"])
    for name in names:
        record = ProjectionRecord(tmp_path / "out/projections" / f"{Path(name).stem}.npz")
        image = torch.from_numpy(np.asarray(Image.open(tmp_path / "in" / name), np.float32) / 255)
        expected = network(image[None, None])[0].expand(6, -1)
        torch.testing.assert_close(torch.from_numpy(record.w), expected, rtol=1e-4, atol=1e-4)
        assert record.settings["encoder_sha256"] == file_sha256(Path(encoder["encoder"]) / "models/model.pt")


def test_projections_from_the_encoder_and_from_the_mean_are_not_mixed(folder, encoder, datalist, tmp_path):
    run(make(folder, tmp_path / "out", datalist, steps=1))
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(make(folder, tmp_path / "out", datalist, steps=1, resume=True, **encoder))
    assert_one_line(caught.value, r"was made with encoder_sha256 None, this run has \w{64}; resume with")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"encoder": "absent"},
            "encoder must be a bundle's folder, models:/NAME@ALIAS .*, no folder at absent; .*--encoder",
        ),
        ({"encoder_overlay": None}, r"the images of the encoder must be \(1, 16, 16\) .*, got \(1, 32, 32\); "),
        ({"encoder_weights": "absent.pt"}, r"no weights of the encoder at absent\.pt; .*--encoder_weights"),
        ({"encoder": "models:/encoder@best"}, "encoder models:/encoder@best is in a registry, and none is named"),
        ({"model_path": "absent.pt"}, r"no weights of a generator at absent\.pt"),
        ({"overlay": "classes"}, r"generator_sha256 must be \w+ as in the training of .*encoder/models/model\.pt, got"),
    ],
)
def test_mistakes_with_an_encoder_are_one_line(overrides, message, folder, encoder, datalist, tmp_path):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        make(folder, tmp_path / "out", datalist, **{**encoder, **overrides}).initialize()
    assert_one_line(caught.value, message)
    assert not (tmp_path / "out").exists()


def test_config_has_the_properties_that_monai_asks_for(folder, datalist, tmp_path):
    workflow = make(folder, tmp_path / "out", datalist)
    workflow.initialize()
    assert workflow.check_properties() == []
