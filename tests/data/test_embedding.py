"""Embeddings on the disk, and items of whole datalists."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from medgen.data import Embedding, load_items, write_datalist
from medgen.errors import UserError

ITEMS = [
    {
        **{"image": "a/00001.png", "patient": "00012", "labels": ["Mass", "Nodule"], "age": 55, "sex": "F"},
        **{"view": "AP", "follow_up": 2, "split": "training", "mse": 0.0123456789, "psnr": 19.08, "ms_ssim": 0.75},
    },
    {"image": 'b,"2".png', "patient": "13", "labels": [], "age": 41, "sex": "M", "split": "test", "mse": 1e-9},
    {"image": "c.png", "patient": "14", "label": 1, "split": "test", "mse": 0.5},
    {"image": "d.png", "patient": "15", "label": "inf", "split": "test", "mse": 0.25},
]


def make_embedding(**changes) -> Embedding:
    latents = np.random.default_rng(0).normal(size=(4, 2, 3)).astype(np.float32)
    settings = {
        **{"latents": latents, "items": ITEMS, "space": "w+", "generator_sha256": "a" * 64, "encoder_sha256": "b" * 64},
        **{"mean": latents.mean(0), "std": 0.5, "stage": "encoder"},
    }
    return Embedding(**{**settings, **changes})


def test_what_was_written_is_read(tmp_path):
    written = make_embedding()
    written.write(tmp_path / "new" / "embedding")
    for path in (tmp_path / "new/embedding", tmp_path / "new/embedding/latents.safetensors"):
        read = Embedding.read(path, "a" * 64)
        np.testing.assert_array_equal(read.latents, written.latents)
        np.testing.assert_array_equal(read.mean, written.mean)
        assert list(read.items) == ITEMS
        names = ("space", "generator_sha256", "encoder_sha256", "std", "stage")
        assert [getattr(read, name) for name in names] == [getattr(written, name) for name in names]
        assert len(read) == 4


def test_table_has_a_row_for_each_image(tmp_path):
    make_embedding().write(tmp_path)
    with (tmp_path / "latents.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:5] == ["index", "image", "patient", "label", "labels"]
    assert [row["index"] for row in rows] == ["0", "1", "2", "3"]
    assert [row["labels"] for row in rows] == ["Mass|Nodule", "[]", "", ""]
    assert [row["patient"] for row in rows] == ["00012", "13", "14", "15"]


def test_figures_that_are_not_finite_are_left_out(tmp_path):
    items = [{**item, "psnr": np.inf, "ms_ssim": np.nan} for item in ITEMS]
    make_embedding(items=items).write(tmp_path)
    assert [set(item) & {"mse", "psnr", "ms_ssim"} for item in Embedding.read(tmp_path).items] == [{"mse"}] * 4


def test_images_are_chosen_in_the_order_of_their_names(tmp_path):
    embedding = make_embedding()
    chosen = embedding.of_images(["c.png", "./a/00001.png"])
    np.testing.assert_array_equal(chosen.latents, embedding.latents[[2, 0]])
    assert [item["image"] for item in chosen.items] == ["c.png", "a/00001.png"]
    with pytest.raises(UserError, match=r"x\.png is not among the 4 images of the embedding \(1 of 2 are not\)"):
        embedding.of_images(["c.png", "x.png"])


def test_latents_of_another_generator_are_refused(tmp_path):
    make_embedding().write(tmp_path)
    with pytest.raises(UserError, match=r"belong to the generator a{12}, got c{12}; name their own with --generator"):
        Embedding.read(tmp_path, "c" * 64)


@pytest.mark.parametrize("missing", ["latents.safetensors", "latents.csv"])
def test_missing_file_is_named(tmp_path, missing):
    make_embedding().write(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(UserError, match=f"no embedding at .*: {missing} is missing; .*--embedding"):
        Embedding.read(tmp_path)


@pytest.mark.parametrize("damage", ["a row less", "another order", "another image"])
def test_table_of_other_latents_is_refused(tmp_path, damage):
    make_embedding().write(tmp_path)
    lines = (tmp_path / "latents.csv").read_text().splitlines(keepends=True)
    if damage == "a row less":
        lines.pop()
    elif damage == "another order":
        lines[3:] = lines[:2:-1]
    else:
        lines[3] = lines[3].replace("c.png", "e.png")
    (tmp_path / "latents.csv").write_text("".join(lines))
    with pytest.raises(UserError, match=r"must list the same images in the same order, got [34] rows and 4 latents"):
        Embedding.read(tmp_path)


def test_table_that_a_spreadsheet_saved_with_another_column_is_read(tmp_path):
    make_embedding().write(tmp_path)
    lines = (tmp_path / "latents.csv").read_text().splitlines()
    text = "\r\n".join(f"{line},{'weight' if number == 0 else 60.5}" for number, line in enumerate(lines))
    (tmp_path / "latents.csv").write_text(text, encoding="utf-8-sig", newline="")
    assert list(Embedding.read(tmp_path).items) == [{**item, "weight": 60.5} for item in ITEMS]


def damaged(path, change):
    arrays = load_file(path)
    about = {"space": "z", "generator_sha256": "", "encoder_sha256": "", "stage": "encoder", "images_sha256": ""}
    change(arrays, about)
    save_file(arrays, path, {"embedding": json.dumps(about)})


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays, metadata: arrays.pop("mean"),
        lambda arrays, metadata: metadata.pop("space"),
        lambda arrays, metadata: arrays.update(latents=arrays["latents"][0]),
        lambda arrays, metadata: arrays.update(latents=arrays["latents"].astype(np.float64)),
        lambda arrays, metadata: arrays["latents"].fill(np.nan),
    ],
)
def test_file_of_something_else_is_refused(tmp_path, change):
    make_embedding().write(tmp_path)
    damaged(tmp_path / "latents.safetensors", change)
    with pytest.raises(UserError, match=r"must hold finite latents \(N, L, D\), mean"):
        Embedding.read(tmp_path)


def test_broken_files_are_refused(tmp_path):
    make_embedding().write(tmp_path)
    content = (tmp_path / "latents.safetensors").read_bytes()
    for broken in (b"", content[:40], content[:-4]):
        (tmp_path / "latents.safetensors").write_bytes(broken)
        with pytest.raises(UserError, match="is no safetensors file"):
            Embedding.read(tmp_path)
    (tmp_path / "latents.safetensors").write_bytes(content)
    (tmp_path / "latents.csv").write_text("file,reason\na,b\n")
    with pytest.raises(UserError, match="must be a CSV with the column image"):
        Embedding.read(tmp_path)


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="expected an item for each of 4 latents, got 3"):
        make_embedding(items=ITEMS[:3])
    with pytest.raises(UserError, match=r"latents must be \(N, L, D\) in float32"):
        make_embedding(latents=np.zeros((4, 2, 3)))
    with pytest.raises(UserError, match="stage must be encoder or optimised, got 'best'"):
        make_embedding(stage="best")


def test_label_with_the_separator_is_refused(tmp_path):
    items = [{**item, "labels": ["a|b"]} for item in ITEMS]
    with pytest.raises(UserError, match=r"a label must not have the sign \|, got 'a\|b'"):
        make_embedding(items=items).write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_embedding_needs_neither_torch_nor_monai(tmp_path):
    make_embedding().write(tmp_path)
    code = (
        "import sys; from medgen.data import Embedding; "
        f"Embedding.read({str(tmp_path)!r}).write({str(tmp_path)!r}); "
        "print([name for name in ('torch', 'monai') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------------------------------
# items


def listed(folder, **splits):
    items = {split: [{"image": f"{name}.png", "patient": name} for name in names] for split, names in splits.items()}
    for name in (item["image"] for members in items.values() for item in members):
        (folder / name).touch()
    write_datalist(folder / "datalist.json", "test", "X-ray", items, label_names=["a", "b"])
    return folder / "datalist.json"


def test_items_know_their_split(tmp_path):
    datalist = listed(tmp_path, training="ab", validation="c", test="")
    found = {split: load_items(datalist, split) for split in ("all", "validation")}
    assert [(item["patient"], item["split"]) for item in found["all"]] == [
        ("a", "training"),
        ("b", "training"),
        ("c", "validation"),
    ]
    assert found["validation"] == [
        {"image": str(tmp_path / "c.png"), "patient": "c", "split": "validation"},
    ]


def test_list_that_is_called_all_is_taken_alone(tmp_path):
    datalist = listed(tmp_path, all="ab", other="c")
    assert [item["patient"] for item in load_items(datalist, "all")] == ["a", "b"]


def test_datalist_without_items_is_refused(tmp_path):
    (tmp_path / "datalist.json").write_text(json.dumps({"training": [], "test": []}))
    with pytest.raises(UserError, match=r"split all is missing; it has training \(0\), test \(0\)"):
        load_items(tmp_path / "datalist.json", "all")
