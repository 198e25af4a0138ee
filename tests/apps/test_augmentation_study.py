"""The augmentation study without trainings: its runs, and its report from tables of predictions made by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.special import expit, softmax
from sklearn.metrics import roc_auc_score

from medgen.apps.augmentation_report import Arm, AugmentationReport, Predictions, read_predictions
from medgen.apps.augmentation_study import AugmentationStudy
from medgen.apps.probes import holm
from medgen.data import AUGMENTATION_ARMS, trained_on, write_datalist
from medgen.errors import UserError
from medgen.metrics import classification_metrics, pick_threshold

BUNDLE = Path(__file__).parents[2] / "bundles" / "augmentation_classifier"
NAMES = ["hand", "chest"]
COUNTS = {"training": (12, 3), "validation": (14, 12), "test": (30, 20)}
QUICK = {"resamples": 200, "shuffles": 199}
ARMS = ["real", "synthetic_100", "balanced"]


def items(split):
    return [
        {"image": f"{split}{label}_{n}.png", "patient": f"{split}{label}_{n // 2}", "label": NAMES[label]}
        for label, count in enumerate(COUNTS[split])
        for n in range(count)
    ]


def write_images(folder, of):
    """Files that are there: nothing reads them here."""
    for item in of:
        (folder / item["image"]).touch()


@pytest.fixture(scope="module")
def datalist(tmp_path_factory):
    path = tmp_path_factory.mktemp("real") / "datalist.json"
    splits = {split: items(split) for split in COUNTS}
    write_images(path.parent, [item for of_split in splits.values() for item in of_split])
    write_datalist(path, "hands and chests", "X-ray", splits, label_names=NAMES)
    return path


@pytest.fixture(scope="module")
def make_synthetic(datalist, tmp_path_factory):
    def make(seen, counts=(12, 12)):
        """A synthetic set; ``seen``: items that its generator saw, None: not known."""
        synthetic = [
            {"image": f"{k}_{n}.png", "patient": f"synthetic-{k}-{n}", "label": k, "synthetic": True}
            for k, count in enumerate(counts)
            for n in range(count)
        ]
        extra = {} if seen is None else {"trained_on": trained_on(datalist, seen, [])}
        path = tmp_path_factory.mktemp("synthetic") / "datalist.json"
        write_images(path.parent, synthetic)
        write_datalist(path, "synthetic", "X-ray", {"training": synthetic}, label_names=NAMES, **extra)
        return str(path)

    return make


@pytest.fixture
def make_study(datalist, make_synthetic, tmp_path):
    def make(**settings):
        training = {"datalist": str(datalist), "num_classes": 2, "image_size": None, **settings.pop("training", {})}
        synthetic = settings.pop("synthetic", make_synthetic(items("training")))
        return AugmentationStudy(BUNDLE, tmp_path, training, synthetic=synthetic, **{**QUICK, **settings})

    return make


def write_table(path, of, probabilities):
    """``predictions.csv`` as an evaluation leaves it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["image", "patient", "label", *(f"p{k}" for k in range(probabilities.shape[1]))])
        for item, row in zip(of, probabilities, strict=True):
            label = item["label"] if isinstance(item["label"], int) else NAMES.index(item["label"])
            lines.writerow([item["image"], item["patient"], label, *(f"{value:.9g}" for value in row)])


def predictions(of, strength, seed):
    """(N, 2) of noise and of the truth."""
    labels = np.array([NAMES.index(item["label"]) for item in of])
    p = expit(np.random.default_rng(seed).normal(size=len(of)) + strength * labels - 1)
    return np.stack([1 - p, p], axis=1)


def fill(study):
    """Predictions of all runs of a study; an arm is the better the later it comes."""
    for place, arm in enumerate(study.arms):
        for seed in study.seeds:
            folder = study.output_dir / "runs" / arm / f"seed{seed}"
            for split, name in (("validation", "validation_predictions.csv"), ("test", "predictions.csv")):
                write_table(folder / name, items(split), predictions(items(split), 0.5 + place, [seed, len(split)]))


def rows_of(folder):
    with open(folder / "study.csv", newline="") as file:
        return {(row["arm"], row["metric"]): row for row in csv.DictReader(file)}


