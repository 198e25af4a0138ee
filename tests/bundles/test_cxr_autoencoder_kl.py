"""The autoencoder bundle as its users run it: killed, distributed, and with their mistakes."""

from __future__ import annotations

import json
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import piq
import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from PIL import Image
from running import (
    assert_one_line,
    assert_same_training,
    assert_shards_merge,
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

BUNDLE = Path(__file__).parents[2] / "bundles" / "cxr_autoencoder_kl"
TRAIN = ["configs/train.json", "configs/demo.json"]


@pytest.mark.slow(reason="starts four trainings as processes of their own; importing MONAI alone takes seconds in each")
def test_training_killed_with_sigkill_at_random_points_ends_with_the_same_weights(datalist, tmp_path):
    settings = {"datalist": datalist, "batch_size": 2, "max_epochs": 6, "val_interval": 2, "checkpoint_interval": 1}
    settings |= {"adversarial_start_epoch": 2, "ema_decay": 0.9, "resume": "true", "num_workers": 1}
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    running = start(BUNDLE, command(TRAIN, undisturbed, **settings))
    seed = int(time.time())
    print(f"seed of the kills: {seed}")
    rng = random.Random(seed)
    for interrupt in (kill_after_next_checkpoint, terminate_after_next_checkpoint):
        interrupt(start(BUNDLE, command(TRAIN, killed, **settings)), killed, rng)
    assert "resumed from" in finish(start_afresh(BUNDLE, command(TRAIN, killed, **settings)))
    finish(running)
    assert state(undisturbed)["images_seen"] == 6 * 4
    assert {"network", "discriminator", "g_optimizer", "d_optimizer", "ema"} <= set(state(killed)["components"])
    assert_same_training(undisturbed, killed)


@pytest.mark.slow(reason="starts three trainings of two processes each under torchrun")
def test_two_processes_train_one_network_and_resume_it(datalist, tmp_path):
    datalist = spoil(datalist, tmp_path / "data", three_for_validation)  # an uneven share for two processes
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    config_file = [*TRAIN, "configs/multi_gpu_train.json"]
    settings = {"datalist": datalist, "batch_size": 1, "val_interval": 1, "adversarial_start_epoch": 0}
    straight, paused = tmp_path / "straight", tmp_path / "paused"
    output = finish(start(BUNDLE, command(config_file, straight, max_epochs=2, **settings), *torchrun))
    assert "2 process(es)" in output
    assert "the best so far" in output
    finish(start(BUNDLE, command(config_file, paused, max_epochs=1, **settings), *torchrun))
    finish(start(BUNDLE, command(config_file, paused, max_epochs=2, resume="true", **settings), *torchrun))
    assert state(straight)["images_seen"] == 8  # two epochs of the four training images, shared by the processes
    assert_same_training(straight, paused)
    val_l1 = state(straight)["components"]["best_model"]["best"]
    assert val_l1 == pytest.approx(l1_of_best_model(straight, datalist), abs=1e-5)
    assert not any(name.startswith("module.") for name in torch.load(straight / "model.pt", weights_only=True))


def three_for_validation(content, folder):
    content["validation"].append(content["test"].pop())


def l1_of_best_model(output_dir: Path, datalist: Path) -> float:
    """Validation L1 of the saved weights, image by image in this process."""
    parser = ConfigParser()
    parser.read_config([BUNDLE / name for name in TRAIN])
    network = parser.get_parsed_content("network_def")
    network.load_state_dict(torch.load(output_dir / "model.pt", weights_only=True))
    losses = []
    for item in json.loads(datalist.read_text())["validation"]:
        image = torch.tensor(np.asarray(Image.open(datalist.parent / item["image"])) / 255).float()[None, None]
        with torch.inference_mode():
            losses.append((network.eval()(image).clamp(0, 1) - image).abs().mean().item())
    return float(np.mean(losses))


def share_patient(content, folder):
    content["test"][0]["patient"] = content["training"][0]["patient"]


def empty_split(content, folder):
    content["training"] = []


def lose_file(content, folder):
    (folder / content["training"][0]["image"]).unlink()


def shrink(content, folder):
    for item in content["training"]:
        Image.open(folder / item["image"]).resize((40, 48)).save(folder / item["image"])


def colour(content, folder):
    for item in content["training"]:
        pixels = np.asarray(Image.open(folder / item["image"]))
        Image.fromarray(np.stack([pixels, pixels // 2, pixels], -1)).save(folder / item["image"])


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (share_patient, r"patient p0 .*training.*test"),
        (empty_split, r"training.*empty|no .*training"),
        (lose_file, r"image0\.png"),
        (shrink, r"48×40 pixels .*smaller than the crop of 64×64; preprocess with --size 64"),
        (colour, r"expected 1 channel\(s\), got 3"),
    ],
)
def test_mistakes_in_the_data_are_one_line(change, message, num_workers, datalist, workflow, tmp_path):
    spoiled = spoil(datalist, tmp_path / "data", change)
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(workflow(BUNDLE, "train", tmp_path / "out", datalist=str(spoiled), num_workers=num_workers, cache_rate=0))
    assert_one_line(caught.value, message)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"datalist": "absent.json"}, r"absent\.json.*preprocessing\.images"),
        ({"batch_size": 2.5}, "batch_size must be a whole number of at least 1, got 2.5"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"image_size": 60}, "image_size must be a multiple of 8, got 60; set --image_size to 56 or 64"),
        ({"channels": [32, 40, 64, 64]}, "channels must be a multiple of 32, got 40"),
        ({"device": "cuda:99"}, "device must be one of cpu.*--device"),
        ({"batch_size": 100}, r"takes 100 images .* holds 4; lower --batch_size"),
        ({"perceptual_weight": 0.002, "perceptual_weights": "absent.pth"}, r"absent\.pth.*--perceptual_weight 0"),
        ({"output_dir": "{file}/out"}, r"output_dir must be a folder that can be written to.*--output_dir"),
        ({}, None),
    ],
)
def test_mistakes_in_the_settings_are_one_line(overrides, message, workflow, tmp_path):
    (tmp_path / "file").write_text("in the way")
    overrides = {k: v.format(file=tmp_path / "file") if isinstance(v, str) else v for k, v in overrides.items()}
    if message is None:  # another architecture than the checkpoint's
        run(workflow(BUNDLE, "train", tmp_path / "out", max_epochs=1))
        overrides, message = {"resume": True, "channels": [32, 32, 32, 32]}, "belongs to another architecture"
    output_dir = Path(overrides.pop("output_dir", tmp_path / "out"))
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(workflow(BUNDLE, "train", output_dir, **overrides))
    assert_one_line(caught.value, message)


