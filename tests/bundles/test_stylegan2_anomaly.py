"""Training of the StyleGAN2 bundle as its users run it: killed, distributed, transferred, and with their mistakes."""

from __future__ import annotations

import copy
import json
import random
import time
from pathlib import Path

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
    spoil,
    start,
    start_afresh,
    state,
    terminate_after_next_checkpoint,
)

from medgen.data import file_sha256
from medgen.registry import pull, register_bundle

BUNDLE = Path(__file__).parents[2] / "bundles" / "stylegan2_anomaly"
TRAIN = ["configs/train.json", "configs/demo.json"]
FOR_SECONDS = {"batch_size": 2, "tick_images": 4, "val_interval": 1, "augment_rise_images": 40}


@pytest.mark.slow(reason="starts four trainings as processes of their own; importing MONAI alone takes seconds in each")
def test_training_killed_with_sigkill_at_random_points_ends_with_the_same_state(datalist, tmp_path):
    settings = {**FOR_SECONDS, "datalist": datalist, "max_images": 40, "val_interval": 2, "checkpoint_interval": 1}
    settings |= {"augment_p": 0.5, "r1_interval": 3, "path_length_interval": 2, "resume": "true", "num_workers": 1}
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    running = start(BUNDLE, command(TRAIN, undisturbed, **settings))
    seed = int(time.time())
    print(f"seed of the kills: {seed}")
    rng = random.Random(seed)
    for interrupt in (kill_after_next_checkpoint, terminate_after_next_checkpoint):
        interrupt(start(BUNDLE, command(TRAIN, killed, **settings)), killed, rng)
    assert "resumed from" in finish(start_afresh(BUNDLE, command(TRAIN, killed, **settings)))
    finish(running)
    assert state(undisturbed)["images_seen"] == 40
    expected = {"generator", "discriminator", "ema", "g_optimizer", "d_optimizer", "path_length", "augment"}
    assert expected <= set(state(killed)["components"])
    assert state(killed)["components"]["augment"]["p"] not in (0.0, 0.5)
    assert_same_training(undisturbed, killed)
    assert (undisturbed / "best.json").read_text().replace("undisturbed", "killed") == (
        killed / "best.json"
    ).read_text()


@pytest.mark.slow(reason="starts three trainings, two of them of two processes under torchrun")
def test_two_processes_hold_one_network_and_resume_it(datalist, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    config_file = [*TRAIN, "configs/multi_gpu_train.json"]
    settings = {**FOR_SECONDS, "datalist": datalist, "batch_size": 1}
    straight, paused = tmp_path / "straight", tmp_path / "paused"
    output = finish(start(BUNDLE, command(config_file, straight, max_images=8, **settings), *torchrun))
    assert "2 process(es)" in output
    assert "the best so far" in output
    finish(start(BUNDLE, command(config_file, paused, max_images=4, **settings), *torchrun))
    finish(start(BUNDLE, command(config_file, paused, max_images=8, resume="true", **settings), *torchrun))
    assert state(straight)["images_seen"] == 8
    assert_same_training(straight, paused)
    assert not any(name.startswith("module.") for name in torch.load(straight / "model.pt", weights_only=True))


def test_best_snapshot_is_the_moving_average_and_is_named(workflow, tmp_path):
    run(workflow(BUNDLE, "train", tmp_path, max_images=4))  # validated once: the state of then is the last
    best = json.loads((tmp_path / "best.json").read_text())
    saved = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    assert best["metric"] == "val_frd"
    assert best["images_seen"] == 4
    components = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)["components"]
    torch.testing.assert_close(saved, components["ema"], rtol=0, atol=0)
    assert any(not torch.equal(saved[name], value) for name, value in components["generator"].items())


def test_pictures_show_training_images_upright_above_samples(datalist, workflow, tmp_path):
    corner = np.full((64, 64), 30, np.uint8)
    corner[:20, :30] = 220

    def mark(content, folder):
        for item in content["training"]:
            Image.fromarray(corner).save(folder / item["image"])

    spoiled = spoil(datalist, tmp_path / "data", mark)
    run(workflow(BUNDLE, "train", tmp_path / "out", datalist=str(spoiled), max_images=4))
    picture = np.asarray(Image.open(tmp_path / "out" / "images" / "samples_000000004.png"))
    assert np.abs(picture[:64, :64].astype(int) - corner).max() <= 1
    assert picture[66:].std() > 5


def test_transfer_starts_from_the_given_weights_with_its_own_augmentation_and_average(workflow, tmp_path):
    run(workflow(BUNDLE, "train", tmp_path / "first", max_images=4))
    record = tmp_path / "first" / "models" / "trained_on.json"
    about = json.loads(record.read_text())
    assert [len(about["patients"][split]) for split in ("training", "validation")] == [4, 2]
    record.write_text(json.dumps({**about, "patients": {"training": ["0" * 16], "validation": []}}))  # as of other data
    discriminator = str(tmp_path / "first" / "checkpoints" / "last.pt")
    settings = {"transfer_generator": str(tmp_path / "first" / "models" / "model.pt"), "freeze_d": 4}
    settings["transfer_discriminator"] = discriminator
    transferred = workflow(BUNDLE, "train", tmp_path / "second", **settings)
    transferred.initialize()  # builds everything anew
    parser = transferred.parser
    given = torch.load(tmp_path / "first" / "models" / "model.pt", weights_only=True)
    torch.testing.assert_close(parser.get_parsed_content("network").state_dict(), given, rtol=0, atol=0)
    torch.testing.assert_close(parser.get_parsed_content("ema").state_dict(), given, rtol=0, atol=0)
    # ADA's rule for a transfer: the average does not begin with a half-life of a few images
    assert parser.get_parsed_content("ema_rampup") == 0
    before = copy.deepcopy(parser.get_parsed_content("discriminator").state_dict())
    transferred.run()
    moved = [n for n, v in parser.get_parsed_content("discriminator").state_dict().items() if not v.equal(before[n])]
    assert moved
    assert not any(name.startswith("blocks.0.") for name in moved)
    seen = json.loads((tmp_path / "second" / "models" / "trained_on.json").read_text())
    assert seen.pop("weights_sha256") == [file_sha256(tmp_path / "second" / "models" / "model.pt")]
    assert seen["patients"]["training"] == sorted([*about["patients"]["training"], "0" * 16])
    assert seen["patients"]["validation"] == about["patients"]["validation"]
    assert seen["unknown"] == ["last.pt"]  # whose training's record lies elsewhere

    parser = ConfigParser()
    parser.read_config(BUNDLE / "configs" / "train.json")
    assert parser.get_parsed_content("augment_rise_images") == 500_000
    parser["transfer_generator"] = "given.pt"
    parser.parse(True)
    assert parser.get_parsed_content("augment_rise_images") == 100_000


