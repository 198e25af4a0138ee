"""The classifier of the augmentation study as its users run it."""

from __future__ import annotations

import csv
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

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
    state,
)
from sklearn.metrics import average_precision_score, roc_auc_score

from medgen.data import load_classes, read_trained_on, trained_on, write_datalist
from medgen.data.provenance import patient_digest
from medgen.transforms.save_probabilities import write_predictions

BUNDLE = Path(__file__).parents[2] / "bundles" / "augmentation_classifier"
TRAIN = ["configs/train.json", "configs/demo.json"]
COUNTS = {"training": (16, 4), "validation": (6, 3), "test": (8, 5)}  # of dark and of bright images
NAMES = ["dark", "bright"]


def draw(path: Path, rng: np.random.Generator, label: int) -> None:
    """Noise, brighter on average in class 1 than in class 0."""
    Image.fromarray(np.clip(rng.normal(90 + 60 * label, 25, (40, 48)), 0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Datalist of dark and bright images, the bright ones rare in the training."""
    folder = tmp_path_factory.mktemp("toy")
    rng = np.random.default_rng(0)
    splits = {
        split: [
            {"image": f"{split}{label}_{n}.png", "patient": f"{split}{label}_{n}", "label": NAMES[label]}
            for label, count in enumerate(counts)
            for n in range(count)
        ]
        for split, counts in COUNTS.items()
    }
    for item in [item for items in splits.values() for item in items]:
        draw(folder / item["image"], rng, NAMES.index(item["label"]))
    write_datalist(folder / "datalist.json", "brightness", "X-ray", splits, label_names=NAMES)
    return folder / "datalist.json"


@pytest.fixture(scope="module")
def make_synthetic(toy, tmp_path_factory):
    """Writes a synthetic set of both classes, of a generator that saw the patients of these splits; None: not known."""

    def make(seen: tuple[str, ...] | None = ("training", "validation")) -> str:
        folder = tmp_path_factory.mktemp("synthetic")
        items = [
            {"image": f"{n}.png", "patient": f"synthetic-{n}", "label": n % 2, "synthetic": True} for n in range(64)
        ]
        for n, item in enumerate(items):
            draw(folder / item["image"], np.random.default_rng(100 + n), n % 2)
        saw = {split: load_classes(toy, split) for split in seen or ()}
        chosen_by = saw.pop("validation", [])
        extra = (
            {}
            if seen is None
            else {"trained_on": trained_on(toy, [i for each in saw.values() for i in each], chosen_by)}
        )
        write_datalist(folder / "datalist.json", "synthetic", "X-ray", {"training": items}, label_names=NAMES, **extra)
        return str(folder / "datalist.json")

    return make


@pytest.fixture(scope="module")
def synthetic(make_synthetic):
    """A synthetic set whose generator saw no test patient."""
    return make_synthetic()


@pytest.fixture(scope="module")
def trained(toy, workflow, tmp_path_factory):
    """Folder of a training on the real images, evaluated."""
    folder = tmp_path_factory.mktemp("trained")
    settings = {"datalist": str(toy), "batch_size": 8}
    run(workflow(BUNDLE, "train", folder, max_steps=60, val_interval=20, augment="classical", **settings))
    run(workflow(BUNDLE, "evaluate", folder, **settings))
    return folder


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_brightness_is_learnt_and_predictions_are_complete_and_in_order(trained, toy):
    expected = json.loads(toy.read_text())
    for split, name in (("validation", "validation_predictions.csv"), ("test", "predictions.csv")):
        rows = table(trained / name)
        assert list(rows[0]) == ["image", "patient", "label", "p0", "p1"]
        assert [(row["image"], row["patient"]) for row in rows] == [(i["image"], i["patient"]) for i in expected[split]]
        assert [int(row["label"]) for row in rows] == [NAMES.index(item["label"]) for item in expected[split]]
        assert [float(row["p0"]) + float(row["p1"]) for row in rows] == pytest.approx([1] * len(rows), abs=1e-6)
    rows = table(trained / "predictions.csv")
    labels, scores = [int(row["label"]) for row in rows], [float(row["p1"]) for row in rows]
    figures = json.loads((trained / "metrics.json").read_text())
    assert figures["auroc"] > 0.95
    assert figures["auroc"] == pytest.approx(roc_auc_score(labels, scores))
    assert figures["average_precision"] == pytest.approx(average_precision_score(labels, scores))
    decided = np.array(scores) >= figures["threshold"]
    assert figures["accuracy"] == pytest.approx(np.mean(decided == np.array(labels)))
    assert (figures["n"], figures["split"], figures["image_size"]) == (13, "test", 32)
    assert (trained / "images" / "most_wrong.png").is_file()


def test_best_model_is_that_of_the_validations_auroc(trained):
    rows = table(trained / "validation_predictions.csv")
    auroc = roc_auc_score([int(row["label"]) for row in rows], [float(row["p1"]) for row in rows])
    best = json.loads((trained / "best.json").read_text())
    assert (best["metric"], best["value"]) == ("val_auroc", pytest.approx(auroc))
    assert json.loads((trained / "models" / "trained_as.json").read_text())["label_names"] == NAMES


def test_shards_leave_the_probabilities_of_one_process_which_are_those_of_the_evaluation(
    trained, toy, workflow, tmp_path
):
    settings = {"datalist": str(toy), "model_path": str(trained / "models" / "model.pt"), "batch_size": 2}

    def predict(output_dir: Path, **shard: str) -> None:
        run(workflow(BUNDLE, "inference", output_dir, **settings, **shard))

    assert_shards_merge(predict, tmp_path, ["predictions.csv", "rejected.csv"])
    found, expected = table(tmp_path / "out" / "predictions.csv"), table(trained / "predictions.csv")
    for row, other in zip(found, expected, strict=True):
        assert float(row["p1"]) == pytest.approx(float(other["p1"]), abs=1e-6)
        assert [row[name] for name in ("image", "patient", "label")] == [
            other[name] for name in ("image", "patient", "label")
        ]
        assert row["prediction"] == NAMES[float(row["p1"]) > 0.5]


def test_folder_without_labels_gets_probabilities_and_a_broken_file_a_reason(trained, workflow, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for n in range(3):
        draw(folder / f"{n}.png", np.random.default_rng(n), n % 2)
    (folder / "broken.png").write_bytes(b"nothing")
    settings = {"input_dir": str(folder), "model_path": str(trained / "models" / "model.pt")}
    run(workflow(BUNDLE, "inference", tmp_path / "out", **settings))
    rows = table(tmp_path / "out" / "predictions.csv")
    assert [(row["image"], row["label"], row["prediction"]) for row in rows] == [
        ("0.png", "", "dark"),
        ("1.png", "", "bright"),
        ("2.png", "", "dark"),
    ]
    assert [row["file"] for row in table(tmp_path / "out" / "rejected.csv")] == ["broken.png"]
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(workflow(BUNDLE, "inference", tmp_path / "out", resume=True, image_size=64, **settings))
    assert_one_line(caught.value, "image_size must be 32 as in the training of .*, got 64")


@pytest.mark.parametrize(
    ("arm", "settings", "images"),
    [
        ("real", {}, (16, 4)),
        ("synthetic_200", {}, (48, 12)),
        ("synthetic_only", {}, (16, 4)),
        ("classical_balanced", {}, (16, 16)),
        ("oversampled", {}, (16, 16)),
        ("real", {"synthetic_ratio": 0.5, "balance": "synthetic"}, (24, 24)),
    ],
)
def test_every_arm_takes_the_same_number_of_steps(arm, settings, images, toy, synthetic, workflow, tmp_path):
    made = workflow(
        BUNDLE,
        "train",
        tmp_path,
        datalist=str(toy),
        arm=arm,
        synthetic=synthetic,
        max_steps=4,
        val_interval=2,
        **settings,
    )
    made.initialize()
    items = made.parser.get_parsed_content("train#items")
    assert tuple(np.bincount([item["label"] for item in items])) == images
    cached = made.parser.get_parsed_content("train#dataset")._cache
    assert len(cached) == len({item["image"] for item in items})  # a repeated image once
    trainer = made.parser.get_parsed_content("train#trainer")
    made.run()
    assert (trainer.state.iteration, trainer.images_seen) == (4, 8)
    assert trainer.optimizer.param_groups[0]["lr"] < 1e-8  # the cosine's end
    is_random = [type(each).__name__ for each in made.parser.get_parsed_content("train#preprocessing").transforms]
    assert ("RandAffined" in is_random) == arm.startswith("classical")


def test_generator_that_saw_a_test_patient_is_refused_before_anything_begins(toy, make_synthetic, workflow, tmp_path):
    settings = {"datalist": str(toy), "arm": "balanced"}
    for seen, message in (
        (("training", "test"), r"was trained on 13 of the 13 patients of split test .* such as test"),
        (None, "does not say whose images its generator saw.*set --allow_unknown true"),
    ):
        made = workflow(BUNDLE, "train", tmp_path / "out", synthetic=make_synthetic(seen), **settings)
        with pytest.raises(Exception) as caught:  # noqa: PT011
            made.initialize()
        assert_one_line(caught.value, message)
    assert not (tmp_path / "out").exists()
    made = workflow(BUNDLE, "train", tmp_path, synthetic=make_synthetic(None), allow_unknown="true", **settings)
    made.initialize()


def test_classifier_says_whom_it_and_its_generators_saw_and_is_not_tested_on_them(
    trained, toy, synthetic, workflow, tmp_path
):
    def refuse(message: str, **settings: Any) -> None:
        made = workflow(BUNDLE, "evaluate", tmp_path / "out", **{"datalist": str(toy), "model_path": model, **settings})
        with pytest.raises(Exception) as caught:  # noqa: PT011
            made.initialize()
        assert_one_line(caught.value, message)

    model = str(trained / "models" / "model.pt")
    of = {
        split: {patient_digest(i["patient"]) for i in load_classes(toy, split)} for split in ("training", "validation")
    }
    assert read_trained_on(model)["patients"] == {split: sorted(digests) for split, digests in of.items()}
    refuse("model.pt was trained on 20 of the 20 patients of split training", split="training")
    refuse("model.pt was trained on 1 of the 13 patients", datalist=str(spoil(toy, tmp_path / "data", leak)))
    unknown = tmp_path / "model.pt"
    unknown.write_bytes(Path(model).read_bytes())
    refuse("whose images .* was trained on is not known: .*--allow_unknown true", model_path=str(unknown))
    workflow(
        BUNDLE, "evaluate", tmp_path, datalist=str(toy), model_path=str(unknown), allow_unknown="true"
    ).initialize()

    saw = json.loads(Path(synthetic).read_text())["trained_on"]["patients"]
    saw["training"].append("0" * 16)  # of other data
    other = tmp_path / "synthetic" / "datalist.json"
    content = json.loads(Path(synthetic).read_text())
    content["trained_on"]["patients"] = saw
    shutil.copytree(Path(synthetic).parent, other.parent)
    other.write_text(json.dumps(content))
    for arm, more in (("real", []), ("balanced", ["0" * 16])):
        made = workflow(BUNDLE, "train", tmp_path / arm, datalist=str(toy), arm=arm, synthetic=str(other))
        made.initialize()
        record = made.parser.get_parsed_content("validate#companions").trained_on
        assert record["patients"]["training"] == sorted([*more, *of["training"]])


@pytest.mark.parametrize("name", ["evaluate", "inference", "train"])
def test_confident_images_keep_their_order(name, trained, toy, workflow, tmp_path):
    model = tmp_path / "model.pt" if name == "train" else trained / "models" / "model.pt"
    made = workflow(BUNDLE, name, tmp_path, datalist=str(toy), model_path=str(model))
    made.initialize()
    postprocessing = made.parser.get_parsed_content("validate#postprocessing" if name == "train" else "postprocessing")
    logits = torch.tensor([[0.0, 20.0], [0.0, 25.0]])  # in float32 both are p1 = 1
    softmax = postprocessing.transforms[0]
    probabilities = [softmax({"pred": each})["pred"] for each in logits]
    assert probabilities[0][1] < probabilities[1][1] < 1
    rows = [{"image": "a", "patient": "a", "label": 1, "probabilities": each.numpy()} for each in probabilities]
    write_predictions(tmp_path / "table.csv", rows, 2)
    written = [float(row["p1"]) for row in table(tmp_path / "table.csv")]
    assert written == [float(each[1]) for each in probabilities]


def test_same_global_batch_in_two_processes_goes_on_and_another_does_not(toy, workflow, tmp_path, monkeypatch):
    def fingerprint(**settings: Any) -> dict[str, Any]:
        made = workflow(BUNDLE, "train", tmp_path, datalist=str(toy), **settings)
        made.initialize()
        return made.parser.get_parsed_content("train#handlers")[0].fingerprint

    alone = fingerprint(batch_size=4)
    assert fingerprint(batch_size=8) == alone | {"global_batch_size": 8}
    assert fingerprint(batch_size=4, intensity_mean=[0.1]) == alone | {"intensity_mean": [0.1]}
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert fingerprint(batch_size=2, multi_gpu=True) == alone


def leak(content, folder):
    content["test"][0]["patient"] = content["training"][0]["patient"]
    content["training"][0]["patient"] = "another"


def mix_in(content, folder):
    content["training"][0]["synthetic"] = True


def lose_class(content, folder):
    content["validation"] = content["validation"][:6]


def name_others(content, folder):
    content["label_names"] = ["bright", "dark"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"max_steps": 150, "val_interval": 100}, "max_steps must be a multiple of 100, got 150; set --max_steps to"),
        ({"arm": "best"}, "arm must be one of real, classical"),
        ({"augment": "mixup"}, "augment must be one of none, classical"),
        ({"arm": "balanced"}, "class 1 needs 12 synthetic images, got none of any class; .*--synthetic"),
        ({"image_size": 16}, "image_size must be a whole number of at least 32"),
        ({"batch_size": 1}, "batch_size must be a whole number of at least 2"),
        ({"num_classes": 3}, r"none of class 2 \(2\) among 0 \(16\), 1 \(4\)"),
        ({"pretrained": "nowhere.pt"}, "no weights at nowhere.pt"),
    ],
)
def test_mistakes_in_the_settings_are_one_line(overrides, message, toy, workflow, tmp_path):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(workflow(BUNDLE, "train", tmp_path / "out", datalist=str(toy), **overrides))
    assert_one_line(caught.value, message)


def test_classes_of_another_order_or_none_are_one_line(trained, toy, workflow, tmp_path):
    model = str(trained / "models" / "model.pt")
    others, fewer = (str(spoil(toy, tmp_path / f.__name__, f)) for f in (name_others, lose_class))
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(workflow(BUNDLE, "evaluate", tmp_path / "out", datalist=others, model_path=model))
    assert_one_line(caught.value, r"label_names must be \['dark', 'bright'\] as in the training of")
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(workflow(BUNDLE, "train", tmp_path / "out", datalist=str(spoil(toy, tmp_path / "mixed", mix_in))))
    assert_one_line(caught.value, "1 items of split training are synthetic, such as training0_0.png; .*--synthetic")
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(workflow(BUNDLE, "train", tmp_path / "out", datalist=fewer))
    assert_one_line(
        caught.value, r"the validation images must be of all 2 classes, there is none of class 1 \(bright\)"
    )


def test_training_begins_with_weights_from_elsewhere(trained, toy, workflow, tmp_path):
    made = workflow(BUNDLE, "train", tmp_path, datalist=str(toy), pretrained=str(trained / "models" / "model.pt"))
    made.initialize()
    network = made.parser.get_parsed_content("network")
    torch.testing.assert_close(
        network.state_dict(), torch.load(trained / "models" / "model.pt", weights_only=True), rtol=0, atol=0
    )


def test_efficientnet_takes_the_place_of_the_densenet():
    parser = ConfigParser()
    parser.read_config([BUNDLE / "configs" / f"{name}.json" for name in ("train", "efficientnet", "imagenet")])
    network = parser.get_parsed_content("network_def").eval()
    with torch.no_grad():
        assert network(torch.rand(1, 3, 64, 64)).shape == (1, 2)
    assert parser.get_parsed_content("intensity_mean") == [0.485, 0.456, 0.406]


@pytest.mark.slow(reason="starts trainings as processes of their own, two of them under torchrun")
def test_killed_training_ends_with_the_same_weights_and_two_processes_validate_what_they_save(
    toy, synthetic, workflow, tmp_path
):
    settings = {"datalist": toy, "batch_size": 4, "max_steps": 40, "val_interval": 10, "checkpoint_interval": 1}
    settings |= {"arm": "classical_balanced", "synthetic": synthetic, "resume": "true"}
    undisturbed, killed, two = (tmp_path / name for name in ("undisturbed", "killed", "two"))
    running = start(BUNDLE, command(TRAIN, undisturbed, **settings))
    seed = int(time.time())
    print(f"seed of the kill: {seed}")
    kill_after_next_checkpoint(start(BUNDLE, command(TRAIN, killed, **settings)), killed, random.Random(seed))
    assert "resumed from" in finish(start(BUNDLE, command(TRAIN, killed, **settings)))
    finish(running)
    assert state(undisturbed)["images_seen"] == 160
    assert {"network", "optimizer", "lr_scheduler", "best_model"} == set(state(killed)["components"])
    assert_same_training(undisturbed, killed)

    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    config_file = [*TRAIN, "configs/multi_gpu_train.json"]
    arguments = command(config_file, two, **settings | {"batch_size": "$medgen.engines.batch_per_process(4)"})
    assert "2 process(es)" in finish(start(BUNDLE, arguments, *torchrun))
    assert state(two)["images_seen"] == 160
    # each had other statistics of its normalisation, and validated with those that were saved
    run(workflow(BUNDLE, "evaluate", tmp_path / "out", datalist=str(toy), model_path=str(two / "model.pt")))
    rows = table(tmp_path / "out" / "validation_predictions.csv")
    auroc = roc_auc_score([int(row["label"]) for row in rows], [float(row["p1"]) for row in rows])
    assert json.loads((two / "best.json").read_text())["value"] == pytest.approx(auroc)