class TestRuns:
    def test_all_arms_that_the_images_allow_are_run_and_the_others_named(self, make_study, make_synthetic):
        study = make_study(synthetic=make_synthetic(items("training"), counts=(12, 8)))
        assert list(study.arms) == ["real", "classical", "synthetic_050", "synthetic_100", "classical_synthetic_100",
                                    "synthetic_only", "oversampled"]  # fmt: skip
        left_out = {arm.name: arm.reason for arm in study.left_out}
        assert set(left_out) == set(AUGMENTATION_ARMS) - set(study.arms)
        assert "class 1 needs 9 synthetic images, got 8" in left_out["balanced"]

    def test_without_synthetic_images_the_arms_that_need_none_are_left(self, make_study):
        assert list(make_study(synthetic=None).arms) == ["real", "classical", "oversampled"]

    def test_arms_tell_their_images_of_each_class(self, make_study):
        arms = make_study().arms
        counts = {name: (tuple(arm.real), tuple(arm.synthetic)) for name, arm in arms.items()}
        assert counts["real"] == ((12, 3), (0, 0))
        assert counts["synthetic_100"] == ((12, 3), (12, 3))
        assert counts["synthetic_only"] == ((0, 0), (12, 3))
        assert counts["balanced"] == ((12, 3), (0, 9))
        assert counts["oversampled"] == ((12, 12), (0, 0))

    def test_arms_of_the_same_images_are_run_once(self, make_study, make_synthetic, tmp_path):
        equal = [item for item in items("training") if int(item["image"][10:-4]) < 3]
        path = tmp_path / "equal.json"
        write_datalist(path, "equal", "X-ray", {s: items(s) for s in COUNTS} | {"training": equal}, label_names=NAMES)
        write_images(tmp_path, [item for split in COUNTS for item in items(split)])
        study = make_study(
            training={"datalist": str(path)}, arms="oversampled,real,classical,balanced,classical_balanced"
        )
        assert list(study.arms) == ["real", "classical"]
        assert {arm.name: arm.reason for arm in study.left_out} == {
            "oversampled": "the same images as real, used in the same way",
            "balanced": "the same images as real, used in the same way",
            "classical_balanced": "the same images as classical, used in the same way",
        }

    def test_the_evaluation_gets_the_settings_of_the_training_that_it_has(self, make_study, make_synthetic):
        given = {"intensity_mean": [0.4], "network_def#init_features": 8, "lr": 0.1, "batch_size": 4}
        settings = {"arms": ["real", "balanced"], "seeds": 0, "synthetic": make_synthetic(items("training"))}
        study = make_study(**settings, training=given, threshold=0.3)
        for run in study.runs().values():
            training, evaluation = (step.overrides for step in run.steps)
            assert given.items() <= training.items()
            assert evaluation.items() >= {name: given[name] for name in given if name != "lr"}.items()
            assert "lr" not in evaluation
        # the report's own: another one takes no other runs
        assert make_study(**settings, training=given).runs() == study.runs()

    def test_an_overlay_that_would_make_all_arms_alike_is_refused(self, make_study, tmp_path):
        overlay = tmp_path / "overlay.json"
        overlay.write_text('{"augment": "none"}')
        with pytest.raises(UserError, match="what tells its runs apart, got augment"):
            make_study(overlays=str(overlay))

    def test_each_arm_and_seed_trains_then_evaluates_with_the_same_steps_and_seed(self, make_study):
        study = make_study(arms="real,balanced", seeds="3,5", training={"max_steps": 7}, overlays="demo.json")
        runs = study.runs()
        assert list(runs) == [("real", 3), ("balanced", 3), ("real", 5), ("balanced", 5)]
        for (arm, seed), run in runs.items():
            training, evaluation = run.steps
            assert training.config_file == ["train.json", "demo.json"]
            assert evaluation.config_file == ["evaluate.json", "demo.json"]
            given = training.overrides
            assert (given["arm"], given["seed"], given["max_steps"], given["resume"]) == (arm, seed, 7, True)
            assert ("synthetic" in given) == (arm == "balanced")
            assert "image_size" not in given
            assert not {"arm", "synthetic", "resume"} & set(evaluation.overrides)
            assert evaluation.overrides["model_path"] == given["model_path"]
        assert len({run.done for run in runs.values()}) == 4

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"arms": ["classical"]}, "with real among them"),
            ({"arms": ["real", "real"]}, "must be different names"),
            ({"arms": ["real", "magic"]}, "arm must be one of"),
            ({"arms": ["real", "synthetic_200"]}, "arm synthetic_200: class 0 needs 24 synthetic images, got 12"),
            ({"seeds": "x"}, "seeds must be whole numbers"),
            ({"training": {"num_classes": 3}, "threshold": 0.5}, "a threshold takes two classes"),
            ({"threshold": 1.5}, "threshold must be a number from 0 to 1"),
            ({"level": 95}, "level must lie between 0 and 1"),
            ({"resamples": 100}, "resamples must be a whole number of at least 200"),
            ({"shuffles": 0}, "shuffles must be a whole number"),
            ({"arms": ["real", "classical", "balanced"], "shuffles": 39}, "at least 40 for 2 arms beside real.*got 39"),
            *[
                ({"training": {name: 1}}, f"what tells its runs apart, got {name}; leave it out")
                for name in ("arm", "augment", "balance", "resume", "seed", "synthetic", "synthetic_ratio")
            ],
            ({"training": {"bach_size": 4}}, "did you mean --batch_size"),
            ({"overlays": "nothing.json"}, "no config nothing.json in"),
        ],
    )
    def test_impossible_studies_are_refused_before_anything_is_trained(self, make_study, settings, message):
        with pytest.raises(UserError, match=message) as error:
            make_study(**settings)
        assert "\n" not in str(error.value)

    def test_generators_that_saw_test_patients_are_refused(self, make_study, make_synthetic):
        with pytest.raises(UserError, match="patients of split test"):
            make_study(synthetic=make_synthetic([*items("training"), items("test")[0]]))
        with pytest.raises(UserError, match="does not say whose images"):
            make_study(synthetic=make_synthetic(None))
        assert make_study(synthetic=make_synthetic(None), allow_unknown=True).arms

    def test_what_succeeded_is_reported_when_a_run_fails(self, make_study, tmp_path, monkeypatch):
        study = make_study(arms=["real", "balanced"], seeds="0-1")
        fill(study)
        failed = {"balanced, seed 1": "diverged"}
        monkeypatch.setattr("medgen.apps.augmentation_study.run_all", lambda runs, root, shard: failed)
        with pytest.raises(SystemExit) as end:
            study.run("1/2")
        assert end.value.code == 3
        assert not (tmp_path / "study.md").exists()  # a share tells nothing
        with pytest.raises(SystemExit):
            study.run()
        assert "- balanced: seed 1: diverged" in (tmp_path / "study.md").read_text()

    def test_a_study_of_which_all_failed_has_no_report(self, make_study, tmp_path, monkeypatch):
        monkeypatch.setattr(
            "medgen.apps.augmentation_study.run_all", lambda runs, root, shard: {run.name: "diverged" for run in runs}
        )
        with pytest.raises(UserError, match="all 2 runs have failed"):
            make_study(arms=["real", "balanced"], seeds=0).run()
        assert not (tmp_path / "study.md").exists()


