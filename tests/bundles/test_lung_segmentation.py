"""The lung bundle as its users run it."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
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
from skimage.metrics import hausdorff_distance

from medgen.preemption import AGAIN

BUNDLE = Path(__file__).parents[2] / "bundles" / "lung_segmentation"
pytestmark = [
    # MONAI's own, of scikit-image and of itself: nothing that the bundle could change
    pytest.mark.filterwarnings("ignore:Parameter `min_size` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning"),
]
TRAIN = ["configs/train.json", "configs/demo.json"]


@pytest.mark.slow(reason="starts four trainings as processes of their own; importing MONAI alone takes seconds in each")
def test_training_killed_with_sigkill_at_random_points_ends_with_the_same_weights(datalist, tmp_path):
    settings = {"datalist": datalist, "batch_size": 2, "max_epochs": 6, "val_interval": 2, "checkpoint_interval": 1}
    settings |= {"resume": "true", "num_workers": 1}
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
    assert {"network", "optimizer", "ema", "best_model"} == set(state(killed)["components"])
    assert_same_training(undisturbed, killed)


@pytest.mark.slow(reason="starts three trainings of two processes under torchrun")
def test_two_processes_train_one_network_and_leave_together_when_one_is_told_to_end(datalist, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    config_file = [*TRAIN, "configs/multi_gpu_train.json"]
    settings = {"datalist": datalist, "batch_size": "$medgen.engines.batch_per_process(2)", "val_interval": 1}
    settings |= {"max_epochs": 10, "checkpoint_interval": 1, "resume": "true"}
    straight, told = tmp_path / "straight", tmp_path / "told"
    running = start(BUNDLE, command(config_file, straight, **settings), *torchrun)
    output, code = terminate_one_rank(start(BUNDLE, command(config_file, told, **settings), *torchrun), told)
    assert code == 1  # torchrun's, whatever those of the processes are
    assert len(re.findall("stopped by SIGTERM after a checkpoint at .* images; the same command", output)) == 1, output
    assert f"exitcode  : {AGAIN}" in output  # of the first that it saw end
    assert "resumed from" in finish(start(BUNDLE, command(config_file, told, **settings), *torchrun))
    assert "2 process(es)" in finish(running)
    assert state(straight)["images_seen"] == 40
    assert_same_training(straight, told)
    assert not any(name.startswith("module.") for name in torch.load(straight / "model.pt", weights_only=True))


def terminate_one_rank(process, output_dir):
    """SIGTERM to one of torchrun's two processes alone, after the first checkpoint."""
    while process.poll() is None and not (output_dir / "checkpoints" / "last.pt").exists():
        time.sleep(0.01)
    (rank, _) = (int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    os.kill(rank, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    return output, process.returncode


def lose_mask(content, folder):
    del content["training"][0]["mask"]


def damage(content, folder):
    (folder / content["training"][0]["image"]).write_bytes(b"no picture")


def empty_mask(content, folder):
    Image.new("L", (64, 64)).save(folder / content["training"][0]["mask"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose_mask, r"1 of 4 items of split training have no mask.*preprocessing\.masks"),
        (damage, r"image0\.png"),
        (empty_mask, r"mask0\.png: the mask marks no pixel"),
    ],
)
def test_mistakes_in_the_data_are_one_line(change, message, datalist, workflow, tmp_path):
    spoiled = spoil(datalist, tmp_path / "data", change)
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(workflow(BUNDLE, "train", tmp_path / "out", datalist=str(spoiled), cache_rate=0))
    assert_one_line(caught.value, message)


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        ("train", {"image_size": 60}, "image_size must be a multiple of 8, got 60; set --image_size to 56 or 64"),
        ("inference", {"image_size": 8}, "image_size must be a whole number of at least 16, got 8"),
        ("train", {"dropout": 1.0}, "dropout must be from 0 to below 1, got 1.0"),
        ("train", {"flip_prob": 2}, "flip_prob must be a number from 0 to 1, got 2"),
        ("train", {"lr": 0}, "lr must be a number above 0"),
        ("inference", {"mc_passes": 1}, "mc_passes must be 0"),
        ("inference", {"margin": -1}, "margin must be a number from 0"),
        ("inference", {}, "train the bundle first, or name a file with --model_path"),
        ("evaluate", {}, "train the bundle first, or name a file with --model_path"),
    ],
)
def test_mistakes_in_the_settings_are_one_line(config, overrides, message, workflow, tmp_path):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(workflow(BUNDLE, config, tmp_path / "out", **overrides))
    assert_one_line(caught.value, message)


