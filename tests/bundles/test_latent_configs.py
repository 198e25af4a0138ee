"""Encoding and evaluation of the latent diffusion bundle as their users run them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.metrics import MultiScaleSSIMMetric
from PIL import Image
from running import assert_one_line, assert_shards_merge

from medgen.data import LatentScaling, load_latents
from medgen.metrics import RadiomicsExtractor, frd_score
from medgen.metrics.extractors import EXTRACTORS, XRVDenseNetFeatures
from medgen.networks import KLAutoencoder
from medgen.transforms import LoadLatentd

BUNDLES = Path(__file__).parents[2] / "bundles"
CONFIGS = BUNDLES / "cxr_latent_diffusion" / "configs"
SMALL = {
    "image_size": 64,
    "autoencoder_channels": [32, 32, 64],
    "autoencoder_res_blocks": 1,
    "num_workers": 0,
    "batch_size": 2,
    "seed": 5,
}
SHAPE = (3, 16, 16)


def make_autoencoder(seed: int = 0) -> KLAutoencoder:
    torch.manual_seed(seed)
    return KLAutoencoder(
        2,
        in_channels=1,
        out_channels=1,
        num_res_blocks=1,
        channels=[32, 32, 64],
        attention_levels=[False] * 3,
        latent_channels=3,
        norm_num_groups=32,
        norm_eps=1e-6,
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    ).eval()


@pytest.fixture(scope="module")
def autoencoder_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "autoencoder.pt"
    torch.save(make_autoencoder().state_dict(), path)
    return path


def run(config: str, overlays: tuple[str, ...] = (), **settings: Any) -> ConfigWorkflow:
    files = [str(CONFIGS / f"{name}.json") for name in (config, *overlays)]
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in {**SMALL, **settings}.items()}
    workflow = ConfigWorkflow(files, logging_file=False, workflow_type="infer", **settings)
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    return workflow


def pixels(path: str) -> torch.Tensor:
    return torch.from_numpy(np.asarray(Image.open(path), np.float32) / 255)[None]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_latents_are_the_posteriors_of_the_images(datalist, autoencoder_path, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    workflow = run("encode", datalist=datalist, autoencoder_path=autoencoder_path, latents_dir=tmp_path, shard_size=3)

    assert workflow.check_properties() == []
    scaling = LatentScaling.read(tmp_path / "scaling.json")
    network, means, stds = make_autoencoder(), [], []
    for split in ("training", "validation", "test"):
        for item in load_latents(tmp_path, datalist, split, None, autoencoder_path, SHAPE):
            with torch.no_grad():
                mean, std = network.encode(pixels(item["image"])[None])
            row = np.load(item["latent"]["file"])[item["latent"]["row"]]
            np.testing.assert_allclose(row[0], torch.cat([mean, std]), rtol=2**-10, atol=2e-4)
            loaded = LoadLatentd("latent", scaling, posterior="mean")(item)["image"]
            torch.testing.assert_close(scaling.unwhiten(loaded), mean[0], rtol=2**-10, atol=2e-4)
            if split == "training":
                means.append(mean)
                stds.append(std)
    variance = torch.cat(means).var(correction=0) + torch.cat(stds).square().mean()
    assert scaling.scale == pytest.approx((variance.item() ** -0.5,), rel=1e-3)
    printed = capsys.readouterr().out.splitlines()[-1]
    assert "encoding 8 of 8 images, 0 augmented copies each" in caplog.text
    assert "8 images encoded in" in caplog.text
    assert f"{scaling}" in caplog.text
    assert printed.startswith(f"8 images, 8 of them encoded now: latents in {tmp_path}; scale ")


def test_interrupted_encoding_ends_with_the_same_bytes(datalist, autoencoder_path, tmp_path, monkeypatch):
    settings = {"datalist": datalist, "autoencoder_path": autoencoder_path, "shard_size": 3, "augmented_copies": 2}
    run("encode", latents_dir=tmp_path / "whole", **settings)

    def break_off(store: Any, stem: str, shard: range) -> None:
        if stem == "00001":
            raise KeyboardInterrupt
        write(store, stem, shard)

    from medgen.data.latents import LatentStore

    write = LatentStore._write_shard
    with monkeypatch.context() as patch:
        patch.setattr(LatentStore, "_write_shard", break_off)
        with pytest.raises(KeyboardInterrupt):
            run("encode", latents_dir=tmp_path / "cut", **settings)
    assert sorted(content(tmp_path / "cut")) == ["00000.json", "00000.npy", "latents.json"]
    run("encode", latents_dir=tmp_path / "cut", resume="true", **settings)

    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    with pytest.raises((RuntimeError, ValueError)) as error:
        run("encode", latents_dir=tmp_path / "cut", **settings)
    assert_one_line(error.value, "holds latents of 8 images already; keep them")


def test_shards_and_their_merge_leave_the_files_of_one_process(datalist, autoencoder_path, tmp_path):
    def encode(latents_dir: Path, **shard: str) -> None:
        settings = {"autoencoder_path": autoencoder_path, "shard_size": 3, "augmented_copies": 1}
        run("encode", latents_dir=latents_dir, datalist=datalist, **settings, **shard)

    assert_shards_merge(encode, tmp_path, ["scaling.json"], "cxr_latent_diffusion.encode")


def test_copies_are_of_the_images_moved_a_little(datalist, autoencoder_path, tmp_path):
    run("encode", datalist=datalist, autoencoder_path=autoencoder_path, latents_dir=tmp_path, augmented_copies=3)

    posteriors = np.load(tmp_path / "00000.npy").astype(np.float32)
    assert posteriors.shape == (8, 4, 2, *SHAPE)
    original, copies = posteriors[:, :1, 0], posteriors[:, 1:, 0]
    near = np.abs(copies - original).mean((2, 3, 4))
    others = np.abs(original[1:] - original[:-1]).mean()
    assert (near > 0).all()
    assert near.mean() < others


def test_images_are_prepared_as_for_the_autoencoders_training():
    encode = ConfigParser.load_config_file(CONFIGS / "encode.json")
    train = ConfigParser.load_config_file(BUNDLES / "cxr_autoencoder_kl" / "configs" / "train.json")

    assert encode["deterministic_transforms"][1:] == train["train"]["deterministic_transforms"][1:]
    affine = {**train["train"]["random_transforms"][0], "prob": 1.0}
    assert encode["augmentation"] == affine


def test_evaluation_prepares_images_and_names_networks_as_the_others_do():
    configs = {
        name: ConfigParser.load_config_file(CONFIGS / f"{name}.json") for name in ("encode", "evaluate", "train")
    }

    assert configs["evaluate"]["preprocessing"]["transforms"][1:] == configs["encode"]["deterministic_transforms"][1:]
    assert configs["evaluate"]["network_def"] == configs["train"]["network_def"]
    for config in configs.values():
        assert config["autoencoder_def"] == configs["train"]["autoencoder_def"]
        assert config["autoencoder"] == configs["train"]["autoencoder"]


@pytest.mark.parametrize(
    "overlays", [("small_64", "unconditional"), ("demo", "rectified_flow"), ("small_64", "labels")]
)
def test_overlays_of_training_do_no_harm(datalist, autoencoder_path, tmp_path, overlays):
    run(
        "encode",
        overlays,
        datalist=datalist,
        autoencoder_path=autoencoder_path,
        latents_dir=tmp_path,
        splits="training",
        write_latents="false",
        scaling="channel",
    )

    assert [path.name for path in tmp_path.iterdir()] == ["scaling.json"]
    assert len(LatentScaling.read(tmp_path / "scaling.json").scale) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"autoencoder_path": "none.pt"}, "no autoencoder at none.pt"),
        ({"scaling": "pixel"}, "scaling must be global or channel, got 'pixel'"),
        ({"shard_size": 0}, "shard_size must be a whole number of at least 1, got 0"),
        ({"augmented_copies": -1}, "augmented_copies must be a whole number of at least 0, got -1"),
        ({"image_size": 66}, "image_size must be a multiple of 4, got 66"),
        ({"image_size": 128}, "expected at least 128 × 128|128"),
        ({"autoencoder_channels": [32, 64, 64]}, "belongs to another architecture"),
        ({"splits": ["training", "tests"]}, "split tests is missing"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_settings_end_in_one_line(datalist, autoencoder_path, tmp_path, change, message):
    settings = {"datalist": datalist, "autoencoder_path": autoencoder_path, "latents_dir": tmp_path, **change}

    with pytest.raises((RuntimeError, ValueError)) as error:
        run("encode", **settings)

    assert_one_line(error.value, message)


def test_encoding_with_another_autoencoder_is_refused(datalist, autoencoder_path, tmp_path):
    settings = {"datalist": datalist, "latents_dir": tmp_path / "latents"}
    run("encode", autoencoder_path=autoencoder_path, **settings)
    torch.save(make_autoencoder(seed=1).state_dict(), tmp_path / "other.pt")

    with pytest.raises((RuntimeError, ValueError)) as error:
        run("encode", autoencoder_path=tmp_path / "other.pt", resume=True, **settings)

    assert_one_line(error.value, r"latents.* are of another autoencoder .* than .*other\.pt")


def test_unreadable_image_is_named(datalist, autoencoder_path, tmp_path):
    shutil.copytree(datalist.parent, tmp_path / "data")
    name = json.loads(datalist.read_text())["training"][1]["image"]
    (tmp_path / "data" / name).write_bytes(b"no picture")

    with pytest.raises((RuntimeError, ValueError)) as error:
        run(
            "encode",
            datalist=tmp_path / "data" / "datalist.json",
            autoencoder_path=autoencoder_path,
            latents_dir=tmp_path / "latents",
        )

    assert_one_line(error.value, name)


# ---------------------------------------------------------------------------------------------------------------------


def write_images(folder: Path, count: int, blur: float, seed: int) -> None:
    """Discs in noise, as a datalist's test images or as inference.json's samples."""
    (folder / "samples").mkdir(parents=True)
    random, (row, column) = np.random.default_rng(seed), np.mgrid[:64, :64] / 64
    items = []
    for number in range(count):
        y, x, radius = random.uniform((0.3, 0.3, 0.1), (0.7, 0.7, 0.3))
        disc = 1 / (1 + np.exp((np.hypot(row - y, column - x) - radius) / blur))
        grey = np.clip(60 + 120 * disc + random.normal(0, 8, disc.shape), 0, 255).astype(np.uint8)
        Image.fromarray(grey).save(folder / "samples" / f"{number}.png")
        made_by = {"model": "models:/ldm/3", "model_sha256": "ab" * 32}
        items.append({"image": f"samples/{number}.png", "patient": f"p{number}", **made_by})
    content = {"name": "discs", "modality": "X-ray", "test": items}
    (folder / "datalist.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Twelve real images and fourteen samples."""
    folder = tmp_path_factory.mktemp("judged")
    write_images(folder / "real", 12, 0.01, 0)
    write_images(folder / "made", 14, 0.03, 1)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MEDGEN_CACHE", str(tmp_path_factory.mktemp("cache")))


