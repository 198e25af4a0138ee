"""Items that must have a mask."""

from __future__ import annotations

import pytest

from medgen.data import load_masked, write_datalist
from medgen.errors import UserError


@pytest.fixture
def datalist(tmp_path):
    for name in ("a", "b", "a_mask"):
        (tmp_path / f"{name}.png").touch()
    with_mask = {"image": "a.png", "patient": "a", "mask": "a_mask.png"}
    without = {"image": "b.png", "patient": "b"}
    write_datalist(tmp_path / "datalist.json", "two", "X-ray", {"training": [with_mask], "test": [without]})
    return tmp_path / "datalist.json"


def test_items_come_with_full_paths(datalist, tmp_path):
    (item,) = load_masked(datalist, "training")
    assert (item["image"], item["mask"]) == (str(tmp_path / "a.png"), str(tmp_path / "a_mask.png"))


def test_item_without_a_mask_is_named_with_the_command_that_gives_it_one(datalist):
    with pytest.raises(UserError, match=r"1 of 1 items of split test have no mask.*b\.png.*preprocessing\.masks"):
        load_masked(datalist, "test")