def test_a_second_training_does_not_overwrite_the_first(workflow, tmp_path):
    run(workflow(BUNDLE, "train", tmp_path / "out", max_epochs=1))
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(workflow(BUNDLE, "train", tmp_path / "out", max_epochs=1, resume="false"))
    assert_one_line(caught.value, "--resume true, or choose another --output_dir")


def test_settings_that_change_on_resume_are_refused_but_batch_size_and_length_may_change(workflow, tmp_path):
    run(workflow(BUNDLE, "train", tmp_path / "out", max_epochs=1, batch_size=1))
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(workflow(BUNDLE, "train", tmp_path / "out", resume=True, g_lr=1e-5))
    assert_one_line(caught.value, r"made with g_lr 0\.001, this run has 1e-05")
    run(workflow(BUNDLE, "train", tmp_path / "out", resume=True, max_epochs=3, batch_size=2))
    assert state(tmp_path / "out")["images_seen"] == 12


def test_configuration_is_that_of_the_published_model():
    parser = ConfigParser()
    parser.read_config(BUNDLE / "configs" / "train.json")
    published = {
        **{"max_epochs": 75, "val_interval": 3, "image_size": 512, "seed": 42, "g_lr": 5e-5, "d_lr": 1e-4},
        **{"perceptual_weight": 0.002, "kl_weight": 1e-8, "adversarial_weight": 0.005, "clip_grad_norm": 1.0},
        **{"adversarial_start_epoch": 5, "batch_size": 96 // 8, "ema_decay": 0.0},
    }
    assert {name: parser[name] for name in published} == published
    affine, flip = (parser["train"]["random_transforms"][i] for i in (0, 1))
    assert (affine["prob"], affine["translate_range"], affine["scale_range"]) == (0.5, [2, 2], [0.01, 0.01])
    assert parser.get_parsed_content("train#random_transforms#0").rand_affine.rand_affine_grid.rotate_range == (
        pytest.approx((np.pi / 36,))
    )
    assert (flip["prob"], flip["spatial_axis"]) == (0.5, 1)

    discriminator = parser.get_parsed_content("discriminator_def")
    convolutions = [module for module in discriminator.modules() if isinstance(module, torch.nn.Conv2d)]
    assert [c.stride[0] for c in convolutions] == [2, 2, 2, 1, 1]
    assert [c.out_channels for c in convolutions] == [64, 128, 256, 512, 1]
    assert all(c.kernel_size == (4, 4) for c in convolutions)
    assert all(c.weight.std().item() == pytest.approx(0.02, rel=0.1) for c in convolutions)
    slopes = {m.negative_slope for m in discriminator.modules() if isinstance(m, torch.nn.LeakyReLU)}
    assert slopes == {0.2}
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in discriminator.modules()) == 3
    network = parser.get_parsed_content("network_def")
    assert sum(p.numel() for p in network.parameters()) == 4_607_848
    assert {m.eps for m in network.modules() if isinstance(m, torch.nn.GroupNorm)} == {1e-6}