def as_tensors(folder: Path) -> torch.Tensor:
    items = json.loads((folder / "datalist.json").read_text())["test"]
    return torch.stack([pixels(folder / item["image"]) for item in items])


def test_evaluation_measures_what_its_names_say(judged, autoencoder_path, tmp_path, caplog):
    settings = {"datalist": judged / "real" / "datalist.json", "samples_dir": judged / "made", "max_images": 12}
    workflow = run("evaluate", autoencoder_path=autoencoder_path, output_dir=tmp_path, batch_size=5, **settings)

    assert workflow.check_properties() == []
    figures = json.loads((tmp_path / "metrics.json").read_text())
    real, network = as_tensors(judged / "real"), make_autoencoder()
    with torch.no_grad():
        reconstructed = network(real).clamp(0, 1)
    ms_ssim = MultiScaleSSIMMetric(spatial_dims=2, kernel_size=3)
    assert figures["ms_ssim_reconstruction"] == pytest.approx(ms_ssim(reconstructed, real).mean().item(), abs=1e-4)
    first, second = np.triu_indices(12, 1)
    assert figures["ms_ssim_test"] == pytest.approx(ms_ssim(real[first], real[second]).mean().item(), abs=1e-4)
    radiomics = RadiomicsExtractor("frd_v1")
    levels = (reconstructed * 255).round() / 255
    of_real, of_reconstructed = (
        np.concatenate([radiomics.on_images([image.numpy()]) for image in images]) for images in (real, levels)
    )
    assert figures["frd_reconstruction"] == pytest.approx(frd_score(of_real, of_reconstructed), abs=0.05)
    assert {figures[name] for name in ("n", "n_samples", "n_test")} == {12}
    assert {"frd", "frd_equal_n", "frd_reconstruction_equal_n", "frd_real", "ms_ssim_samples"} <= figures.keys()
    assert figures["frd_real"] < figures["frd_equal_n"]
    assert (figures["model"], figures["model_sha256"]) == ("models:/ldm/3", "ab" * 32)
    left_out = [record.message for record in caplog.records if "fid_xrv" in record.message]
    assert len(left_out) == 1
    assert "densenet121" in left_out[0]
    assert not any(name.startswith("fid_xrv") for name in figures)
    assert Image.open(tmp_path / "images" / "samples_over_test.png").size == (8 * 66 - 2, 2 * 66 - 2)
    assert Image.open(tmp_path / "images" / "test.png").height == 3 * 66 - 2


