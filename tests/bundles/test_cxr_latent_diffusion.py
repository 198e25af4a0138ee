"""Training of the latent diffusion bundle as its users run it: conditioned, killed, distributed, and mistaken."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from PIL import Image
from running import (
    assert_one_line,
    assert_same_training,
    command,
    finish,
    kill_after_next_checkpoint,
    run,
    start,
    start_afresh,
    state,
    terminate_after_next_checkpoint,
)

from medgen.data.image_set import file_sha256
from medgen.networks import KLAutoencoder
from medgen.registry import pull, register_bundle

BUNDLE = Path(__file__).parents[2] / "bundles" / "cxr_latent_diffusion"
TRAIN = ["configs/train.json", "configs/demo.json"]


def save_autoencoder(path: Path, seed: int) -> Path:
    """The demo's autoencoder with random weights."""
    torch.manual_seed(seed)
    parser = ConfigParser(
        ConfigParser.load_config_files([str(BUNDLE / "configs" / name) for name in ("train.json", "demo.json")])
    )
    network = parser.get_parsed_content("autoencoder_def")
    assert isinstance(network, KLAutoencoder)
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def prepared(ingredients: Callable[[Path], dict[str, str]]) -> dict[str, str]:
    """Settings of a training: an autoencoder, the latents of the data, and a text encoder."""
    return {name: value for name, value in ingredients(BUNDLE).items() if name != "samples_dir"}


@pytest.fixture(scope="module")
def train(prepared, workflow) -> Callable[..., Any]:
    """A workflow of the training, with everything that it needs and overlays of the bundle."""

    def make(output_dir: Path, *overlays: str, **overrides: Any) -> Any:
        ids: dict[str, Any] = {}
        for overlay in overlays:
            ids |= ConfigParser.load_config_file(str(BUNDLE / "configs" / overlay))
        return workflow(BUNDLE, "train", output_dir, **{**ids, **prepared, **overrides})

    return make


@pytest.mark.slow(reason="starts four trainings as processes of their own; importing MONAI alone takes seconds in each")
def test_training_killed_with_sigkill_at_random_points_ends_with_the_same_state(datalist, prepared, tmp_path):
    settings = {**prepared, "datalist": datalist, "batch_size": 2, "max_epochs": 8, "val_interval": 2}
    settings |= {"checkpoint_interval": 1, "resume": "true", "preview_steps": 2, "num_workers": 1, "snr_gamma": 5}
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    running = start(BUNDLE, command(TRAIN, undisturbed, **settings))
    seed = int(time.time())
    print(f"seed of the kills: {seed}")
    rng = random.Random(seed)
    for interrupt in (kill_after_next_checkpoint, terminate_after_next_checkpoint):
        interrupt(start(BUNDLE, command(TRAIN, killed, **settings)), killed, rng)
    assert "resumed from" in finish(start_afresh(BUNDLE, command(TRAIN, killed, **settings)))
    finish(running)
    assert state(undisturbed)["images_seen"] == 32
    assert {"network", "ema", "optimizer", "lr_scheduler"} <= set(state(killed)["components"])
    assert_same_training(undisturbed, killed)


