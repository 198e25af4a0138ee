"""``inference.json`` and ``optimise.json`` of the inversion encoder as their users run them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from PIL import Image
from running import assert_one_line, assert_shards_merge, files_in, run, search_killed_twice

from medgen.data import Embedding
from medgen.inferers import LatentOptimiser
from medgen.networks import ConvNeXtEncoder, LatentGenerator, PGGANGenerator
from medgen.transforms import ProjectionRecord

BUNDLE = Path(__file__).parents[2] / "bundles" / "cxr_inversion_encoder"
TINY = {"channels": [8, 8, 4], "latent_dim": 8}
ENCODER = {"image_size": 16, "latent_shape": [1, 8], "size": "atto", "patch": 2, "layer_scale": 0.1}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny generator and an encoder of random weights, and the overlay that names them."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    torch.save(PGGANGenerator(**TINY).state_dict(), folder / "generator.pt")
    definition = {"network_def": {"_target_": "medgen.networks.PGGANGenerator", **TINY}}
    (folder / "generator.json").write_text(json.dumps(definition))
    torch.save(ConvNeXtEncoder(**ENCODER).state_dict(), folder / "model.pt")
    trained_as = {"generator_sha256": sha256(folder / "generator.pt"), "space": "z"}
    (folder / "trained_as.json").write_text(json.dumps(trained_as))
    overlay = {
        **{"generator_overlay": str(folder / "generator.json"), "generator_weights": str(folder / "generator.pt")},
        **{"image_size": 16, "latent_dim": 8, "encoder_size": "atto", "patch": 2, "layer_scale": 0.1},
    }
    (folder / "tiny.json").write_text(json.dumps(overlay))
    losses = {"perceptual_weight": 0.0, "similarity_weight": 0.0, "ms_ssim_weight": 0.1}
    (folder / "optimise.json").write_text(json.dumps(losses))
    return folder


def make(folder: Path, output_dir: Path, datalist: Path, config: str = "optimise", **overrides) -> ConfigWorkflow:
    settings = {"bundle_root": str(BUNDLE), "datalist": str(datalist), "output_dir": str(output_dir), "num_workers": 0}
    settings |= {"model_path": str(folder / "model.pt"), "batch_size": 2, "split": "training"}
    files = [str(BUNDLE / "configs" / f"{config}.json"), str(folder / "tiny.json")]
    if config == "optimise":
        settings["steps"] = 6
        files.append(str(folder / "optimise.json"))
    return ConfigWorkflow(files, logging_file=False, workflow_type="infer", **{**settings, **overrides})


def assert_refused(message: str, folder: Path, output_dir: Path, datalist: Path, **overrides) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(make(folder, output_dir, datalist, **overrides))
    assert_one_line(caught.value, message)


def generator_of(folder: Path) -> LatentGenerator:
    network = PGGANGenerator(**TINY)
    network.load_state_dict(torch.load(folder / "generator.pt", weights_only=True))
    return LatentGenerator(network)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=np.float32) / 255


# ---------------------------------------------------------------------------------------------------------------------
# one pass of the encoder


def test_inference_writes_latents_reconstructions_and_errors(folder, datalist, tmp_path):
    run(make(folder, tmp_path / "out", datalist, config="inference", split="all"))
    content = json.loads(datalist.read_text())
    listed = [(split, item) for split in ("training", "validation", "test") for item in content[split]]
    found = Embedding.read(tmp_path / "out/embedding", sha256(folder / "generator.pt"))
    assert [item["image"] for item in found.items] == [item["image"] for _, item in listed]
    assert [item["split"] for item in found.items] == [split for split, _ in listed]
    assert [(item["patient"], item["label"]) for item in found.items] == [(i["patient"], i["label"]) for _, i in listed]
    assert (found.space, found.stage, found.encoder_sha256) == ("z", "encoder", sha256(folder / "model.pt"))
    np.testing.assert_allclose((found.latents**2).mean((1, 2)), 1, rtol=1e-4)
    with torch.no_grad():
        images = generator_of(folder)(torch.from_numpy(found.latents)).clamp(0, 1).numpy()[:, 0]
    for image, item in zip(images, found.items, strict=True):
        name = f"{Path(item['image']).stem}.png"
        np.testing.assert_allclose(pixels(tmp_path / "out/reconstructions" / name), image, atol=0.51 / 255)
        # the conftest's discs, shrunk by 4: the mean of 16 pixels is near what an antialiased resize gives
        original = pixels(datalist.parent / item["image"]).reshape(16, 4, 16, 4).mean((1, 3))
        assert item["mse"] == pytest.approx(((image - original) ** 2).mean(), rel=0.05)
        assert item["psnr"] == pytest.approx(-10 * np.log10(item["mse"]), abs=1e-3)
        assert "ms_ssim" not in item  # 16 pixels are too few for it
    assert Image.open(tmp_path / "out/images/grid.png").size == (8 * 18 - 2, 3 * 18 - 2)
    assert (tmp_path / "out/rejected.csv").read_text() == "file,reason\n"


def test_folder_of_images_of_any_size_is_encoded(folder, tmp_path):
    images = tmp_path / "in"
    (images / "sub").mkdir(parents=True)
    random_pixels = np.random.default_rng(0).integers(0, 256, (40, 23, 3), dtype=np.uint8)
    Image.fromarray(random_pixels).save(images / "colour.png")
    Image.fromarray(random_pixels[:10, :12, 0]).save(images / "sub" / "small.png")
    (images / "broken.png").write_bytes(b"no image")
    run(make(folder, tmp_path / "out", Path("unused.json"), config="inference", input_dir=str(images)))
    found = Embedding.read(tmp_path / "out/embedding")
    assert {item["image"] for item in found.items} == {"colour.png", "sub/small.png"}
    assert (tmp_path / "out/reconstructions/sub/small.png").is_file()
    assert "broken.png," in (tmp_path / "out/rejected.csv").read_text()


def test_image_that_cannot_be_read_is_listed_and_the_others_are_encoded(folder, datalist, tmp_path):
    shutil.copytree(datalist.parent, tmp_path / "data")
    (tmp_path / "data/image3.png").write_bytes(b"")
    run(make(folder, tmp_path / "out", tmp_path / "data/datalist.json", config="inference"))
    assert len(Embedding.read(tmp_path / "out/embedding")) == 3
    assert "image3.png,empty file" in (tmp_path / "out/rejected.csv").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# optimisation


def test_shards_leave_the_files_of_one_process_though_an_image_cannot_be_read(folder, datalist, tmp_path):
    shutil.copytree(datalist.parent, tmp_path / "data")
    (tmp_path / "data/image1.png").write_bytes(b"")

    def optimise(output_dir: Path, **shard: str) -> None:
        run(make(folder, output_dir, tmp_path / "data/datalist.json", split="all", **shard))

    tables = ["rejected.csv", "embedding/latents.csv", "images/loss_curves.png", "images/optimised.png"]
    assert_shards_merge(optimise, tmp_path, tables, "cxr_inversion_encoder.optimise")
    assert len(list((tmp_path / "out/projections").iterdir())) == 7


def test_optimised_images_are_nearer_than_the_encoders(folder, datalist, tmp_path):
    run(make(folder, tmp_path / "encoded", datalist, config="inference"))
    run(make(folder, tmp_path / "out", datalist, steps=40, initial_lr=0.05))
    encoded, optimised = (Embedding.read(tmp_path / name / "embedding") for name in ("encoded", "out"))
    assert (optimised.stage, optimised.encoder_sha256) == ("optimised", sha256(folder / "model.pt"))
    errors = [[item["mse"] for item in embedding.items] for embedding in (encoded, optimised)]
    assert [item["image"] for item in optimised.items] == [item["image"] for item in encoded.items]
    assert np.less(errors[1], errors[0]).all()
    with torch.no_grad():
        images = generator_of(folder)(torch.from_numpy(optimised.latents)).clamp(0, 1).numpy()[:, 0]
    for image, latents, item in zip(images, optimised.latents, optimised.items, strict=True):
        name = Path(item["image"]).stem
        record = ProjectionRecord(tmp_path / "out/projections" / f"{name}.npz")
        np.testing.assert_array_equal(record.w, latents)
        assert record.loss_curve.shape == (40,)
        assert record.settings["encoder_sha256"] == sha256(folder / "model.pt")
        assert record.settings["generator_sha256"] == sha256(folder / "generator.pt")
        assert (record.settings["space"], record.settings["pixel_weight"]) == ("z", 1.0)
        np.testing.assert_allclose(pixels(tmp_path / "out/reconstructions" / f"{name}.png"), image, atol=0.51 / 255)
    # originals, the encoder's, the optimised, their difference
    assert Image.open(tmp_path / "out/images/optimised.png").size == (4 * 18 - 2, 4 * 18 - 2)
    assert (tmp_path / "out/images/loss_curves.png").is_file()


def test_generator_and_encoder_stay_as_they_are(folder, datalist, tmp_path):
    for config in ("inference", "optimise"):
        workflow = make(folder, tmp_path / config, datalist, config=config)
        workflow.initialize()
        loaded = workflow.parser.get_parsed_content("latent_generator")
        before = {name: value.clone() for name, value in loaded.state_dict().items()}
        workflow.run()
        torch.testing.assert_close(dict(loaded.state_dict()), before, rtol=0, atol=0)
        encoder = workflow.parser.get_parsed_content("network").state_dict()
        given = torch.load(folder / "model.pt", weights_only=True)
        torch.testing.assert_close(dict(encoder), dict(given), rtol=0, atol=0)


def test_start_from_the_mean_needs_no_encoder(folder, datalist, tmp_path):
    run(make(folder, tmp_path / "out", datalist, start="mean", model_path=str(tmp_path / "absent.pt")))
    assert Embedding.read(tmp_path / "out/embedding").encoder_sha256 == ""


@pytest.mark.parametrize("lost", ["projections/image1.npz", "reconstructions/image1.png"])
def test_lost_result_is_made_again_with_its_group(lost, folder, datalist, tmp_path):
    run(make(folder, tmp_path / "out", datalist))
    before = files_in(tmp_path / "out")
    (tmp_path / "out" / lost).unlink()
    shutil.rmtree(tmp_path / "out/embedding")
    run(make(folder, tmp_path / "out", datalist, resume="true"))
    assert files_in(tmp_path / "out") == before
    assert_refused(
        r"4 of 4 results are in the output folder already; .*--resume true", folder, tmp_path / "out", datalist
    )


def test_another_setting_is_not_mixed_into_an_earlier_optimisation(folder, datalist, tmp_path):
    run(make(folder, tmp_path / "out", datalist))
    assert_refused("made with steps 6, this run has 5", folder, tmp_path / "out", datalist, resume=True, steps=5)
    other = tmp_path / "other.pt"
    torch.manual_seed(1)
    torch.save(ConvNeXtEncoder(**ENCODER).state_dict(), other)
    settings = {"resume": True, "model_path": str(other)}
    assert_refused(r"made with encoder_sha256 \w+, this run has", folder, tmp_path / "out", datalist, **settings)


def test_image_that_diverges_is_listed_and_the_others_are_embedded(folder, datalist, tmp_path, monkeypatch):
    real = LatentOptimiser.starts

    def broken_for_the_brightest(self, images, network=None):
        levels = images.mean((1, 2, 3))
        return real(self, images, network) / (levels < levels.max())[:, None, None]

    monkeypatch.setattr(LatentOptimiser, "starts", broken_for_the_brightest)
    run(make(folder, tmp_path / "out", datalist, batch_size=4))
    assert len(Embedding.read(tmp_path / "out/embedding")) == 3
    assert "its projection ended in values that are not finite" in (tmp_path / "out/rejected.csv").read_text()


@pytest.mark.slow(reason="starts four optimisations as processes; importing MONAI alone takes seconds in each")
def test_optimisation_killed_with_sigkill_and_resumed_leaves_the_same_files(folder, datalist, tmp_path):
    settings = {"input_dir": datalist.parent, "model_path": folder / "model.pt", "batch_size": 3, "steps": 300}
    config = ["configs/optimise.json", str(folder / "tiny.json"), str(folder / "optimise.json")]
    expected, found, _, _ = search_killed_twice(BUNDLE, config, tmp_path, 16, **settings)
    assert len([name for name in expected if name.startswith("projections/")]) == 16
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


# ---------------------------------------------------------------------------------------------------------------------
# mistakes


@pytest.mark.parametrize("config", ["inference", "optimise"])
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model_path": "absent.pt"}, r"no weights at absent\.pt; .*--model_path"),
        ({"generator_weights": "absent.pt"}, r"absent\.pt"),
        ({"image_size": 32}, r"image_size of the encoder must be the generator's, \[16,16\], got \(32, 32\)"),
        ({"in_channels": 3}, "in_channels of the encoder must be the generator's, 1, got 3"),
        ({"latent_dim": 16}, r"latent_shape of the encoder must be the generator's, \[1,8\], got \(1, 16\)"),
        ({"space": "w"}, "space must be z for a PGGANGenerator, got 'w'"),
        ({"split": "holdout"}, "split holdout is missing; it has training"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"input_dir": "absent"}, "expected a folder, got absent"),
    ],
)
def test_mistakes_in_the_settings_are_one_line(config, overrides, message, folder, datalist, tmp_path):
    assert_refused(message, folder, tmp_path / "out", datalist, config=config, **overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"start": "noise"}, "start must be one of encoder, mean, got 'noise'"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"ramp_down": 2}, "ramp_down must be a number from 0 to 1, got 2"),
        ({"pixel_weight": -1}, "pixel_weight must be"),
        ({"resume": "perhaps"}, "a switch must be true or false, got 'perhaps'"),
    ],
)
def test_mistakes_in_an_optimisation_are_one_line(overrides, message, folder, datalist, tmp_path):
    assert_refused(message, folder, tmp_path / "out", datalist, **overrides)


@pytest.mark.parametrize("config", ["inference", "optimise"])
def test_encoder_of_another_generator_is_refused(config, folder, datalist, tmp_path):
    torch.manual_seed(1)
    torch.save(PGGANGenerator(**TINY).state_dict(), tmp_path / "other.pt")
    settings = {"config": config, "generator_weights": str(tmp_path / "other.pt")}
    assert_refused(
        r"generator_sha256 must be \w+ as in the training of", folder, tmp_path / "out", datalist, **settings
    )


@pytest.mark.parametrize("config", ["inference", "optimise"])
def test_empty_split_is_refused(config, folder, datalist, tmp_path):
    content = json.loads(datalist.read_text()) | {"test": []}
    (tmp_path / "datalist.json").write_text(json.dumps(content))
    settings = {"config": config, "split": "test", "dataset_dir": str(datalist.parent)}
    assert_refused("split test is empty; it has", folder, tmp_path / "out", tmp_path / "datalist.json", **settings)


def test_published_settings_are_the_defaults_of_the_config():
    parser = ConfigParser()
    parser.read_config(BUNDLE / "configs" / "optimise.json")
    published = {"steps": 3000, "initial_lr": 0.1, "ramp_up": 0.05, "ramp_down": 0.4, "batch_size": 32}
    published |= {"pixel_weight": 1.0, "perceptual_weight": 0.8, "similarity_weight": 0.1, "start": "encoder"}
    assert {name: parser[name] for name in published} == published


@pytest.mark.parametrize("config", ["inference", "optimise"])
def test_config_has_the_properties_that_monai_asks_for(config, folder, datalist, tmp_path):
    workflow = make(folder, tmp_path / "out", datalist, config=config)
    workflow.initialize()
    assert workflow.check_properties() == []
