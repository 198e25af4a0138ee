"""Both trainings of the inversion encoder, as their users run them."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser
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

from medgen.data import derive_seed
from medgen.networks import LatentGenerator, StyleGAN2Generator, begin_encoder

BUNDLE = Path(__file__).parents[2] / "bundles" / "cxr_inversion_encoder"
CONFIGS = BUNDLE / "configs"
STAGES = {
    # a checkpoint at every step, a validation at every other
    "train_bootstrap": {"max_images": 32, "tick_images": 4, "val_interval": 1, "val_images": 4, "batch_size": 2},
    "train": {"max_epochs": 8, "val_interval": 1, "batch_size": 2},
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.slow(reason="starts five trainings as processes; importing MONAI alone takes seconds in each")
def test_training_killed_with_sigkill_at_random_points_ends_with_the_same_state(stage, datalist, ingredients, tmp_path):
    needed = {name: value for name, value in ingredients(BUNDLE).items() if name in json.loads(config_of(stage))}
    settings = {**STAGES[stage], **needed, "checkpoint_interval": 1, "resume": "true"}
    if stage == "train":
        settings["datalist"] = datalist
    config_file = [f"configs/{stage}.json", "configs/demo.json"]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    running = start(BUNDLE, command(config_file, undisturbed, **settings))
    seed = int(time.time())
    print(f"seed of the kills: {seed}")
    rng = random.Random(seed)
    for interrupt in (kill_after_next_checkpoint, terminate_after_next_checkpoint):
        interrupt(start(BUNDLE, command(config_file, killed, **settings)), killed, rng)
    assert "resumed from" in finish(start_afresh(BUNDLE, command(config_file, killed, **settings)))
    finish(running)
    assert state(undisturbed)["images_seen"] == 32
    assert_same_training(undisturbed, killed)


def config_of(stage: str) -> str:
    return (CONFIGS / f"{stage}.json").read_text()


@pytest.fixture(scope="module")
def stylegan2(tmp_path_factory) -> dict[str, str]:
    """A StyleGAN2 of 32×32 pixels and what an encoder of its W+ is begun with."""
    folder = tmp_path_factory.mktemp("stylegan2")
    settings = {"image_size": 32, "channel_base": 64, "channel_max": 8, "latent_dim": 8, "w_dim": 8}
    torch.manual_seed(0)
    network = StyleGAN2Generator(**settings, num_mapping_layers=2)
    torch.save(network.state_dict(), folder / "generator.pt")
    overlay = {"network_def": {"_target_": "medgen.networks.StyleGAN2Generator", **settings, "num_mapping_layers": 2}}
    (folder / "tiny.json").write_text(json.dumps(overlay))
    parser = ConfigParser(ConfigParser.load_config_files([str(CONFIGS / f"{n}.json") for n in ("train", *OVERLAYS)]))
    parser["latent_dim"] = 8
    encoder = begin_encoder(parser.get_parsed_content("network_def"), LatentGenerator(network))
    torch.save(encoder.state_dict(), folder / "bootstrap.pt")
    return {
        "generator": str(BUNDLE.parent / "stylegan2_anomaly"),
        "generator_weights": str(folder / "generator.pt"),
        "generator_overlay": str(folder / "tiny.json"),
        "initial_weights": str(folder / "bootstrap.pt"),
    }


OVERLAYS = ("w_plus", "demo")


@pytest.mark.slow(reason="starts three trainings of two processes under torchrun")
def test_two_processes_with_a_judge_of_styles_hold_one_network_and_resume_it(datalist, stylegan2, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    config_file = [f"configs/{name}.json" for name in ("train", *OVERLAYS, "multi_gpu_train")]
    settings = {**stylegan2, "datalist": datalist, "batch_size": 2, "latent_dim": 8, "val_interval": 1}
    settings |= {"progressive_start": 0, "progressive_images": 4}
    straight, paused = tmp_path / "straight", tmp_path / "paused"
    assert "2 process(es)" in finish(start(BUNDLE, command(config_file, straight, max_epochs=6, **settings), *torchrun))
    finish(start(BUNDLE, command(config_file, paused, max_epochs=3, **settings), *torchrun))
    finish(start(BUNDLE, command(config_file, paused, max_epochs=6, resume="true", **settings), *torchrun))
    final = state(straight)
    assert {"pool", "latent_discriminator", "d_optimizer"} <= set(final["components"])
    assert int(final["components"]["network"]["stage_reached"]) > 1
    assert_same_training(straight, paused)


def test_first_stage_can_be_left_out_on_the_command_line(workflow, tmp_path):
    run(workflow(BUNDLE, "train", tmp_path, initial_weights="null", max_epochs=1))
    assert (tmp_path / "models" / "model.pt").is_file()


def test_images_that_choose_the_model_are_not_those_that_measure_it():
    for name, tag in (("train_bootstrap", 4), ("evaluate_bootstrap", 6)):
        assert f"derive_seed(@seed, {tag}, number)" in config_of(name)
    assert {derive_seed(0, 4, n) for n in range(1000)}.isdisjoint(derive_seed(0, 6, n) for n in range(1000))


def test_latents_of_the_first_stage_are_measured_beside_chance(workflow, tmp_path):
    run(workflow(BUNDLE, "train_bootstrap", tmp_path, val_images=4))
    run(
        workflow(
            BUNDLE,
            "evaluate_bootstrap",
            tmp_path / "measured",
            model_path=str(tmp_path / "models/model.pt"),
            synthetic_images=6,
        )
    )
    figures = json.loads((tmp_path / "measured" / "metrics.json").read_text())
    assert figures["n"] == 6
    # on the sphere both are the same distance
    assert figures["latent_error"] == pytest.approx(2 * (1 - figures["cosine"]), abs=1e-4)
    assert figures["chance_error"] == pytest.approx(2 * (1 - figures["chance_cosine"]), abs=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"initial_weights": "absent.pt"}, r"no weights of the first stage at absent\.pt; .*--initial_weights null"),
        ({"image_size": 64}, r"image_size of the encoder must be the generator's, \[32,32\], got \(64, 64\)"),
        ({"space": "w"}, "space must be z for a PGGANGenerator, got 'w'"),
        ({"similarity_weight": 0.1}, "--discriminator_checkpoint"),
        ({"delta_weight": 0.1}, "delta_weight must be 0 for an encoder of one style"),
        ({"pixel_weight": 0, "ms_ssim_weight": 0}, "all are 0"),
    ],
)
def test_mistakes_are_told_in_one_line(overrides, message, workflow, tmp_path):
    with pytest.raises(Exception) as error:  # noqa: PT011 - MONAI wraps what a config raises
        run(workflow(BUNDLE, "train", tmp_path, **overrides))
    assert_one_line(error.value, message)


def test_weights_of_another_generators_encoder_are_refused(workflow, ingredients, tmp_path):
    run(workflow(BUNDLE, "train_bootstrap", tmp_path, val_images=4))
    torch.manual_seed(9)
    other = ConfigParser(
        ConfigParser.load_config_files(
            [str(BUNDLE.parent / "cxr_pggan" / "configs" / f"{name}.json") for name in ("inference", "demo")]
        )
    ).get_parsed_content("network_def")
    torch.save(other.state_dict(), tmp_path / "other.pt")
    settings = {"generator_weights": str(tmp_path / "other.pt"), "initial_weights": str(tmp_path / "models/model.pt")}
    with pytest.raises(Exception) as error:  # noqa: PT011 - MONAI wraps what a config raises
        run(workflow(BUNDLE, "train", tmp_path / "again", **settings))
    assert_one_line(error.value, r"generator_sha256 must be .* use the generator that it was trained for")