class TestReport:
    def test_files_tell_the_figures_of_the_predictions(self, make_study, tmp_path):
        study = make_study(arms=ARMS, seeds="0-2", training={"max_steps": 40})
        fill(study)

        study.report({}).write(tmp_path)

        rows = rows_of(tmp_path)
        for arm in ARMS:
            figures = []
            for seed in range(3):
                folder = tmp_path / "runs" / arm / f"seed{seed}"
                validation, test = (
                    read_predictions(folder / name, 2) for name in ("validation_predictions.csv", "predictions.csv")
                )
                threshold = pick_threshold(validation.probabilities, validation.labels)
                figures.append(classification_metrics(test.probabilities, test.labels, threshold))
                assert figures[-1]["auroc"] == pytest.approx(roc_auc_score(test.labels, test.probabilities[:, 1]))
            for metric in ("accuracy", "auroc", "average_precision", "sensitivity", "specificity", "ece"):
                row = rows[arm, metric]
                assert float(row["value"]) == pytest.approx(np.mean([one[metric] for one in figures])), metric
                assert float(row["low"]) <= float(row["value"]) <= float(row["high"])
                if arm == "real":
                    assert row["difference"] == row["p_value"] == row["p_holm"] == ""
        tested = [float(rows[arm, "auroc"]["p_value"]) for arm in ARMS[1:]]
        assert [float(rows[arm, "auroc"]["p_holm"]) for arm in ARMS[1:]] == pytest.approx(holm(tested))
        assert (rows["balanced", "auroc"]["n_real"], rows["balanced", "auroc"]["n_synthetic"]) == ("15", "9")

        text = (tmp_path / "study.md").read_text()
        for part in (
            "- dataset: hands and chests, modality X-ray",
            "- real training images: 15 of 8 patients (hand 12, chest 3); the rarest class is chest",
            "DenseNet121, 40 steps of 32 images at 224 pixels",
            "seeds 0, 1, 2",
            "Youden's J on the validation images (hand 14, chest 12)",
            "24 of a generator",
            "that saw 8 patients of hands and chests",
            "of those known none is in the test, and 0 are in no training or validation split of the real images",
            "The one primary figure is AUROC of all images",
            "- test: 50 images of 25 patients (hand 30 of 15, chest 20 of 10)",
            "| balanced | 12 | 3 | 0 | 9 | 40 | 0, 1, 2 |",
            "### Average precision",
        ):
            assert part in text, part
        assert "Failed" not in text

        record = json.loads((tmp_path / "study.json").read_text())
        assert [arm["name"] for arm in record["arms"]] == ARMS
        of_balanced = next(row for row in record["rows"] if (row["arm"], row["metric"]) == ("balanced", "auroc"))
        assert of_balanced["by_seed"].keys() == {"0", "1", "2"}
        with Image.open(tmp_path / "study.png") as picture:
            assert picture.width > 1000

    def test_patients_that_only_the_generator_saw_are_told(self, make_study, make_synthetic):
        others = [{"image": f"{n}.png", "patient": f"elsewhere{n}"} for n in range(3)]
        study = make_study(arms=["real", "balanced"], synthetic=make_synthetic([*items("training"), *others]))
        fill(study)
        assert "3 are in no training or validation split of the real images" in study.report({}).markdown()

    def test_a_failed_run_is_told_and_the_others_are_compared(self, make_study, tmp_path):
        study = make_study(arms=ARMS, seeds="0-1")
        fill(study)
        failed = {("balanced", 0): "diverged", ("synthetic_100", 0): "no memory", ("synthetic_100", 1): "no memory"}

        study.report(failed).write(tmp_path)

        text = (tmp_path / "study.md").read_text()
        assert "- balanced: seed 0: diverged" in text
        assert "| synthetic_100 | 12 | 3 | 12 | 3 | 2,000 | failed |" in text
        rows = rows_of(tmp_path)
        assert rows["balanced", "auroc"]["seeds"] == "1"
        assert rows["synthetic_100", ""]["note"] == "seed 0: no memory; seed 1: no memory"

    def test_a_given_threshold_takes_the_place_of_that_of_the_validation(self, make_study):
        study = make_study(arms=["real"], seeds=0, threshold=0.9)
        fill(study)
        test = read_predictions(study.output_dir / "runs" / "real" / "seed0" / "predictions.csv", 2)
        report = study.report({})
        found = {row["metric"]: row["value"] for row in report.rows}
        assert found["sensitivity"] == (test.probabilities[test.labels == 1, 1] >= 0.9).mean()
        assert "threshold: 0.9, given" in report.markdown()

    def test_a_figure_without_an_interval_is_told_and_drawn(self, tmp_path):
        labels = np.repeat([0, 1], 25)
        images, patients = tuple(f"{n}.png" for n in range(50)), tuple(map(str, range(50)))
        p = 0.1 + 0.8 * labels + 0.001 * np.arange(50)
        runs = {0: (Predictions(images, patients, labels, np.stack([1 - p, p], axis=1)), None)}
        report = AugmentationReport([Arm("real", runs=runs), Arm("other", runs=runs)], NAMES, {}, **QUICK)
        report.write(tmp_path)
        text = (tmp_path / "study.md").read_text()
        assert "| other | 1.000 (no interval) | 1.000 | +0.000 (no interval) | 1 | 1 | 1 |" in text
        assert "(+0.000 to +0.000)" not in text
        assert rows_of(tmp_path)["other", "average_precision"]["difference_low"] == ""

    def test_synthetic_images_of_another_size_are_told(self, make_study):
        study = make_study(arms=["real", "balanced"])
        for kind, size in ((study.real, 40), (study.pool, 32)):
            Image.new("L", (size, size)).save(kind[0]["image"])
        fill(study)
        text = study.report({}).markdown()
        assert "- caution: synthetic images are stored as 32×32 L, real ones as 40×40 L" in text

    def test_several_classes_have_a_table_of_each_against_the_rest(self, tmp_path):
        rng = np.random.default_rng(0)
        labels = np.tile([0, 1, 2], 30)
        images, patients = tuple(f"{n}.png" for n in range(90)), tuple(f"p{n // 2}" for n in range(90))
        arms = []
        for name in ("real", "balanced"):
            p = [softmax(rng.normal(size=(90, 3)) + np.eye(3)[labels], axis=1) for _ in range(2)]
            runs = {seed: (Predictions(images, patients, labels, p[seed]), None) for seed in range(2)}
            arms.append(Arm(name, (5, 5, 2), (0, 0, 3), runs))
        report = AugmentationReport(arms, ["a", "b", "c"], {}, **QUICK)
        report.write(tmp_path)
        of_c = next(row for row in report.rows if (row["class"], row["arm"], row["metric"]) == ("c", "real", "auroc"))
        run = arms[0].runs
        expected = np.mean([roc_auc_score(labels == 2, run[seed][0].probabilities[:, 2]) for seed in range(2)])
        assert of_c["value"] == pytest.approx(expected)
        assert "## Each class against the rest" in (tmp_path / "study.md").read_text()


