"""Training of the progressive GAN's bundle as its users run it: killed, distributed, by class, with mistakes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
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

from medgen.data import read_trained_on, write_datalist
from medgen.data.provenance import patient_digest

BUNDLE = Path(__file__).parents[2] / "bundles" / "cxr_pggan"
TRAIN = ["configs/train.json", "configs/demo.json"]
# 4×4, 8×8 (fading in for four images), 16×16 and 32×32 within 40 images
FOR_SECONDS = {"images": [8, 12, 12, 8], "fade_images": [0, 4, 8, 4], "tick_images": 8, "val_interval": 2}
FOR_SECONDS |= {"batch_sizes": [2, 2, 2, 2], "max_images": 40}


@pytest.mark.slow(reason="starts four trainings as processes of their own; importing MONAI alone takes seconds in each")
def test_training_killed_with_sigkill_at_random_points_ends_with_the_same_state(datalist, tmp_path):
    settings = {**FOR_SECONDS, "datalist": datalist, "checkpoint_interval": 1, "resume": "true", "mirror": "true"}
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    running = start(BUNDLE, command(TRAIN, undisturbed, **settings))
    seed = int(time.time())
    print(f"seed of the kills: {seed}")
    rng = random.Random(seed)
    for interrupt in (kill_after_next_checkpoint, terminate_after_next_checkpoint):
        interrupt(start(BUNDLE, command(TRAIN, killed, **settings)), killed, rng)
    assert "resumed from" in finish(start_afresh(BUNDLE, command(TRAIN, killed, **settings)))
    finish(running)
    final = state(undisturbed)
    assert final["images_seen"] == 40
    assert {"generator", "discriminator", "ema", "g_optimizer", "d_optimizer", "growth"} <= set(final["components"])
    assert final["components"]["growth"]["iteration"] == 20
    assert_same_training(undisturbed, killed)
    for side in (4, 8, 16, 32):
        levels = [torch.load(out / "levels" / f"{side:04d}.pt", weights_only=True) for out in (undisturbed, killed)]
        torch.testing.assert_close(levels[0], levels[1], rtol=0, atol=0)
        assert levels[0]["growth"].tolist() == [side, 1.0]


@pytest.mark.slow(reason="starts three trainings, two of them of two processes under torchrun")
def test_two_processes_hold_one_network_and_resume_it(datalist, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    config_file = [*TRAIN, "configs/multi_gpu_train.json"]
    settings = {**FOR_SECONDS, "datalist": datalist, "batch_size": 2, "batch_sizes": [4, 4, 4, 4]}
    straight, paused = tmp_path / "straight", tmp_path / "paused"
    output = finish(start(BUNDLE, command(config_file, straight, **settings), *torchrun))
    assert "2 process(es)" in output
    assert "the best so far" in output
    finish(start(BUNDLE, command(config_file, paused, **{**settings, "max_images": 16}), *torchrun))
    finish(start(BUNDLE, command(config_file, paused, resume="true", **settings), *torchrun))
    assert state(straight)["images_seen"] == 40
    assert_same_training(straight, paused)


def test_each_level_is_seen_in_pictures_and_kept(workflow, tmp_path):
    run(workflow(BUNDLE, "train", tmp_path, **{**FOR_SECONDS, "val_interval": 1}))
    levels = sorted(path.name for path in (tmp_path / "models" / "levels").iterdir())
    assert levels == ["0004.pt", "0008.pt", "0016.pt", "0032.pt", "trained_on.json"]
    about = read_trained_on(tmp_path / "models" / "model.pt")
    assert about["images"] == {"training": 4, "validation": 2}
    of = {"training": range(4), "validation": range(4, 6)}
    assert about["patients"] == {split: sorted(patient_digest(f"p{n}") for n in of[split]) for split in of}
    assert read_trained_on(tmp_path / "models" / "levels" / "0004.pt") == about
    assert read_trained_on(tmp_path / "models" / "levels" / "0032.pt") == about
    pictures = sorted((tmp_path / "images").glob("samples_*.png"))
    assert [int(path.stem[-9:]) for path in pictures] == [8, 16, 24, 32, 40]
    shapes = {np.asarray(Image.open(path)).shape for path in pictures}
    assert len(shapes) == 1  # small images are enlarged to the full size
    best = json.loads((tmp_path / "best.json").read_text())
    assert best["metric"] == "val_swd"
    saved = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    assert saved["growth"][0] in (4, 8, 16, 32)
    # the moving average, not the generator
    last = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)["components"]
    assert not torch.equal(last["ema"]["blocks.0.conv.weight"], last["generator"]["blocks.0.conv.weight"])
    end = torch.load(tmp_path / "models" / "levels" / "0032.pt", weights_only=True)
    torch.testing.assert_close(end, last["ema"], rtol=0, atol=0)


def test_training_images_are_shown_upright_and_not_mirrored(datalist, workflow, tmp_path):
    corner = np.full((64, 64), 30, np.uint8)
    corner[:20, :32] = 220

    def mark(content, folder):
        for item in content["training"]:
            Image.fromarray(corner).save(folder / item["image"])

    settings = {**FOR_SECONDS, "datalist": str(spoil(datalist, tmp_path / "data", mark)), "val_interval": 5}
    run(workflow(BUNDLE, "train", tmp_path / "out", **settings))
    picture = np.asarray(Image.open(tmp_path / "out" / "images" / "samples_000000040.png"))
    top = picture.shape[0] - (5 * 34 - 2)  # below the caption: five rows of 32 pixels and a gap
    first = picture[top : top + 32, :32].astype(int)
    assert np.abs(first[:9, :15] - 220).max() <= 1
    assert np.abs(first[12:] - 30).max() <= 1
    assert np.abs(first[:, 17:] - 30).max() <= 1


def test_configuration_is_that_of_the_published_training():
    parser = ConfigParser()
    parser.read_config(BUNDLE / "configs" / "train.json")
    published = {
        **{"preset": "rsna_512", "max_images": 15_000_000, "adam_epsilon": 1e-8, "ema_decay": 0.999, "mirror": False},
        **{"gradient_penalty_weight": 10.0, "gradient_penalty_target": 1.0, "drift": 0.001, "class_weight": 1.0},
    }
    assert {name: parser.get_parsed_content(name) for name in published} == published
    schedule = parser.get_parsed_content("schedule")
    assert schedule.batch_sizes == (128, 128, 128, 64, 32, 16, 8, 4)
    assert schedule.lrs == (*(0.001,) * 7, 0.0015)
    assert schedule.images == (600_000, *(1_200_000,) * 6, 7_200_000)
    assert schedule.fade_images == (0, *(600_000,) * 7)
    assert parser.get_parsed_content("network_def").channels == (512, 512, 512, 512, 256, 128, 64, 32)
    parser["preset"] = "cxr14_1024"
    parser.parse(True)
    schedule = parser.get_parsed_content("schedule")
    assert schedule.batch_sizes == (64, 64, 64, 64, 64, 64, 56, 32, 12)
    assert schedule.images == (800_000, *(1_600_000,) * 7, 2_000_000)
    assert parser.get_parsed_content("adam_epsilon") == 1e-7
    assert parser.get_parsed_content("discriminator_def").minibatch_group_size is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"preset": "stylegan3"}, r"preset must be one of .*small_64.*, got 'stylegan3'; set"),
        ({"images": [8, 8, 8]}, r"images must have one entry for each of the 4 resolutions, got 3"),
        ({"fade_images": [0, 4, 99, 4]}, r"fade_images must not exceed images, got 99 of 12 at 16×16"),
        ({"lrs": [0.001, -1, 0.001, 0.001]}, r"lrs must be numbers above 0, got -1"),
        ({"batch_sizes": 16}, r"batch_sizes must be a list with one entry a level, got 16"),
        ({"batch_size": "x"}, r"batch_size must be a whole number of at least 1, or null, got 'x'"),
        ({"batch_size": 16, "batch_sizes": [4, 4, 4, 16]}, r"a training step takes 16 images .* holds 4"),
        ({"max_images": 41}, r"max_images must be from 1 to the schedule's 40, got 41; raise the last of --images"),
        ({"tick_images": 0}, "tick_images must be a whole number of at least 1, got 0"),
        ({"tick_images": 1}, "at least one step, 2 images, got 1; raise --tick_images"),
        ({"ema_decay": 1.5}, r"ema_decay must be a number from 0 to 1, got 1\.5"),
        ({"gradient_penalty_target": 0}, "gradient_penalty_target"),
        ({"num_classes": 1}, r"label must be a class from 0 to 0"),
        (
            {"label": "pneumonia"},
            r"label must be one that the datalist's items have, 0 \(1\), 1 \(1\), got 'pneumonia'",
        ),
        ({"label": 1}, r"the validation split must hold at least 2 images of label 1, got 1; make the splits anew"),
        ({"in_channels": 3}, r"expected 3 channel\(s\), got 1"),
    ],
)
def test_mistakes_in_the_settings_are_one_line(overrides, message, workflow, tmp_path):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(workflow(BUNDLE, "train", tmp_path / "out", **{**FOR_SECONDS, **overrides}))
    assert_one_line(caught.value, message)


def test_settings_that_change_on_resume_are_refused_but_memory_and_length_may_change(workflow, tmp_path, caplog):
    run(workflow(BUNDLE, "train", tmp_path / "out", **{**FOR_SECONDS, "max_images": 16}))
    for change, message in (
        ({"drift": 0.5}, r"made with drift 0\.001, this run has 0\.5"),
        ({"label": 0}, "made with label None, this run has 0|at least 2 images"),
        ({"images": [8, 14, 12, 8]}, "made with images"),
    ):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            run(workflow(BUNDLE, "train", tmp_path / "out", resume=True, **{**FOR_SECONDS, **change}))
        assert_one_line(caught.value, message)
    run(workflow(BUNDLE, "train", tmp_path / "out", resume=True, **{**FOR_SECONDS, "batch_size": 1}))
    assert state(tmp_path / "out")["images_seen"] == 40
    with caplog.at_level("INFO"):
        run(workflow(BUNDLE, "train", tmp_path / "out", resume=True, **FOR_SECONDS))
    assert "this training is complete; to go on raise --max_images, or the last of --images" in caplog.text
    longer = {**FOR_SECONDS, "images": [8, 12, 12, 20], "max_images": 52}
    run(workflow(BUNDLE, "train", tmp_path / "out", resume=True, **longer))
    assert state(tmp_path / "out")["images_seen"] == 52


def test_levels_of_another_training_are_kept_apart(workflow, tmp_path):
    models = tmp_path / "models"
    for out, settings in (("first", FOR_SECONDS), ("second", {**FOR_SECONDS, "max_images": 20, "seed": 1})):
        run(workflow(BUNDLE, "train", tmp_path / out, model_path=str(models / "model.pt"), **settings))
    assert sorted(path.name for path in (models / "levels").iterdir()) == ["0004.pt", "0008.pt", "trained_on.json"]
    assert len(list((models / "levels.previous").iterdir())) == 5
    run(workflow(BUNDLE, "train", tmp_path / "second", model_path=str(models / "model.pt"), resume=True, seed=1,
                 **FOR_SECONDS))  # fmt: skip
    assert len(list((models / "levels").iterdir())) == 5


def test_training_begun_with_the_state_of_another_leaves_its_levels_alone(workflow, tmp_path):
    models = tmp_path / "models"
    settings = {**FOR_SECONDS, "model_path": str(models / "model.pt")}
    run(workflow(BUNDLE, "train", tmp_path / "first", **{**settings, "max_images": 20}))
    before = {path.name: path.read_bytes() for path in (models / "levels").iterdir()}
    run(workflow(BUNDLE, "train", tmp_path / "other", resume_from=str(tmp_path / "first"), **settings))
    assert {path.name: path.read_bytes() for path in (models / "levels.previous").iterdir()} == before
    assert sorted(path.name for path in (models / "levels").iterdir()) == ["0016.pt", "0032.pt", "trained_on.json"]
    undisturbed = {**settings, "model_path": str(tmp_path / "whole.pt")}
    run(workflow(BUNDLE, "train", tmp_path / "whole", **undisturbed))
    for name in ("generator", "discriminator", "ema"):
        whole, other = (state(tmp_path / out)["components"][name] for out in ("whole", "other"))
        torch.testing.assert_close(other, whole, rtol=0, atol=0)


def test_class_conditional_training_learns_from_labels(workflow, tmp_path):
    run(workflow(BUNDLE, "train", tmp_path / "out", num_classes=2, **FOR_SECONDS))
    trained = state(tmp_path / "out")["components"]
    assert trained["generator"]["blocks.0.dense.weight"].shape[1] == 512 + 2
    assert trained["discriminator"]["blocks.0.out.weight"].shape[0] == 1 + 2


def of_both_classes(content, folder):
    """Two validation images of each class, those of class 1 white and the others black."""
    content["validation"] += [{**item, "image": f"more-{item['image']}"} for item in content["validation"]]
    for item in content["training"] + content["validation"]:
        Image.fromarray(np.full((64, 64), 255 * item["label"], np.uint8)).save(folder / item["image"])


def test_training_of_one_class_sees_no_other(datalist, workflow, tmp_path):
    spoiled = str(spoil(datalist, tmp_path / "data", of_both_classes))
    run(workflow(BUNDLE, "train", tmp_path / "out", datalist=spoiled, label=1, **FOR_SECONDS))
    (folder,) = [path for path in (tmp_path / "out" / "pyramids").iterdir() if path.is_dir()]
    images = np.load(folder / "0032.npy")
    assert len(images) == 2
    assert (images == 255).all()
    content = json.loads(Path(spoiled).read_text())
    seen = {
        split: {item["patient"] for item in content[split] if item["label"] == 1}
        for split in ("training", "validation")
    }
    about = read_trained_on(tmp_path / "out" / "models" / "model.pt")
    assert about["patients"] == {split: sorted(map(patient_digest, patients)) for split, patients in seen.items()}
    assert about["images"] == {"training": 2, "validation": 2}


@pytest.mark.slow(reason="two trainings as processes of their own")
def test_one_command_trains_a_model_for_each_class(datalist, tmp_path):
    settings = {**FOR_SECONDS, "num_workers": 0, "val_interval": 5}
    datalist = spoil(datalist, tmp_path / "data", of_both_classes)
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    environment = {
        **os.environ,
        **{"PYTHON": sys.executable, "CONFIG_FILE": str(TRAIN), "OMP_NUM_THREADS": "1"},
    }
    script = ["bash", str(BUNDLE / "train_each_class.sh")]
    given = [*script, "--datalist", str(datalist), "--output_dir", str(tmp_path / "out"), *options]
    done = subprocess.run(given, cwd=BUNDLE, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for label in (0, 1):
        assert (tmp_path / "out" / f"class_{label}" / "model.pt").is_file()
    weights = [torch.load(tmp_path / "out" / f"class_{n}" / "levels" / "0032.pt", weights_only=True) for n in (0, 1)]
    assert not torch.equal(weights[0]["blocks.0.conv.weight"], weights[1]["blocks.0.conv.weight"])

    for arguments, message in (
        (["--datalist", str(datalist)], "expected --datalist FILE --output_dir DIR"),
        (["--datalist", str(datalist), "--output_dir", "x", "--label", "0"], "--label is set for each class here"),
        (["--datalist", "absent.json", "--output_dir", "x"], "absent.json"),
    ):
        failed = subprocess.run([*script, *arguments], cwd=BUNDLE, env=environment, capture_output=True, text=True)
        assert failed.returncode != 0
        assert message in failed.stderr
        assert failed.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("labels", "folders"),
    [
        (["no finding", "a_b", 1], {"no finding": "class_no_finding", "a_b": "class_a_b", "1": "class_1"}),
        (["a b", "a_b"], None),
    ],
)
def test_each_class_has_a_folder_of_its_own(labels, folders, tmp_path):
    splits = {"training": [{"image": f"{n}.png", "patient": str(n), "label": label} for n, label in enumerate(labels)]}
    splits["validation"] = [
        {"image": f"v{place}.png", "patient": f"v{place}", "label": labels[place // 2]}
        for place in range(2 * len(labels))
    ]
    write_datalist(tmp_path / "datalist.json", "classes", "X-ray", splits)
    environment = {**os.environ, "PYTHON": sys.executable, "LAUNCHER": "echo"}  # says what it would start
    script = ["bash", str(BUNDLE / "train_each_class.sh"), "--datalist", str(tmp_path / "datalist.json")]
    done = subprocess.run([*script, "--output_dir", "out"], env=environment, capture_output=True, text=True)
    if folders is None:
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "error: the labels 'a b' and 'a_b' would share the folder class_a_b; rename one\n"
        return
    assert done.returncode == 0, done.stderr
    for label, folder in folders.items():
        assert f"--label {label} --output_dir out/{folder} --model_path out/{folder}/model.pt" in done.stdout