def test_evaluation_writes_what_numpy_and_skimage_find(workflow, datalist, tmp_path):
    run(workflow(BUNDLE, "train", tmp_path, max_epochs=1))
    outputs = []
    evaluate = workflow(BUNDLE, "evaluate", tmp_path, threshold=0.4)
    evaluate.initialize()
    engine = evaluate.parser.get_parsed_content("evaluator")
    engine.add_event_handler("ITERATION_COMPLETED", lambda engine: outputs.extend(engine.state.output))
    evaluate.run()

    figures = json.loads((tmp_path / "metrics.json").read_text())
    truth = [np.asarray(Image.open(datalist.parent / f"mask{n}.png")) > 0 for n in (6, 7)]
    pairs = [(np.asarray(item["pred"][0]) > 0, mask) for item, mask in zip(outputs, truth, strict=True)]
    dice = [2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in pairs]
    iou = [(a & b).sum() / (a | b).sum() for a, b in pairs]
    assert figures["dice"] == pytest.approx(np.mean(dice), abs=1e-6)
    assert figures["iou"] == pytest.approx(np.mean(iou), abs=1e-6)
    assert figures["dice_low"] <= figures["dice"] <= figures["dice_high"]
    assert 0 < figures["surface_distance_pixels"] <= figures["hausdorff95_pixels"]
    assert figures["hausdorff95_pixels"] <= np.mean([hausdorff_distance(a, b) for a, b in pairs]) + 1e-6
    assert (figures["n"], figures["image_size"], figures["threshold"]) == (2, 64, 0.4)
    assert (tmp_path / "images" / "test.png").is_file()


def channel_as_logit(model_path: Path) -> None:
    """Weights whose probability is above 0.5 exactly where the image is bright.

    All weights are zero but those that carry the full-size features past the others: the first convolution's centre,
    the last level's, and the head's.
    """
    parser = ConfigParser()
    parser.read_config([BUNDLE / "configs" / "inference.json", BUNDLE / "configs" / "demo.json"])
    network = parser.get_parsed_content("network_def")
    for parameter in network.parameters():
        torch.nn.init.zeros_(parameter)
    weights = network.state_dict()
    for name in ("down.0.0.conv.weight", "down.0.1.conv.weight", "up.2.0.conv.weight", "up.2.1.conv.weight"):
        weights[name][0, 0, 1, 1] = 1  # the identity in channel 0; the skip's channels come first
    weights["head.weight"][0, 0] = 10
    weights["head.bias"][0] = -5
    model_path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(weights, model_path)


