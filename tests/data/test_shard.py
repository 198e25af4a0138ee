"""Shares of a list, for processes that know nothing of each other."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest

from medgen.data import group_batches, parse_shard, pending_groups, shard_line, shard_of
from medgen.errors import UserError


@pytest.mark.parametrize("shard", [None, "null", "none", "None", ""])
def test_no_shard_is_all(shard):
    assert parse_shard(shard) is None
    assert shard_of("abc", shard) == ["a", "b", "c"]


@pytest.mark.parametrize(("shard", "found"), [("0/1", (0, 1)), ("3/4", (3, 4)), ("007/100", (7, 100))])
def test_shard_is_its_index_and_their_number(shard, found):
    assert parse_shard(shard) == found


@pytest.mark.parametrize(
    "shard", ["4/4", "0/0", "-1/4", "1", "1/", "/4", "1/4/2", "1 /4", "a/b", "1/4\n", "١/٤", 0.25, 1, True, (1, 4)]
)
def test_what_is_no_shard_is_refused_in_one_line(shard):
    with pytest.raises(UserError, match=r"shard must be i/n with i from 0 to n - 1, .* got .*; set --shard") as caught:
        parse_shard(shard)
    assert "\n" not in str(caught.value).replace(repr(shard), "")


def test_shards_share_all_items_between_them_in_whole_groups():
    for length, size, count in itertools.product((0, 1, 5, 12, 13), (1, 3, 20), (1, 2, 5, 30)):
        items = list(range(length))
        parts = [shard_of(items, f"{index}/{count}", size) for index in range(count)]
        assert sorted(itertools.chain(*parts)) == items
        assert all(part == sorted(part) for part in parts)
        groups = [items[start : start + size] for start in range(0, length, size)]
        cut = [part[start : start + size] for part in parts for start in range(0, len(part), size)]
        assert sorted(cut) == groups
        assert max(len(part) for part in parts) - min(len(part) for part in parts) <= size


def test_neighbours_go_to_different_shards():
    assert shard_of(range(9), "1/3", 2) == [2, 3, 8]


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "2"])
def test_groups_have_at_least_one_item(size):
    with pytest.raises(UserError, match="batch_size must be a whole number of at least 1, got"):
        shard_of([1], None, size)


def test_batches_of_shards_are_those_of_one_process_where_images_drop_out():
    listed = [{"image": f"{number}.png"} for number in range(11)]
    readable = [item for number, item in enumerate(listed) if number not in (1, 6, 7, 8)]

    def batches(items):
        pending = pending_groups(items, lambda item: item["image"] == "9.png", 3, True, listed)
        return [[pending[place]["image"] for place in batch] for batch in group_batches(pending, listed, 3)]

    whole = batches(readable)
    assert whole == [["0.png", "2.png"], ["3.png", "4.png", "5.png"], ["9.png", "10.png"]]
    parts = [shard_of(listed, f"{index}/2", 3) for index in range(2)]
    of_shards = [batch for part in parts for batch in batches([item for item in part if item in readable])]
    assert Counter(map(tuple, of_shards)) == Counter(map(tuple, whole))


def test_line_says_how_many_and_what_comes_next():
    line = shard_line("2/8", [], range(5), "/outputs/x")
    assert line.startswith("shard 2/8: 0 of 5 items are done in /outputs/x; when all shards are,")
    assert "--resume true" in line


def test_sharded_stages_of_a_cluster_go_on_with_what_shards_have_done():
    root = Path(__file__).parents[2]
    stages = {}
    for path in sorted((root / "cluster" / "args").glob("*.json")):
        arguments = json.loads(path.read_text())
        files = arguments["config_file"]
        for file in [files] if isinstance(files, str) else files:
            config = json.loads((root / "bundles" / path.name.split(".")[0] / file).read_text())
            if {"shard", "resume"} <= config.keys():  # a study always goes on
                stages[path.stem] = arguments.get("resume")
    assert "stylegan2_anomaly.score" in stages
    assert set(stages.values()) == {True}, stages
