"""The table of scores in the order of the items, its means, localisation, and detection where both classes are."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import PrepareBatchExtraInput, SupervisedEvaluator
from monai.metrics import MultiScaleSSIMMetric
from scipy.stats import mannwhitneyu

from medgen.errors import UserError
from medgen.handlers import DetectionFigures, ScoresCSV, reconstruction_metrics
from medgen.metrics import localisation_rate
from medgen.metrics.anomaly import Patch
from medgen.transforms import SaveProjectiond, ScoreAnomalyd

SIDE, PATCH = 16, 4


def make_items(folder, count=6, anomalies=True):
    """Datalist items; every other one an anomaly with a mask."""
    items = []
    for number in range(count):
        item = {"image": str(folder / "in" / f"p{number % 3}" / f"{number}.png"), "patient": f"p{number % 3}"}
        if anomalies and number % 2:
            item |= {"anomaly": 1, "anomaly_mask": f"m{number}.png"}
        items.append(item)
    return items


def make_entries(items, patient=""):
    """What the configs' chain makes of them: noise, and a bright square that the reconstruction lacks."""
    random = np.random.default_rng(0)
    entries = []
    for number, item in enumerate(items):
        reconstruction = random.uniform(0.2, 0.6, (1, SIDE, SIDE))
        image, mask = reconstruction + random.normal(0, 0.02, reconstruction.shape), np.zeros((1, SIDE, SIDE))
        if item.get("anomaly"):
            # of one of them the mask lies elsewhere: a miss
            image[:, 4:8, 4:8] += 0.3
            at = slice(10, 14) if number == 1 else slice(4, 8)
            mask[:, at, at] = 1
        meta = {"filename_or_obj": item["image"], "patient": patient}
        entry = {"image": MetaTensor(torch.tensor(image.clip(0, 1), dtype=torch.float32), meta=meta)}
        entry |= {"reconstruction": torch.tensor(reconstruction, dtype=torch.float32)}
        entry = ScoreAnomalyd(patch=PATCH)(entry)
        entries.append(
            {
                "image": entry["image"],
                "reconstruction": entry["reconstruction"],
                "scores": entry["scores"],
                "anomaly_mask": torch.tensor(mask, dtype=torch.uint8),
            }
        )
    return entries


def run(entries, handlers, batch_size=4, **metrics):
    evaluator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=DataLoader(Dataset(entries), batch_size=batch_size),
        network=torch.nn.Identity(),
        prepare_batch=PrepareBatchExtraInput("reconstruction"),
        inferer=lambda image, network, reconstruction: reconstruction,
        val_handlers=handlers,
        **metrics,
    )
    evaluator.run()
    return evaluator.state.metrics


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_stand_in_the_order_of_the_items_with_their_scores(tmp_path):
    items = make_items(tmp_path)
    entries = make_entries(items)
    run(entries, [ScoresCSV(tmp_path / "out/scores.csv", items, tmp_path / "in")])
    rows = read(tmp_path / "out/scores.csv")
    assert [row["image"] for row in rows] == [f"p{n % 3}/{n}.png" for n in range(6)]
    assert [row["patient"] for row in rows] == [item["patient"] for item in items]
    assert [row["anomaly"] for row in rows] == list("010101")
    for row, entry in zip(rows, entries, strict=True):
        assert {name: float(row[name]) for name in entry["scores"]} == entry["scores"]
    assert "label" not in rows[0]


def test_image_without_a_body_has_empty_cells_and_is_named(tmp_path, caplog):
    items = make_items(tmp_path, anomalies=False)
    entries = make_entries(items)
    entries[2]["scores"] |= {"mse_body": float("nan"), "wd_body": float("nan")}
    metrics = run(entries, [ScoresCSV(tmp_path / "scores.csv", items, tmp_path / "in")])
    rows = read(tmp_path / "scores.csv")
    assert (rows[2]["mse_body"], rows[2]["wd_body"]) == ("", "")
    assert metrics["mse_body"] == pytest.approx(
        np.mean([float(row["mse_body"]) for n, row in enumerate(rows) if n != 2])
    )
    assert "no body found in 1 of 6 images (p2/2.png is one)" in caplog.text
    assert "anomaly" not in rows[0]
    assert "mse_full_normal" not in metrics


def test_means_are_over_all_and_by_class(tmp_path):
    items = make_items(tmp_path)
    metrics = run(make_entries(items), [ScoresCSV(tmp_path / "scores.csv", items)])
    values = np.array([float(row["wd_patch"]) for row in read(tmp_path / "scores.csv")])
    assert metrics["wd_patch"] == pytest.approx(values.mean())
    assert (metrics["n_patients"], metrics["n_anomalous"]) == (3, 3)
    assert metrics["wd_patch_normal"] == pytest.approx(values[::2].mean())
    assert metrics["wd_patch_anomalous"] == pytest.approx(values[1::2].mean())