class TestPredictions:
    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda rows: rows[1:], "differ at row 1"),
            (lambda rows: rows[:-1], "got 50 of real, seed 0 and 49 of balanced, seed 0, which differ at row 50"),
            (lambda rows: [rows[1], rows[0], *rows[2:]], "in the same order.*differ at row 1"),
            (lambda rows: [*rows, rows[3]], "test0_3.png stands in it twice"),
            (lambda rows: [{**rows[0], "patient": "nobody"}, *rows[1:]], "nobody"),
            (lambda rows: [{**rows[0], "label": "1"}, *rows[1:]], "differ at row 1"),
            (lambda rows: [{**rows[0], "p1": "nan"}, *rows[1:]], "between 0 and 1, got nan"),
            (lambda rows: [{**rows[0], "p1": ""}, *rows[1:]], "could not convert"),
            (lambda rows: [{**rows[0], "p1": "0.9", "p0": "0.9"}, *rows[1:]], "sum 1"),
            (lambda rows: [{**rows[0], "label": "7"}, *rows[1:]], "class index"),
            (lambda rows: [{**row, "p2": "0"} for row in rows], "set --num_classes"),
            (lambda rows: [{key: row[key] for key in ("image", "label", "p0", "p1")} for row in rows], "patient"),
            (lambda rows: [], "got 0 rows"),
        ],
    )
    def test_tables_that_do_not_fit_together_are_refused_in_one_line(self, make_study, spoil, message):
        study = make_study(arms=["real", "balanced"], seeds=0)
        fill(study)
        path = study.output_dir / "runs" / "balanced" / "seed0" / "predictions.csv"
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        rows = spoil(rows)
        with open(path, "w", newline="") as file:
            table = csv.DictWriter(file, rows[0] if rows else ["image"])
            table.writeheader()
            table.writerows(rows)
        with pytest.raises(UserError, match=message) as error:
            study.report({})
        assert "\n" not in str(error.value)

    def test_missing_tables_are_named(self, make_study):
        study = make_study(arms=["real"], seeds=0)
        with pytest.raises(UserError, match=r"validation_predictions.csv cannot be read.*the run is done again"):
            study.report({})