def test_real_images_as_samples_are_as_near_as_real_images(judged, autoencoder_path, tmp_path):
    write_images(tmp_path / "more", 12, 0.01, 2)
    settings = {"datalist": judged / "real" / "datalist.json", "samples_dir": tmp_path / "more"}

    run("evaluate", autoencoder_path=autoencoder_path, output_dir=tmp_path, **settings)

    figures = json.loads((tmp_path / "metrics.json").read_text())
    assert figures["frd_equal_n"] == pytest.approx(figures["frd_real"], abs=1)
    assert figures["ms_ssim_samples"] == pytest.approx(figures["ms_ssim_test"], abs=0.1)


def test_reconstructions_are_measured_without_samples(datalist, autoencoder_path, tmp_path, caplog):
    run("evaluate", autoencoder_path=autoencoder_path, output_dir=tmp_path, datalist=datalist)

    figures = json.loads((tmp_path / "metrics.json").read_text())
    assert {"ms_ssim_reconstruction", "ms_ssim_test", "frd_reconstruction", "n_test"} <= figures.keys()
    assert not {"frd", "frd_real", "ms_ssim_samples", "n_samples"} & figures.keys()
    assert "samples are left out: none given" in caplog.text
    assert "frd at equal n is left out: halves take at least 4 patients" in caplog.text