def test_metrics_kept_by_image_become_columns(tmp_path):
    items = make_items(tmp_path)
    entries = make_entries(items)
    table = ScoresCSV(tmp_path / "scores.csv", items)
    run(entries, [table], additional_metrics={}, key_val_metric=reconstruction_metrics())
    for row, entry in zip(read(tmp_path / "scores.csv"), entries, strict=True):
        error = (entry["image"] - entry["reconstruction"]).abs().mean()
        assert float(row["l1"]) == pytest.approx(float(error), rel=1e-5)


def test_metrics_of_records_become_columns_and_their_means_leave_out_what_an_image_lacks(tmp_path):
    items = make_items(tmp_path)
    nan = float("nan")
    found = [{"psnr": 20.0 + n, "ms_ssim": nan if n == 1 else 0.5, "other": nan} for n in range(len(items))]
    entries = [entry | {"metrics": metrics} for entry, metrics in zip(make_entries(items), found, strict=True)]
    engine = Engine(lambda _, batch: batch)
    ScoresCSV(tmp_path / "scores.csv", items).attach(engine)
    engine.run([[entry] for entry in entries])
    rows = read(tmp_path / "scores.csv")
    assert [row["psnr"] for row in rows] == ["20.0", "21.0", "22.0", "23.0", "24.0", "25.0"]
    assert (engine.state.metrics["psnr"], engine.state.metrics["ms_ssim"]) == (22.5, 0.5)
    assert "other" not in engine.state.metrics
    assert "other" not in rows[0]


def of_sizes(folder, sizes):
    """Items and entries of images of these sizes, scored."""
    random = np.random.default_rng(0)
    items, entries = [], []
    for number, size in enumerate(sizes):
        image = torch.tensor(random.uniform(size=(1, *size)), dtype=torch.float32)
        items.append({"image": str(folder / f"{number}.png"), "patient": str(number)})
        entry = {"image": MetaTensor(image, meta={"filename_or_obj": items[-1]["image"]})}
        entry = ScoreAnomalyd(patch=PATCH)(entry | {"reconstruction": (image + 0.1).clip(0, 1)})
        entries.append({name: entry[name] for name in ("image", "reconstruction", "scores")})
    return items, entries


def test_metrics_are_by_the_size_of_each_image(tmp_path):
    items, entries = of_sizes(tmp_path, [(47, 99), (48, 60), (200, 180)])
    table = ScoresCSV(tmp_path / "scores.csv", items)
    metrics = run(entries, [table], key_val_metric=reconstruction_metrics(), batch_size=1)
    rows = read(tmp_path / "scores.csv")
    assert rows[0]["ms_ssim"] == ""
    for row, entry, kernel_size in zip(rows[1:], entries[1:], (3, 11), strict=True):
        metric = MultiScaleSSIMMetric(spatial_dims=2, kernel_size=kernel_size)
        expected = metric(entry["reconstruction"][None], entry["image"].as_tensor()[None])
        assert float(row["ms_ssim"]) == pytest.approx(float(expected), rel=1e-5)
    assert metrics["ms_ssim"] == pytest.approx(np.mean([float(row["ms_ssim"]) for row in rows[1:]]), rel=1e-5)
    assert float(rows[0]["l1"]) == pytest.approx(0.095, abs=0.01)


def test_ms_ssim_is_left_out_where_all_images_are_too_small(tmp_path):
    items, entries = of_sizes(tmp_path, [(47, 99), (16, 16)])
    handlers = [ScoresCSV(tmp_path / "scores.csv", items)]
    metrics = run(entries, handlers, key_val_metric=reconstruction_metrics(), batch_size=1)
    assert "ms_ssim" not in metrics
    assert "ms_ssim" not in read(tmp_path / "scores.csv")[0]


def test_localisation_is_that_of_the_worst_patches(tmp_path):
    items = make_items(tmp_path)
    entries = make_entries(items)
    metrics = run(entries, [ScoresCSV(tmp_path / "scores.csv", items, seed=4)])
    chosen = [1, 3, 5]
    scores = [entries[n]["scores"] for n in chosen]
    patches = [Patch(s["mse_patch_row"], s["mse_patch_column"], PATCH, s["mse_patch"]) for s in scores]
    masks = [entries[n]["anomaly_mask"].numpy() for n in chosen]
    expected = localisation_rate(patches, masks, [items[n]["patient"] for n in chosen], seed=4)
    assert expected.rate.value == pytest.approx(2 / 3)
    assert metrics["localisation_mse"] == expected.rate.value
    assert (metrics["localisation_mse_low"], metrics["localisation_mse_high"]) == (
        expected.rate.low,
        expected.rate.high,
    )
    assert metrics["localisation_mse_chance"] == pytest.approx(expected.chance)
    assert [row["mse_hit"] for row in read(tmp_path / "scores.csv")] == ["", "0", "", "1", "", "1"]