def test_evaluation_without_weights_says_what_to_do(workflow, tmp_path):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(workflow(BUNDLE, "evaluate", tmp_path / "out"))
    assert_one_line(caught.value, "train the bundle first, or name a file with --model_path")


def test_evaluation_writes_the_means_of_what_piq_finds_in_each_image(workflow, tmp_path):
    run(workflow(BUNDLE, "train", tmp_path, max_epochs=1))
    evaluate = workflow(BUNDLE, "evaluate", tmp_path)
    outputs = []
    evaluate.initialize()
    evaluate.parser.get_parsed_content("evaluator").add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: outputs.extend(engine.state.output)
    )
    evaluate.run()

    figures = json.loads((tmp_path / "metrics.json").read_text())
    pairs = [(item["pred"][None].double(), item["image"][None].double()) for item in outputs]
    rgb = [[x.as_tensor().expand(-1, 3, -1, -1) for x in pair] for pair in pairs]
    for name, values in {
        "haarpsi": [piq.haarpsi(*pair) for pair in pairs],
        "ms_gmsd": [piq.multi_scale_gmsd(*pair) for pair in pairs],
        "mdsi": [piq.mdsi(*pair) for pair in rgb],
        "psnr": [piq.psnr(*pair) for pair in pairs],
    }.items():
        assert figures[name] == pytest.approx(float(np.mean([float(value) for value in values])), rel=1e-4), name


def test_command_prints_the_one_line_and_no_traceback(tmp_path):
    process = start(BUNDLE, command(TRAIN, tmp_path / "out", datalist="absent.json"))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in output
    assert output.strip().splitlines()[-1].startswith("error: ")


def test_reconstructions_and_latents_of_a_folder_are_written_upright(datalist, workflow, tmp_path):
    run(workflow(BUNDLE, "train", tmp_path, max_epochs=1))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    pixels = np.zeros((80, 100), np.uint8)
    pixels[:40, :50] = 200  # the upper left quarter
    Image.fromarray(pixels).save(pictures / "quarter.png")

    def infer(output_dir: Path, **settings: Any) -> None:
        run(workflow(BUNDLE, "inference", output_dir, model_path=model, image_size=64, **settings))

    model = str(tmp_path / "models" / "model.pt")
    infer(tmp_path, input_dir=str(pictures))
    for number in range(5):
        Image.fromarray(pixels + np.uint8(10 * number)).save(pictures / f"{number}.png")
    Image.fromarray(pixels).save(pictures / "6.tif", save_all=True, append_images=[Image.fromarray(pixels)])
    (pictures / "1.dcm").write_bytes(b"broken")
    (pictures / "note.txt").touch()
    assert_shards_merge(partial(infer, input_dir=str(pictures), batch_size=2), tmp_path / "shards", ["rejected.csv"])
    rejected = (tmp_path / "shards/out/rejected.csv").read_text()
    assert [line.split(",")[0] for line in rejected.splitlines()] == ["file", "1.dcm", "6.tif"]
    reconstruction = np.asarray(Image.open(tmp_path / "reconstructions" / "quarter.png")).astype(float)
    mean, std = (np.load(tmp_path / "latents" / f"quarter_{name}.npy") for name in ("mean", "std"))
    assert reconstruction.shape == (64, 64)
    assert reconstruction[8:24, 8:24].mean() > max(
        reconstruction[8:24, 40:].mean(), reconstruction[40:, 8:24].mean(), reconstruction[40:, 40:].mean()
    )
    assert mean.shape == std.shape == (3, 8, 8)
    assert (std > 0).all()
