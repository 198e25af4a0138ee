"""Real and synthetic items in one training: how many of each class, which ones, and under which label."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from medgen.data import (
    AUGMENTATION_ARMS,
    augmentation_arm,
    load_synthetic,
    mix_synthetic,
    synthetic_mismatch,
    write_datalist,
)
from medgen.errors import UserError


def items(kind: str, **counts: int) -> list[dict[str, Any]]:
    return [
        {"image": f"{kind}_{name}_{n}.png", "patient": f"{kind}-{name}-{n}", "label": int(name[1:])}
        for name, count in counts.items()
        for n in range(count)
    ]


REAL = items("real", c0=10, c1=3)
POOL = items("synthetic", c0=40, c1=40)


def counts(mixed: list[dict[str, Any]]) -> dict[tuple[int, bool], int]:
    return dict(Counter((item["label"], item["synthetic"]) for item in mixed))


def names(mixed: list[dict[str, Any]], synthetic: bool = True) -> list[str]:
    return [item["image"] for item in mixed if item["synthetic"] is synthetic]


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        ("real", {(0, False): 10, (1, False): 3}),
        ("classical", {(0, False): 10, (1, False): 3}),
        ("synthetic_050", {(0, False): 10, (1, False): 3, (0, True): 5, (1, True): 2}),
        ("synthetic_100", {(0, False): 10, (1, False): 3, (0, True): 10, (1, True): 3}),
        ("synthetic_200", {(0, False): 10, (1, False): 3, (0, True): 20, (1, True): 6}),
        ("classical_synthetic_100", {(0, False): 10, (1, False): 3, (0, True): 10, (1, True): 3}),
        ("synthetic_only", {(0, True): 10, (1, True): 3}),
        ("oversampled", {(0, False): 10, (1, False): 10}),
        ("balanced", {(0, False): 10, (1, False): 3, (1, True): 7}),
        ("classical_balanced", {(0, False): 10, (1, False): 3, (1, True): 7}),
    ],
)
def test_each_arm_has_as_many_of_each_class_as_it_says(arm, expected):
    chosen = {name: augmentation_arm(arm, name) for name in ("ratio", "only", "balance")}

    assert counts(mix_synthetic(REAL, POOL, **chosen)) == expected
    assert augmentation_arm(arm, "augment") == ("classical" if arm.startswith("classical") else "none")
    assert len(AUGMENTATION_ARMS) == 10


def test_ratio_and_balance_together_fill_up_to_the_largest_class_with_its_synthetic_ones():
    filled = mix_synthetic(REAL, POOL, 1.0, balance="synthetic")
    assert counts(filled) == {(0, False): 10, (0, True): 10, (1, False): 3, (1, True): 17}
    alone = mix_synthetic(REAL, POOL, 2.0, only=True, balance="synthetic")
    assert counts(alone) == {(0, True): 20, (1, True): 20}
    repeated = mix_synthetic(REAL, POOL, 1.0, balance="oversample")
    assert counts(repeated) == {(0, False): 10, (0, True): 10, (1, False): 17, (1, True): 3}


def test_real_items_keep_their_order_and_repeats_are_even():
    mixed = mix_synthetic(REAL[::-1], POOL, 1.0, balance="oversample")

    assert names(mixed, synthetic=False)[:13] == [item["image"] for item in REAL[::-1]]
    assert sorted(Counter(n for n in names(mixed, synthetic=False) if "c1" in n).values()) == [5, 6, 6]
    assert "synthetic" not in REAL[0]  # the caller's items are left alone


def test_larger_ratio_holds_the_images_of_a_smaller_one_and_the_seed_alone_decides():
    small, large = (names(mix_synthetic(REAL, POOL, ratio)) for ratio in (0.5, 2.0))

    assert set(small) < set(large)
    assert len(set(large)) == 26
    assert small == names(mix_synthetic(REAL, POOL, 0.5))
    assert set(small) != set(names(mix_synthetic(REAL, POOL, 0.5, seed=1)))


def test_too_few_synthetic_images_say_how_many_more():
    with pytest.raises(UserError, match=r"class 0 needs 50 synthetic images, got 40; generate 10 more of it"):
        mix_synthetic(REAL, POOL, 5.0)
    with pytest.raises(UserError, match=r"class 1 needs 7 synthetic images, got none of any class; .* --synthetic"):
        mix_synthetic(REAL, [], balance="synthetic")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": -0.5}, r"synthetic_ratio must be a number from 0 up, got -0\.5"),
        ({"ratio": float("nan")}, r"synthetic_ratio must be a number from 0 up, got nan"),
        ({"ratio": "0.5"}, r"synthetic_ratio must be a number from 0 up, got '0\.5'"),
        ({"balance": "smote"}, r"balance must be one of none, synthetic, oversample, got 'smote'"),
        ({"only": True, "balance": "oversample"}, r"oversample repeats real images, of which synthetic_only leaves"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        mix_synthetic(REAL, POOL, **settings)


def test_real_items_without_classes_and_unknown_arms_are_refused():
    with pytest.raises(UserError, match=r"real_0\.png: label must be the index of a class, got 'nevus'"):
        mix_synthetic([{"image": "real_0.png", "patient": "0", "label": "nevus"}], [])
    with pytest.raises(UserError, match=r"arm must be one of real, classical, .*, got 'gan'; set --arm"):
        augmentation_arm("gan", "ratio")


# ---- synthetic datalists


@pytest.fixture
def generated(tmp_path):
    def write(name: str, *labels: Any, **extra: Any) -> Path:
        folder = tmp_path / name
        (folder / "samples").mkdir(parents=True)
        made = []
        for seed, label in enumerate(labels):
            (folder / "samples" / f"{seed}.png").touch()
            item = {"image": f"samples/{seed}.png", "patient": f"synthetic-{seed}", "synthetic": True}
            made.append(item if label is None else {**item, "label": label})
        write_datalist(folder / "datalist.json", name, "RGB", {"training": made}, **extra)
        return folder / "datalist.json"

    return write


def labels_of(*datalists: Path, names: tuple[str, ...] = ()) -> list[int]:
    return [item["label"] for item in load_synthetic(list(datalists), 2, names)]


def test_several_generators_paths_start_from_their_own_folders(generated, tmp_path):
    one, two = generated("one", 0), generated("two", 1, 1)

    loaded = load_synthetic([one, two], 2)

    places = ["one/samples/0.png", "two/samples/0.png", "two/samples/1.png"]
    assert [item["image"] for item in loaded] == [str(tmp_path / place) for place in places]
    assert [item["label"] for item in loaded] == [0, 1, 1]
    assert load_synthetic(str(one), 2) == loaded[:1]
    assert load_synthetic(None, 2) == []


def test_classes_are_matched_by_name_where_both_have_names(generated):
    names = ("nevus", "melanoma")
    assert labels_of(generated("swapped", 0, 1, label_names=["melanoma", "nevus"]), names=names) == [1, 0]
    assert labels_of(generated("named", "melanoma", "nevus"), names=names) == [1, 0]
    assert labels_of(generated("numbered", 1, 0), names=names) == [1, 0]
    assert labels_of(generated("of numbers alone", 1, 0, label_names=["b", "a"])) == [1, 0]
    for name, labels in (
        ("own", ["b", "a"]),
        ("one class", ["melanoma"]),
    ):  # numbers that the real images need not share
        with pytest.raises(UserError, match=r"the real images have no names; write label_names into the real datalist"):
            labels_of(generated(name, *labels, label_names=labels))


@pytest.mark.parametrize(
    ("label", "extra", "message"),
    [
        (None, {}, r"has no label, so its class is not known; generate with --label"),
        (2, {}, r"label must be one of the 2 classes of the real images \(nevus, melanoma\), got 2"),
        (True, {}, r"got True"),
        (-1, {"label_names": ["nevus"]}, r"got -1"),
        ("seborrhoea", {}, r"got 'seborrhoea'"),
        (0, {"label_names": ["keratosis"]}, r"got 'keratosis'"),
    ],
)
def test_label_that_is_no_class_of_the_real_images_is_refused(label, extra, message, generated):
    with pytest.raises(UserError, match=message):
        labels_of(generated("one", label, **extra), names=("nevus", "melanoma"))


def test_images_that_are_not_synthetic_or_named_twice_are_refused(generated, tmp_path):
    one = generated("one", 0)
    with pytest.raises(UserError, match=r"samples/0\.png stands in two synthetic datalists, .*; name it once"):
        load_synthetic([one, tmp_path / "one" / ".." / "one" / "datalist.json"], 2)
    with pytest.raises(UserError, match="name it once"):
        load_synthetic([str(one)] * 2, 2)  # one and the same object
    write_datalist(tmp_path / "one" / "real.json", "real", "RGB", {"training": [{"image": "x.png", "patient": "x"}]})
    (tmp_path / "one" / "x.png").touch()
    with pytest.raises(UserError, match=r"x\.png is not marked as synthetic; name the datalist\.json beside"):
        load_synthetic(tmp_path / "one" / "real.json", 2)


def test_images_of_another_stored_size_or_mode_than_the_real_ones_are_told_once(tmp_path, caplog):
    def stored(name: str, mode: str, *sizes: tuple[int, int]) -> list[dict[str, Any]]:
        paths = [tmp_path / f"{name}{n}.png" for n in range(len(sizes))]
        for path, size in zip(paths, sizes, strict=True):
            Image.new(mode, size).save(path)
        return [{"image": str(path), "patient": path.stem, "label": 0} for path in paths]

    real = stored("real", "L", (64, 64), (64, 48))
    assert synthetic_mismatch(real, stored("same", "L", (64, 64))) is None
    assert synthetic_mismatch(real, []) is None
    (tmp_path / "scan.dcm").write_bytes(b"no header that Pillow knows")
    assert synthetic_mismatch([{"image": str(tmp_path / "scan.dcm")}], real) is None
    assert not caplog.messages

    small = synthetic_mismatch(real, stored("small", "L", *[(64, 64)] * 5, (16, 16)))
    assert small.startswith("synthetic images are stored as 16×16 L, 64×64 L, real ones as 64×48 L, 64×64 L: a class")
    assert len(caplog.messages) == 1
    colour = synthetic_mismatch(real, stored("colour", "RGB", (64, 64), (8, 8), (9, 9)))
    assert "are stored as 64×64 RGB, 8×8 RGB and 1 more forms, real" in colour
