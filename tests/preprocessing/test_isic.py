"""Dermoscopic images: tables of every form, classes, copies, groups that stay together, and crops."""

from __future__ import annotations

import csv
import io
import json
from itertools import combinations
from pathlib import Path

import networkx
import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from medgen.data.phantom import PhantomSpec, write_phantom
from medgen.data.phantom.skin import Lesion, Photograph, Skin, SkinPhantom
from medgen.errors import UserError
from preprocessing import _convert as c
from preprocessing import isic
from preprocessing.isic import Classes, Record, app, class_of, find_copies, perceptual_hash, read_records, unite

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """Phantoms in the archive's layout, with copies that only their pixels tell."""
    out = tmp_path_factory.mktemp("isic") / "archive"
    write_phantom("isic", out, PhantomSpec(patients=16, images_per_patient=2, size=48, seed=3))
    return out


def call(source, target, *words, **options):
    words = [*map(str, words)]
    words += [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    return c.main(app, ["--source", str(source), "--target", str(target), *words])


def rows(path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def datalist(target) -> dict:
    return json.loads((target / "datalist.json").read_text())


def items_of(target) -> dict[str, dict]:
    """Items by the id of their image, with their split."""
    content = datalist(target)
    names = ("training", "validation", "test")
    return {Path(item["image"]).stem: {**item, "split": name} for name in names for item in content[name]}


def picture(seed: int, shape=(48, 64), sigma=4.0) -> np.ndarray:
    """A smooth picture in colour, (H, W, 3) in [0, 1]."""
    noise = gaussian_filter(np.random.default_rng(seed).standard_normal((*shape, 3)), (sigma, sigma, 0))
    return ((noise - noise.min()) / np.ptp(noise)).astype(np.float32)


def save(path: Path, pixels: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.rint(pixels * 255).astype(np.uint8)).save(path, **options)


def orientations(pixels: np.ndarray) -> list[np.ndarray]:
    return [np.rot90(side, turns) for side in (pixels, pixels[:, ::-1]) for turns in range(4)]


# ---------------------------------------------------------------------------------------------------------------------
# tables

FORMS = {
    "archive": (
        "isic_id,attribution,benign_malignant,diagnosis,age_approx,sex,anatom_site_general,patient_id,lesion_id\n"
        "a,x,malignant,melanoma,55,male,head/neck,P1,L1\nb,x,benign,nevus,40,female,,P2,\n",
        {"a": ("melanoma", "P1", "L1"), "b": ("nevus", "P2", None)},
    ),
    "archive of 2024": (
        "isic_id,diagnosis_1,diagnosis_2,diagnosis_3,patient_id\n"
        'a,Malignant,Malignant melanocytic proliferations (Melanoma),"Melanoma, NOS",P1\nb,Benign,x,Nevus,P2\n',
        {"a": ("melanoma", "P1", None), "b": ("nevus", "P2", None)},
    ),
    "ISIC 2019": (
        "image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK\n"
        "a,1.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0\nb_downsampled,0.0,0.0,0.0,1.0,0.0,0.0,0.0,0.0,0.0\n",
        {"a": ("melanoma", None, None), "b": ("actinic keratosis", None, None)},
    ),
    "ISIC 2018": (
        "image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\na,0.0,1.0,0.0,0.0,0.0,0.0,0.0\nb,0.0,0.0,0.0,1.0,0.0,0.0,0.0\n",
        {"a": ("nevus", None, None), "b": ("actinic keratosis", None, None)},
    ),
    "ISIC 2020": (
        "image_name,patient_id,sex,age_approx,anatom_site_general_challenge,diagnosis,benign_malignant,target\n"
        "a,P1,male,45.0,head/neck,melanoma,malignant,1\nb,P1,female,50.0,torso,unknown,benign,0\n",
        {"a": ("melanoma", "P1", None), "b": ("", "P1", None)},
    ),
    "ISIC 2016": ("a,benign\nb,malignant\n", {"a": ("", None, None), "b": ("", None, None)}),
    "ISIC 2016, test": ("a,0.0\nb,1.0\n", {"a": ("", None, None), "b": ("", None, None)}),
    "ISIC 2017": (
        "image_id,melanoma,seborrheic_keratosis\na,0.0,0.0\nb,1.0,0.0\nc,0.0,1.0\n",
        {"a": ("nevus", None, None), "b": ("melanoma", None, None), "c": ("seborrheic keratosis", None, None)},
    ),
    "HAM10000": (
        "lesion_id,image_id,dx,dx_type,age,sex,localization\nL1,a,bkl,histo,80.0,male,scalp\nL2,b,nv,histo,,male,ear\n",
        {"a": ("benign keratosis", None, "L1"), "b": ("nevus", None, "L2")},
    ),
    "PH2": (
        "||   Name   ||   Histological Diagnosis ||   Clinical Diagnosis   || Asymmetry  |   Streaks ||   Colors ||\n"
        "||  a    ||                          ||           1          ||   0     |    A   ||  3  4    ||\n"
        "||  b    || Melanoma                 ||           2          ||   0     |    A   ||  3  4    ||\n"
        "\nLegends\n\nClinical Diagnosis:\n\t0 - Common Nevus; 1 - Atypical Nevus; 2 - Melanoma.\n",
        {"a": ("atypical nevus", None, None), "b": ("melanoma", None, None)},
    ),
    "simple": (
        "image,diagnosis\na.jpg,Common Nevus\nb.jpg,Melanoma\n",
        {"a": ("common nevus", None, None), "b": ("melanoma", None, None)},
    ),
    "semicolons": (
        "Image ID;Diagnosis\nimages/a.jpg;naevus\nb;MEL\n",
        {"a": ("nevus", None, None), "b": ("melanoma", None, None)},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_tables_of_every_form_are_read_by_their_columns(form, tmp_path):
    text, expected = FORMS[form]
    path = tmp_path / "table.csv"
    path.write_text(text)
    records = read_records([path])
    found = {
        name: (" or ".join(r.diagnoses), next(iter(r.patients), None), next(iter(r.lesions), None))
        for name, r in records.items()
    }
    assert found == expected
    if form.startswith("ISIC 2016"):
        assert [record.malignancy for record in records.values()] == ["benign", "malignant"]


def test_ids_that_say_nothing_are_none_and_numbers_have_one_form(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("image,diagnosis,patient_id,lesion_id\na,nv,17,nan\nb,nv,17.0,NA\nc,nv,Unknown,-\nd,nv,None,L1.0\n")
    records = read_records([path])
    assert [list(record.patients) for record in records.values()] == [["17"], ["17"], [], []]
    assert [list(record.lesions) for record in records.values()] == [[], [], [], ["L1"]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("image,MEL,NV\na,0.9,0.1\n", "got mel 0.9: predictions are no diagnosis"),
        ("image,MEL,NV\na,1,0.2\n", "got nv 0.2"),
        ("image,MEL,NV\na,1,1\n", "got MEL, NV"),
        ("image,diagnosis,target\na,MEL,0\n", "melanoma (t.csv) and benign at once"),
        ("image,diagnosis,benign_malignant\na,Atypical Nevus,malignant\n", "atypical nevus (t.csv) and malignant at"),
    ],
)
def test_rows_that_contradict_themselves_are_wrong(text, said, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(text)
    assert said in read_records([path])["a"].wrong


def test_ages_sexes_and_sites_are_kept_as_far_as_they_are_known(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("image_id,dx,age,sex,localization\na,nv,80.0,Male,scalp\nb,nv,,unknown,unknown\n")
    records = read_records([path])
    assert records["a"].fields == {"age": 80, "sex": "male", "site": "scalp"}
    assert records["b"].fields == {}


def test_tables_are_joined_by_the_id_of_the_image(tmp_path):
    (tmp_path / "truth.csv").write_text("image,MEL,NV\na_downsampled,1,0\nb,0,1\n")
    (tmp_path / "meta.csv").write_text("image,age_approx,lesion_id\na,55,HAM_1\n")
    (tmp_path / "archive.csv").write_text("isic_id,lesion_id,patient_id\na,IL_7,IP_1\n")
    record = read_records([tmp_path / f"{name}.csv" for name in ("truth", "meta", "archive")])["a"]
    assert record.diagnoses == {"melanoma": "truth.csv"}
    assert list(record.lesions) == ["HAM_1", "IL_7"]
    assert list(record.patients) == ["IP_1"]
    assert record.fields == {"age": 55}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file,diagnosis\na,MEL\n", "must have a column isic_id"),
        ("image,age\na,50\n", "expected a table with a column diagnosis"),
        ("", "an empty file"),
    ],
)
def test_a_table_without_what_is_needed_is_refused(text, said, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        read_records([path])


# ---------------------------------------------------------------------------------------------------------------------
# classes


def known(*diagnoses: str, malignancy: str = "") -> Record:
    return Record(diagnoses=dict.fromkeys(diagnoses, "t.csv"), malignancy=malignancy)


def test_default_is_one_class_per_diagnosis_by_the_alphabet():
    classes = Classes.of_all([known("nevus"), known("melanoma"), known("nevus"), known(malignancy="benign")])
    assert classes.names == ("melanoma", "nevus")
    assert class_of(known("nevus"), classes) == 1
    assert class_of(known(malignancy="benign"), classes) == "its diagnosis is not known"


def test_without_any_diagnosis_classes_are_benign_and_malignant():
    classes = Classes.of_all([known(malignancy="malignant"), known(malignancy="benign")])
    assert classes.names == ("benign", "malignant")
    assert class_of(known(malignancy="malignant"), classes) == 1


def test_binary_takes_unknown_benign_lesions_for_the_rest_and_leaves_unknown_malignant_ones_open():
    classes = Classes.parse(["other=*", "melanoma=MEL"])
    assert class_of(known("melanoma", malignancy="malignant"), classes) == 1
    assert class_of(known("basal cell carcinoma", malignancy="malignant"), classes) == 0
    assert class_of(known(malignancy="benign"), classes) == 0
    assert class_of(known(malignancy="malignant"), classes) == "its diagnosis is not known"
    assert class_of(known(), classes) == "its diagnosis is not known"


def test_classes_name_diagnoses_by_any_spelling_and_malignancy_for_the_others():
    classes = Classes.parse(["mole=NV,Atypical Nevus", "melanoma=melanoma", "evil=malignant"])
    assert classes.names == ("mole", "melanoma", "evil")
    assert class_of(known("atypical nevus"), classes) == 0
    assert class_of(known("melanoma", malignancy="malignant"), classes) == 1
    assert class_of(known("basal cell carcinoma", malignancy="malignant"), classes) == 2
    assert class_of(known("dermatofibroma", malignancy="benign"), classes) is None


def test_tables_may_differ_within_a_class_and_not_between_two():
    record = Record(diagnoses={"benign keratosis": "a.csv", "seborrheic keratosis": "b.csv"})
    together = Classes.parse(["keratosis=BKL,seborrheic keratosis", "melanoma=MEL"])
    assert class_of(record, together) == 0
    apart = Classes.of_all([record])
    assert class_of(record, apart) == (
        "the tables give it different classes: benign keratosis (a.csv) and seborrheic keratosis (b.csv)"
    )


@pytest.mark.parametrize(
    "texts", [["a=MEL"], ["a=MEL", "b=melanoma"], ["a=MEL", "a=NV"], ["a", "b=NV"], ["a=", "b=NV"]]
)
def test_classes_of_another_form_or_named_twice_are_refused(texts):
    with pytest.raises(UserError):
        Classes.parse(texts)


# ---------------------------------------------------------------------------------------------------------------------
# copies


def test_hash_is_the_signs_of_the_cosine_transform():
    """Against a transform written out as sums of cosines, without scipy."""
    pixels = picture(1, (50, 70))
    grey = Image.fromarray((pixels @ np.array([0.299, 0.587, 0.114], np.float32)).astype(np.float32))
    small = np.asarray(grey.resize((64, 64), Image.Resampling.BICUBIC), np.float64)
    places = np.arange(64)
    bits = ""
    for row in range(16):
        for column in range(16):
            wave = np.outer(np.cos(np.pi * (places + 0.5) * row / 64), np.cos(np.pi * (places + 0.5) * column / 64))
            bits += "1" if (row, column) != (0, 0) and (small * wave).sum() > 0 else "0"
    assert perceptual_hash(pixels) == f"{int(bits, 2):064x}"


def hashed(pictures: list[np.ndarray]) -> tuple[list[str], list[str]]:
    return [perceptual_hash(p) for p in pictures], [isic._thumbnail(p) for p in pictures]


def test_all_eight_orientations_of_an_image_are_copies():
    pictures = orientations(picture(2))
    pairs = find_copies(*hashed(pictures))
    assert [pair[:2] for pair in pairs] == list(combinations(range(8), 2))
    assert max(distance for *_, distance in pairs) <= 1  # of a frequency that is next to nothing


def test_copies_are_those_of_a_search_written_out(monkeypatch):
    """Against loops over images that are turned and hashed themselves, with blocks that end amid the images."""
    monkeypatch.setattr(isic, "BLOCK", 3)
    rng = np.random.default_rng(0)
    pictures = [picture(seed) for seed in range(4)]
    for seed in range(4):
        noisy = np.clip(pictures[seed] + rng.normal(0, 0.002, pictures[seed].shape), 0, 1).astype(np.float32)
        pictures.append(orientations(noisy)[2 * seed + 1])

    def bits(text: str) -> np.ndarray:
        return np.array([int(bit) for bit in f"{int(text, 16):0256b}"])

    expected = {}
    for one, two in combinations(range(len(pictures)), 2):
        turned = [bits(perceptual_hash(np.ascontiguousarray(side))) for side in orientations(pictures[one])]
        least = min(int((side != bits(perceptual_hash(pictures[two]))).sum()) for side in turned)
        if least <= isic.MAX_BITS:
            expected[one, two] = least
    found = {pair[:2]: pair[2] for pair in find_copies(*hashed(pictures))}
    assert set(found) == set(expected) == {(seed, seed + 4) for seed in range(4)}
    assert all(abs(found[pair] - expected[pair]) <= 1 for pair in found)


@pytest.mark.parametrize("change", ["recompressed", "half", "mirrored and recompressed", "grown"])
def test_changed_copies_are_found(change, archive):
    path = sorted((archive / "images").iterdir())[0]
    image = Image.open(path)
    width, height = image.size
    changed = {
        "recompressed": image,
        "half": image.resize((width // 2, height // 2), Image.Resampling.BICUBIC),
        "mirrored and recompressed": image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        "grown": image.resize((width * 2, height * 2), Image.Resampling.BILINEAR),
    }[change]
    stream = io.BytesIO()
    changed.save(stream, "JPEG", quality=60)
    pair = [np.asarray(one, np.float32) / 255 for one in (image, Image.open(stream))]
    assert [found[:2] for found in find_copies(*hashed(pair))] == [(0, 1)]


def test_a_copy_turned_halved_and_compressed_hard_is_found():
    rng = np.random.default_rng(1)
    pixels = SkinPhantom(Skin.draw(rng), Lesion.draw(rng, "nevus"), Photograph.draw(rng)).render(192).image
    image = Image.fromarray(np.rint(pixels * 255).astype(np.uint8))
    half = image.transpose(Image.Transpose.TRANSVERSE).resize((image.height // 2, image.width // 2))
    stream = io.BytesIO()
    half.save(stream, "JPEG", quality=10)
    ((one, two, bits),) = find_copies(*hashed([pixels, np.asarray(Image.open(stream), np.float32) / 255]))
    assert (one, two) == (0, 1)
    assert bits > 32  # else this would test nothing that the others do not


def test_images_of_another_colour_are_no_copies_though_their_shapes_agree():
    pixels = picture(5)
    assert find_copies(*hashed([pixels, pixels * 0.8])) == []


def test_groups_are_the_connected_parts_of_a_graph():
    rng = np.random.default_rng(1)
    keys = [[int(key) for key in rng.integers(0, 60, rng.integers(0, 3))] for _ in range(50)]
    groups = unite(keys)
    graph = networkx.Graph()
    graph.add_nodes_from(range(50))
    graph.add_edges_from((one, two) for one, two in combinations(range(50), 2) if set(keys[one]) & set(keys[two]))
    expected = {frozenset(part) for part in networkx.connected_components(graph)}
    assert {frozenset(n for n in range(50) if groups[n] == group) for group in groups} == expected


# ---------------------------------------------------------------------------------------------------------------------
# the command


def test_exactly_the_copies_among_phantoms_are_found_and_stay_with_their_originals(archive, tmp_path, capsys):
    truth = {Path(row["file"]).stem: row for row in rows(archive / "truth.csv")}
    copies = {frozenset((name, row["copy_of"])) for name, row in truth.items() if row["copy"]}
    assert {row["copy"] for row in truth.values()} == {"", "exact", "mirrored", "turned", "smaller"}
    whose = networkx.Graph()
    for row in rows(archive / "metadata.csv"):
        whose.add_edges_from((row["isic_id"], row[key]) for key in ("patient_id", "lesion_id") if row[key])
    whose.add_edges_from(copies)

    assigned = set()
    for seed in range(8):
        assert call(archive, tmp_path / "out", size=16, seed=seed) == 0
        items = items_of(tmp_path / "out")
        assert items.keys() == truth.keys()
        for part in networkx.connected_components(whose):
            members = [items[name] for name in part if name in items]
            assert len({(item["split"], item["patient"]) for item in members}) == 1
        assert len({item["patient"] for item in items.values()}) == networkx.number_connected_components(whose)
        assert all(any(item["split"] == name for item in items.values()) for name in ("training", "test"))
        assigned.add(tuple(items[name]["split"] for name in truth))
    assert len(assigned) > 1
    found = {
        frozenset(Path(row[key]).stem for key in ("file", "other")) for row in rows(tmp_path / "out/duplicates.csv")
    }
    assert found == copies
    assert f"{len(copies)} pairs of images are copies" in capsys.readouterr().err
    names = datalist(tmp_path / "out")["label_names"]
    assert all(names[item["label"]] == truth[name]["diagnosis"] for name, item in items.items())
    assert datalist(tmp_path / "out")["modality"] == "dermoscopy"


def test_all_but_the_first_of_each_set_of_copies_can_be_dropped(archive, tmp_path):
    assert call(archive, tmp_path / "out", "--drop-duplicates", size=16) == 0
    kept = items_of(tmp_path / "out")
    pairs = [[Path(row[key]).stem for key in ("file", "other")] for row in rows(tmp_path / "out/duplicates.csv")]
    assert all(one in kept and two not in kept for one, two in pairs)
    assert len(kept) == len(rows(archive / "metadata.csv")) - len(pairs)


def test_shards_end_in_the_bytes_of_one_process(archive, tmp_path):
    call(archive, tmp_path / "one", size=16)
    for shard in ("1/2", "0/2"):
        assert call(archive, tmp_path / "two", size=16, shard=shard) == 0
        assert not (tmp_path / "two" / "datalist.json").exists()
    call(archive, tmp_path / "two", size=16)
    for name in ("datalist.json", "duplicates.csv", "rejected.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    for path in (tmp_path / "one" / "images").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / "images" / path.name).read_bytes()


@pytest.fixture
def few(tmp_path) -> Path:
    """Twelve different images of two classes, with a table."""
    source = tmp_path / "source"
    for number in range(12):
        save(source / "deep" / f"i{number}.png", picture(100 + number))
    lines = "".join(f"i{number},{'MEL' if number % 3 == 0 else 'NV'}\n" for number in range(12))
    (source / "labels.csv").write_text("image,diagnosis\n" + lines)
    return source


def test_what_cannot_be_used_is_rejected_with_its_reason(few, tmp_path, capsys):
    save(few / "stray.png", picture(1))
    (few / "deep" / "i1.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    save(few / "again" / "i2.jpg", picture(1))
    save(few / "deep" / "i5.png", large := picture(105, (96, 128), 2.5))
    save(
        few / "again" / "small" / "i5.jpg", large.reshape(48, 2, 64, 2, 3).mean((1, 3)), quality=90
    )  # comes before the larger one
    (few / "again" / "i7.png").write_bytes((few / "deep" / "i7.png").read_bytes())
    mask = np.zeros((48, 64), np.float32)
    mask[10:30, 20:30] = 1
    save(few / "again" / "i6.jpg", mask)  # two values, next to, as JPEG has them: passed over
    (few / "old.csv").write_bytes("Läsion;x\n".encode("latin-1"))
    save(few / "i3_segmentation.png", picture(2))  # a mask is no image, and passed over
    (few / "licence.txt").write_text("none")
    with open(few / "labels.csv", "a") as table:
        table.write("gone,NV\ni4,MEL\nempty,\n")
    save(few / "empty.png", picture(3))
    assert call(few, tmp_path / "out", size=16) == 3
    rejected = {row["file"]: row["reason"] for row in rows(tmp_path / "out" / "rejected.csv")}
    assert rejected.pop("deep/i1.png")
    assert rejected == {
        "stray.png": "not listed in labels.csv",
        "deep/i2.png": "named as again/i2.jpg, which shows something else: leave only the photograph there",
        "again/i2.jpg": "named as deep/i2.png, which shows something else: leave only the photograph there",
        "again/small/i5.jpg": "the same image as deep/i5.png",
        "deep/i7.png": "the same image as again/i7.png",
        "gone": "listed in labels.csv, but not found below the source",
        "deep/i4.png": "the tables give it different classes: nevus (labels.csv) and melanoma (labels.csv)",
        "empty.png": "its diagnosis is not known",
    }
    assert items_of(tmp_path / "out").keys() == {f"i{number}" for number in range(12)} - {"i1", "i2", "i4"}
    shown = np.asarray(Image.open(tmp_path / "out" / "images" / "i6.png"), float)
    expected = c.render(picture(106), c.Settings("x", 16, c.Fit.crop, channels="rgb"))
    assert np.abs(shown - np.asarray(expected, float)).max() <= 1  # the photograph, not the mask
    assert "old.csv cannot be read as a table" in capsys.readouterr().err


def test_most_images_with_files_that_differ_are_an_error(few, tmp_path, capsys):
    for number in range(7):
        save(few / "more" / f"i{number}.png", picture(200 + number))
    assert call(few, tmp_path / "out", size=16) == 1
    assert "of 7 of 12 images several files that differ have the name, the first deep/i0.png and more/i0.png" in (
        capsys.readouterr().err
    )


def test_masks_of_the_photographs_names_are_known_by_their_folder(few, tmp_path):
    """Grey ones of many values, which could be photographs, and one whose photograph is missing."""
    for number in range(12):
        save(few / "a_masks" / f"i{number}.png", picture(300 + number)[..., 0])
    (few / "deep" / "i3.png").unlink()
    assert call(few, tmp_path / "out", crop="lesion", masks=few / "a_masks", size=16) == 3
    rejected = {row["file"]: row["reason"] for row in rows(tmp_path / "out" / "rejected.csv")}
    assert rejected == {"a_masks/i3.png": "its mask and its photograph are this one file: one of the two is missing"}
    assert len(items_of(tmp_path / "out")) == 11


def test_a_row_whose_image_is_missing_links_a_patient_and_a_lesion(few, tmp_path):
    """The image of i1's patient and i2's lesion is missing, that of i3's and i4's of a class that is left out."""
    lines = ["i1,NV,P1,", "i2,NV,,L1", "gone,NV,P1,L1", "i3,MEL,P2,", "i4,NV,,L2", "i5,BCC,P2,L2", "i6,MEL,,"]
    (few / "labels.csv").write_text("image,diagnosis,patient_id,lesion_id\n" + "\n".join(lines) + "\n")
    assert call(few, tmp_path / "out", "--classes", "n=NV", "--classes", "m=MEL", size=16) == 3
    patients = {name: item["patient"] for name, item in items_of(tmp_path / "out").items()}
    assert patients == {"i1": "P1", "i2": "P1", "i3": "P2", "i4": "P2", "i6": "i6"}


def test_a_class_without_a_readable_image_is_an_error(few, tmp_path, capsys):
    for number in range(0, 12, 3):
        (few / "deep" / f"i{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    assert call(few, tmp_path / "out", size=16) == 1
    assert "no image of class melanoma is left" in capsys.readouterr().err
    assert len(rows(tmp_path / "out" / "rejected.csv")) == 4
    assert not (tmp_path / "out" / "datalist.json").exists()


def test_a_class_that_is_not_asked_for_is_left_out_and_counted(few, tmp_path, capsys):
    with open(few / "labels.csv", "a") as table:
        table.write("b,BCC\n")
    save(few / "b.png", picture(3))
    assert call(few, tmp_path / "out", "--classes", "mole=NV", "--classes", "melanoma=MEL", size=16) == 0
    output = capsys.readouterr()
    assert "left out, of no class: 1 images (basal cell carcinoma 1)" in output.out
    assert "12 of 12 images name neither patient nor lesion" in output.err
    assert datalist(tmp_path / "out")["label_names"] == ["mole", "melanoma"]
    assert {name: item["label"] for name, item in items_of(tmp_path / "out").items()} == {
        f"i{number}": int(number % 3 == 0) for number in range(12)
    }
    # of four and eight images each split has its share
    for name in ("training", "validation", "test"):
        assert {item["label"] for item in datalist(tmp_path / "out")[name]} == {0, 1}


def test_binary_numbers_the_diagnosis_1_and_all_others_0(few, tmp_path):
    assert call(few, tmp_path / "out", binary="MEL", size=16) == 0
    assert datalist(tmp_path / "out")["label_names"] == ["other", "melanoma"]
    assert all(item["label"] == int(item["diagnosis"] == "melanoma") for item in items_of(tmp_path / "out").values())


def test_copies_of_different_classes_are_told(few, tmp_path, capsys):
    save(few / "deep" / "i1.png", picture(100)[:, ::-1])
    assert call(few, tmp_path / "out", size=16) == 0
    told = "1 of them have different classes, the first deep/i0.png and deep/i1.png"
    assert told in capsys.readouterr().err
    items = items_of(tmp_path / "out")
    assert items["i0"]["patient"] == items["i1"]["patient"] == "i0"


def test_centre_square_and_whole_image_are_of_the_shorter_side(few, tmp_path):
    call(few, tmp_path / "centre", size=24)
    call(few, tmp_path / "none", size=24, crop="none")
    centre = Image.open(tmp_path / "centre" / "images" / "i0.png")
    whole = Image.open(tmp_path / "none" / "images" / "i0.png")
    assert (centre.size, whole.size) == ((24, 24), (32, 24))
    inner = np.asarray(whole, float)[:, 4:28]
    assert np.abs(np.asarray(centre, float) - inner)[:, 2:-2].max() < 3


def test_lesion_crop_holds_the_whole_mask_with_its_margin(few, tmp_path):
    marks = {"i0": (slice(10, 30), slice(20, 30)), "i1": (slice(0, 48), slice(4, 24)), "i2": (slice(0, 6), slice(0, 6))}
    for name, (down, across) in marks.items():
        mask = np.zeros((48, 64), np.float32)
        mask[down, across] = 1
        save(tmp_path / "masks" / f"{name}_segmentation.png", mask)
    save(tmp_path / "masks" / "i0.png", picture(100))  # as PH2 has the photographs beside the masks
    save(tmp_path / "masks" / "i5_lesion.bmp", np.pad(np.ones((4, 4), np.float32), 20))
    assert call(few, tmp_path / "out", crop="lesion", masks=tmp_path / "masks", size=24) == 3
    rejected = {row["file"]: row["reason"] for row in rows(tmp_path / "out" / "rejected.csv")}
    assert rejected["deep/i4.png"] == "no mask"
    assert rejected["deep/i5.png"] == "the mask is 44×44, the image 64×48: not of one image"
    assert items_of(tmp_path / "out").keys() == marks.keys()
    image = np.rint(picture(100) * 255) / 255
    # 20 rows and a tenth of that at each side; the columns around the mask's middle
    expected = c.render(image[8:32, 13:37].astype(np.float32), c.Settings("x", 24, channels="rgb"))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out/images/i0.png")), np.asarray(expected))
    # taller than the image: mirrored above and below it
    tall = np.pad(np.rint(picture(101) * 255) / 255, ((5, 5), (0, 0), (0, 0)), mode="symmetric")[:, :58]
    expected = c.render(tall.astype(np.float32), c.Settings("x", 24, channels="rgb"))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out/images/i1.png")), np.asarray(expected))

    mask = np.zeros((48, 64), np.float32)
    mask[20:40, 30:50] = 1
    save(tmp_path / "masks" / "i0_segmentation.png", mask)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out" / "images").iterdir()}
    call(few, tmp_path / "out", crop="lesion", masks=tmp_path / "masks", size=24)
    after = {path.name: path.read_bytes() for path in (tmp_path / "out" / "images").iterdir()}
    assert [name for name in after if after[name] != before[name]] == ["i0.png"]


def test_grey_images_become_colour_and_exif_turns_them(few, tmp_path):
    grey = picture(7)[..., 0]
    save(few / "deep" / "i0.png", grey)
    turned = Image.fromarray(np.rint(picture(8) * 255).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter clockwise
    (few / "deep" / "i1.png").unlink()
    turned.save(few / "deep" / "i1.jpg", exif=exif, quality=95)
    call(few, tmp_path / "out", size=48, crop="none")
    assert Image.open(tmp_path / "out" / "images" / "i0.png").mode == "RGB"
    shown = np.asarray(Image.open(tmp_path / "out" / "images" / "i1.png"), float)
    assert shown.shape == (64, 48, 3)
    assert np.abs(shown - np.rot90(picture(8), -1) * 255).mean() < 3


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--crop", "lesion"], 2, "--crop lesion and --masks DIR go together"),
        (["--binary", "MEL", "--classes", "a=NV"], 2, "exclude each other"),
        (
            ["--classes", "a=DF", "--classes", "b=VASC"],
            1,
            "no image is of class a; the tables have nevus 8, melanoma 4",
        ),
        (["--binary", "melonoma"], 1, "no image is of class melonoma"),
        (["--metadata", "absent.csv"], 1, "cannot be read as a table"),
        (["--split", "0.5", "0.1", "0.1"], 1, "sum to 1"),
    ],
)
def test_mistakes_are_one_line(words, code, said, few, tmp_path, capsys):
    assert call(few, tmp_path / "out", *words) == code
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "datalist.json").exists()


def test_a_source_without_a_table_is_refused(few, tmp_path, capsys):
    (few / "labels.csv").unlink()
    assert call(few, tmp_path / "out") == 1
    assert "name it with --metadata" in capsys.readouterr().err