def test_samples_of_another_size_are_fitted_and_broken_ones_left_out(judged, autoencoder_path, tmp_path, caplog):
    shutil.copytree(judged / "made", tmp_path / "made")
    for number in range(14):
        path = tmp_path / "made" / "samples" / f"{number}.png"
        Image.open(path).resize((128, 160)).save(path)
    path.write_bytes(b"no picture")
    settings = {"datalist": judged / "real" / "datalist.json", "samples_dir": tmp_path / "made"}

    run("evaluate", autoencoder_path=autoencoder_path, output_dir=tmp_path, **settings)

    assert json.loads((tmp_path / "metrics.json").read_text())["n_samples"] == 12
    assert "samples/13.png of the samples is left out" in caplog.text


def test_too_few_samples_are_told_before_images_are_reconstructed(judged, autoencoder_path, tmp_path):
    write_images(tmp_path / "made", 1, 0.03, 1)
    settings = {"datalist": judged / "real" / "datalist.json", "samples_dir": tmp_path / "made"}

    with pytest.raises((RuntimeError, ValueError)) as error:
        run("evaluate", autoencoder_path=autoencoder_path, output_dir=tmp_path / "output", **settings)

    assert_one_line(error.value, "at least 2 samples and 2 real images, got 1; make more")
    assert not (tmp_path / "output" / "reconstructions").exists()


def test_fid_takes_the_weights_that_are_named(judged, autoencoder_path, tmp_path, monkeypatch):
    class Means(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.shape[1:] == (1, 224, 224)
            return torch.nn.functional.avg_pool2d(x, 112).flatten(1)[:, :, None, None]

    monkeypatch.setitem(
        EXTRACTORS, "xrv", lambda protocol, weights, device: XRVDenseNetFeatures(protocol, network=Means())
    )
    settings = {"datalist": judged / "real" / "datalist.json", "samples_dir": judged / "made", "max_images": 12}

    run("evaluate", autoencoder_path=autoencoder_path, output_dir=tmp_path, xrv_weights="w.pt", **settings)

    figures = json.loads((tmp_path / "metrics.json").read_text())
    assert {"fid_xrv", "fid_xrv_equal_n", "fid_xrv_real", "fid_xrv_reconstruction"} <= figures.keys()
    assert figures["fid_xrv"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples_dir": "nothing"}, "no samples in nothing: .* make them with inference.json"),
        ({"xrv_weights": "nothing.pt"}, "densenet121.*not found at nothing.pt"),
        ({"max_images": 1}, "max_images must be a whole number of at least 2, got 1"),
        ({"split": "validation"}, "split validation is missing"),
        ({"autoencoder_path": "nothing.pt"}, "no autoencoder at nothing.pt"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_settings_of_an_evaluation_end_in_one_line(judged, autoencoder_path, tmp_path, change, message):
    settings = {
        "datalist": judged / "real" / "datalist.json",
        "samples_dir": judged / "made",
        "autoencoder_path": autoencoder_path,
        "output_dir": tmp_path,
    }

    with pytest.raises((RuntimeError, ValueError)) as error:
        run("evaluate", **{**settings, **change})

    assert_one_line(error.value, message)
