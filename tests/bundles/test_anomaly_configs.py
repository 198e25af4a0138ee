"""stylegan2_anomaly from images to figures: inference, score, evaluate, detect."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from PIL import Image
from running import assert_one_line, assert_shards_merge

from medgen.data import write_datalist
from medgen.errors import find_user_error
from medgen.networks import StyleGAN2Generator

pytestmark = pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader:UserWarning")

BUNDLE = Path(__file__).parents[2] / "bundles" / "stylegan2_anomaly"
QUICK = {"steps": 2, "save_noise": False, "resamples": 100, "shuffles": 100}


class KilledError(BaseException):
    """Not an Exception: no handler gets to clean up."""


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run(workflow):
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    return workflow


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(StyleGAN2Generator.from_preset("demo_64", out_channels=1).state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def anomalies(tmp_path_factory):
    """Six test images of as many patients, wider than high, three of them with a bright square and its mask."""
    folder = tmp_path_factory.mktemp("anomalies")
    random = np.random.default_rng(0)
    items = []
    for number in range(6):
        grey = random.normal(110, 10, (64, 90))
        item = {"image": f"{number}.png", "patient": f"p{number}", "label": number % 2}
        if number % 2:
            mask = np.zeros(grey.shape, dtype=bool)
            mask[20:32, 30:42] = True
            grey[mask] = 250
            Image.fromarray(255 * mask.astype(np.uint8)).save(folder / f"mask{number}.png")
            item |= {"anomaly": 1, "anomaly_mask": f"mask{number}.png"}
        Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).save(folder / item["image"])
        items.append(item)
    splits = {"training": [], "validation": [], "test": items}
    write_datalist(folder / "datalist.json", "squares", "X-ray", splits)
    return folder / "datalist.json"


@pytest.fixture(scope="module")
def make(workflow, weights, anomalies):
    def build(config, output_dir, **settings):
        known = ConfigParser.load_config_files([str(BUNDLE / "configs" / f"{config}.json")])
        quick = {name: value for name, value in QUICK.items() if name in known}
        settings = {"model_path": weights, "datalist": str(anomalies), **quick, **settings}
        return workflow(BUNDLE, config, output_dir, **settings)

    return build


@pytest.fixture(scope="module")
def inferred(make, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inferred")
    made = make("inference", folder)
    made.initialize()
    assert made.check_properties() == []
    made.run()
    return folder


def test_inference_writes_a_row_and_pictures_for_each_image(inferred):
    rows = read(inferred / "scores.csv")
    assert [row["image"] for row in rows] == [f"{n}.png" for n in range(6)]
    assert [row["anomaly"] for row in rows] == list("010101")
    assert {row["projection_steps"] for row in rows} == {"2"}
    for folder, kind in (("overlays", "png"), ("maps", "nii.gz")):
        expected = {f"{n}_{measure}.{kind}" for n in range(6) for measure in ("mse", "wd")}
        assert {file.name for file in (inferred / folder).iterdir()} == expected
    assert not (inferred / "dicom").exists()


def test_hit_says_whether_the_worst_patch_touches_the_square(inferred):
    for row in read(inferred / "scores.csv")[1::2]:
        for measure in ("mse", "wd"):
            top, left = (int(row[f"{measure}_patch_{side}"]) for side in ("row", "column"))
            # 64 of 90 columns from the 13th on are scored: the square stands at columns 17 to 28 there
            touches = top < 32 and top + 16 > 20 and left < 29 and left + 16 > 17
            assert row[f"{measure}_hit"] == str(int(touches))


def test_killed_and_resumed_inference_ends_with_the_same_table(make, inferred, tmp_path):
    killed = make("inference", tmp_path)
    killed.initialize()
    evaluator = killed.parser.get_parsed_content("evaluator")

    @evaluator.on(Events.ITERATION_STARTED(once=2))
    def kill(_):
        raise KilledError

    with pytest.raises(KilledError):
        killed.run()
    assert not (tmp_path / "scores.csv").exists()
    run(make("inference", tmp_path, resume=True))
    assert (tmp_path / "scores.csv").read_bytes() == (inferred / "scores.csv").read_bytes()


def test_scoring_alone_gives_the_same_scores(make, inferred, tmp_path):
    made = make(
        "score",
        tmp_path,
        reconstruction_dir=str(inferred / "reconstructions"),
        projection_dir=str(inferred / "projections"),
        save_overlays="false",
        save_maps=False,
    )
    run(made)
    assert made.check_properties() == []
    assert read(tmp_path / "scores.csv") == read(inferred / "scores.csv")
    assert not (tmp_path / "overlays").exists()
    assert not (tmp_path / "maps").exists()
    assert (tmp_path / "images/scored.png").is_file()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["n_anomalous"] == 3
    assert "auroc_mse_full" in metrics


def test_shards_of_scores_leave_the_files_of_one_process(make, inferred, tmp_path):
    folders = {f"{kind}_dir": str(inferred / f"{kind}s") for kind in ("reconstruction", "projection")}

    def score(output_dir, **shard):
        run(make("score", output_dir, **folders, **shard))

    tables = ["scores.csv", "detection.csv", "metrics.json", "images/roc.png", "images/scored.png"]
    assert_shards_merge(score, tmp_path, tables, "stylegan2_anomaly.score")
    assert read(tmp_path / "out/scores.csv") == read(inferred / "scores.csv")


def test_image_that_a_projection_gave_up_is_left_out(make, inferred, tmp_path, capsys):
    shutil.copytree(inferred / "reconstructions", tmp_path / "reconstructions")
    rows = read(inferred / "scores.csv")
    (tmp_path / "reconstructions" / Path(rows[0]["image"]).with_suffix(".png")).unlink()
    (tmp_path / "rejected.csv").write_text(f"file,reason\n{rows[0]['image']},its projection diverged\n")
    folder = str(tmp_path / "reconstructions")

    run(make("score", tmp_path / "out", reconstruction_dir=folder))

    assert [row["image"] for row in read(tmp_path / "out/scores.csv")] == [row["image"] for row in rows[1:]]
    assert f"{len(rows) - 1} images scored, 1 without a projection left out" in capsys.readouterr().out
    (tmp_path / "rejected.csv").unlink()
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(make("score", tmp_path / "other", reconstruction_dir=folder))
    assert_one_line(caught.value, r"not found \(1 of .* reconstructions are missing\)")


def test_scoring_beside_a_projection_keeps_its_table_of_what_it_gave_up(make, tmp_path):
    for place in ("in/a", "in/b", "out/reconstructions/a"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 50), 100, np.uint8)).save(tmp_path / f"{place}.png")
    table = tmp_path / "out/rejected.csv"
    table.write_text("file,reason\nb.png,its projection diverged\n")
    run(make("score", tmp_path / "out", input_dir=str(tmp_path / "in")))
    assert [row["image"] for row in read(tmp_path / "out/scores.csv")] == ["a.png"]
    assert table.read_text() == "file,reason\nb.png,its projection diverged\n"


def test_any_two_folders_can_be_scored(make, tmp_path):
    for folder, level in (("in/p", 100), ("rec/p", 151)):
        (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(np.full((40, 40), level, np.uint8)).save(tmp_path / folder / "a.bmp")
    settings = {"input_dir": str(tmp_path / "in"), "reconstruction_dir": str(tmp_path / "rec"), "patch": 8}
    run(make("score", tmp_path / "out", **settings))
    (row,) = read(tmp_path / "out/scores.csv")
    assert (row["image"], row["patient"], row["patch"]) == ("p/a.bmp", "p/a", "8")
    assert float(row["mse_full"]) == pytest.approx((51 / 255) ** 2)
    assert float(row["wd_patch"]) == pytest.approx(51 / 255)


def test_folders_of_images_of_different_sizes_can_be_scored(make, tmp_path):
    random = np.random.default_rng(0)
    for number, size in enumerate([(60, 60), (64, 80), (40, 40)]):
        image = random.integers(0, 255, size, dtype=np.uint8)
        for folder, pixels in (("in", image), ("rec", 255 - image)):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / folder / f"{number}.png")
    settings = {"input_dir": str(tmp_path / "in"), "reconstruction_dir": str(tmp_path / "rec")}
    run(make("score", tmp_path / "out", **settings))
    rows = read(tmp_path / "out/scores.csv")
    assert [row["patch"] for row in rows] == ["15", "16", "10"]
    assert [bool(row["ms_ssim"]) for row in rows] == [True, True, False]
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert (metrics["n"], metrics["n_patients"], metrics["n_anomalous"]) == (3, 3, 0)
    with Image.open(tmp_path / "out/images/scored.png") as grid:
        assert grid.size == (3 * 82 - 2, 3 * 66 - 2)


def test_other_reconstructions_have_no_columns_of_the_projections_beside_them(make, inferred, tmp_path):
    shutil.copytree(inferred, tmp_path, dirs_exist_ok=True)
    (tmp_path / "scores.csv").unlink()
    run(make("score", tmp_path, resume=True))
    assert "projection_steps" in read(tmp_path / "scores.csv")[0]
    (tmp_path / "reconstructions").rename(tmp_path / "of another detector")
    run(make("score", tmp_path, reconstruction_dir=str(tmp_path / "of another detector"), resume=True))
    assert "projection_steps" not in read(tmp_path / "scores.csv")[0]


def test_scoring_without_reconstructions_says_what_to_do(make, tmp_path):
    with pytest.raises(Exception, match=r".") as caught:
        run(make("score", tmp_path))
    assert "6 of 6 reconstructions are missing" in find_user_error(caught.value)


def test_senseless_patch_is_refused_before_the_projection(make, tmp_path):
    with pytest.raises(Exception, match=r".") as caught:
        make("inference", tmp_path, patch=0).initialize()
    assert "patch must be a whole number of pixels" in find_user_error(caught.value)


def spoil(change):
    """Settings with a datalist in which something has been changed."""

    def settings(anomalies, folder):
        shutil.copytree(anomalies.parent, folder)
        content = json.loads((folder / "datalist.json").read_text())
        change(content["test"], folder)
        (folder / "datalist.json").write_text(json.dumps(content))
        return {"datalist": str(folder / "datalist.json")}

    return settings


def cut_off(items, folder):
    file = folder / items[4]["image"]
    file.write_bytes(file.read_bytes()[:100])


def replace_mask(items, folder):
    Image.fromarray(np.ones((90, 64), np.uint8)).save(folder / items[3]["anomaly_mask"])


@pytest.mark.parametrize("config", ["inference", "evaluate"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lambda *_: {"patch": 65}, "shorter side of the image, 64 pixels, got 65"),
        (
            lambda *_: {"mse_limit": "abc", "save_overlays": True},
            r"limits must be a number above 0 .*'abc'.*--mse_limit",
        ),
        (spoil(lambda items, _: items[1].update(anomaly=2)), r"anomaly must be 1, or 0 .* got 2 for .*1\.png"),
        (spoil(lambda items, _: items[1].update(anomaly="needle")), "got 'needle'"),
        (spoil(cut_off), r"4\.png: .*truncated or damaged.* \(1 of 6 items cannot be used\)"),
        (spoil(replace_mask), r"mask3\.png: an anomaly_mask must have its image's 64×90 pixels .* got 90×64"),
    ],
    ids=["patch", "limit", "2", "needle", "cut off", "mask"],
)
def test_what_would_fail_after_the_projection_is_refused_before_it(
    config, settings, message, make, anomalies, tmp_path
):
    made = make(config, tmp_path / "out", **settings(anomalies, tmp_path / "data"))
    with pytest.raises(Exception, match=r".") as caught:
        made.initialize()
    assert_one_line(caught.value, message)
    assert not list((tmp_path / "out").rglob("*.npz"))


def test_evaluation_measures_detection_localisation_and_reconstruction(make, inferred, tmp_path):
    made = make("evaluate", tmp_path)
    made.initialize()
    assert made.check_properties() == []
    made.run()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    rows = read(tmp_path / "scores.csv")
    assert rows == read(inferred / "scores.csv")
    assert metrics["l1"] == pytest.approx(np.mean([float(row["l1"]) for row in rows]))
    assert metrics["mse_patch"] == pytest.approx(np.mean([float(row["mse_patch"]) for row in rows]))
    assert {
        "psnr",
        "ms_ssim",
        "localisation_mse",
        "auroc_wd_patch_low",
        "delong_p_full",
        "model_sha256",
    } <= metrics.keys()
    assert (metrics["n"], metrics["n_anomalous"], metrics["n_patients"], metrics["split"]) == (6, 3, 6, "test")
    assert (metrics["image_height"], metrics["image_width"]) == (64, 64)
    assert {file.name for file in (tmp_path / "images").iterdir()} == {"test.png", "roc.png"}
    assert not (tmp_path / "overlays").exists()


def test_evaluation_of_normal_images_has_no_detection(make, datalist, tmp_path):
    run(make("evaluate", tmp_path, datalist=str(datalist)))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert {"psnr", "l1", "ms_ssim", "mse_full", "wd_patch"} <= metrics.keys()
    assert [name for name in metrics if name.startswith(("auroc", "localisation"))] == []
    assert {file.name for file in (tmp_path / "images").iterdir()} == {"test.png"}


def test_detection_from_tables_alone(make, inferred, tmp_path):
    rows = read(inferred / "scores.csv")
    for kind in ("0", "1"):
        with (tmp_path / f"{kind}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["patient", "mse_full", "wd_full"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(row for row in rows if row["anomaly"] == kind)
    one, two = tmp_path / "one", tmp_path / "two"
    run(make("detect", one, scores=str(inferred / "scores.csv")))
    run(make("detect", two, scores=str(tmp_path / "0.csv"), anomalous_scores=str(tmp_path / "1.csv")))
    first, second = (json.loads((folder / "detection.json").read_text()) for folder in (one, two))
    assert "auroc_mse_patch" in first
    assert "auroc_mse_patch" not in second
    assert second["auroc_wd_full"] == first["auroc_wd_full"]
    assert second["permutation_p_mse_full"] == first["permutation_p_mse_full"]


def test_scoring_is_the_same_everywhere():
    chains = {}
    for name in ("score", "inference", "evaluate"):
        config = json.loads((BUNDLE / "configs" / f"{name}.json").read_text())
        chain = config.get("score", config)["preprocessing"]["transforms"]
        # without it two detectors' DICOM objects would share a series
        origins = [step.pop("origin") for step in chain if step["_target_"] == "medgen.transforms.SaveAnomalyDICOMd"]
        assert len(origins) == 1
        chains[name] = chain
    assert chains["score"] == chains["inference"] == chains["evaluate"]


@pytest.mark.parametrize("config", ["inference", "evaluate", "score", "detect"])
def test_overlay_changes_the_network_of_every_config(config):
    parser = ConfigParser()
    parser.read_config([str(BUNDLE / "configs" / f"{name}.json") for name in (config, "small_64")])
    assert parser.get_parsed_content("network_def").image_size == (64, 64)


def test_projection_settings_are_the_same_everywhere():
    project, inference, evaluate = (
        json.loads((BUNDLE / "configs" / f"{name}.json").read_text()) for name in ("project", "inference", "evaluate")
    )
    own = {"run_name", "data_root", "items", "projected", "initialize", "run"}
    unsharded = {"input_dir", "inputs", "is_shard", "listed", "part", "rejected"}
    shared = {name: value for name, value in project.items() if not isinstance(value, dict | list)} | {
        "imports": project["imports"]
    }
    for config, missing in ((inference, set()), (evaluate, unsharded)):
        assert {n: config.get(n) for n in shared if n not in own | missing} == {
            n: v for n, v in shared.items() if n not in own | missing
        }
    for name in ("loss", "projector", "encoder_def", "inferer"):
        nested = json.dumps(evaluate["project"][name]).replace("@project#", "@")
        assert json.loads(nested) == project[name] == inference[name]