@pytest.mark.slow(reason="starts three trainings of two processes under torchrun")
def test_two_processes_hold_one_network_and_resume_it(datalist, prepared, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    config_file = [*TRAIN, "configs/multi_gpu_train.json"]
    settings = {**prepared, "datalist": datalist, "batch_size": 1, "val_interval": 1, "preview_steps": 2}
    straight, paused = tmp_path / "straight", tmp_path / "paused"
    output = finish(start(BUNDLE, command(config_file, straight, max_epochs=4, **settings), *torchrun))
    assert "2 process(es)" in output
    finish(start(BUNDLE, command(config_file, paused, max_epochs=2, **settings), *torchrun))
    finish(start(BUNDLE, command(config_file, paused, max_epochs=4, resume="true", **settings), *torchrun))
    assert state(straight)["images_seen"] == 16
    assert_same_training(straight, paused)
    assert not any(name.startswith("module.") for name in torch.load(straight / "model.pt", weights_only=True))


def test_the_moving_average_is_kept_with_all_that_sampling_needs_beside_it(prepared, train, tmp_path):
    run(train(tmp_path))
    models = tmp_path / "models"
    best = json.loads((tmp_path / "best.json").read_text())
    assert best["metric"] == "val_loss"
    checkpoint = "last" if best["images_seen"] == 8 else "previous"
    components = torch.load(tmp_path / "checkpoints" / f"{checkpoint}.pt", weights_only=True)["components"]
    saved = torch.load(models / "model.pt", weights_only=True)
    torch.testing.assert_close(saved, components["ema"], rtol=0, atol=0)
    assert any(not torch.equal(saved[name], value) for name, value in components["network"].items())
    assert file_sha256(models / "autoencoder.pt") == file_sha256(prepared["autoencoder_path"])
    scaling = json.loads((models / "scaling.json").read_text())
    assert scaling["autoencoder_sha256"] == file_sha256(models / "autoencoder.pt")
    trained_as = json.loads((models / "trained_as.json").read_text())
    assert trained_as["prediction_type"] == "v_prediction"
    assert trained_as["conditioning"] == "text"
    assert trained_as["text_encoder"]
    assert trained_as["scale"] == scaling["scale"]
    assert trained_as["num_head_channels"] == [0, 32, 32]  # of which the shapes of weights say nothing
    about = json.loads((models / "trained_on.json").read_text())
    assert about["unknown"] == [Path(prepared["autoencoder_path"]).name]  # whose training left no record
    assert about["images"] == {"training": 4, "validation": 2}
    assert [len(about["patients"][split]) for split in ("training", "validation")] == [4, 2]


@pytest.mark.parametrize(
    ("overlays", "overrides"),
    [
        (["unconditional.json"], {"prediction_type": "epsilon"}),
        (["labels.json"], {"snr_gamma": 5.0}),
        (["rectified_flow.json"], {}),
        (["unconditional.json", "rectified_flow.json", "pixels.json"], {"augment_prob": 0.5}),
        (["pixels.json"], {"prediction_type": "sample", "preview_prompts": ["effusion", "normal"]}),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else None,
)
def test_variants_train_validate_and_show_samples(overlays, overrides, train, tmp_path):
    run(train(tmp_path, *overlays, **overrides))
    picture = np.asarray(Image.open(tmp_path / "images" / "samples_0002.png"))
    assert picture.shape == (3 * 66 - 2, 8 * 66 - 2)
    losses = state(tmp_path)["components"]["best_model"]
    assert 0 < losses["best"] < 10


def test_pixels_and_cached_latents_give_the_same_validation_loss(train, tmp_path):
    """Of the untrained network: the caches hold the posteriors that the encoder gives, to the digits of float16."""
    first = train(tmp_path / "cached", "unconditional.json", max_epochs=1, lr=1e-30)
    second = train(tmp_path / "pixels", "unconditional.json", "pixels.json", max_epochs=1, lr=1e-30)
    run(first)
    run(second)
    best = [state(tmp_path / name)["components"]["best_model"]["best"] for name in ("cached", "pixels")]
    assert best[0] == pytest.approx(best[1], rel=1e-3)


def test_configuration_is_that_of_the_source():
    """Constants of generative_chestxray, with what it lacked: EMA, warm-up and clipping."""
    parser = ConfigParser()
    parser.read_config(BUNDLE / "configs" / "train.json")
    parser["conditioning"] = "text"
    source = {
        **{"num_train_timesteps": 1000, "beta_start": 0.0015, "beta_end": 0.0205, "prediction_type": "v_prediction"},
        **{"lr": 2.5e-5, "weight_decay": 0.01, "drop_prob": 0.1, "augment_prob": 0.1, "max_epochs": 500},
        **{"val_interval": 10, "seed": 2, "latent_shape": (3, 64, 64), "context_dim": 1024},
    }
    assert {name: parser.get_parsed_content(name) for name in source} == source
    with torch.device("meta"):
        network = parser.get_parsed_content("network_def")
    assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(263.6e6, rel=1e-3)
    scheduler = parser.get_parsed_content("noise_scheduler")
    betas = np.linspace(0.0015**0.5, 0.0205**0.5, 1000) ** 2
    np.testing.assert_allclose(scheduler.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-4)


@pytest.mark.parametrize(("overlay", "ours"), [(None, None), ("latents_64.json", "small_64.json")])
def test_autoencoders_of_the_other_bundle_are_those_that_the_configs_expect(overlay, ours):
    def shapes(bundle: Path, network: str, overlay: str | None) -> dict[str, torch.Size]:
        names = ["train.json", *([overlay] if overlay else [])]
        parser = ConfigParser(ConfigParser.load_config_files([str(bundle / "configs" / name) for name in names]))
        with torch.device("meta"):
            return {name: value.shape for name, value in parser.get_parsed_content(network).state_dict().items()}

    trained = shapes(BUNDLE.parent / "cxr_autoencoder_kl", "network_def", overlay)
    assert trained == shapes(BUNDLE, "autoencoder_def", ours)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"text_encoder": None}, "text_encoder"),
        ({"text_encoder": "/nowhere/clip"}, r"/nowhere/clip"),
        ({"context_dim": 64}, "context_dim"),
        ({"conditioning": "words"}, "conditioning"),
        ({"conditioning": "label", "num_classes": 1}, r"label must be a class from 0 to 0"),
        ({"prediction_type": "velocity"}, "prediction_type"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"lr": 0}, "lr must be a number above 0"),
        ({"drop_prob": 1.5}, "drop_prob must be a number from 0 to 1"),
        ({"image_size": 60}, "image_size must be a multiple of 16, got 60"),
        ({"image_size": 128}, r"latent"),
        ({"latents_dir": "/nowhere/latents"}, r"/nowhere/latents"),
        ({"model_path": "."}, r"model_path must be a file, got the folder \."),
        ({"preview_sampler": "euler"}, "sampler must be one of"),
    ],
)
def test_mistakes_in_the_settings_are_one_line(overrides, message, train, tmp_path):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(train(tmp_path / "out", **overrides))
    assert_one_line(caught.value, message)
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_latents_of_another_autoencoder_are_refused(train, tmp_path):
    other = save_autoencoder(tmp_path / "other.pt", 1)
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(train(tmp_path / "out", autoencoder_path=str(other)))
    assert_one_line(caught.value, r"autoencoder.*other\.pt")


