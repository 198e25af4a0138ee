"""Names of classes, and whether each has images."""

from __future__ import annotations

import json

import pytest

from medgen.data import check_each_class, class_names
from medgen.errors import UserError


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"label_names": ["a", "b"]}, ["a", "b"]),
        ({"label_names": ["a", "b", "c"]}, ["0", "1"]),
        ({"label_names": None}, ["0", "1"]),
        ([], ["0", "1"]),
    ],
)
def test_names_are_those_of_the_file_or_numbers(content, expected, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(content))
    assert class_names(tmp_path / "x.json", 2) == expected
    assert class_names(tmp_path / "x.json", 2, numbered=False) == (expected if "a" in expected else [])


def test_file_that_is_not_there_names_none_and_a_broken_one_is_told(tmp_path):
    assert class_names(tmp_path / "x.json", 3) == ["0", "1", "2"]
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match=r"x\.json is no JSON"):
        class_names(tmp_path / "x.json", 2)


def test_class_without_images_is_named():
    items = [{"label": 0}, {"label": 0}, {"label": 2}]
    check_each_class(["a"], training=items[:2])
    with pytest.raises(UserError, match=r"validation images .* none of class 1 \(b\) among a \(2\), c \(1\)"):
        check_each_class(["a", "b", "c"], training=[*items, {"label": 1}], validation=items)