def test_anomaly_outside_the_crop_does_not_count_and_is_named(tmp_path, caplog):
    items = make_items(tmp_path)
    entries = make_entries(items)
    entries[1]["anomaly_mask"].zero_()
    metrics = run(entries, [ScoresCSV(tmp_path / "scores.csv", items, tmp_path / "in")])
    assert metrics["localisation_mse"] == 1
    assert "the known anomaly of 1 of 3 images lies outside the part that was scored" in caplog.text


def test_other_order_than_the_items_is_refused(tmp_path):
    items = make_items(tmp_path)
    entries = make_entries(items)
    with pytest.raises(UserError, match=r"in the order of the items, got .*1\.png in the place of .*0\.png"):
        run([entries[1], entries[0]], [ScoresCSV(tmp_path / "scores.csv", items[:2])])


def test_projection_of_each_image_is_in_its_row(tmp_path, caplog):
    items = make_items(tmp_path)
    (tmp_path / "model.pt").write_bytes(b"weights")
    save = SaveProjectiond(tmp_path / "projections", {}, tmp_path / "model.pt", tmp_path / "in", save_noise=False)
    for number in (0, 3):
        image = MetaTensor(torch.zeros(1, 4, 4), meta={"filename_or_obj": items[number]["image"]})
        (tmp_path / f"in/p{number % 3}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"in/p{number % 3}/{number}.png").write_bytes(b"image")
        found = {"w": torch.zeros(1, 2), "loss_curve": torch.zeros(70), "steps": 70, "distance": 0.25}
        path = save({"image": image, **found})["projection_path"]
    with open(path, "r+b") as file:
        file.truncate(200)
    run(make_entries(items), [ScoresCSV(tmp_path / "scores.csv", items, tmp_path / "in", tmp_path / "projections")])
    rows = read(tmp_path / "scores.csv")
    assert (rows[0]["projection_steps"], rows[0]["projection_distance"]) == ("70", "0.25")
    # neither an image without a record nor a broken one loses the scores
    assert rows[1]["projection_steps"] == rows[3]["projection_steps"] == ""
    assert rows[3]["mse_full"]
    assert "1 records of projections left out of the table" in caplog.text


@pytest.mark.parametrize(
    ("from_folder", "of_file", "expected"),
    [(True, "P7", ["P7", "P7"]), (True, "", ["a/0", "b/0"]), (False, "P7", ["0", "0"])],
)
def test_patient_of_a_folder_is_dicoms_or_else_the_path(tmp_path, from_folder, of_file, expected):
    items = [{"image": str(tmp_path / folder / "0.dcm"), "patient": "0"} for folder in "ab"]
    table = ScoresCSV(tmp_path / "scores.csv", items, tmp_path, from_folder=from_folder)
    metrics = run(make_entries(items, patient=of_file), [table])
    assert [row["patient"] for row in read(tmp_path / "scores.csv")] == expected
    assert metrics["n_patients"] == len(set(expected))
    assert metrics["n_anomalous"] == 0


def with_detection(tmp_path, items):
    table = ScoresCSV(tmp_path / "scores.csv", items, tmp_path / "in")
    return [table, DetectionFigures(table, tmp_path / "detection.csv", tmp_path / "images/roc.png", 100, 100)]


def test_detection_figures_are_those_of_the_table(tmp_path):
    items = [{**item, "patient": f"q{n}"} for n, item in enumerate(make_items(tmp_path))]
    metrics = run(make_entries(items), with_detection(tmp_path, items))
    values = np.array([float(row["mse_full"]) for row in read(tmp_path / "scores.csv")])
    assert metrics["auroc_mse_full"] == pytest.approx(mannwhitneyu(values[1::2], values[::2]).statistic / 9)
    assert float(read(tmp_path / "detection.csv")[0]["auroc"]) == metrics["auroc_mse_full"]
    assert (tmp_path / "images/roc.png").is_file()
    assert all(np.isfinite(value) for value in metrics.values())


def test_one_class_has_scores_and_no_detection(tmp_path):
    items = make_items(tmp_path, anomalies=False)
    metrics = run(make_entries(items), with_detection(tmp_path, items))
    assert "mse_full" in metrics
    assert not [name for name in metrics if name.startswith("auroc")]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scores.csv"]


def test_later_handlers_of_the_epoch_see_the_figures(tmp_path):
    # trackers log engine.state.metrics at the end of the epoch
    items = make_items(tmp_path)
    seen = {}

    class Tracker:
        def attach(self, engine: Engine) -> None:
            engine.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: seen.update(engine.state.metrics))

    run(make_entries(items), [*with_detection(tmp_path, items), Tracker()])
    assert {"mse_full", "localisation_wd", "auroc_wd_patch"} <= seen.keys()