def test_settings_that_change_on_resume_are_refused_but_the_length_may_change(train, tmp_path):
    run(train(tmp_path / "out", max_epochs=1))
    for change, message in (
        ({"prediction_type": "epsilon"}, "made with prediction_type v_prediction, this run has epsilon"),
        ({"num_head_channels": [0, 16, 16]}, r"made with num_head_channels \[0, 32, 32\], this run has"),
    ):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            run(train(tmp_path / "out", resume=True, **change))
        assert_one_line(caught.value, message)
    run(train(tmp_path / "out", resume=True, max_epochs=3))
    assert state(tmp_path / "out")["images_seen"] == 12


@pytest.mark.slow(reason="trains, registers with MLflow, pulls, and samples")
def test_registered_model_samples_where_it_is_pulled_without_its_overlays(train, tmp_path):
    run(train(tmp_path, "unconditional.json", max_epochs=1))
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    overlays = [BUNDLE / "configs" / name for name in ("demo.json", "unconditional.json")]
    weights = tmp_path / "models" / "model.pt"
    version = register_bundle(BUNDLE, "diffusion", uri, overlays=overlays, weights=weights)
    pulled = pull(f"models:/diffusion/{version}", tmp_path / "pulled", uri)
    settings = {"bundle_root": str(pulled), "output_dir": str(tmp_path / "out"), "seeds": "0-2", "num_steps": 2}
    config = str(pulled / "configs" / "inference.json")
    run(ConfigWorkflow(config, logging_file=False, workflow_type="infer", num_workers=0, **settings))
    assert len(list((tmp_path / "out" / "samples").glob("*.png"))) == 3


def test_weights_are_sampled_only_as_they_were_trained(prepared, train, tmp_path):
    run(train(tmp_path, max_epochs=1))
    configs = [str(BUNDLE / "configs" / name) for name in ("inference.json", "demo.json")]
    settings = {
        "bundle_root": str(BUNDLE),
        "model_path": str(tmp_path / "models" / "model.pt"),
        "output_dir": str(tmp_path / "samples"),
        "text_encoder": prepared["text_encoder"],
        "prompt": "effusion",
        "seeds": "0-1",
        "num_steps": 2,
        "num_workers": 0,
    }
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(ConfigWorkflow(configs, logging_file=False, workflow_type="infer", prediction_type="epsilon", **settings))
    assert_one_line(caught.value, r"prediction_type must be v_prediction as in the training of .*, got epsilon")
    run(ConfigWorkflow(configs, logging_file=False, workflow_type="infer", **settings))
    assert len(list((tmp_path / "samples" / "samples").glob("*.png"))) == 2
