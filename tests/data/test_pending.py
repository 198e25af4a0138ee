"""Which items are left to do."""

from __future__ import annotations

import pytest

from medgen.data import pending_groups
from medgen.errors import UserError

ITEMS = [{"image": f"{n}.png"} for n in range(7)]


def numbers(finished: set[int], group_size: int = 3, resume: bool = True) -> list[int]:
    left = pending_groups(ITEMS, lambda item: int(item["image"][0]) in finished, group_size, resume)
    return [int(item["image"][0]) for item in left]


@pytest.mark.parametrize(
    ("finished", "left"),
    [
        (set(), [0, 1, 2, 3, 4, 5, 6]),
        ({0, 1, 2}, [3, 4, 5, 6]),
        ({0, 1}, [0, 1, 2, 3, 4, 5, 6]),
        ({0, 1, 2, 4}, [3, 4, 5, 6]),
        ({3, 4, 5}, [0, 1, 2, 6]),
        ({6}, [0, 1, 2, 3, 4, 5]),
        (set(range(7)), []),
    ],
)
def test_groups_with_anything_to_do_are_done_wholly(finished, left):
    assert numbers(finished) == left


def test_batches_of_what_is_left_are_the_groups_of_the_whole():
    left = numbers({3, 4, 5})
    assert [left[start : start + 3] for start in range(0, len(left), 3)] == [[0, 1, 2], [6]]


def test_results_of_an_earlier_run_are_not_overwritten_unasked():
    with pytest.raises(UserError, match=r"2 of 7 results .*--resume true, or choose another --output_dir"):
        numbers({0, 4}, resume=False)
    assert numbers(set(), resume=False) == list(range(7))


def test_group_of_nothing_is_refused():
    with pytest.raises(UserError, match="batch_size must be a whole number of at least 1, got 0"):
        numbers(set(), group_size=0)


def test_a_merge_is_told_of_what_is_missing_and_a_shard_is_not(caplog):
    pending_groups(ITEMS, lambda item: False, 3, resume=True)
    pending_groups(ITEMS, lambda item: item is ITEMS[0], 3, resume=True, shard="0/2")
    assert caplog.text == ""
    pending_groups(ITEMS, lambda item: item is ITEMS[0], 3, resume=True)
    assert "6 of 7 items are missing; this process does them now" in caplog.text