def test_configuration_is_that_of_the_published_detector():
    parser = ConfigParser()
    parser.read_config(BUNDLE / "configs" / "train.json")
    published = {
        **{"max_images": 25_000_000, "tick_images": 4000, "val_interval": 50, "batch_size": 32, "lr": 0.002},
        **{"r1_gamma": 10.0, "r1_interval": 16, "path_length_weight": 2.0, "path_length_interval": 4, "beta0": 0.9},
        **{"style_mixing": 0.9, "ema_images": 10_000, "ema_rampup": 0.0, "augment_target": 0.6},
    }
    assert {name: parser.get_parsed_content(name) for name in published} == published
    generator = parser.get_parsed_content("network_def")
    assert generator.image_size == (512, 512)
    assert generator.num_ws == 16
    assert len(generator.mapping_network.layers) == 8
    assert [block.conv1.weight.shape[0] for block in generator.synthesis.blocks] == [512] * 5 + [256, 128, 64]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"preset": "stylegan3"}, r"preset must be one of .*small_64.*, got 'stylegan3'; set"),
        ({"augment": "all"}, r"augmentation preset must be one of none, bgc, radiograph, got 'all'"),
        ({"beta0": 1.5}, r"beta0 must be a number from 0 to 1, got 1\.5; set --beta0"),
        ({"r1_gamma": "x"}, r"r1_gamma must be a number from 0 to 1e\+12, got 'x'; set --r1_gamma"),
        ({"path_length_weight": -1}, "path_length_weight must be a number from 0"),
        ({"max_images": 0}, "max_images must be a whole number of at least 1, got 0"),
        ({"num_classes": 2}, r"label must be a class from 0 to 1, got none; .*--num_classes to 0"),
        ({"transfer_generator": "absent.pt"}, r"absent\.pt"),
        ({"freeze_d": 99}, "layers, got 99"),
        ({"in_channels": 3}, r"expected 3 channel\(s\), got 1"),
    ],
)
def test_mistakes_in_the_settings_are_one_line(overrides, message, datalist, workflow, tmp_path):
    if "num_classes" in overrides:  # items of some data sets have no label
        overrides["datalist"] = str(spoil(datalist, tmp_path / "data", drop_labels))
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(workflow(BUNDLE, "train", tmp_path / "out", **overrides))
    assert_one_line(caught.value, message)


def drop_labels(content, folder):
    for split in ("training", "validation", "test"):
        for item in content[split]:
            del item["label"]


def test_settings_that_change_on_resume_are_refused_but_batch_size_and_length_may_change(workflow, tmp_path):
    run(workflow(BUNDLE, "train", tmp_path / "out", max_images=4))
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(workflow(BUNDLE, "train", tmp_path / "out", resume=True, r1_gamma=5.0))
    assert_one_line(caught.value, r"made with r1_gamma 0\.2, this run has 5\.0")
    run(workflow(BUNDLE, "train", tmp_path / "out", resume=True, max_images=12, batch_size=4))
    assert state(tmp_path / "out")["images_seen"] == 12


def test_classes_are_trained_by_label(workflow, tmp_path):
    run(workflow(BUNDLE, "train", tmp_path / "out", num_classes=2, max_images=4))
    trained = torch.load(tmp_path / "out" / "models" / "model.pt", weights_only=True)
    assert trained["mapping_network.embed.weight"].shape[1] == 2


@pytest.mark.slow(reason="trains, evaluates, registers with MLflow, pulls, and generates")
def test_registered_detector_keeps_its_figures_and_generates_where_it_is_pulled(datalist, workflow, tmp_path):
    run(workflow(BUNDLE, "train", tmp_path, max_images=4))
    run(workflow(BUNDLE, "evaluate", tmp_path, save_dicom=False))
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    version = register_bundle(
        BUNDLE,
        "detector",
        uri,
        metrics=tmp_path / "metrics.json",
        overlays=[BUNDLE / "configs" / "demo.json"],
        weights=tmp_path / "models" / "model.pt",
    )
    pulled = pull(f"models:/detector/{version}", tmp_path / "pulled", uri)
    settings = {"bundle_root": str(pulled), "output_dir": str(tmp_path / "generated"), "seeds": "0-2", "num_workers": 0}
    # by itself, without the overlay that it was trained with
    generate = ConfigWorkflow(str(pulled / "configs" / "generate.json"), logging_file=False, **settings)
    run(generate)
    assert len(list((tmp_path / "generated" / "samples").glob("*.png"))) == 3
