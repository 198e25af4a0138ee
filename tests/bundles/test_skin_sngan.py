"""DCGAN and SNGAN as their users run them: trained, killed, by class and preset, sampled, measured, with mistakes."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from PIL import Image
from running import (
    assert_one_line,
    assert_resumes,
    assert_same_levels,
    assert_same_training,
    assert_shards_merge,
    assert_synthetic_dicom,
    command,
    finish,
    kill_after_next_checkpoint,
    run,
    start,
    start_afresh,
    state,
    terminate_after_next_checkpoint,
)

from medgen.data import load_datalist, write_datalist
from medgen.data.provenance import patient_digest
from medgen.engines import DCGAN_TRAINING
from medgen.inferers import DCGANInferer
from medgen.networks import DCGANGenerator

BUNDLE = Path(__file__).parents[2] / "bundles" / "skin_sngan"
TRAIN = ["configs/train.json", "configs/demo.json"]
NARROW = {"g_channels": 4, "d_channels": 4, "latent_dim": 8}
FOR_SECONDS = {**NARROW, "batch_size": 2, "tick_images": 4, "val_interval": 2, "max_images": 24}
COLOURS = np.array([[200, 60, 40], [40, 60, 200]])  # of the lesions of both classes: red and blue


@pytest.fixture(scope="module")
def lesions(tmp_path_factory) -> Path:
    """Photographs of 40×32 pixels, two images a patient: a disc, red in class 0 and blue in class 1, on skin."""
    folder = tmp_path_factory.mktemp("lesions")
    rng = np.random.default_rng(0)
    row, column = np.mgrid[:40, :32]
    splits: dict[str, list[dict]] = {"training": [], "validation": [], "test": []}
    for number in range(32):
        split = "training" if number < 12 else "validation" if number < 20 else "test"
        centre, radius = rng.uniform((16, 12), (24, 20)), rng.uniform(5, 10)
        disc = ((row - centre[0]) ** 2 + (column - centre[1]) ** 2 < radius**2)[..., None]
        pixels = np.where(disc, COLOURS[number // 2 % 2], [230, 190, 170]) + rng.normal(0, 6, (40, 32, 3))
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{number}.png")
        item = {"image": f"{number}.png", "patient": f"p{number // 2}", "label": number // 2 % 2}
        splits[split].append(item)
    write_datalist(folder / "datalist.json", "discs", "dermoscopy", splits, label_names=["red", "blue"])
    return folder / "datalist.json"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDGEN_CACHE", str(tmp_path / "cache"))


def parsed(*names: str, **settings: object) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config([str(BUNDLE / "configs" / f"{name}.json") for name in names])
    parser.update(settings)
    return parser


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


# ---------------------------------------------------------------- train.json


@pytest.mark.slow(reason="starts four trainings as processes of their own; importing MONAI alone takes seconds in each")
def test_training_killed_with_sigkill_at_random_points_ends_with_the_same_state(lesions, tmp_path):
    settings = {**FOR_SECONDS, "datalist": lesions, "checkpoint_interval": 1, "resume": "true", "num_workers": 1}
    settings |= {"flip": "true", "diff_augment": "color,translation,cutout", "d_steps": 2, "d_batch_norm": "true"}
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    running = start(BUNDLE, command(TRAIN, undisturbed, **settings))
    seed = int(time.time())
    print(f"seed of the kills: {seed}")
    rng = random.Random(seed)
    for interrupt in (kill_after_next_checkpoint, terminate_after_next_checkpoint):
        interrupt(start(BUNDLE, command(TRAIN, killed, **settings)), killed, rng)
    assert "resumed from" in finish(start_afresh(BUNDLE, command(TRAIN, killed, **settings)))
    finish(running)
    assert state(undisturbed)["images_seen"] == 24
    assert {"generator", "discriminator", "ema", "g_optimizer", "d_optimizer"} <= set(state(killed)["components"])
    assert_same_training(undisturbed, killed)
    assert (undisturbed / "trained_on.json").read_bytes() == (killed / "trained_on.json").read_bytes()


@pytest.mark.slow(reason="starts three trainings of two processes under torchrun")
def test_two_processes_hold_one_network_and_resume_it(lesions, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    config_file = [*TRAIN, "configs/multi_gpu_train.json"]
    settings = {**FOR_SECONDS, "datalist": lesions, "max_images": 8, "d_batch_norm": "true"}
    straight, paused = tmp_path / "straight", tmp_path / "paused"
    output = finish(start(BUNDLE, command(config_file, straight, **settings), *torchrun))
    assert "2 process(es)" in output
    assert "the best so far" in output
    finish(start(BUNDLE, command(config_file, paused, **{**settings, "max_images": 4}), *torchrun))
    finish(start(BUNDLE, command(config_file, paused, resume="true", **settings), *torchrun))
    assert state(straight)["images_seen"] == 8
    assert_same_training(straight, paused)


def test_model_is_the_moving_average_and_pictures_keep_their_colours(lesions, workflow, tmp_path):
    run(workflow(BUNDLE, "train", tmp_path, **{**FOR_SECONDS, "max_images": 4, "datalist": str(lesions)}))

    best = read_json(tmp_path / "best.json")
    assert (best["metric"], best["images_seen"]) == ("val_frd", 4)
    saved = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    last = state(tmp_path)["components"]
    torch.testing.assert_close(saved, last["ema"], rtol=0, atol=0)
    assert not torch.equal(last["ema"]["convs.1.weight"], last["generator"]["convs.1.weight"])
    picture = np.asarray(Image.open(tmp_path / "images" / "samples_000000004.png")).astype(int)
    assert picture.shape == (5 * 34 - 2, 8 * 34 - 2, 3)
    shown = {tuple(picture[place, 34 * column + place]) for column in range(2) for place in (16,)}
    assert all(min(np.abs(COLOURS - pixel).max(1)) < 30 for pixel in shown)  # lesions, red before green before blue
    assert np.abs(picture[2, 2] - [230, 190, 170]).max() < 30  # skin


def test_without_a_moving_average_the_model_is_the_generator(lesions, workflow, tmp_path):
    settings = {**FOR_SECONDS, "max_images": 4, "datalist": str(lesions), "ema_decay": 0, "num_classes": 2}

    made = workflow(BUNDLE, "train", tmp_path, **settings)
    run(made)

    last = state(tmp_path)["components"]
    # but for the statistics, which it has of its own
    generator = {name: value for name, value in last["generator"].items() if not re.search("running|num_batches", name)}
    torch.testing.assert_close({name: last["ema"][name] for name in generator}, generator, rtol=0, atol=0)
    assert generator["norms.0.gain_KO"].shape[0] == 2  # and it has classes
    assert sorted(made.parser.get_parsed_content("train#trainer").labels) == [0] * 6 + [1] * 6  # of the whole split
    assert last["discriminator"]["projection.parametrizations.weight.original"].shape[1] == 2


def test_training_of_one_class_sees_no_other_and_says_whom_it_saw(lesions, workflow, tmp_path):
    made = workflow(BUNDLE, "train", tmp_path, **{**FOR_SECONDS, "datalist": str(lesions), "label": "1"})
    run(made)

    dataset = made.parser.get_parsed_content("train#dataset")
    assert len(dataset) == 6
    assert all(item["image"][2, 15:17, 15:17].mean() > 0.6 for item in dataset)  # blue
    seen = read_json(tmp_path / "models" / "trained_on.json")
    assert seen["images"] == {"training": 6, "validation": 4}
    assert seen["patients"] == {
        split: sorted({patient_digest(item["patient"]) for item in load_datalist(lesions, split) if item["label"] == 1})
        for split in ("training", "validation")
    }


def test_flips_and_turns_are_the_symmetries_of_the_square_and_off_by_default(lesions):
    corner = torch.zeros(3, 32, 32)
    corner[:, :4, 1:8] = 1  # differs in all eight of its positions

    def seen(**settings):
        parser = parsed("train", "demo", datalist=str(lesions), **settings)
        random = parser.get_parsed_content("train#random_transforms")
        found = set()
        for seed in range(60):
            item = {"image": corner}
            for number, transform in enumerate(random):
                item = transform.set_random_state(seed=8 * seed + number)(item)
            found.add(item["image"].numpy().tobytes())
        return found

    turned = [
        np.rot90(flipped, k, (1, 2)) for flipped in (corner.numpy(), corner.numpy()[:, :, ::-1]) for k in range(4)
    ]
    assert seen(flip="true") == {np.ascontiguousarray(image).tobytes() for image in turned}
    assert seen() == {corner.numpy().tobytes()}


@pytest.mark.parametrize("preset", DCGAN_TRAINING)
def test_settings_of_a_preset_reach_networks_loss_and_optimisers(preset, lesions):
    row = DCGAN_TRAINING[preset]
    parser = parsed(
        "train", preset=preset, datalist=str(lesions), device="cpu", batch_size=2, g_channels=2, d_channels=2
    )
    found = {name: parser.get_parsed_content(name) for name in row if name not in ("base_channels", "total_batch_size")}
    assert found == {name: row[name] for name in found}
    generator, discriminator = (parser.get_parsed_content(name) for name in ("network_def", "discriminator_def"))
    assert (generator.image_size, generator.latent_dim) == (row["image_size"], row["latent_dim"])
    assert (discriminator.spectral_norm, discriminator.batch_norm) == (row["spectral_norm"], row["d_batch_norm"])
    for side, network in (
        ("g", parser.get_parsed_content("network")),
        ("d", parser.get_parsed_content("discriminator")),
    ):
        optimiser = parser.get_parsed_content(f"train#{side}_optimizer")
        (group,) = optimiser.param_groups
        assert (group["lr"], group["betas"]) == (row[f"{side}_lr"], (row["beta0"], row["beta1"]))
        assert {id(parameter) for parameter in group["params"]} == {id(parameter) for parameter in network.parameters()}
    loss = parser.get_parsed_content("train#loss")
    assert (loss.kind, loss.real_label, loss.fake_label) == (row["loss"], row["real_label"], row["fake_label"])
    assert parser.get_parsed_content("max_images") == row["epochs"] * 12
    plain = parsed("train", preset=preset)
    assert plain.get_parsed_content("batch_size") == row["total_batch_size"]
    assert plain.get_parsed_content("g_channels") == plain.get_parsed_content("d_channels") == row["base_channels"]


@pytest.mark.parametrize("config", ["train", "inference", "evaluate", "serve"])
def test_overlays_choose_between_the_two_papers(config):
    dcgan, sngan = (parsed(config, overlay) for overlay in ("dcgan", "sngan"))
    assert [parser.get_parsed_content("latent_dim") for parser in (dcgan, sngan)] == [100, 128]
    if config == "train":
        of_dcgan, of_sngan = (parser.get_parsed_content("discriminator_def") for parser in (dcgan, sngan))
        assert (of_dcgan.spectral_norm, of_dcgan.batch_norm) == (False, True)
        assert (of_sngan.spectral_norm, of_sngan.batch_norm) == (True, False)
        assert [parser.get_parsed_content("d_lr") for parser in (dcgan, sngan)] == [0.0002, 0.001]
        assert [parser.get_parsed_content("batch_size") for parser in (dcgan, sngan)] == [128, 16]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"preset": "biggan"}, r"preset must be one of dcgan, .*sngan_128.*, got 'biggan'; set --preset"),
        ({"image_size": 48}, r"image_size must be 16, .*512, got 48"),
        ({"image_size": 64}, r"40×32 pixels|64"),
        ({"latent_dim": 0}, "latent_dim must be a whole number of at least 1, got 0"),
        ({"g_channels": 0}, "base_channels must be a whole number of at least 1, got 0"),
        ({"loss": "wasserstein"}, "loss must be non_saturating or hinge, got 'wasserstein'"),
        ({"loss": "hinge", "real_label": 0.9}, "the hinge loss has no labels to smooth"),
        ({"diff_augment": "colour"}, "diff_augment must be none or some of"),
        ({"flip": "perhaps"}, "a switch must be true or false, got 'perhaps'"),
        ({"d_lr": 0}, "d_lr must be a number above 0, got 0"),
        ({"beta0": 1.5}, r"beta0 must be a number from 0 to 1, got 1\.5"),
        ({"ema_decay": 1.5}, r"ema_decay must be a number from 0 to 1, got 1\.5"),
        ({"d_steps": 0}, "d_steps must be a whole number of at least 1, got 0"),
        ({"in_channels": 2}, r"channels must be 1 \(grey\) or 3 \(RGB\), got 2"),
        ({"batch_size": 13}, "a training step takes 13 images .* holds 12; lower --batch_size"),
        ({"epochs": 0, "max_images": 8}, "epochs must be a whole number of at least 1, got 0"),
        ({"max_images": 0}, "max_images must be a whole number of at least 1, got 0"),
        ({"num_classes": 1}, "label must be a class from 0 to 0"),
        (
            {"num_classes": 2, "label": 1},
            "label must be null for a network with 2 classes, .* got 1; leave out --label",
        ),
        ({"num_classes": 3}, r"training images must be of all 3 classes, there is none of class 2 .* 0 \(6\), 1 \(6\)"),
        ({"label": "nevus"}, r"label must be one that the datalist's items have, 0 \(6\), 1 \(6\), got 'nevus'"),
    ],
)
def test_mistakes_in_the_settings_are_one_line(overrides, message, lesions, workflow, tmp_path):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(workflow(BUNDLE, "train", tmp_path / "out", **{**FOR_SECONDS, "datalist": str(lesions), **overrides}))
    assert_one_line(caught.value, message)


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ({"epochs": 334}, 4008),  # 12 images a pass: two ticks
        ({"epochs": 333}, 3996),
        ({"epochs": 167, "batch_size": 12}, 2004),
        ({"max_images": 7}, 8),
        ({"max_images": 4001}, 4004),
        ({"max_images": 7, "tick_images": 6}, 12),  # as told
    ],
)
def test_training_sees_max_images_and_less_than_a_step_a_tick_more(settings, trained, lesions):
    parser = parsed("train", preset="demo_32", datalist=str(lesions), **{**NARROW, "batch_size": 2, **settings})
    loader = parser.get_parsed_content("train#dataloader")
    epochs = parser.get_parsed_content("train#trainer").state.max_epochs

    assert epochs * len(loader) * loader.batch_size == trained
    if trained > 2000:
        assert 2000 <= len(loader) * loader.batch_size < 4000


def test_settings_that_change_on_resume_are_refused_but_a_longer_training_goes_on(lesions, workflow, tmp_path):
    settings = {**FOR_SECONDS, "datalist": str(lesions), "max_images": 4}
    run(workflow(BUNDLE, "train", tmp_path, **settings))
    for change, message in (
        ({"d_lr": 0.002}, r"made with d_lr 0\.\d+, this run has 0\.002"),
        ({"flip": True}, "made with flip False, this run has True"),
        ({"diff_augment": ("color", "cutout")}, "made with diff_augment , this run has color,cutout"),
    ):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            run(workflow(BUNDLE, "train", tmp_path, resume=True, **{**settings, **change}))
        assert_one_line(caught.value, message)
    run(workflow(BUNDLE, "train", tmp_path, resume=True, **{**settings, "max_images": 8}))
    assert state(tmp_path)["images_seen"] == 8
    # in the middle of what is a tick now: its default follows from max_images
    run(workflow(BUNDLE, "train", tmp_path, resume=True, **{**settings, "max_images": 14, "tick_images": 14}))
    assert state(tmp_path)["images_seen"] == 14
    assert (tmp_path / "images" / "samples_000000014.png").is_file()


# ---------------------------------------------------------------- inference.json and evaluate.json


def weights(path: Path, **changes: int) -> Path:
    torch.manual_seed(0)
    network = DCGANGenerator(32, 8, base_channels=4, **changes)
    with torch.no_grad():
        for conv in network.convs:  # of an untrained network all images would be grey
            conv.weight.mul_(10)
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    return weights(tmp_path_factory.mktemp("model") / "model.pt")


@pytest.fixture(scope="module")
def of_classes(tmp_path_factory) -> Path:
    return weights(tmp_path_factory.mktemp("model") / "model.pt", num_classes=2)


def use(config: str, output_dir: Path, model_path: Path, **settings: object) -> None:
    fixed = {"preset": "demo_32", "g_channels": 4, "latent_dim": 8, "batch_size": 4, "num_workers": 0}
    made = ConfigWorkflow(
        str(BUNDLE / "configs" / f"{config}.json"),
        logging_file=False,  # it would take pytest's handlers off
        workflow_type="infer",
        **{"output_dir": str(output_dir), "model_path": str(model_path), **fixed, **settings},
    )
    run(made)
    made.finalize()


def expected(path: Path, seeds: list[int], labels: list[int] | None = None, psi: float = 1.0, **changes: int):
    """8-bit images (N, C, H, W) straight from the network."""
    network = DCGANGenerator(32, 8, base_channels=4, **changes)
    network.load_state_dict(torch.load(path, weights_only=True))
    with torch.no_grad():
        images = DCGANInferer(psi)(seeds, network, labels=None if labels is None else torch.tensor(labels))
    return (images * 255).round().byte().numpy()


def test_samples_of_a_class_are_the_networks_images(model_path, tmp_path):
    use("inference", tmp_path, model_path, seeds="0-4,9", truncation_psi=0.8, label="blue", label_names=["red", "blue"])

    files = [tmp_path / "samples" / f"seed{seed:06d}.png" for seed in (0, 1, 2, 3, 4, 9)]
    pixels = np.stack([np.asarray(Image.open(file)) for file in files]).transpose(0, 3, 1, 2)
    assert_same_levels(pixels, expected(model_path, [0, 1, 2, 3, 4, 9], psi=0.8))
    assert pixels.std() > 20
    items = load_datalist(tmp_path / "datalist.json", "training")
    assert [(item["seed"], item["patient"], item["label"]) for item in items] == [
        (seed, f"synthetic-{seed}", "blue") for seed in (0, 1, 2, 3, 4, 9)
    ]


def test_dicom_samples_of_classes_in_colour(of_classes, tmp_path):
    use("inference", tmp_path, of_classes, seeds=[4, 7], num_classes=2, file_format="dicom")

    items = load_datalist(tmp_path / "datalist.json", "training")
    assert [item["label"] for item in items] == [0, 1]
    assert_synthetic_dicom(items, expected(of_classes, [4, 7], [0, 1], num_classes=2))


def test_interrupted_and_shared_synthesis_ends_with_the_files_of_one_run(model_path, tmp_path):
    def generate(output_dir: Path, **settings: str) -> None:
        use("inference", output_dir, model_path, **settings)

    assert_resumes(generate, tmp_path / "resumed")
    tables = ["datalist.json", "images/grid.png"]
    assert_shards_merge(lambda out, **of: generate(out, seeds="0-8", **of), tmp_path / "shared", tables)


def test_evaluation_measures_as_many_samples_as_real_images(model_path, lesions, tmp_path):
    settings = {"datalist": str(lesions), "max_images": 10, "seed": 5}
    use("evaluate", tmp_path, model_path, **settings, source_metrics="true")

    found = read_json(tmp_path / "metrics.json")
    assert (found["n"], found["n_samples"], found["n_test"], found["resolution"]) == (10, 10, 10, 32)
    assert (found["seed"], found["split"], found["label"], found["truncation_psi"]) == (5, "test", None, 1.0)
    for name in ("frd", "kid", "swd", "swd_32", "swd_16"):
        # an untrained network is farther away than other lesions are
        assert found[f"{name}_equal_n"] > found[f"{name}_real"], name
    assert found["unpaired_psnr"] < found["unpaired_psnr_real"] < 40
    assert all(0 < found[f"unpaired_{name}"] < 1 for name in ("ms_gmsd", "mdsi", "haarpsi"))
    picture = np.asarray(Image.open(tmp_path / "images" / "samples_over_test.png"))
    assert_same_levels(
        picture[:32, :32].transpose(2, 0, 1), expected(model_path, [1_000_005])[0]
    )  # not the validation's latents
    assert_same_levels(picture[34:, :32], np.asarray(Image.open(lesions.parent / "20.png"))[4:36])

    use("evaluate", tmp_path / "plain", model_path, **settings)
    plain = read_json(tmp_path / "plain" / "metrics.json")
    assert {name for name in found if name not in plain} == {name for name in found if name.startswith("unpaired")}
    assert plain["kid"] == found["kid"]


def test_evaluation_in_grey_of_one_class(lesions, tmp_path):
    path = weights(tmp_path / "model.pt", out_channels=1)

    use("evaluate", tmp_path / "out", path, datalist=str(lesions), in_channels=1, label=1)

    assert read_json(tmp_path / "out" / "metrics.json")["n_test"] == 6
    picture = np.asarray(Image.open(tmp_path / "out" / "images" / "samples_over_test.png"))
    luma = np.asarray(Image.open(lesions.parent / "22.png").convert("L"))[4:36]
    assert_same_levels(picture[34:, :32], luma)


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        ("inference", {"seeds": "0-x"}, "seeds must be whole numbers"),
        ("inference", {"class_index": 0}, "class_index must be null for a network without classes"),
        ("inference", {"num_classes": 2, "label": 1}, "label must be null for a network with 2 classes"),
        ("inference", {"file_format": "jpeg"}, "file_format must be png or dicom, got 'jpeg'"),
        ("inference", {"truncation_psi": "much"}, "truncation_psi must be a finite number"),
        ("inference", {"image_size": 33}, "image_size must be 16, .*512, got 33"),
        ("inference", {}, "no weights at .*absent.pt"),
        ("inference", {"shard": "4/4"}, "shard"),
        ("evaluate", {"datalist": "absent.json"}, "datalist absent.json not found"),
        ("evaluate", {"label": 7}, "label must be one that the datalist's items have"),
        ("evaluate", {"max_images": 1}, "max_images must be a whole number of at least 2"),
        ("evaluate", {"source_metrics": "some"}, "a switch must be true or false"),
    ],
)
def test_mistakes_are_one_line(config, settings, message, lesions, tmp_path):
    given = {"datalist": str(lesions)} if config == "evaluate" else {}
    with pytest.raises(Exception) as caught:  # noqa: PT011
        use(config, tmp_path / "out", tmp_path / "absent.pt", **{**given, **settings})
    assert_one_line(caught.value, message)
