"""Phantoms in the layout of the ISIC archive: tables, lesions photographed twice, copies, and what is drawn."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medgen.data.phantom import PhantomSpec, draw_skin_studies, write_phantom
from medgen.data.phantom.skin import Lesion, Photograph, Skin, SkinPhantom

SPEC = PhantomSpec(patients=16, images_per_patient=2, size=48, seed=3)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("skin") / "phantom"
    lines = write_phantom("isic", out, SPEC)
    assert lines[-1] == f"next: python -m preprocessing.isic --source {out} --target {out}-prepared --size 48"
    return out


def table(path: Path) -> dict[str, dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {row["isic_id"] if "isic_id" in row else Path(row["file"]).stem: row for row in rows}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), float)


def test_table_is_as_the_archive_has_it_and_does_not_tell_copies(tree):
    metadata, truth = table(tree / "metadata.csv"), table(tree / "truth.csv")
    header = (tree / "metadata.csv").read_text().splitlines()[0]
    assert header == ("isic_id,patient_id,lesion_id,diagnosis,benign_malignant,age_approx,sex,anatom_site_general")
    assert list(metadata) == sorted(truth) == sorted(path.stem for path in (tree / "images").iterdir())
    for name, row in truth.items():
        expected = ("", "") if row["copy"] else (row["patient"], row["lesion"])
        assert (metadata[name]["patient_id"], metadata[name]["lesion_id"]) == expected
        assert metadata[name]["diagnosis"] == row["diagnosis"]
        malignant = row["diagnosis"] in ("melanoma", "basal cell carcinoma")
        assert metadata[name]["benign_malignant"] == ("malignant" if malignant else "benign")
        assert int(metadata[name]["age_approx"]) % 5 == 0


def test_lesions_belong_to_one_patient_and_some_are_photographed_twice(tree):
    lesions = defaultdict(list)
    for row in table(tree / "truth.csv").values():
        if not row["copy"]:
            lesions[row["lesion"]].append((row["patient"], row["diagnosis"]))
    assert all(len(set(told)) == 1 for told in lesions.values())
    assert {len(told) for told in lesions.values()} == {1, 2}
    malignant = sum(told[0][1] in ("melanoma", "basal cell carcinoma") for told in lesions.values())
    assert malignant == round(SPEC.anomaly_fraction * len(lesions))
    assert {told[0][1] for told in lesions.values()} == {
        "nevus",
        "seborrheic keratosis",
        "melanoma",
        "basal cell carcinoma",
    }


def test_copies_show_their_originals(tree):
    truth = table(tree / "truth.csv")
    seen = set()
    for name, row in truth.items():
        if not row["copy"]:
            continue
        seen.add(row["copy"])
        for folder, suffix in (("images", ".jpg"), ("masks", "_segmentation.png")):
            own, other = (tree / folder / f"{one}{suffix}" for one in (name, row["copy_of"]))
            if row["copy"] == "exact":
                assert own.read_bytes() == other.read_bytes()
                continue
            original = pixels(other)
            if row["copy"] == "mirrored":
                original = original[:, ::-1]
            elif row["copy"] == "turned":
                original = np.rot90(original)
            else:
                original = np.asarray(Image.open(other).resize((48, 36), Image.Resampling.BOX), float)
            assert original.shape == pixels(own).shape
            assert np.abs(original - pixels(own)).mean() < 3
    assert seen == {"exact", "mirrored", "turned", "smaller"}


def test_masks_cover_what_differs_from_the_skin(tree):
    for name in list(table(tree / "truth.csv"))[:12]:
        image, mask = pixels(tree / "images" / f"{name}.jpg"), pixels(tree / "masks" / f"{name}_segmentation.png") > 0
        assert image.shape == (*mask.shape, 3)
        assert 0.02 < mask.mean() < 0.7
        rows, columns = np.nonzero(mask)
        box = np.zeros_like(mask)
        box[max(rows.min() - 3, 0) : rows.max() + 4, max(columns.min() - 3, 0) : columns.max() + 4] = True
        around = box & ~mask
        # green: both melanin and blood take it away
        assert image[mask][:, 1].mean() < image[around][:, 1].mean() - 10


def drawn(diagnosis: str, seed: int) -> SkinPhantom:
    rng = np.random.default_rng(seed)
    skin = Skin(sex="female", age=50, melanin=0.05, blood=0.05, hairs=0)
    photograph = Photograph(0.0, (0.0, 0.0), 1.0, 9.0, 0.05, (1.0, 1.0, 1.0), False, seed)
    return SkinPhantom(skin, Lesion.draw(rng, diagnosis), photograph)


def test_melanomas_are_larger_less_symmetric_and_of_more_colours_than_nevi():
    measured = defaultdict(list)
    for diagnosis in ("nevus", "melanoma"):
        for seed in range(8):
            shown = drawn(diagnosis, seed).render(64)
            mask = shown.lesion_mask
            half_turn = mask[::-1, ::-1]
            asymmetry = (mask ^ half_turn).sum() / mask.sum()
            measured[diagnosis].append((mask.mean(), asymmetry, shown.image[mask].std(axis=0).sum()))
    nevus, melanoma = (np.median(measured[name], axis=0) for name in ("nevus", "melanoma"))
    assert (melanoma > 1.3 * nevus).all()


def test_a_lesion_is_the_same_in_two_photographs(tmp_path):
    one = drawn("melanoma", 1)
    turned = SkinPhantom(one.skin, one.lesion, Photograph(np.pi, (0, 0), 1.0, 9.0, 0.05, (1.0, 1.0, 1.0), False, 7))
    first, second = one.render(64), turned.render(64)
    assert np.mean(first.lesion_mask != second.lesion_mask[::-1, ::-1]) < 0.01
    inside = first.lesion_mask & second.lesion_mask[::-1, ::-1]
    assert np.abs(first.image - second.image[::-1, ::-1])[inside].mean() < 0.02
    # the skin around it, its hairs and its noise are another photograph's
    assert not np.array_equal(first.image[0], second.image[::-1, ::-1][0])


def test_a_patient_stays_the_same_when_patients_are_added():
    few = list(draw_skin_studies(PhantomSpec(patients=2, images_per_patient=2, anomaly_fraction=0)))
    many = list(draw_skin_studies(PhantomSpec(patients=5, images_per_patient=2, anomaly_fraction=0)))
    assert few == many[: len(few)]
    assert few[0].phantom.skin == few[1].phantom.skin != few[2].phantom.skin