@pytest.fixture
def pictures(tmp_path):
    """Bright rectangles on black, 150×240 pixels: one with a hole, one without, a smaller one; and what is refused."""
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    pixels = np.zeros((150, 240), np.uint8)
    pixels[30:120, 24:84] = 255
    pixels[60:72, 48:58] = 0  # a hole
    pixels[15:90, 120:180] = 255
    pixels[129:147, 210:234] = 255  # the third in size
    Image.fromarray(pixels).save(folder / "lungs.png")
    rgb = np.stack([pixels.T] * 3, axis=-1)
    Image.fromarray(rgb).save(folder / "sub" / "upright.png")
    speck = np.zeros((100, 100), np.uint8)
    speck[40:50, 40:50] = 255
    Image.fromarray(speck).save(folder / "speck.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    nan = np.full((64, 64), np.nan, np.float32)
    Image.fromarray(nan).save(folder / "nan.tif")
    return folder


def rows(path):
    with open(path, newline="") as file:
        return {row[next(iter(row))]: row for row in csv.DictReader(file)}


def box_of(row):
    return [int(row[side]) for side in ("top", "left", "bottom", "right")]


def test_folder_of_images_gives_masks_boxes_and_reasons(pictures, workflow, tmp_path, capsys):
    channel_as_logit(tmp_path / "model.pt")
    out = tmp_path / "out"
    settings = {"input_dir": str(pictures), "model_path": str(tmp_path / "model.pt"), "margin": 0.1, "mc_passes": 0}
    run(workflow(BUNDLE, "inference", out, **settings))

    boxes = rows(out / "boxes.csv")
    assert set(boxes) == {"lungs.png", "sub/upright.png"}
    mask = np.asarray(Image.open(out / "masks" / "lungs.png")) > 0
    expected = np.zeros((150, 240), bool)
    expected[30:120, 24:84] = True  # the hole filled
    expected[15:90, 120:180] = True  # and not the third component
    assert mask.shape == (150, 240)
    assert (mask != expected).mean() < 0.05  # edges of a network of 64×64 pixels
    top, left, bottom, right = 15, 24, 120, 180
    height, width = 0.1 * (bottom - top), 0.1 * (right - left)
    wide = [top - height, left - width, bottom + height, right + width]
    np.testing.assert_allclose(box_of(boxes["lungs.png"]), np.clip(wide, 0, [150, 240, 150, 240]), atol=5)
    assert float(boxes["lungs.png"]["area_fraction"]) == pytest.approx(mask.mean(), abs=1e-6)
    # the same picture turned over its diagonal, in colour: the mask turns with it
    turned = np.asarray(Image.open(out / "masks" / "sub" / "upright.png")) > 0
    assert turned.shape == (240, 150)
    assert (turned != mask.T).mean() < 0.01

    reasons = {name: row["reason"] for name, row in rows(out / "rejected.csv").items()}
    assert set(reasons) == {"broken.png", "nan.tif", "speck.png"}
    assert reasons["speck.png"].startswith("no lung found: ")
    assert "no lung found in 1" in capsys.readouterr().out.splitlines()[-1]
    items = json.loads((out / "datalist.json").read_text())["test"]
    assert [item["mask"] for item in items] == ["out/masks/lungs.png", "out/masks/sub/upright.png"]
    assert [item["image"] for item in items] == ["pictures/lungs.png", "pictures/sub/upright.png"]


def test_interrupted_inference_goes_on_and_ends_with_the_same_files(pictures, workflow, tmp_path):
    channel_as_logit(tmp_path / "model.pt")
    settings = {"input_dir": str(pictures), "model_path": str(tmp_path / "model.pt"), "mc_passes": 2, "batch_size": 1}
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    run(workflow(BUNDLE, "inference", whole, **settings))
    run(workflow(BUNDLE, "inference", torn, **settings))
    for lost in ("boxes.csv", "records/lungs.json", "records/sub/upright.json", "masks/lungs.png"):
        (torn / lost).unlink()

    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(workflow(BUNDLE, "inference", torn, **settings))
    assert_one_line(caught.value, "1 of 3 results are in the output folder already.*--resume true")
    run(workflow(BUNDLE, "inference", torn, resume="true", **settings))
    names = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    assert {"masks", "overlays", "uncertainty", "records"} < {name.parts[0] for name in names}
    for name in names:
        if not name.name.startswith("config_"):
            assert (torn / name).read_bytes() == (whole / name).read_bytes() or name.name == "datalist.json", name
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(workflow(BUNDLE, "inference", torn, resume="true", **{**settings, "mc_passes": 3}))
    assert_one_line(caught.value, "made with mc_passes 2, this run has 3")


def test_shards_leave_the_files_of_one_process_though_an_image_cannot_be_read(pictures, workflow, tmp_path):
    channel_as_logit(tmp_path / "model.pt")
    for number in range(3):
        shutil.copy(pictures / "lungs.png", pictures / f"{number}.png")
    names = ["0.png", "broken.png", "lungs.png", "1.png", "sub/upright.png", "2.png"]
    items = [{"image": name, "patient": name} for name in names]
    (pictures / "datalist.json").write_text(json.dumps({"test": items}))
    settings = {"datalist": str(pictures / "datalist.json"), "model_path": str(tmp_path / "model.pt"), "mc_passes": 2}

    def predict(output_dir: Path, **shard: str) -> None:
        run(workflow(BUNDLE, "inference", output_dir, **settings, **shard))

    assert_shards_merge(predict, tmp_path, ["boxes.csv", "datalist.json", "rejected.csv"], "lung_segmentation.predict")
    assert len(list((tmp_path / "out/records").rglob("*.json"))) == 5


def test_unreadable_images_of_a_datalist_are_recorded_and_the_rest_goes_on(pictures, workflow, tmp_path):
    channel_as_logit(tmp_path / "model.pt")
    names = ["broken.png", "lungs.png", "sub/upright.png"]
    items = [{"image": name, "patient": name} for name in names]
    (pictures / "datalist.json").write_text(json.dumps({"test": items}))
    settings = {"datalist": str(pictures / "datalist.json"), "model_path": str(tmp_path / "model.pt"), "mc_passes": 0}
    out = tmp_path / "out"
    for resume in ("false", "true"):
        run(workflow(BUNDLE, "inference", out, resume=resume, num_workers=1, **settings))
        assert set(rows(out / "boxes.csv")) == set(names[1:])
        assert set(rows(out / "rejected.csv")) == {"broken.png"}
        (out / "records" / "lungs.json").unlink()
    Image.open(pictures / "lungs.png").save(pictures / "broken.png")  # mended: the next run takes it along
    run(workflow(BUNDLE, "inference", out, resume="true", **settings))
    assert set(rows(out / "boxes.csv")) == set(names)


def test_uncertainty_does_not_depend_on_the_batch_and_is_zero_without_dropout(pictures, workflow, tmp_path):
    run(workflow(BUNDLE, "train", tmp_path / "train", max_epochs=1))
    model = str(tmp_path / "train" / "models" / "model.pt")
    settings = {"input_dir": str(pictures), "model_path": model, "mc_passes": 4, "min_area": 0.0}
    for batch_size, dropout in ((1, 0.2), (2, 0.2), (2, 0.0)):
        out = tmp_path / f"{batch_size}_{dropout}"
        run(workflow(BUNDLE, "inference", out, batch_size=batch_size, dropout=dropout, **settings))

    def uncertainty(folder):
        records = [json.loads(path.read_text()) for path in sorted((tmp_path / folder / "records").rglob("*.json"))]
        return [record["mean_uncertainty"] for record in records]

    assert min(uncertainty("1_0.2")) > 1e-4
    assert uncertainty("2_0.2") == pytest.approx(uncertainty("1_0.2"), rel=1e-3)
    assert max(uncertainty("2_0.0")) < 1e-6
    assert np.asarray(Image.open(tmp_path / "1_0.2" / "uncertainty" / "lungs.png")).shape == (150, 240)
